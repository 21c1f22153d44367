"""Interface of a training objective: from a batch and three roles of one network to losses.

A method knows no file, device, optimizer or model family. It yields its loss in pieces whose
gradients add up; the caller runs backward on each piece at once, so that the activations of one
forward are in memory, not those of all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dopsd.diffusion.batch import Batch, Part
from dopsd.diffusion.flow import Schedule, Space
from dopsd.diffusion.rollout import Velocity

# What a method requires: roles, and parts of a batch beside images and prompts.
Need = Literal["teacher", "base", "reward", "privileged", "rejected", "prior"]
Score = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Loss:
    """One piece of a batch's loss.

    surrogate: 0-d, what to differentiate; a mean over the rows of the batch's part `over`. last:
    whether it is the batch's last piece. log and counts: detached 0-d tensors to report, added up
    over the pieces of a batch, and read only at the end of an optimizer step, so that no device
    waits in between. Over micro-batches a log entry is averaged over the rows of those that report
    it, and a count is summed: how many examples the loss uses. A step whose counts are all 0 has no
    gradient.
    """

    surrogate: Tensor
    log: Mapping[str, Tensor]
    last: bool
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    over: Part = "latents"


@dataclass(frozen=True)
class Roles:
    """What a method may evaluate.

    student, teacher, base: velocities of one network under three sets of weights; only the student
    carries gradient. schedule: (steps, or None for the model's own number; height and width of the
    latents) -> the sampler's times. score, for methods that need a reward: (clean latents
    [B, C, h, w], prompts) -> float32 [B], higher is better, NaN where there is no score.
    """

    student: Velocity
    teacher: Velocity
    base: Velocity
    schedule: Callable[[int | None, int, int], Schedule]
    score: Score | None = None


@dataclass(frozen=True)
class ToGenerate:
    """Images that the base model generates before training, with its own number of steps.

    what: the part of a batch that they become. count: images for each prompt. prompt: None for each
    example's own caption.
    """

    what: Literal["prior", "rejected"]
    count: int
    prompt: str | None = None


class Objective(Protocol):
    """What an optimizer step minimises: a method, or a method with further pieces beside it."""

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """As `Method.losses`."""
        ...


class Method(BaseModel):
    """Hyperparameters of a training objective, frozen, and its losses."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    nfe: int | None = Field(
        default=None,
        ge=1,
        description="Steps of the sampler that training runs or draws times from; default: the "
        "model's own.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        """What it requires with these settings."""
        return frozenset()

    @property
    def loss_spaces(self) -> tuple[Space, ...]:
        """The values that its setting `space` can have; empty where it has no such setting."""
        setting = type(self).model_fields.get("space")
        return get_args(setting.annotation) if setting else ()

    @property
    def to_generate(self) -> ToGenerate | None:
        """What the base model must generate before training."""
        return None

    @property
    def reward_name(self) -> str | None:
        """Name of the reward that scores images during training."""
        return None

    @property
    def takes_masks(self) -> bool:
        """Whether the loss on the images weights latent positions by `Batch.mask`."""
        return False

    @property
    def teacher_sees_another(self) -> bool:
        """Whether the teacher sees another image of the concept than the one trained on."""
        return False

    def refuse_schedule(self, schedule: Schedule) -> None:
        """Raise ValueError for settings that do not fit a sampler with this schedule."""

    def forwards(self, nfe: int) -> float:
        """Network forwards for each image of a batch at this nfe; a backward counts as two. The
        mean over the draws where it depends on them."""
        raise NotImplementedError

    @property
    def decay(self) -> float:
        """Decay of the teacher's average after each optimizer step; 1 = it never changes."""
        return 1.0

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The pieces of the batch's loss. Their order and number depend on nothing but settings
        and sizes, never on values or random draws. rng: on the CPU."""
        raise NotImplementedError


def row_errors(left: Tensor, right: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of each row, [B, ...] and [B, ...] -> [B].

    mask: multiplies the squares, broadcast to their shape; the mean stays one over all elements.
    Pass float32 or wider: a difference of bf16 velocities is mostly rounding error.
    """
    squares = (left - right).square()
    return (squares if mask is None else mask * squares).flatten(1).mean(1)


def mean_error(left: Tensor, right: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the batch of weight times `row_errors`: [B, ...], [B, ...], [B] -> 0-d."""
    return (weight * row_errors(left, right, mask)).mean()
