"""Student, teacher and base: one network under three sets of tensors.

Nothing is ever switched: the teacher and the base run by `functional_call` with tensors of their
own, so the student stays active and trainable whatever happens, and a checkpointed block recomputes
with the right weights.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Denoiser
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity
from dopsd.methods.base import Roles, Score
from dopsd.training.adapters import base_tensors


class Teacher:
    """The teacher's tensors, float32: an exponential average of the student's. decay 1 = the frozen
    start, 0 = the student itself (the tensors are then the student's own)."""

    def __init__(
        self,
        student: Mapping[str, nn.Parameter],
        decay: float,
        start: Mapping[str, Tensor] | None = None,
        home: torch.device | None = None,
    ):
        """start: a frozen copy of the student as it begins, where there is one: then decay 1 makes
        no other. home: where the average stays; default: beside the student."""
        self.decay = decay
        self._student, self._start = student, start
        if decay == 0:
            self.tensors: Mapping[str, Tensor] = {n: p.detach() for n, p in student.items()}
        elif decay == 1 and start is not None:
            self.tensors = start
        else:
            self.tensors = {
                n: p.detach().to(home or p.device, torch.float32, copy=True)
                for n, p in student.items()
            }

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold of it: nothing, where it is a whole model that is held
        already."""
        return self.tensors if 0 < self.decay < 1 or self._start is None else {}

    @torch.no_grad()
    def follow(self) -> None:
        """teacher = decay * teacher + (1 - decay) * student; after each optimizer step."""
        if 0 < self.decay < 1:
            for name, parameter in self._student.items():
                average = self.tensors[name]
                average.lerp_(parameter.to(average), 1 - self.decay)


def make_roles(
    denoiser: Denoiser,
    student: Mapping[str, nn.Parameter],
    teacher: Teacher,
    schedule: Callable[[int | None, int, int], Schedule],
    score: Score | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> Roles:
    """The roles over a denoiser whose network trains `student` (by name in the network). base:
    tensors under which it is the base model; default: those of LoRA, every B zero."""

    def trained(z: Tensor, t: Tensor, context: Context) -> Tensor:
        return denoiser(z, t, context)

    return Roles(
        student=trained,
        teacher=velocity_under(denoiser, teacher.tensors),
        base=velocity_under(denoiser, base_tensors(dict(student)) if base is None else base),
        schedule=schedule,
        score=score,
    )


def velocity_under(denoiser: Denoiser, tensors: Mapping[str, Tensor]) -> Velocity:
    """The denoiser's velocity, without gradient, with these tensors in place of its network's own,
    lent in the dtype and on the device of those."""
    own = dict(denoiser.network.named_parameters())

    @torch.no_grad()
    def velocity(z: Tensor, t: Tensor, context: Context) -> Tensor:
        lent = {f"network.{name}": tensor.to(own[name]) for name, tensor in tensors.items()}
        return functional_call(denoiser, lent, (z, t, context))

    return velocity
