"""Judges: what says how good an image is for its prompt. A short name, or any callable by its
dotted name.

A reward is `(images [B, 3, H, W] float in [0, 1], prompts) -> [B]`, higher is better, NaN where it
cannot say.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dopsd.evaluation.metrics import Found, find_metric

Reward = Callable[[Tensor, Sequence[str]], Tensor]


def find_reward(name: str) -> Found:
    """What a reward's name leads to (see `find_measure`), before a weight is loaded. Raises
    ValueError for a measure that needs more than an image and its prompt."""
    found = find_metric(name)
    if found.metric.needs != "prompt":
        raise ValueError(
            f"{found.short} compares with {found.metric.needs} pictures: it is a measure, and no judge."
        )
    return found


def load_reward(name: str, device: torch.device) -> Reward:
    """The reward of a name, its model on the device. What it answers is checked: a floating tensor
    of one number a image; it comes back as float32 on the images' device, NaN where it is not
    finite: the caller drops it."""
    found = find_reward(name)
    if found.model:
        raw = found.made(found.model, device)
    else:
        raw = found.made() if isinstance(found.made, type) else found.made

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        try:
            answer = raw(images, prompts)
        except Exception as error:  # of whatever the user's code may raise
            raise ValueError(
                f"the judge {name} failed on {len(images)} pictures ({type(error).__name__}: {error}): it is called "
                "with pictures [B, 3, H, W] in [0, 1] and a list of B prompts."
            ) from error
        if not (
            isinstance(answer, Tensor)
            and answer.is_floating_point()
            and answer.shape == (len(images),)
        ):
            what = (
                f"{answer.dtype} {list(answer.shape)}"
                if isinstance(answer, Tensor)
                else type(answer).__name__
            )
            raise ValueError(
                f"the judge {name} answered {what} to {len(images)} pictures: it must answer a floating tensor "
                f"[{len(images)}], one number a picture."
            )
        scores = answer.to(images.device, torch.float32)
        return torch.where(scores.isfinite(), scores, torch.nan)

    return reward
