"""D-OPSD, on-policy self-distillation (arXiv:2605.05204). The model is its own teacher.

z_0 ~ noise;  for each step k of the student's own few-step walk:
    u_s = student(z_k, t_k, prompt)                      with gradient
    u_t = teacher(z_k, t_k, prompt and target picture)   without
    loss_k = w(t_k) |u_s - u_t|^2 / K                    eq. 7; w = 1 in velocity space
    z_{k+1} = the sampler's step from z_k along u_s, detached
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from dopsd.batch import Batch
from dopsd.flow import loss_weight
from dopsd.methods.base import Loss, Method, Need, Roles, mean_error, noise_like
from dopsd.rollout import rollout


class DOPSD(Method):
    """space: where the error is measured; "velocity" is the paper's eq. 7, "clean" the reference code's sigma^2.
    nfe: steps of the training walk. teacher_decay: 0 = a live copy of the
    student, 1 = the frozen start, between = exponential moving average (float32)."""

    name: Literal["dopsd"] = "dopsd"
    space: Literal["velocity", "clean"] = "velocity"
    teacher_decay: float = Field(default=0.9999, ge=0, le=1)

    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "privileged"})

    def forwards(self, nfe: int) -> int:
        return 4 * nfe

    @property
    def decay(self) -> float:
        return self.teacher_decay

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        assert batch.privileged is not None, "the run must cache the teacher's contexts for D-OPSD"
        z = noise_like(batch.latents, rng)
        schedule = roles.schedule(self.nfe, *z.shape[-2:])
        for visit in rollout(roles.student, z, schedule, batch.context, rng):
            t = visit.step.now.expand(len(z)).to(z.device)
            with torch.no_grad():
                target = roles.teacher(visit.z, t, batch.privileged)
            error = mean_error(visit.velocity, target, batch.weight * loss_weight(t, self.space)) / schedule.nfe
            log = {"loss": error.detach(), f"loss_at_{visit.step.index}": error.detach() * schedule.nfe}
            yield Loss(error, log, last=visit.step.index == schedule.nfe - 1)
