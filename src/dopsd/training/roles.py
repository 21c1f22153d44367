"""Student, teacher and base: one network with three sets of tensors.

Nothing is switched. The teacher and the base run through `functional_call` with their own tensors,
so the student stays in place and trainable, and a checkpointed block is recomputed with the weights
of its forward.
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
    """The teacher's tensors: a float32 exponential moving average of the student's.

    decay: 1 = the student as it starts, 0 = the student itself, whose tensors are shared.
    """

    def __init__(
        self,
        student: Mapping[str, nn.Parameter],
        decay: float,
        start: Mapping[str, Tensor] | None = None,
        device: torch.device | None = None,
    ):
        """start: a frozen copy of the student as it starts, where one exists; decay 1 uses it.
        device: of the average; default: the student's."""
        self.decay = decay
        self._student, self._start = student, start
        if decay == 0:
            self.tensors: Mapping[str, Tensor] = {n: p.detach() for n, p in student.items()}
        elif decay == 1 and start is not None:
            self.tensors = start
        else:
            self.tensors = {
                name: p.detach().to(device or p.device, torch.float32, copy=True)
                for name, p in student.items()
            }

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must store: nothing where the tensors are the student's or the base
        model's."""
        return self.tensors if 0 < self.decay < 1 or self._start is None else {}

    @torch.no_grad()
    def follow(self) -> None:
        """teacher = decay * teacher + (1 - decay) * student; to be called after each update."""
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
    """The roles of a denoiser whose network trains `student` (parameters by name in the network).

    base: tensors with which the network is the base model; default: those of LoRA with each B zero.
    schedule, score: see `Roles`.
    """
    return Roles(
        student=denoiser,
        teacher=velocity_under(denoiser, teacher.tensors),
        base=velocity_under(denoiser, base_tensors(student) if base is None else base),
        schedule=schedule,
        score=score,
    )


def velocity_under(denoiser: Denoiser, tensors: Mapping[str, Tensor]) -> Velocity:
    """The denoiser's velocity, without gradient, with these tensors in place of the network's own,
    cast and moved to the dtype and device of those at each call."""
    own = dict(denoiser.network.named_parameters())

    @torch.no_grad()
    def velocity(z: Tensor, t: Tensor, context: Context) -> Tensor:
        replaced = {f"network.{name}": tensor.to(own[name]) for name, tensor in tensors.items()}
        return functional_call(denoiser, replaced, (z, t, context))

    return velocity
