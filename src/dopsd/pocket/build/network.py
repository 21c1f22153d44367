"""Transformer and VLM on stacked tensors, for training the pocket model."""

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3VLModel

from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build.corpus import SEED
from dopsd.pocket.build.encoder import StackedEncoder
from dopsd.pocket.build.transformer import rotary_positions, velocity_and_gaze

PAD_ID = 0  # <|endoftext|>, the first special token


class Network(nn.Module):
    """Transformer and VLM, for batches whose prompts all have the same padded length."""

    def __init__(self, transformer: ZImageTransformer2DModel, vlm: Qwen3VLModel):
        super().__init__()
        self.transformer, self.vlm = transformer, vlm
        self.encoder = StackedEncoder(vlm)
        self.velocity_and_gaze = velocity_and_gaze
        self._positions: dict[int, tuple[Tensor, Tensor]] = {}

    def plain(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 32] -> (context [B, 32, 128], its mask)."""
        return self.encoder.plain(ids), ids != PAD_ID

    def privileged(self, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] and images uint8 [B, 64, 64, 3] -> (context [B, L, 128], its mask)."""
        return self.encoder.privileged(ids, images), ids != PAD_ID

    def forward(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """z [B, 8, 16, 16], t [B] (1 = noise) -> velocity (noise - clean), same shape as z."""
        return self.gazing(z, t, context, mask, guided=False)[0]

    def gazing(
        self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor, guided: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The velocity, and the guided heads' cross-entropy (see `velocity_and_gaze`)."""
        positions = self.positions(context.shape[1])
        velocity, gaze = self.velocity_and_gaze(
            self.transformer, z, 1 - t, context, mask, positions, guided
        )
        return -velocity, gaze

    def positions(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary positions of an image beside a context of this length."""
        if length not in self._positions:
            side = parts.IMAGE // 8  # image tokens: 2 x 2 latent cells of 4 x 4 pixels
            self._positions[length] = rotary_positions(self.transformer, length, side, side)
        return self._positions[length]


def fresh_network(compiled: bool, tower: parts.VisionTower = parts.TOWER) -> Network:
    """An untrained, seeded network. compiled: run the transformer through torch.compile, which
    needs a C++ compiler."""
    torch.manual_seed(SEED)
    network = Network(parts.make_transformer(), parts.make_vlm(parts.make_tokenizer(), tower))
    if compiled:
        network.velocity_and_gaze = torch.compile(velocity_and_gaze, dynamic=False)
    return network
