"""From noise to images, through the same `rollout` that training uses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity, sample
from dopsd.images import as_bytes

# Limits of one network call: activations take up to a gigabyte for an image of 1024 x 1024
MAX_PIXELS, MAX_IMAGES = 1024 * 1024, 16


@dataclass(frozen=True)
class Noise:
    """All random numbers of some samples: unit noise to start from, then fresh noise for steps that
    re-noise. One seed for each image; latent_shape: (channels, height, width).

    It is the noise that diffusers draws for one image with
    `generator=torch.Generator().manual_seed(seed)`, whatever else is in the batch.
    """

    seeds: tuple[int, ...]
    latent_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice) -> "Noise":
        return Noise(self.seeds[rows], self.latent_shape)

    def draw(self) -> tuple[Tensor, list[torch.Generator]]:
        """Start noise, float32 [B, C, h, w] on the CPU, and for each row the generator that the
        rollout goes on drawing from."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        rows = [torch.randn(1, *self.latent_shape, generator=each) for each in generators]
        return torch.cat(rows), generators

    @property
    def start(self) -> Tensor:
        """Start noise alone, float32 [B, C, h, w] on the CPU."""
        return self.draw()[0]


def noise_for(seeds: Sequence[int], channels: int, height: int, width: int) -> Noise:
    """One image for each seed; height and width of the latents."""
    return Noise(tuple(seeds), (channels, height, width))


@torch.no_grad()
def generate(
    velocity: Velocity, vae: VAE, schedule: Schedule, context: Context, noise: Noise
) -> Tensor:
    """Images, uint8 [B, H, W, 3] on the CPU; row i of `context` and of `noise` give image i."""
    parts = sample_in_chunks(velocity, schedule, context, noise, vae.vae_scale_factor)
    return torch.cat([decode_images(vae, clean) for clean in parts])


@torch.no_grad()
def sample_in_chunks(
    velocity: Velocity, schedule: Schedule, context: Context, noise: Noise, vae_scale_factor: int
) -> Iterator[Tensor]:
    """Clean latents [b, C, h, w] of a few images at a time, on the context's device."""
    height, width = noise.latent_shape[1:]
    count = min(MAX_IMAGES, max(1, MAX_PIXELS // (height * width * vae_scale_factor**2)))
    for start in range(0, len(noise), count):
        indices = range(start, min(start + count, len(noise)))
        rows = Context.stack([context.row(index) for index in indices])
        z, generators = noise[start : start + count].draw()
        yield sample(velocity, z.to(rows.tokens.device), schedule, rows, generators)


@torch.no_grad()
def decode_images(vae: VAE, clean: Tensor) -> Tensor:
    """Clean latents [B, C, h, w] -> images uint8 [B, H, W, 3] on the CPU, rounded as in diffusers'
    VaeImageProcessor."""
    return as_bytes(vae.pixels(clean) / 2 + 0.5)
