"""What is measured of pictures, by name: one file a model or a formula, imported when it is asked for.

Pictures come as float tensors in [0, 1]; nothing here knows which model painted them.
"""

import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal

from dopsd.files import brief
from dopsd.models.hub import Checkpoint

HERE = "dopsd.evaluation.metrics"


@dataclass(frozen=True)
class Measure:
    """made: package.module:attribute; made(model, device), where there is a model, is what measures.

    model: the hub id where none is named; "" = one must be named; None = pixels are enough. needs: what it looks at
    beside the pictures: their prompts, the target picture of a prompt, or a whole set of pictures. higher: is better.
    skips: the kind of test prompts that it says nothing of (protocol/questions.py).
    """

    made: str
    model: str | None = None
    needs: Literal["prompt", "target", "set"] = "prompt"
    higher: bool = True
    skips: str = ""


MEASURES = {
    "red": Measure(f"{HERE}.pixels:red"),
    "bright": Measure(f"{HERE}.pixels:bright"),
    "attributes": Measure("dopsd.pocket.metrics.reward:attributes"),
    "clip": Measure(f"{HERE}.clip:ClipScore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "pickscore": Measure(f"{HERE}.clip:PickScore", "yuvalkirstain/PickScore_v1"),
    "aesthetic": Measure(f"{HERE}.clip:Aesthetic", ""),
    "dino": Measure(
        f"{HERE}.dino:DinoDistance", "facebook/dinov3-vits16plus-pretrain-lvd1689m", "target", False, "scene"
    ),
    "lpips": Measure(f"{HERE}.lpips:Lpips", "", "target", False, "scene"),
    "vlm_object": Measure(f"{HERE}.vlm:ObjectJudge", "Qwen/Qwen3-VL-8B-Instruct", "target", skips="rewrite"),
    "vlm_style": Measure(f"{HERE}.vlm:StyleJudge", "Qwen/Qwen3-VL-8B-Instruct", "target", skips="rewrite"),
    "fid": Measure(f"{HERE}.inception:Inception", "", "set", False),
    "kid": Measure(f"{HERE}.inception:Inception", "", "set", False),
}


@dataclass(frozen=True)
class Found:
    """What a measure's name leads to. short: without its model; model: hub id or folder of what `made` is made with;
    "": `made` measures itself."""

    name: str
    short: str
    made: Any
    model: str
    measure: Measure


def find_measure(name: str) -> Found:
    """What a name leads to, before a weight is loaded: `red`, `pickscore`, `pickscore=<hub id or folder>`, or
    `package.module:attribute` of a judge. Raises ValueError where there is none, or its model is not there."""
    short, model, measure = named_measure(name)
    if model:
        Checkpoint(model, called=f"the model of {short}, {model},")
    elif measure.model is not None:
        raise ValueError(
            f"{short} has no usual model: name a folder, {short}=<folder> (docs/metrics.md says what in it)."
        )
    return Found(name, short, _attribute(measure.made), model, measure)


def named_measure(name: str) -> tuple[str, str, Measure]:
    """(short name, model, measure) of a name, without a look at whether model or module is there. Raises ValueError for
    a name that is none."""
    short, _, model = name.partition("=")
    if ":" in short:
        return short, "", Measure(short)
    if short not in MEASURES:
        like = "".join(f" Did you mean {word}?" for word in get_close_matches(short, MEASURES, n=1))
        raise ValueError(f"{brief(name)} is no measure: give {', '.join(MEASURES)}, or package.module:attribute.{like}")
    measure = MEASURES[short]
    if measure.model is None and model:
        raise ValueError(f"{short} takes no model: it looks at pixels alone.")
    return short, model or measure.model or "", measure


def _attribute(dotted: str) -> Any:
    """What `package.module:attribute` names."""
    module, _, attribute = dotted.partition(":")
    try:
        if "" not in sys.path:
            sys.path.insert(0, "")  # a module in the working directory is found, as by `python -m`
        found = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ValueError(f"{dotted} cannot be imported ({type(error).__name__}: {error}).") from error
    if not callable(found):
        raise ValueError(f"{dotted} is a {type(found).__name__}, which cannot be called.")
    return found
