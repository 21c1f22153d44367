"""Rewards: scores of images for their prompts, by the name of a metric or of any callable.

A reward maps images [B, 3, H, W] in [0, 1] and B prompts to [B], higher is better, NaN where it
cannot judge.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dopsd.evaluation.metrics import ResolvedMetric, find_metric

Reward = Callable[[Tensor, Sequence[str]], Tensor]


def find_reward(name: str) -> ResolvedMetric:
    """Resolve a reward's name (see `find_metric`) without loading weights. Raises ValueError for a
    metric that needs more than an image and its prompt."""
    resolved = find_metric(name)
    if (needs := resolved.metric.needs) != "prompt":
        raise ValueError(
            f"{resolved.short} needs {needs} images besides the generated ones: it is a metric for "
            "`dopsd evaluate`, and cannot be a reward."
        )
    return resolved


def load_reward(name: str, device: torch.device) -> Reward:
    """The reward of a name, its model on the device. Its answers are checked; they come back as
    float32 on the images' device, NaN where they are not finite."""
    raw = find_reward(name).load(device)

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        try:
            answer = raw(images, prompts)
        except Exception as error:  # the user's code may raise anything
            raise ValueError(
                f"the reward {name} failed on {len(images)} images ({type(error).__name__}: "
                f"{error}): it is called with images [B, 3, H, W] in [0, 1] and B prompts."
            ) from error
        _refuse_unlike(answer, len(images), name)
        scores = answer.to(images.device, torch.float32)
        return torch.where(scores.isfinite(), scores, torch.nan)

    return reward


def _refuse_unlike(answer: object, count: int, name: str) -> None:
    """Raise ValueError for an answer that is not a floating tensor [count]."""
    if not isinstance(answer, Tensor):
        returned = type(answer).__name__
    elif not answer.is_floating_point() or answer.shape != (count,):
        returned = f"{answer.dtype} {list(answer.shape)}"
    else:
        return
    raise ValueError(
        f"the reward {name} returned {returned} for {count} images: it must return a floating "
        f"tensor [{count}], one number an image."
    )
