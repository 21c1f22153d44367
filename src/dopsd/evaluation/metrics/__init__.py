"""What is measured of images, by name: one file a model or a formula, imported when it is asked
for.

Images come as float tensors in [0, 1]; nothing here knows which model generated them.
"""

import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal

from dopsd.files import shorten
from dopsd.models.hub import Checkpoint

HERE = "dopsd.evaluation.metrics"


@dataclass(frozen=True)
class Metric:
    """made: package.module:attribute; made(model, device), where there is a model, is what
    measures.

    model: the hub id where none is named; "" = one must be named; None = pixels are enough. needs:
    what it looks at beside the images: their prompts, the target image of a prompt, or a whole set
    of images. higher: is better. skips: the kind of test prompts that it says nothing of
    (protocol/questions.py).
    """

    made: str
    model: str | None = None
    needs: Literal["prompt", "target", "set"] = "prompt"
    higher: bool = True
    skips: str = ""


METRICS = {
    "red": Metric(f"{HERE}.pixels:red"),
    "bright": Metric(f"{HERE}.pixels:bright"),
    "attributes": Metric("dopsd.pocket.metrics.reward:attributes"),
    "clip": Metric(f"{HERE}.clip:ClipScore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "pickscore": Metric(f"{HERE}.clip:PickScore", "yuvalkirstain/PickScore_v1"),
    "aesthetic": Metric(f"{HERE}.clip:Aesthetic", ""),
    "dino": Metric(
        f"{HERE}.dino:DinoDistance",
        "facebook/dinov3-vits16plus-pretrain-lvd1689m",
        "target",
        False,
        "scene",
    ),
    "lpips": Metric(f"{HERE}.lpips:Lpips", "", "target", False, "scene"),
    "vlm_object": Metric(
        f"{HERE}.vlm:ObjectReward", "Qwen/Qwen3-VL-8B-Instruct", "target", skips="rewrite"
    ),
    "vlm_style": Metric(
        f"{HERE}.vlm:StyleReward", "Qwen/Qwen3-VL-8B-Instruct", "target", skips="rewrite"
    ),
    "fid": Metric(f"{HERE}.inception:Inception", "", "set", False),
    "kid": Metric(f"{HERE}.inception:Inception", "", "set", False),
}


@dataclass(frozen=True)
class Found:
    """What a measure's name leads to. short: without its model; model: hub id or folder of what
    `made` is made with; "": `made` measures itself."""

    name: str
    short: str
    made: Any
    model: str
    metric: Metric


def find_metric(name: str) -> Found:
    """What a name leads to, before a weight is loaded: `red`, `pickscore`, `pickscore=<hub id or
    folder>`, or `package.module:attribute` of a reward. Raises ValueError where there is none, or
    its model is not there."""
    short, model, metric = named_metric(name)
    if model:
        Checkpoint(model, called=f"the model of {short}, {model},")
    elif metric.model is not None:
        raise ValueError(
            f"{short} has no usual model: name a folder, {short}=<folder> (docs/metrics.md says what in it)."
        )
    return Found(name, short, load_attribute(metric.made), model, metric)


def named_metric(name: str) -> tuple[str, str, Metric]:
    """(short name, model, measure) of a name, without a look at whether model or module is there.
    Raises ValueError for a name that is none."""
    short, _, model = name.partition("=")
    if ":" in short:
        return short, "", Metric(short)
    if short not in METRICS:
        like = "".join(f" Did you mean {word}?" for word in get_close_matches(short, METRICS, n=1))
        raise ValueError(
            f"{shorten(name)} is no measure: give {', '.join(METRICS)}, or package.module:attribute.{like}"
        )
    metric = METRICS[short]
    if metric.model is None and model:
        raise ValueError(f"{short} takes no model: it looks at pixels alone.")
    return short, model or metric.model or "", metric


def load_attribute(dotted: str) -> Any:
    """What `package.module:attribute` names."""
    module, _, attribute = dotted.partition(":")
    try:
        if "" not in sys.path:
            sys.path.insert(0, "")  # a module in the working directory is found, as by `python -m`
        found = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ValueError(
            f"{dotted} cannot be imported ({type(error).__name__}: {error})."
        ) from error
    if not callable(found):
        raise ValueError(f"{dotted} is a {type(found).__name__}, which cannot be called.")
    return found
