"""The verb: a method looks at a batch, asks the roles for velocities, and yields losses.

A method knows no file, device, optimizer or family. The gradients of the pieces it yields add up to
the batch's, and whoever receives a piece runs backward on it at once, so that one forward's
activations are alive, not all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity

# What a method cannot do without: roles, and what a batch brings beside images and prompts.
Need = Literal["teacher", "base", "reward", "privileged", "rejected", "prior", "replay"]
Score = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Loss:
    """One piece of a batch's loss. surrogate: 0-d, what to differentiate; log: what to report,
    detached 0-d tensors summed over the pieces, read only at the end of a step, so that no device
    waits in between; last: whether it closes the batch."""

    surrogate: Tensor
    log: Mapping[str, Tensor]
    last: bool


@dataclass(frozen=True)
class Roles:
    """What a method may ask. student, teacher, base: velocities of one network under three sets of
    weights; only the student carries gradient. schedule: (nfe or None for the model's own, h, w in
    cells) -> the sampler's times. Where the method needs a reward: score, (clean latents, prompts)
    -> float32 [B], higher is better, NaN = no answer.
    """

    student: Velocity
    teacher: Velocity
    base: Velocity
    schedule: Callable[[int | None, int, int], Schedule]
    score: Score | None = None


@dataclass(frozen=True)
class ToGenerate:
    """Images that the base model generates before training, at its own NFE. what: the batch's field
    they become; count: images a prompt; prompt: None = each example's own caption."""

    what: Literal["prior", "rejected"]
    count: int
    prompt: str | None = None


class Method(BaseModel):
    """A frozen set of hyperparameters with one function, `losses`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    nfe: int | None = Field(
        default=None,
        ge=1,
        description="Steps of the sampler that training walks or draws times "
        "from; default: the model's own.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot do without, as it is set."""
        return frozenset()

    @property
    def to_generate(self) -> ToGenerate | None:
        """What the base model must generate before training."""
        return None

    @property
    def reward_name(self) -> str | None:
        """Name of the reward that scores images while training."""
        return None

    @property
    def teacher_sees_another(self) -> bool:
        """Whether the teacher is shown another image of the concept than the one that is trained
        on."""
        return False

    def refuse_nfe(self, nfe: int) -> None:
        """Raise ValueError for settings that a walk of `nfe` steps cannot have."""

    def forwards(self, nfe: int) -> int:
        """Network forwards an image costs at this nfe, a backward counted as two."""
        raise NotImplementedError

    @property
    def decay(self) -> float:
        """Of the teacher's average after each optimizer step; 1 = it never moves."""
        return 1.0

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The pieces of the batch's loss, in an order and number that depend on nothing but
        settings and sizes."""
        raise NotImplementedError


def row_errors(left: Tensor, right: Tensor) -> Tensor:
    """Each row's mean squared difference. [B, ...] x 2 -> [B]. In float32 (or wider): formed from
    bf16 values the difference would lose its signal."""
    return (left - right).square().flatten(1).mean(1)


def mean_error(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of the row errors over the batch. [B, ...] x 2, [B] -> 0-d."""
    return (weight * row_errors(left, right)).mean()
