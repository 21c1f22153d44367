"""From noise to images, through the same `rollout` that training walks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity, sample
from dopsd.images import as_bytes

# What a network gets in one call: its activations take up to a gigabyte an image of 1024 x 1024.
PIXELS_AT_ONCE, MOST_AT_ONCE = 1024 * 1024, 16


@dataclass(frozen=True)
class Noise:
    """What walks draw, by one seed an image and a latent size (channels, height, width): noise to
    start from, then fresh noise at the steps that renoise. It is what diffusers draws for an image
    with `generator=torch.Generator().manual_seed(seed)`, whatever else is in the batch."""

    seeds: tuple[int, ...]
    latent_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice) -> "Noise":
        return Noise(self.seeds[rows], self.latent_shape)

    def draw(self) -> tuple[Tensor, list[torch.Generator]]:
        """The starts, float32 [B, C, h, w], and the generators that the walks go on drawing from."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return torch.cat(
            [torch.randn(1, *self.latent_shape, generator=each) for each in generators]
        ), generators

    @property
    def start(self) -> Tensor:
        """The starts alone."""
        return self.draw()[0]


def noise_for(seeds: Sequence[int], channels: int, height: int, width: int) -> Noise:
    """The noise of an image for each seed, of a size in latent cells."""
    return Noise(tuple(seeds), (channels, height, width))


@torch.no_grad()
def generate(
    velocity: Velocity, vae: VAE, schedule: Schedule, context: Context, noise: Noise
) -> Tensor:
    """Images, uint8 [B, H, W, 3] on the CPU, from the noise and contexts of each."""
    parts = sample_in_chunks(velocity, schedule, context, noise, vae.vae_scale_factor)
    return torch.cat([decode_images(vae, clean) for clean in parts])


@torch.no_grad()
def sample_in_chunks(
    velocity: Velocity, schedule: Schedule, context: Context, noise: Noise, vae_scale_factor: int
) -> Iterator[Tensor]:
    """The clean latents of some images after the other, on the context's device. cell: pixels along
    its side."""
    height, width = noise.latent_shape[1:]
    at_once = min(MOST_AT_ONCE, max(1, PIXELS_AT_ONCE // (height * width * vae_scale_factor**2)))
    for start in range(0, len(noise), at_once):
        rows = Context.stack(
            [context.row(i) for i in range(start, min(start + at_once, len(noise)))]
        )
        z, generators = noise[start : start + at_once].draw()
        yield sample(velocity, z.to(rows.tokens.device), schedule, rows, generators)


@torch.no_grad()
def decode_images(vae: VAE, clean: Tensor) -> Tensor:
    """Clean latents [B, C, h, w] as uint8 [B, H, W, 3] on the CPU, rounded as diffusers'
    VaeImageProcessor does."""
    return as_bytes(vae.pixels(clean) / 2 + 0.5)
