"""D-OPSD, on-policy self-distillation (arXiv:2605.05204): the model is its own teacher.

z_0 ~ noise
for each step k of the student's own few-step rollout:
    u_s = student(z_k, t_k, prompt)                     with gradient
    u_t = teacher(z_k, t_k, prompt + target image)      without
    loss_k = w(t_k) |u_s - u_t|^2 / K                   eq. 7; w = 1 in velocity space
    z_{k+1} = sampler step from z_k along u_s, detached

Beyond the paper, each by a setting whose default leaves it out; u_b = base(z_k, t_k, prompt):

anchor             loss_k += anchor |(z_k - t_k u_s) - (z_k - t_k u_b)|^2 / K      SelfLift
step_weights       loss_k *= weight_k / mean of the weights                        LightX2V
loss_steps: last   the last, least noisy state alone                               DanceOPD
correction: split  direction and length of u_s - u_b are trained apart             musubi-tuner
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from statistics import fmean
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Schedule, loss_weight, noise_like, noisy
from dopsd.diffusion.rollout import rollout
from dopsd.methods.base import Loss, Method, Need, Roles, mean_error
from dopsd.methods.pull import lengthened, noise_bins, pull_log

Index = Annotated[int, Field(ge=0)]


class DOPSD(Method):
    """Defaults are the paper's; other values of states, loss_steps and teacher_decay are its
    ablations."""

    name: Literal["dopsd"] = "dopsd"
    space: Literal["velocity", "clean"] = Field(
        default="velocity",
        description="Where the error is measured: velocity (eq. 7), or clean, weighted by t^2 as "
        "in the reference code.",
    )
    teacher_decay: float = Field(
        default=0.9999,
        ge=0,
        le=1,
        description="0: the student itself, 1: the model as it starts, between: a moving average "
        "of the student.",
    )
    states: Literal["student", "teacher", "data"] = Field(
        default="student",
        description="States trained at: of the student's rollout, of the teacher's, or noised "
        "images (off policy).",
    )
    loss_steps: Literal["all", "last"] | Annotated[int, Field(ge=1)] | tuple[Index, ...] = Field(
        default="all",
        description="Steps of the rollout that have a loss: all, the last (least noisy) one, a "
        "number drawn at random, or a list of indices.",
    )
    step_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="Weight of the loss at each step of the rollout, noisiest first; only their "
        "ratios matter. Default: equal.",
    )
    anchor: float = Field(
        default=0.0,
        ge=0,
        description="Weight of staying close, at the same states and prompts, to the base model's "
        "clean estimate; costs a forward.",
    )
    correction: Literal["whole", "split"] = Field(
        default="whole",
        description="split: direction and length of the student's difference to the base model "
        "are trained apart, so that a wrong direction does not shorten it; costs a forward.",
    )
    teacher_guidance: float = Field(
        default=1.0,
        ge=0,
        description="Beyond 1 the target moves further away from the teacher's text-only velocity; "
        "costs a forward.",
    )
    teacher_sees: Literal["target", "another"] = Field(
        default="target",
        description="The image that is trained on, or another one of the same folder.",
    )

    @model_validator(mode="after")
    def _one_step_weighs_something(self) -> Self:
        if self.step_weights and not any(self.step_weights):
            raise ValueError("step_weights are all 0: at least one step must have a weight")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"teacher", "privileged"}
        if self._compares_with_base:
            needs.add("base")
        return frozenset(needs)

    @property
    def _compares_with_base(self) -> bool:
        return self.anchor > 0 or self.correction == "split"

    @property
    def decay(self) -> float:
        return self.teacher_decay

    @property
    def takes_masks(self) -> bool:
        return self.teacher_sees == "target"  # a mask belongs to the image that it lies over

    @property
    def teacher_sees_another(self) -> bool:
        return self.teacher_sees == "another"

    def refuse_schedule(self, schedule: Schedule) -> None:
        steps, nfe = self.loss_steps, schedule.nfe
        if isinstance(steps, int) and steps > nfe:
            raise ValueError(
                f"method.loss_steps asks for {steps} of the {nfe} steps of the sampler: ask for "
                f"at most {nfe}."
            )
        if isinstance(steps, tuple) and max(steps) >= nfe:
            raise ValueError(
                f"method.loss_steps names step {max(steps)}, and a sampler of {nfe} steps has "
                f"0 to {nfe - 1}."
            )
        if self.step_weights and len(self.step_weights) != nfe:
            raise ValueError(
                f"method.step_weights has {len(self.step_weights)} weights, and the sampler takes "
                f"{nfe} steps: give {nfe}."
            )

    def forwards(self, nfe: int) -> float:
        """The rollout ends at the last step that has a loss; where steps are drawn this is the
        mean over the draws."""
        steps = self._loss_steps(nfe, seed=0)
        losses = len(steps)
        rollout_forwards = float(steps[-1] + 1)
        if isinstance(self.loss_steps, int):
            rollout_forwards = losses * (nfe + 1) / (losses + 1)  # mean of the largest draw
        if self.states == "data":
            rollout_forwards = 0.0
        # A loss costs the student three forwards (one, and a backward that counts as two); on the
        # student's own rollout one of them is the rollout's.
        student = 2 if self.states == "student" else 3
        teacher = 1 if self.teacher_guidance == 1 else 2
        base = 1 if self._compares_with_base else 0
        return rollout_forwards + losses * (student + teacher + base)

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        schedule = roles.schedule(self.nfe, *batch.latents.shape[-2:])
        noise = noise_like(batch.latents, rng)
        loss_steps = self._loss_steps(schedule.nfe, rng.initial_seed())
        bins = noise_bins(schedule, loss_steps)
        pieces_left = len(loss_steps)
        for k, z, t, velocity in self._states(roles, batch, noise, schedule, loss_steps, rng):
            target = self._target(roles, z, t, batch)
            log = pull_log(velocity, target, z, t, batch.latents, bins, k)
            base = self._base_velocity(roles, z, t, batch)
            if base is not None and self.correction == "split":
                target = lengthened(velocity, target, base)
            weight = batch.weight * loss_weight(t, self.space)
            if self.step_weights:
                weight = weight * self.step_weights[k] / fmean(self.step_weights)
            error = mean_error(velocity, target, weight, batch.mask)
            log[f"loss_at_{k}"] = error.detach()
            if base is not None and self.anchor:
                moved = mean_error(velocity, base, batch.weight * loss_weight(t, "clean"))
                log["anchor"] = moved.detach() / len(loss_steps)
                error = error + self.anchor * moved
            log["loss"] = error.detach() / len(loss_steps)
            pieces_left -= 1
            yield Loss(error / len(loss_steps), log, last=pieces_left == 0)

    def _loss_steps(self, nfe: int, seed: int) -> tuple[int, ...]:
        """Indices of the steps that have a loss, in order. Python's generator draws them, not
        torch's: the memory forecast runs on tensors without values, which cannot be read."""
        if self.loss_steps == "all":
            return tuple(range(nfe))
        if self.loss_steps == "last":
            return (nfe - 1,)
        if isinstance(self.loss_steps, int):
            return tuple(sorted(Random(seed).sample(range(nfe), self.loss_steps)))
        return tuple(sorted(set(self.loss_steps)))

    def _states(
        self,
        roles: Roles,
        batch: Batch,
        noise: Tensor,
        schedule: Schedule,
        loss_steps: Sequence[int],
        rng: torch.Generator,
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """At each step that has a loss: index, z, t [B], and the student's velocity with graph."""
        length = loss_steps[-1] + 1
        if self.states == "student":
            states = rollout(roles.student, noise, schedule, batch.context, rng, loss_steps)
            for state in islice(states, length):
                if state.step.index in loss_steps:
                    yield state.step.index, state.z, state.t, state.velocity
            return
        off_policy = self._off_policy_states(roles, batch, noise, schedule, rng)
        for k, (z, t) in enumerate(islice(off_policy, length)):
            if k in loss_steps:
                yield k, z, t, roles.student(z, t, batch.context)

    def _off_policy_states(
        self, roles: Roles, batch: Batch, noise: Tensor, schedule: Schedule, rng: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """z and t [B] at each step, on the teacher's rollout or on noised images."""
        if self.states == "teacher":
            assert batch.privileged is not None, "the run must cache the teacher's contexts"
            for state in rollout(roles.teacher, noise, schedule, batch.privileged, rng):
                yield state.z, state.t
        else:
            for step in schedule.steps():
                t = step.now.expand(len(noise)).to(noise.device)
                yield noisy(batch.latents, noise_like(noise, rng), step.now), t

    @torch.no_grad()
    def _base_velocity(self, roles: Roles, z: Tensor, t: Tensor, batch: Batch) -> Tensor | None:
        """The base model's velocity for the prompt alone, where a setting compares with it."""
        return roles.base(z, t, batch.context) if self._compares_with_base else None

    @torch.no_grad()
    def _target(self, roles: Roles, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The teacher's velocity given the target image, [B, C, h, w]; with guidance, extrapolated
        from its text-only velocity."""
        assert batch.privileged is not None, "the run must cache the teacher's contexts"
        with_image = roles.teacher(z, t, batch.privileged)
        if self.teacher_guidance == 1:
            return with_image
        text_only = roles.teacher(z, t, batch.context)
        return text_only + self.teacher_guidance * (with_image - text_only)
