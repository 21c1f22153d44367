"""The reward `attributes`: whether a pocket image shows what its caption states, from pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dopsd.images import as_bytes
from dopsd.pocket.metrics.reader import attributes as read_attributes
from dopsd.pocket.world.captions import stated_in
from dopsd.pocket.world.scenes import SIZE


def attributes(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The share of the attributes stated in each caption that its image shows, [B]; NaN where
    nothing is stated. images: [B, 3, 64, 64] in [0, 1]. Raises ValueError for other sizes."""
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(
            f"the reward attributes reads pocket's images, {SIZE} x {SIZE}, not "
            f"{list(images.shape)}."
        )
    stated = [stated_in(prompt) for prompt in prompts]
    return torch.from_numpy(read_attributes(as_bytes(images).numpy(), stated).per_image)
