"""DINO-D: how far the thing in an image is from the thing in another, by the patches of a DINOv2 or
DINOv3."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoModel

from dopsd.models.hub import Checkpoint

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet's, of all DINO checkpoints but those for satellites
KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")


class DinoDistance:
    """1 - cosine of mean patch tokens (after the last norm), in [0, 2], as D-OPSD's evaluation has
    it; both images at their own size, sides scaled to multiples of a patch."""

    def __init__(self, model: str, device: torch.device):
        checkpoint = Checkpoint(model, called=f"the model of dino, {model},")
        part = checkpoint.part()
        with checkpoint.reading("the model"):
            self.model = AutoModel.from_pretrained(part, dtype=torch.float32).to(device).eval()
        if self.model.config.model_type not in KINDS:
            raise ValueError(
                f"{model} is a {self.model.config.model_type}; dino needs one of {', '.join(KINDS)}."
            )
        self.patch = self.model.config.patch_size
        self.mean, self.std = (
            torch.tensor(each, device=device)[:, None, None] for each in (MEAN, STD)
        )

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """images [B, 3, H, W] and one target [3, h, w] in [0, 1] -> [B]."""
        return 1 - (self._look(images) * self._look(target[None])).sum(1)

    @torch.no_grad()
    def _look(self, images: Tensor) -> Tensor:
        """Mean patch tokens [B, D] of length 1."""
        rows, columns = (max(1, side // self.patch) for side in images.shape[2:])
        size = (rows * self.patch, columns * self.patch)
        if tuple(images.shape[2:]) != size:
            images = interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (images.float().to(self.mean.device) - self.mean) / self.std
        tokens = self.model(pixel_values=pixels).last_hidden_state
        return normalize(
            tokens[:, -rows * columns :].mean(1)
        )  # class and register tokens stand before the patches
