"""Judges that need no model: what an image's pixels say by themselves. For tests, and for trying a
method out."""

from collections.abc import Sequence

from torch import Tensor


def red(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How red images [B, 3, H, W] in [0, 1] are, [B] in [-1, 1]: the mean of red less the mean of
    the other two, so that white and grey are 0."""
    means = images.mean((2, 3))
    return means[:, 0] - means[:, 1:].mean(1)


def bright(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The mean of all pixels, [B] in [0, 1]."""
    return images.mean((1, 2, 3))
