"""Judges: what says how good a picture is for its prompt. A short name, or any callable by its dotted name.

A judge is `(pictures [B, 3, H, W] float in [0, 1], prompts) -> [B]`, higher is better, NaN where it cannot say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dopsd.families.checkpoint import Checkpoint
from dopsd.files import brief

Judge = Callable[[Tensor, Sequence[str]], Tensor]

# By pixels alone; the last reads the pocket world's pictures and captions.
PIXELS = {
    "red": "dopsd.evaluation.measures.pixels:red",
    "bright": "dopsd.evaluation.measures.pixels:bright",
    "attributes": "dopsd.pocket.judge:attributes",
}
# By a model: (what is made of it, the hub id where none is named, "" = a folder must be).
MODELS = {
    "clip": ("dopsd.evaluation.measures.clip:ClipScore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "pickscore": ("dopsd.evaluation.measures.clip:PickScore", "yuvalkirstain/PickScore_v1"),
    "aesthetic": ("dopsd.evaluation.measures.clip:Aesthetic", ""),
}


@dataclass(frozen=True)
class Found:
    """What a judge's name leads to. model: hub id or folder of what `made` is made with; "": `made` judges itself."""

    name: str
    made: Any
    model: str


def find_judge(name: str) -> Found:
    """What a name leads to, before a weight is loaded: `red`, `pickscore`, `pickscore=<hub id or folder>`, or
    `package.module:attribute`. Raises ValueError where there is no such judge, or its model is not there."""
    short, _, model = name.partition("=")
    if ":" in short:
        return Found(name, _attribute(short), "")
    if short in PIXELS and not model:
        return Found(name, _attribute(PIXELS[short]), "")
    if short not in MODELS:
        known = [*PIXELS, *MODELS]
        like = "".join(f" Did you mean {word}?" for word in get_close_matches(short, known, n=1))
        what = f"{short} takes no model" if short in PIXELS else f"{brief(name)} is no judge"
        raise ValueError(f"{what}: give {', '.join(known)}, or package.module:attribute.{like}")
    made, usual = MODELS[short]
    if not (model or usual):
        raise ValueError(
            f"{short} has no usual model: name a folder, {short}=<folder> (docs/measures.md says what in it)."
        )
    Checkpoint(model or usual, called=f"the judge {name}")
    return Found(name, _attribute(made), model or usual)


def load_judge(name: str, device: torch.device) -> Judge:
    """The judge of a name (see `find_judge`), its model on the device. What it answers is checked: a floating tensor of
    one number a picture; it comes back as float32 on the pictures' device. NaN stays NaN: the caller drops it."""
    found = find_judge(name)
    if found.model:
        raw = found.made(found.model, device)
    else:
        raw = found.made() if isinstance(found.made, type) else found.made

    @torch.no_grad()
    def judge(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        answer = raw(pictures, prompts)
        what = f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        if not (isinstance(answer, Tensor) and answer.is_floating_point() and answer.shape == (len(pictures),)):
            raise ValueError(
                f"the judge {name} answered {what} to {len(pictures)} pictures: it must answer a floating tensor "
                f"[{len(pictures)}], one number a picture."
            )
        return answer.to(pictures.device, torch.float32)

    return judge


def _attribute(dotted: str) -> Any:
    """What `package.module:attribute` names."""
    module, _, attribute = dotted.partition(":")
    try:
        found = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ValueError(f"the judge {dotted} cannot be imported ({type(error).__name__}: {error}).") from error
    if not callable(found):
        raise ValueError(f"the judge {dotted} is a {type(found).__name__}, which cannot be called.")
    return found
