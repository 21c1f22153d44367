"""KL autoencoders: pixels to latents and back."""

from functools import cached_property
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor

from dopsd.models.base import fingerprint_of
from dopsd.models.hub import Checkpoint, variant_of

# What the autoencoder gets in one call: 2.8 GiB of activations in float32.
PIXELS_AT_ONCE = 1024 * 1024
TILE = 512  # side of a tile in pixels, where images are decoded in tiles

Autoencoder = TypeVar("Autoencoder", AutoencoderKL, AutoencoderKLFlux2)


def load_autoencoder(
    kind: type[Autoencoder], checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> Autoencoder:
    """The checkpoint's `vae` with its weights, on the device."""
    part = checkpoint.part("vae")
    with checkpoint.reading("vae"):
        return kind.from_pretrained(part, torch_dtype=dtype, variant=variant_of(part)).to(device)


def empty_autoencoder(kind: type[Autoencoder], checkpoint: Checkpoint) -> Autoencoder:
    """The checkpoint's `vae` from its config, without weights."""
    with checkpoint.reading("vae"):
        return kind.from_config(kind.load_config(checkpoint.folder / "vae"))  # type: ignore[return-value]


class KLVAE:
    """An autoencoder with its scale and shift applied. Encodes to the mode and without tiles, so
    that an image has one latent."""

    def __init__(self, autoencoder: AutoencoderKL | AutoencoderKLFlux2, tiled: bool = False):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.tiled = tiled
        shift, scale = (
            autoencoder.config.get("shift_factor"),
            autoencoder.config.get("scaling_factor"),
        )
        self.shift, self.scale = shift or 0.0, scale or 1.0
        self.vae_scale_factor = self._side = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        if tiled:
            side = min(TILE, autoencoder.config.sample_size)
            autoencoder.tile_sample_min_size, autoencoder.tile_latent_min_size = (
                side,
                side // self._side,
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights, and of the latents' shift and scale."""
        shift, scale = map(self.autoencoder.config.get, ("shift_factor", "scaling_factor"))
        return f"{fingerprint_of(self.autoencoder)}:{shift}:{scale}"

    def latents(self, pixels: Tensor) -> Tensor:
        at_once = max(1, PIXELS_AT_ONCE // (pixels.shape[-2] * pixels.shape[-1]))
        with torch.no_grad():
            parts = [
                part.to(self.autoencoder.device, self.autoencoder.dtype)
                for part in pixels.split(at_once)
            ]
            mode = torch.cat(
                [self.autoencoder.encode(part).latent_dist.mode().float() for part in parts]
            )
        return (mode - self.shift) * self.scale

    def pixels(self, latents: Tensor) -> Tensor:
        scaled = (
            latents.to(self.autoencoder.device, self.autoencoder.dtype) / self.scale + self.shift
        )
        at_once = max(1, PIXELS_AT_ONCE // (scaled.shape[-2] * scaled.shape[-1] * self._side**2))
        self.autoencoder.use_tiling = self.tiled
        parts = [
            self.autoencoder.decode(part, return_dict=False)[0].float()
            for part in scaled.split(at_once)
        ]
        self.autoencoder.use_tiling = False
        return torch.cat(parts)
