"""The optimizer loop: a generator that yields after each optimizer step. The caller logs, previews
and saves between two steps.

Batch, noise and learning rate are functions of the seed and the step, so a resumed run repeats an
uninterrupted one bit for bit.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from dopsd.diffusion.batch import Batch, Part
from dopsd.methods.base import Objective, Roles
from dopsd.training.adapters import unmoved_modules
from dopsd.training.optimizers import stepping
from dopsd.training.roles import Teacher
from dopsd.training.seeds import noise_seed


class Batches(Protocol):
    """Random access to micro-batches: the same index gives the same batch."""

    def batch(self, index: int) -> Batch: ...


@dataclass(frozen=True)
class Plan:
    """Number, size and rate of the optimizer steps; the names are those of a recipe's `train`.

    accumulation_steps: micro-batches of an optimizer step. max_skipped_steps: how many steps in a
    row may be skipped because their loss or gradient is not finite.
    """

    max_steps: int
    learning_rate: float
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    seed: int = 0
    max_skipped_steps: int = 3

    def learning_rate_at(self, step: int) -> float:
        """The rate of the optimizer step with this index (from 0): a linear warm-up that reaches
        `learning_rate` at its last step, then constant, or a cosine to 0 at `max_steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepReport:
    """One optimizer step.

    step: how many are done, this one included. log: what the method reports, see `Loss`. grad_norm:
    before clipping. images: of all micro-batches. skipped: the loss or the gradient was not finite,
    and no weight has changed.
    """

    step: int
    log: Mapping[str, float]
    grad_norm: float
    learning_rate: float
    images: int
    seconds: float
    skipped: bool = False


@dataclass(frozen=True)
class StepLoss:
    """What the pieces of an optimizer step report: 0-d tensors, see `Loss`."""

    log: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]
    images: int


def generator_at(seed: int, index: int) -> torch.Generator:
    """Random numbers of micro-batch `index`, on the CPU so that every device draws the same."""
    return torch.Generator().manual_seed(noise_seed(seed, index))


def train_steps(
    roles: Roles,
    objective: Objective,
    batches: Batches,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    teacher: Teacher,
    device: torch.device,
    plan: Plan,
    start: int = 0,
) -> Iterator[StepReport]:
    """Train from optimizer step `start` to `plan.max_steps`, yielding after each step.

    trainable: float32 parameters by name in the network; those that `optimizer` updates. Raises
    ValueError when more steps in a row than allowed are not finite, and when the first update
    leaves an adapter or the whole network as it was.
    """
    skipped_in_a_row, checks_update = 0, start == 0
    for step in range(start, plan.max_steps):
        started = time.perf_counter()
        learning_rate = plan.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        with stepping(optimizer):
            # Gradient
            loss = accumulate_gradient(roles, objective, batches, device, plan, step)
            log = {name: value.item() for name, value in {**loss.log, **loss.counts}.items()}
            grad_norm = nn.utils.clip_grad_norm_(trainable.values(), plan.max_grad_norm).item()

            # Update, unless something is not finite
            skipped = not (math.isfinite(grad_norm) and math.isfinite(log["loss"]))
            skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
            if skipped_in_a_row == plan.max_skipped_steps:
                raise ValueError(
                    f"step {step + 1}: loss {log['loss']:.3g}, gradient norm {grad_norm:.3g}, and "
                    f"{skipped_in_a_row} steps in a row were not finite. None of them was applied. "
                    "Lower train.learning_rate."
                )
            if not skipped:
                optimizer.step()
        if not skipped:
            teacher.follow()
        optimizer.zero_grad(set_to_none=True)

        # The first update must change every adapter; a step that used no example changes none
        unused = bool(loss.counts) and not any(log[name] for name in loss.counts)
        if checks_update and not skipped and not unused:
            _refuse_unmoved(trainable, grad_norm)
            checks_update = False
        seconds = time.perf_counter() - started
        yield StepReport(step + 1, log, grad_norm, learning_rate, loss.images, seconds, skipped)


def accumulate_gradient(
    roles: Roles,
    objective: Objective,
    batches: Batches,
    device: torch.device,
    plan: Plan,
    step: int,
) -> StepLoss:
    """Add the gradient of one optimizer step to the trainable parameters, piece by piece.

    A piece's surrogate is a mean over the rows of its micro-batch. It is scaled so that each row of
    the whole step weighs the same, also where micro-batches differ in size: one over their number
    where all are equal.
    """
    first = step * plan.accumulation_steps
    indices = range(first, first + plan.accumulation_steps)
    micro_batches = [batches.batch(index) for index in indices]
    log: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    counts: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    sums: dict[tuple[str, Part], Tensor] = {}  # of log entries, each times the rows it is a mean of
    rows: Counter[tuple[str, Part]] = Counter()  # of the micro-batches that report the entry
    for index, batch in zip(indices, micro_batches, strict=True):
        complete, reported = False, {}
        for piece in objective.losses(roles, batch.to(device), generator_at(plan.seed, index)):
            complete = piece.last
            rows_of_step = sum(each.rows_of(piece.over) for each in micro_batches)
            divisor = rows_of_step / batch.rows_of(piece.over)
            (piece.surrogate / divisor).backward()
            for name, value in piece.log.items():
                entry = (name, piece.over)
                reported[entry] = batch.rows_of(piece.over)
                sums[entry] = sums.get(entry, 0.0) + value * reported[entry]
            for name, value in piece.counts.items():
                counts[name] = counts[name] + value
        assert complete, "the objective ended without a piece marked `last`"
        rows.update(reported)
    for (name, part), total in sums.items():
        log[name] = log[name] + total / rows[name, part]
    return StepLoss(log, counts, images=sum(map(len, micro_batches)))


def _refuse_unmoved(trainable: Mapping[str, nn.Parameter], grad_norm: float) -> None:
    unmoved = unmoved_modules(dict(trainable))
    if unmoved or grad_norm == 0:
        which = (
            f"{len(unmoved)} adapters have not moved (first: {unmoved[0]})"
            if unmoved
            else "no weight has moved"
        )
        raise ValueError(
            f"after the first update {which}: the gradient is exactly zero, so training would "
            "teach nothing. Check lora.targets and the method's contexts."
        )
