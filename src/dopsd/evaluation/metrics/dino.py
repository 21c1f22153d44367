"""DINO distance between the objects of two images, from the patch tokens of DINOv2 or DINOv3."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoModel

from dopsd.models.hub import Checkpoint

# ImageNet's, used by all DINO checkpoints except those for satellite images.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")


class DinoDistance:
    """1 - cosine of mean patch tokens (after the last norm), in [0, 2], as in D-OPSD's evaluation.
    Both images keep their size, with sides scaled to multiples of a patch."""

    def __init__(self, model: str, device: torch.device):
        checkpoint = Checkpoint(model, called=f"the model of dino, {model},")
        part = checkpoint.part()
        with checkpoint.reading("the model"):
            self.model = AutoModel.from_pretrained(part, dtype=torch.float32).to(device).eval()
        if self.model.config.model_type not in KINDS:
            raise ValueError(
                f"{model} is a {self.model.config.model_type}; dino needs one of "
                f"{', '.join(KINDS)}."
            )
        self.patch = self.model.config.patch_size
        self.mean, self.std = (
            torch.tensor(each, device=device)[:, None, None] for each in (MEAN, STD)
        )

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """images [B, 3, H, W] and one target [3, h, w] in [0, 1] -> [B]."""
        return 1 - (self._embed(images) * self._embed(target[None])).sum(1)

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        """Mean patch tokens [B, D] of norm 1."""
        rows, columns = (max(1, side // self.patch) for side in images.shape[2:])
        size = (rows * self.patch, columns * self.patch)
        if tuple(images.shape[2:]) != size:
            images = interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (images.float().to(self.mean.device) - self.mean) / self.std
        tokens = self.model(pixel_values=pixels).last_hidden_state
        patches = tokens[:, -rows * columns :]  # class and register tokens come first
        return normalize(patches.mean(1))
