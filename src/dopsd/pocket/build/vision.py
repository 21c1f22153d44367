"""Training of the VLM's vision tower alone, before the teacher is trained.

Each image token learns to hold the latents of its place and that place itself, which is what the
transformer needs to copy from an image in its context. Without this stage the teacher learned the
same more slowly (docs/experiments.md).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLModel

from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build.corpus import Corpus, rng_at
from dopsd.pocket.build.encoder import StackedEncoder
from dopsd.pocket.build.stages import Stage, optimise, process_rank

ROTARY_FREQUENCIES = 5  # of rows and of columns, in the transformer's rotary positions
ROTARY_THETA = 256.0  # Z-Image's


class TowerWithHeads(nn.Module):
    """The vision tower with linear heads for latents and place, which are not kept."""

    def __init__(self, vlm: Qwen3VLModel):
        super().__init__()
        self.tower, self._encoder = vlm.visual, StackedEncoder(vlm)
        self.latents = nn.Linear(parts.WIDTH, 4 * parts.LATENT_CHANNELS)
        self.place = nn.Linear(parts.WIDTH, 4 * ROTARY_FREQUENCIES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, 64, 64, 3] -> latents [B, 64, 32] and places [B, 64, 20]."""
        tokens, _ = self._encoder.image_tokens(images)
        normed = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + 1e-6)
        return self.latents(normed), self.place(normed)


def place_code(side: int) -> Tensor:
    """[side * side, 20]: cosines and sines of the transformer's rotary angles at each place."""
    rates = ROTARY_THETA ** -(torch.arange(ROTARY_FREQUENCIES) / ROTARY_FREQUENCIES)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * rates, columns.reshape(-1, 1) * rates], dim=1)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def train_tower(folder: Path, language_model: Qwen3VLModel, steps: int, batch: int = 32) -> None:
    """Train a fresh tower; writes `<folder>/vision.safetensors`.

    language_model: the VLM whose text side is kept; its own tower is not used. batch: of each
    process.
    """
    corpus, rank = Corpus.read(folder), process_rank()
    network = TowerWithHeads(vlm_with_new_tower(language_model))
    places = place_code(parts.TOWER.side)

    def loss_at(step: int) -> Tensor:
        rows = torch.from_numpy(
            rng_at("vision", step, rank).integers(0, len(corpus.latents), batch)
        )
        latents, place = network(corpus.images[rows])
        wanted = latents_by_token(corpus.latents[rows].float())
        return F.mse_loss(latents, wanted) + F.mse_loss(place, places.expand(batch, -1, -1))

    optimise(Stage("vision", steps, 3e-3, warm_up=50), folder, {"network": network}, loss_at)


def vlm_with_new_tower(language_model: Qwen3VLModel) -> Qwen3VLModel:
    """The VLM with a fresh, seeded vision tower whose position embeddings start with the places."""
    torch.manual_seed(0)
    vlm = parts.make_vlm(parts.make_tokenizer())
    vlm.language_model.load_state_dict(language_model.language_model.state_dict())
    code = place_code(parts.TOWER.side)
    with torch.no_grad():
        embedding = vlm.visual.pos_embed.weight
        embedding.mul_(0.5)
        embedding[:, : code.shape[1]] += code
    return vlm


def latents_by_token(latents: Tensor) -> Tensor:
    """[B, 8, 16, 16] -> [B, 64, 32]: the 2 x 2 cells of each token, channels last."""
    side = parts.TOWER.side
    cells = latents.reshape(len(latents), parts.LATENT_CHANNELS, side, 2, side, 2)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(len(latents), side * side, -1)
