"""D-OPSD, on-policy self-distillation (arXiv:2605.05204). The model is its own teacher.

z_0 ~ noise;  for each step k of the student's own few-step rollout:
    u_s = student(z_k, t_k, prompt)                      with gradient
    u_t = teacher(z_k, t_k, prompt and target image)   without
    loss_k = w(t_k) |u_s - u_t|^2 / K                    eq. 7; w = 1 in velocity space
    z_{k+1} = the sampler's step from z_k along u_s, detached
With retention > 0, the same on prompts that have nothing to do with the data, where the teacher is
the base model with the same prompt: nothing is to be learned there, and nothing lost.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Schedule, Step, loss_weight, noise_like, noisy
from dopsd.diffusion.rollout import rollout
from dopsd.methods.base import Loss, Method, Need, Roles, mean_error, row_errors

Index = Annotated[int, Field(ge=0)]


class DOPSD(Method):
    """The defaults are the paper's; the other values of states, loss_steps and teacher_decay are
    its ablations."""

    name: Literal["dopsd"] = "dopsd"
    space: Literal["velocity", "clean"] = Field(
        default="velocity",
        description="Where the error is measured: eq. 7, or the reference code's sigma^2.",
    )
    teacher_decay: float = Field(
        default=0.9999,
        ge=0,
        le=1,
        description="0: a live copy, 1: the frozen start, between: average of the student.",
    )
    states: Literal["student", "teacher", "data"] = Field(
        default="student",
        description="Whose: the student's walk, the teacher's, or the noised pictures (off policy).",
    )
    loss_steps: Literal["all"] | Annotated[int, Field(ge=1)] | tuple[Index, ...] = Field(
        default="all",
        description="Steps of the walk that carry a loss: all, so many drawn at random, or a list.",
    )
    teacher_guidance: float = Field(
        default=1.0,
        ge=0,
        description="Beyond 1 the teacher goes further from its text-only answer; costs a forward.",
    )
    teacher_sees: Literal["target", "another"] = Field(
        default="target",
        description="The picture that is trained on, or the next one of the same folder.",
    )
    retention: float = Field(
        default=0.0,
        ge=0,
        description="Weight of staying as the untouched model is on data.replay's prompts.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"teacher", "privileged"}
        if self.retention:
            needs |= {"base", "replay"}
        return frozenset(needs)

    @property
    def decay(self) -> float:
        return self.teacher_decay

    @property
    def teacher_sees_another(self) -> bool:
        return self.teacher_sees == "another"

    def refuse_nfe(self, nfe: int) -> None:
        steps = self.loss_steps
        if isinstance(steps, int) and steps > nfe:
            raise ValueError(
                f"method.loss_steps asks for {steps} steps of a walk of {nfe}: ask for at most {nfe}."
            )
        if isinstance(steps, tuple) and (late := [step for step in steps if step >= nfe]):
            raise ValueError(
                f"method.loss_steps names step {late[0]}, and a walk of {nfe} has 0 to {nfe - 1}."
            )

    def forwards(self, nfe: int) -> int:
        # Three forwards for the student's loss (one, and a backward counted as two), of which the
        # walk has one already where the states are the student's own.
        walk = 0 if self.states == "data" else self._walked_steps(nfe)
        student = 2 if self.states == "student" else 3
        teacher = 1 if self.teacher_guidance == 1 else 2
        with_loss = len(self._loss_steps(nfe, seed=0))
        retention = 4 * nfe if self.retention else 0
        return walk + with_loss * (student + teacher) + retention

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        schedule = roles.schedule(self.nfe, *batch.latents.shape[-2:])
        noise = noise_like(batch.latents, rng)
        carried = self._loss_steps(schedule.nfe, rng.initial_seed())
        left = len(carried) + (schedule.nfe if self.retention else 0)
        for step, z, velocity in self._visits(roles, batch, noise, schedule, carried, rng):
            t = step.now.expand(len(z)).to(z.device)
            target = self._target(roles, z, t, batch)
            error = mean_error(velocity, target, batch.weight * loss_weight(t, self.space))
            left -= 1
            log = {"loss": error.detach() / len(carried)}
            if not isinstance(self.loss_steps, int):
                log[f"loss_at_{step.index}"] = error.detach()
            yield Loss(error / len(carried), log, last=left == 0)
        if self.retention:
            assert batch.replay is not None, "the run must read the replay prompts"
            for state in rollout(
                roles.student, noise_like(noise, rng), schedule, batch.replay, rng
            ):
                t = state.step.now.expand(len(noise)).to(noise.device)
                target = roles.base(state.z, t, batch.replay)
                moved = row_errors(state.velocity, target).mean() / schedule.nfe
                left -= 1
                log = {"loss": self.retention * moved.detach(), "retention": moved.detach()}
                yield Loss(self.retention * moved, log, last=left == 0)

    def _loss_steps(self, nfe: int, seed: int) -> tuple[int, ...]:
        """Indices of the steps that carry a loss, in order. Python's generator draws them, so that
        no tensor has to be read: the memory forecast runs on tensors without values."""
        if self.loss_steps == "all":
            return tuple(range(nfe))
        if isinstance(self.loss_steps, int):
            return tuple(sorted(Random(seed).sample(range(nfe), self.loss_steps)))
        return tuple(sorted(set(self.loss_steps)))

    def _walked_steps(self, nfe: int) -> int:
        """How many steps a walk takes: to the last step of a list; always all where steps are
        drawn, because the number of forwards must not depend on the draw (processes that share a
        network run the same number)."""
        return max(self.loss_steps) + 1 if isinstance(self.loss_steps, tuple) else nfe

    def _visits(
        self,
        roles: Roles,
        batch: Batch,
        noise: Tensor,
        schedule: Schedule,
        carried: Sequence[int],
        rng: torch.Generator,
    ) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """The states that carry a loss, each with the student's velocity there and its graph."""
        if self.states == "student":
            walk = rollout(roles.student, noise, schedule, batch.context, rng, graph_at=carried)
            for state in islice(walk, self._walked_steps(schedule.nfe)):
                if state.step.index in carried:
                    yield state.step, state.z, state.velocity
            return
        states = self._foreign_states(roles, batch, noise, schedule, rng)
        for step, z in islice(states, self._walked_steps(schedule.nfe)):
            if step.index in carried:
                yield step, z, roles.student(z, step.now.expand(len(z)).to(z.device), batch.context)

    def _foreign_states(
        self, roles: Roles, batch: Batch, noise: Tensor, schedule: Schedule, rng: torch.Generator
    ) -> Iterator[tuple[Step, Tensor]]:
        """States that are not the student's own, one a step: off policy."""
        if self.states == "teacher":
            assert batch.privileged is not None, (
                "the run must cache the teacher's contexts for D-OPSD"
            )
            for state in rollout(roles.teacher, noise, schedule, batch.privileged, rng):
                yield state.step, state.z
        else:
            for step in schedule.steps():
                yield step, noisy(batch.latents, noise_like(noise, rng), step.now)

    @torch.no_grad()
    def _target(self, roles: Roles, z: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Where the teacher would go; with guidance, further along what the image told it."""
        assert batch.privileged is not None, "the run must cache the teacher's contexts for D-OPSD"
        seeing = roles.teacher(z, t, batch.privileged)
        if self.teacher_guidance == 1:
            return seeing
        blind = roles.teacher(z, t, batch.context)
        return blind + self.teacher_guidance * (seeing - blind)
