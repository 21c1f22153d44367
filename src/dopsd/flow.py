"""The one clock. Every family lives on the straight path z = (1-t) clean + t noise; pure tensors, no model.

t         time in [0, 1], 1 = noise
velocity  u = noise - clean, what every denoiser answers
z'        = (1-t') clean + t' (sqrt(1-r^2) noise + r fresh), one step of any few-step sampler:
            r = 0 flow Euler, r = 1 re-noising (LCM, DMD2), between: ancestral and CPS samplers
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Space = Literal["velocity", "clean", "noise"]


@dataclass(frozen=True)
class Step:
    """One step of a sampler: from time `now` to `after`, both float32 0-d, with renoise share r in [0, 1]."""

    index: int
    now: Tensor
    after: Tensor
    renoise: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """A sampler's times, float32 [N+1], strictly falling from `times[0]` to 0, and its renoise share per step."""

    times: Tensor
    renoise: tuple[float, ...]

    @property
    def nfe(self) -> int:
        """Network forwards of one walk."""
        return len(self.renoise)

    def steps(self) -> Iterator[Step]:
        """The steps in order."""
        for index, r in enumerate(self.renoise):
            yield Step(index, self.times[index], self.times[index + 1], r)


def per_row(t: Tensor, like: Tensor) -> Tensor:
    """t: [B] or 0-d, shaped to broadcast over `like` [B, ...]."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def noisy(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The state at time t: [B] or 0-d, between clean and noise [B, C, h, w]."""
    return torch.lerp(clean, noise, per_row(t, clean).to(clean))


def clean_of(z: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Where the velocity says the picture is."""
    return z - per_row(t, z) * velocity


def noise_of(z: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Where the velocity says the noise is."""
    return z + (1 - per_row(t, z)) * velocity


def step(z: Tensor, velocity: Tensor, s: Step, rng: torch.Generator | None = None) -> Tensor:
    """The next state of a walk. `rng` is needed where the step renoises.

    The Euler case is written as the schedulers write it, z + (t' - t) u: the same number up to rounding, and then
    bit-equal to diffusers' FlowMatchEulerDiscreteScheduler.
    """
    if s.renoise == 0:
        return z + (s.after - s.now) * velocity
    clean, noise = clean_of(z, velocity, s.now), noise_of(z, velocity, s.now)
    fresh = torch.randn(z.shape, generator=rng, device=z.device, dtype=z.dtype)
    return (1 - s.after) * clean + s.after * (math.sqrt(1 - s.renoise**2) * noise + s.renoise * fresh)


def loss_weight(t: Tensor, space: Space) -> Tensor:
    """What a squared velocity error is multiplied by to be a squared error in `space`, at the same state."""
    if space == "clean":
        return t**2
    if space == "noise":
        return (1 - t) ** 2
    return torch.ones_like(t)
