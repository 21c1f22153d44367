"""Rewards that need no model, for tests and for trying out methods."""

from collections.abc import Sequence

from torch import Tensor


def red(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The mean of red minus the mean of the other two channels, [B] in [-1, 1], of images
    [B, 3, H, W] in [0, 1]; white and grey are 0."""
    means = images.mean((2, 3))
    return means[:, 0] - means[:, 1:].mean(1)


def bright(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The mean of all pixels, [B] in [0, 1]."""
    return images.mean((1, 2, 3))
