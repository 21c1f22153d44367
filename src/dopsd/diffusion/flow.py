"""Noise path, times, and the step of a few-step sampler. Tensors only, no model.

Every model family is translated to one straight path z = (1-t) clean + t noise.

t         time in [0, 1]; 1 = noise
velocity  u = noise - clean; what every denoiser predicts
z'        = (1-t') clean + t' (sqrt(1-r^2) noise + r fresh); one step of any few-step sampler:
            r = 0: Euler; r = 1: full re-noising (LCM, DMD2); between: ancestral and CPS samplers
eta       r = sin(eta pi/2), the share of fresh noise as in CPS (arXiv:2509.05952); used in recipes
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Space = Literal["velocity", "clean", "noise"]
# One generator for a whole batch, or one for each of its rows
Rng = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from time `now` to time `after`, both 0-d.

    renoise: r in [0, 1], the share of fresh noise.
    """

    index: int
    now: Tensor
    after: Tensor
    renoise: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Times of a sampler: float32 [N+1], strictly decreasing from `times[0]` to 0.

    renoise: r of each step. start: factor from unit noise to the first state; 1 where the sampler
    starts at t = 1.
    """

    times: Tensor
    renoise: tuple[float, ...]
    start: float = 1.0

    @property
    def nfe(self) -> int:
        """Number of function evaluations: network forwards of one rollout."""
        return len(self.renoise)

    def steps(self) -> Iterator[Step]:
        """The steps in order."""
        for index, r in enumerate(self.renoise):
            yield Step(index, self.times[index], self.times[index + 1], r)

    def stochastic(self, eta: float, indices: Collection[int]) -> "Schedule":
        """The same times with r = sin(eta pi/2) at the steps `indices`; other steps keep their r.

        The last step is not allowed: it ends at t = 0, where no noise is drawn.
        """
        assert self.nfe - 1 not in indices, "the last step has no transition density"
        r = math.sin(eta * math.pi / 2)
        renoise = (r if k in indices else own for k, own in enumerate(self.renoise))
        return replace(self, renoise=tuple(renoise))


def per_row(t: Tensor, like: Tensor) -> Tensor:
    """t: [B] as [B, 1, ...], to broadcast over `like` [B, ...]. A 0-d t stays 0-d: torch lets a 0-d
    CPU tensor meet tensors of any device, so a schedule's times need not be moved to a GPU."""
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (like.ndim - 1))


def noisy(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The state [B, ...] at time t ([B] or 0-d) between clean and noise, [B, ...] each."""
    return torch.lerp(clean, noise, per_row(t, clean).to(clean))


def clean_of(z: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The clean estimate [B, ...] that a velocity implies at z, t."""
    return z - per_row(t, z) * velocity


def noise_of(z: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The noise estimate [B, ...] that a velocity implies at z, t."""
    return z + (1 - per_row(t, z)) * velocity


def noise_like(z: Tensor, rng: Rng) -> Tensor:
    """Unit noise of z's shape and dtype, drawn on the generator's device and moved to z's.

    With one generator per row, the noise of a row does not depend on the rest of the batch.
    """
    if isinstance(rng, torch.Generator):
        return torch.randn(z.shape, generator=rng, device=rng.device, dtype=z.dtype).to(z.device)
    return torch.cat([noise_like(row, own) for row, own in zip(z.split(1), rng, strict=True)])


def step(z: Tensor, velocity: Tensor, s: Step, rng: Rng | None = None) -> Tensor:
    """The sampler's next state [B, ...]. A step that re-noises needs `rng`.

    The Euler case is written as z + (t' - t) u, as schedulers do: equal up to rounding to the
    general formula, and bit-equal to diffusers' FlowMatchEulerDiscreteScheduler.
    """
    if s.renoise == 0:
        return z + (s.after - s.now) * velocity
    clean, noise = clean_of(z, velocity, s.now), noise_of(z, velocity, s.now)
    assert rng is not None, "a step that re-noises needs a generator"
    return (1 - s.after) * clean + s.after * (
        math.sqrt(1 - s.renoise**2) * noise + s.renoise * noise_like(z, rng)
    )


@dataclass(frozen=True)
class Transition:
    """A re-noising step as a Gaussian policy: z' ~ Normal(share z - slope velocity, std^2).

    The log-density ratio of two velocities u_1, u_2 is, per latent element,
    -weight (|u_1 - implied|^2 - |u_2 - implied|^2), where `implied` is the velocity whose mean is
    exactly z'. Fields are float64 0-d, because these are ratios of small numbers.
    """

    std: Tensor
    slope: Tensor
    share: Tensor

    @property
    def weight(self) -> Tensor:
        """slope^2 / (2 std^2)."""
        return self.slope**2 / (2 * self.std**2)

    def implied(self, z: Tensor, z_next: Tensor) -> Tensor:
        """The velocity [B, ...] whose step without fresh noise leads from z to z_next."""
        return ((self.share * z.double() - z_next.double()) / self.slope).to(z)


def transition(s: Step) -> Transition:
    """The density of a step that re-noises. Raises ValueError for a deterministic step."""
    if s.renoise == 0:
        raise ValueError(
            f"step {s.index} draws no noise, so it has no transition density: give it an eta "
            "above 0."
        )
    now, after = s.now.double(), s.after.double()
    old_noise = after * math.sqrt(1 - s.renoise**2)
    return Transition(
        std=after * s.renoise,
        slope=now * (1 - after) - (1 - now) * old_noise,
        share=1 - after + old_noise,
    )


def loss_weight(t: Tensor, space: Space) -> Tensor:
    """Factor [B] from a squared velocity error at time t to the squared error, at the same state,
    of the quantity named by `space`."""
    if space == "clean":
        return t**2
    if space == "noise":
        return (1 - t) ** 2
    return torch.ones_like(t)
