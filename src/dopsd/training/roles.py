"""Student, teacher and base: one network under three sets of trainable tensors.

No adapter is ever switched: the teacher and the base run by `functional_call` with tensors of their own, so the
student stays active and trainable whatever happens, and a checkpointed block recomputes with the right weights.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dopsd.batch import Context
from dopsd.families.base import Denoiser
from dopsd.flow import Schedule
from dopsd.methods.base import Roles, Score
from dopsd.rollout import Velocity
from dopsd.training.adapters import untouched


class Teacher:
    """The teacher's tensors, float32: an exponential average of the student's. decay 1 = the frozen start, 0 = the
    student itself (the tensors are then the student's own)."""

    def __init__(self, student: Mapping[str, nn.Parameter], decay: float):
        self.decay = decay
        self._student = student
        self.tensors = {
            n: p.detach() if decay == 0 else p.detach().to(torch.float32, copy=True) for n, p in student.items()
        }

    @torch.no_grad()
    def follow(self) -> None:
        """teacher = decay * teacher + (1 - decay) * student; after each optimizer step."""
        if 0 < self.decay < 1:
            for name, parameter in self._student.items():
                self.tensors[name].lerp_(parameter.float(), 1 - self.decay)


def make_roles(
    denoiser: Denoiser,
    student: Mapping[str, nn.Parameter],
    teacher: Teacher,
    schedule: Callable[[int | None, int, int], Schedule],
    score: Score | None = None,
) -> Roles:
    """The roles over a denoiser whose network's trainable parameters are `student` (by their name in the network)."""

    def trained(z: Tensor, t: Tensor, context: Context) -> Tensor:
        return denoiser(z, t, context)

    return Roles(
        student=trained,
        teacher=velocity_under(denoiser, teacher.tensors),
        base=velocity_under(denoiser, untouched(dict(student))),
        schedule=schedule,
        score=score,
    )


def velocity_under(denoiser: Denoiser, tensors: Mapping[str, Tensor]) -> Velocity:
    """The denoiser's velocity, without gradient, with these tensors in place of its network's own."""
    named = {f"network.{name}": tensor for name, tensor in tensors.items()}

    @torch.no_grad()
    def velocity(z: Tensor, t: Tensor, context: Context) -> Tensor:
        return functional_call(denoiser, named, (z, t, context))

    return velocity
