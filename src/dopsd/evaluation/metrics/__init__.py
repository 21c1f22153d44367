"""The registry of metrics: names, what they need, and the code that computes them.

Each file of this package is one model or formula, imported on first use. Images are float tensors
in [0, 1].
"""

import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal

import torch

from dopsd.files import shorten
from dopsd.models.hub import Checkpoint

HERE = "dopsd.evaluation.metrics"


@dataclass(frozen=True)
class Metric:
    """An entry of the registry.

    attribute: `module:attribute` of the scorer; where there is a model, of its factory
    (model, device) -> scorer. model: hub id used by default; "" = one must be named; None = needs
    no model. needs: what it looks at besides the images: their prompts, the target image of each
    prompt, or a whole set of images. higher: whether higher is better. skips: the kind of test
    prompts that it cannot judge (`data/prompts.py`).
    """

    attribute: str
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
class ResolvedMetric:
    """What a metric's name stands for. name: as it was given; short: without its model; model: hub
    id or folder, "" where none is needed; imported: the attribute of `metric`."""

    name: str
    short: str
    model: str
    metric: Metric
    imported: Any

    def load(self, device: torch.device) -> Any:
        """The scorer, its model on the device."""
        if self.model:
            return self.imported(self.model, device)
        return self.imported() if isinstance(self.imported, type) else self.imported


def find_metric(name: str) -> ResolvedMetric:
    """Resolve `red`, `pickscore`, `pickscore=<hub id or folder>`, or `package.module:attribute` of
    a reward, without loading weights. Raises ValueError where there is no such metric or model."""
    short, model, metric = named_metric(name)
    if model:
        Checkpoint(model, called=f"the model of {short}, {model},")
    elif metric.model is not None:
        raise ValueError(
            f"{short} has no default model: name a folder, {short}=<folder> (docs/metrics.md says "
            "what has to be in it)."
        )
    return ResolvedMetric(name, short, model, metric, load_attribute(metric.attribute))


def named_metric(name: str) -> tuple[str, str, Metric]:
    """(short name, model, metric) of a name; whether module and model exist is not checked. Raises
    ValueError for an unknown name."""
    short, _, model = name.partition("=")
    if ":" in short:
        return short, "", Metric(short)
    if short not in METRICS:
        like = "".join(f" Did you mean {word}?" for word in get_close_matches(short, METRICS, n=1))
        raise ValueError(
            f"{shorten(name)} is no metric: give {', '.join(METRICS)}, or "
            f"package.module:attribute.{like}"
        )
    metric = METRICS[short]
    if metric.model is None and model:
        raise ValueError(f"{short} takes no model: it is computed from pixels alone.")
    return short, model or metric.model or "", metric


def load_attribute(dotted: str) -> Any:
    """The callable that `package.module:attribute` names. Raises ValueError where there is none."""
    module, _, attribute = dotted.partition(":")
    try:
        if "" not in sys.path:
            sys.path.insert(0, "")  # modules in the working directory, as with `python -m`
        value = import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ValueError(
            f"{dotted} cannot be imported ({type(error).__name__}: {error})."
        ) from error
    if not callable(value):
        raise ValueError(f"{dotted} is a {type(value).__name__}, which cannot be called.")
    return value
