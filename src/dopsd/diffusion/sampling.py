"""From noise to pictures, through the same `rollout` that training walks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Painter
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity, walk
from dopsd.images import as_bytes

# What a network gets in one call: its activations take up to a gigabyte a picture of 1024 x 1024.
PIXELS_AT_ONCE, MOST_AT_ONCE = 1024 * 1024, 16


@dataclass(frozen=True)
class Noise:
    """What walks draw, by one seed a picture and a latent size (channels, height, width): noise to start from, then
    fresh noise at the steps that renoise. It is what diffusers draws for a picture with
    `generator=torch.Generator().manual_seed(seed)`, whatever else is in the batch."""

    seeds: tuple[int, ...]
    cells: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice) -> "Noise":
        return Noise(self.seeds[rows], self.cells)

    def draw(self) -> tuple[Tensor, list[torch.Generator]]:
        """The starts, float32 [B, C, h, w], and the generators that the walks go on drawing from."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return torch.cat([torch.randn(1, *self.cells, generator=each) for each in generators]), generators

    @property
    def start(self) -> Tensor:
        """The starts alone."""
        return self.draw()[0]


def noise_for(seeds: Sequence[int], channels: int, height: int, width: int) -> Noise:
    """The noise of a picture for each seed, of a size in latent cells."""
    return Noise(tuple(seeds), (channels, height, width))


@torch.no_grad()
def paint(velocity: Velocity, painter: Painter, schedule: Schedule, context: Context, noise: Noise) -> Tensor:
    """Pictures, uint8 [B, H, W, 3] on the CPU, from the noise and contexts of each."""
    parts = walked(velocity, schedule, context, noise, painter.cell)
    return torch.cat([to_pictures(painter, clean) for clean in parts])


@torch.no_grad()
def walked(velocity: Velocity, schedule: Schedule, context: Context, noise: Noise, cell: int) -> Iterator[Tensor]:
    """The clean latents of some pictures after the other, on the context's device. cell: pixels along its side."""
    height, width = noise.cells[1:]
    at_once = min(MOST_AT_ONCE, max(1, PIXELS_AT_ONCE // (height * width * cell**2)))
    for start in range(0, len(noise), at_once):
        rows = Context.stack([context.row(i) for i in range(start, min(start + at_once, len(noise)))])
        z, generators = noise[start : start + at_once].draw()
        yield walk(velocity, z.to(rows.tokens.device), schedule, rows, generators)


@torch.no_grad()
def to_pictures(painter: Painter, clean: Tensor) -> Tensor:
    """Clean latents [B, C, h, w] as uint8 [B, H, W, 3] on the CPU, rounded as diffusers' VaeImageProcessor does."""
    return as_bytes(painter.pixels(clean) / 2 + 0.5)






