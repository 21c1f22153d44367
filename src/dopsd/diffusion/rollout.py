"""The few-step rollout, used by training and sampling alike, and the sample at its end."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dopsd.diffusion.batch import Context
from dopsd.diffusion.flow import Rng, Schedule, Step, step

# (z [B, C, h, w] float32, t [B] in [0, 1], context of B rows) -> velocity, float32, like z
Velocity = Callable[[Tensor, Tensor, Context], Tensor]


@dataclass(frozen=True)
class RolloutStep:
    """One step of a rollout.

    z: [B, C, h, w], the state before the step. t: [B], its time, on z's device. velocity: at z,
    with its graph where one was built. z_next: the state after the step, detached.
    """

    step: Step
    z: Tensor
    t: Tensor
    velocity: Tensor
    z_next: Tensor


def rollout(
    velocity: Velocity,
    noise: Tensor,
    schedule: Schedule,
    context: Context,
    rng: Rng | Callable[[Step], Rng] | None = None,
    graph_at: Container[int] | None = None,
) -> Iterator[RolloutStep]:
    """Run the sampler from unit noise [B, C, h, w] (float32) down the schedule.

    Each state is detached from the previous step, so no graph spans two steps. A caller that runs
    backward at each step has the activations of one forward in memory. rng: for steps that
    re-noise; a function gives one for each step. graph_at: indices of the steps whose velocity gets
    a graph; default: all.
    """
    z, times = schedule.start * noise, schedule.times.to(noise.device)
    for s in schedule.steps():
        t = times[s.index].expand(len(z))
        with_graph = torch.is_grad_enabled() and (graph_at is None or s.index in graph_at)
        with torch.set_grad_enabled(with_graph):
            u = velocity(z, t, context)
        z_next = step(z, u.detach(), s, rng(s) if callable(rng) else rng)
        yield RolloutStep(s, z, t, u, z_next)
        z = z_next


@torch.no_grad()
def sample(
    velocity: Velocity, noise: Tensor, schedule: Schedule, context: Context, rng: Rng | None = None
) -> Tensor:
    """The clean latents [B, C, h, w] at the end of the rollout from unit noise [B, C, h, w]."""
    z = noise
    for state in rollout(velocity, noise, schedule, context, rng):
        z = state.z_next
    return z
