"""The few-step rollout, written once: sampling exhausts it, D-OPSD trains at each visit, previews
decode its end."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dopsd.diffusion.batch import Context
from dopsd.diffusion.flow import Rng, Schedule, Step, step

Velocity = Callable[
    [Tensor, Tensor, Context], Tensor
]  # (z [B, C, h, w], t [B], context) -> [B, C, h, w] float32


@dataclass(frozen=True)
class RolloutStep:
    """A state of the walk: z before the step, the velocity there (with its graph, if any), and the
    detached next z."""

    step: Step
    z: Tensor
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
    """Walk unit noise [B, C, h, w] (float32) down the schedule. The next state is always detached:
    no graph spans two steps, so whoever runs backward at each visit keeps one forward's activations
    alive, not all of them. rng: what steps that renoise draw from, or says it of each. graph_at:
    the steps whose velocity gets a graph at all; default: every one."""
    z = schedule.start * noise
    for s in schedule.steps():
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and (graph_at is None or s.index in graph_at)
        ):
            u = velocity(z, s.now.expand(len(z)).to(z.device), context)
        z_next = step(z, u.detach(), s, rng(s) if callable(rng) else rng)
        yield RolloutStep(s, z, u, z_next)
        z = z_next


@torch.no_grad()
def sample(
    velocity: Velocity, noise: Tensor, schedule: Schedule, context: Context, rng: Rng | None = None
) -> Tensor:
    """The clean latents at the end of the walk from unit noise."""
    z = noise
    for state in rollout(velocity, noise, schedule, context, rng):
        z = state.z_next
    return z
