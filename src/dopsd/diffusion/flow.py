"""The one clock. Every family lives on the straight path z = (1-t) clean + t noise; pure tensors,
no model.

t         time in [0, 1], 1 = noise
velocity  u = noise - clean, what every denoiser answers
z'        = (1-t') clean + t' (sqrt(1-r^2) noise + r fresh), one step of any few-step sampler:
            r = 0 flow Euler, r = 1 re-noising (LCM, DMD2), between: ancestral and CPS samplers
eta       the same share as an angle, r = sin(eta pi/2), as recipes say it (CPS, arXiv:2509.05952)
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Space = Literal["velocity", "clean", "noise"]
Rng = (
    torch.Generator | Sequence[torch.Generator]
)  # one for a whole batch, or one for each of its rows


@dataclass(frozen=True)
class Step:
    """One step of a sampler: from time `now` to `after`, both float32 0-d, with renoise share r in
    [0, 1]."""

    index: int
    now: Tensor
    after: Tensor
    renoise: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """A sampler's times, float32 [N+1], strictly falling from `times[0]` to 0, and its renoise
    share per step. start: what unit noise is multiplied by to be the first state; 1 where the walk
    starts at t = 1."""

    times: Tensor
    renoise: tuple[float, ...]
    start: float = 1.0

    @property
    def nfe(self) -> int:
        """Network forwards of one walk."""
        return len(self.renoise)

    def steps(self) -> Iterator[Step]:
        """The steps in order."""
        for index, r in enumerate(self.renoise):
            yield Step(index, self.times[index], self.times[index + 1], r)

    def stochastic(self, eta: float, indices: Collection[int]) -> "Schedule":
        """The same times with r = sin(eta pi/2) at the steps `indices`; the others stay. The last
        step ends at t = 0, where there is no noise to draw, and must not be among them."""
        assert self.nfe - 1 not in indices, "the last step has no transition density"
        r = math.sin(eta * math.pi / 2)
        return replace(
            self, renoise=tuple(r if k in indices else own for k, own in enumerate(self.renoise))
        )


def per_row(t: Tensor, like: Tensor) -> Tensor:
    """t: [B] as [B, 1, ...], to broadcast over `like` [B, ...]. A 0-d t stays 0-d: torch lets a 0-d
    CPU tensor meet tensors of any device, so a schedule's times need not be moved to a GPU."""
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (like.ndim - 1))


def noisy(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The state at time t: [B] or 0-d, between clean and noise [B, C, h, w]."""
    return torch.lerp(clean, noise, per_row(t, clean).to(clean))


def clean_of(z: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Where the velocity says the image is."""
    return z - per_row(t, z) * velocity


def noise_of(z: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Where the velocity says the noise is."""
    return z + (1 - per_row(t, z)) * velocity


def noise_like(z: Tensor, rng: Rng) -> Tensor:
    """Unit noise of z's shape and dtype, drawn where the generator lives and moved to z. With a
    generator for each row a row's noise does not depend on what else is in the batch."""
    if isinstance(rng, torch.Generator):
        return torch.randn(z.shape, generator=rng, device=rng.device, dtype=z.dtype).to(z.device)
    return torch.cat([noise_like(row, own) for row, own in zip(z.split(1), rng, strict=True)])


def step(z: Tensor, velocity: Tensor, s: Step, rng: Rng | None = None) -> Tensor:
    """The next state of a walk. `rng` is needed where the step renoises.

    The Euler case is written as the schedulers write it, z + (t' - t) u: the same number up to
    rounding, and then bit-equal to diffusers' FlowMatchEulerDiscreteScheduler.
    """
    if s.renoise == 0:
        return z + (s.after - s.now) * velocity
    clean, noise = clean_of(z, velocity, s.now), noise_of(z, velocity, s.now)
    assert rng is not None, "a step that renoises draws from a generator"
    return (1 - s.after) * clean + s.after * (
        math.sqrt(1 - s.renoise**2) * noise + s.renoise * noise_like(z, rng)
    )


@dataclass(frozen=True)
class Transition:
    """A stochastic step seen as a Gaussian policy: z' ~ Normal(mean, std^2), mean = (1-t'+q) z -
    slope * velocity.

    Its log-density ratio between two velocities is, per element, -weight (|u_1 - implied|^2 - |u_2
    - implied|^2), where `implied` is the velocity whose mean would be exactly z'. Float64 0-d:
    these are ratios of small numbers.
    """

    std: Tensor
    slope: Tensor
    share: Tensor  # 1 - t' + q, what of z survives in the mean

    @property
    def weight(self) -> Tensor:
        """slope^2 / (2 std^2)."""
        return self.slope**2 / (2 * self.std**2)

    def implied(self, z: Tensor, z_next: Tensor) -> Tensor:
        """The velocity that would have led from z straight to z_next."""
        return ((self.share * z.double() - z_next.double()) / self.slope).to(z)


def transition(s: Step) -> Transition:
    """The density of a step that renoises. Raises ValueError for one that does not: a point has no
    density."""
    now, after = s.now.double(), s.after.double()
    std = after * s.renoise
    if s.renoise == 0:
        raise ValueError(
            f"step {s.index} draws no noise, so it has no transition density: give it an eta above 0."
        )
    kept = after * math.sqrt(1 - s.renoise**2)  # q: of the noise that was
    return Transition(std, now * (1 - after) - (1 - now) * kept, 1 - after + kept)


def loss_weight(t: Tensor, space: Space) -> Tensor:
    """What a squared velocity error is multiplied by to be a squared error in `space`, at the same
    state."""
    if space == "clean":
        return t**2
    if space == "noise":
        return (1 - t) ** 2
    return torch.ones_like(t)
