"""Retention: beside the loss of any method, the student keeps the base model's velocity near the
base model's own images, on prompts that have nothing to do with the data.

    x = an image of the base model for a prompt c; t ~ uniform; z = (1-t) x + t noise
    loss = the method's + weight w(t) |student(z, t, c) - base(z, t, c)|^2

Prior preservation (`dreambooth`) has the same z and wants noise - x instead: the mean over all
images, which is the velocity of a many-step model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from dopsd.diffusion.batch import Batch, Replay
from dopsd.diffusion.flow import Space, loss_weight, noise_like, noisy
from dopsd.diffusion.rollout import rollout
from dopsd.methods.base import Loss, Method, Roles, mean_error
from dopsd.methods.flow_matching import DrawsTimes, Target


class Retention(BaseModel):
    """What holds the student to the base model where the data says nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: float = Field(default=0.0, ge=0, description="Of its loss; 0: no retention.")
    states: Literal["samples", "walk", "step"] = Field(
        default="samples",
        description="Where the student is held: at the base model's own images, noised; at each "
        "step of the student's rollout (walk); at one random step of it (step).",
    )
    target: Target = Field(
        default="base",
        description="Velocity wanted there: the base model's, or noise - image (data), as in "
        "prior preservation; data needs states: samples.",
    )
    space: Space = Field(
        default="velocity", description="Where the error is measured: velocity, clean or noise."
    )
    per_step: int = Field(
        default=1, ge=1, description="Replayed prompts in each optimizer step, whatever its size."
    )

    @model_validator(mode="after")
    def _the_data_target_needs_images(self) -> Self:
        if self.target == "data" and self.states != "samples":
            raise ValueError(
                "target: data needs states: samples, for a state of a rollout has no image"
            )
        return self

    def forwards(self, nfe: int) -> float:
        """Network forwards of one replayed prompt, a backward counted as two. Where the rollout
        ends at a random step, the mean over the steps."""
        if self.states == "samples":
            return 4 if self.target == "base" else 3
        if self.states == "walk":
            return 4 * nfe
        return (nfe - 1) / 2 + 4

    def losses(
        self, roles: Roles, replay: Replay, like: Tensor, nfe: int | None, rng: torch.Generator
    ) -> Iterator[Loss]:
        """The pieces of the loss on R replayed prompts. A rollout has latents [R, C, h, w] of the
        size of `like` [B, C, h, w], and nfe steps; None: the model's own."""
        if self.states == "samples":
            yield self._piece(self._error_at_samples(roles, replay, rng), last=True)
            return
        schedule = roles.schedule(nfe, *like.shape[-2:])
        steps = list(range(schedule.nfe))
        if self.states == "step":
            steps = [Random(rng.initial_seed()).choice(steps)]  # torch's draw has no value on meta
        noise = noise_like(like.new_empty(len(replay), *like.shape[1:]), rng)
        states = rollout(roles.student, noise, schedule, replay.context, rng, steps)
        for state in islice(states, steps[-1] + 1):
            if state.step.index in steps:
                wanted = _base_velocity(roles, replay, state.z, state.t)
                weight = loss_weight(state.t, self.space) / len(steps)
                error = mean_error(state.velocity, wanted, weight)
                yield self._piece(error, last=state.step.index == steps[-1])

    def _error_at_samples(self, roles: Roles, replay: Replay, rng: torch.Generator) -> Tensor:
        clean = replay.latents
        assert clean is not None, "the run must generate the base model's images"
        noise = noise_like(clean, rng)
        t = DrawsTimes(times="uniform").draw_times(roles, clean, rng)
        z = noisy(clean, noise, t)
        wanted = noise - clean if self.target == "data" else _base_velocity(roles, replay, z, t)
        velocity = roles.student(z, t, replay.context)
        return mean_error(velocity, wanted, loss_weight(t, self.space))

    def _piece(self, error: Tensor, last: bool) -> Loss:
        weighted = self.weight * error
        log = {"loss": weighted.detach(), "retention": error.detach()}
        return Loss(weighted, log, last, over="replay")


@torch.no_grad()
def _base_velocity(roles: Roles, replay: Replay, z: Tensor, t: Tensor) -> Tensor:
    return roles.base(z, t, replay.context)


@dataclass(frozen=True)
class WithRetention:
    """The objective of a run: a method's losses, and those of retention on `batch.replay`.

    The method knows nothing of it, and its random numbers are the same with and without.
    """

    method: Method
    retention: Retention

    def forwards_per_step(self, nfe: int, images: int) -> float:
        """Network forwards of an optimizer step on `images` images, a backward counted as two."""
        own = images * self.method.forwards(nfe)
        replayed = self.retention.per_step if self.retention.weight else 0
        return own + replayed * self.retention.forwards(nfe)

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The pieces of the batch's loss, those of retention last."""
        replay = batch.replay if self.retention.weight else None
        for piece in self.method.losses(roles, batch, rng):
            yield piece if replay is None else replace(piece, last=False)
        if replay is not None:
            own_rng = _own_stream(rng)
            yield from self.retention.losses(roles, replay, batch.latents, self.method.nfe, own_rng)


def _own_stream(rng: torch.Generator) -> torch.Generator:
    """A generator that depends on the seed of `rng` and on nothing that was drawn from it."""
    # torch's CPU generator reads the lowest 32 bits of a seed; the upper half of them is training's
    seed = 2**31 + Random(f"retention {rng.initial_seed()}").getrandbits(31)
    return torch.Generator(rng.device).manual_seed(seed)
