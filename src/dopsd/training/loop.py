"""The loop: a generator of optimizer steps. Whoever runs it logs, samples and saves between two
steps.

Randomness is a function of (seed, index of the micro-batch), so a resumed run repeats the straight
one.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from dopsd.diffusion.batch import Batch
from dopsd.methods.base import Method, Roles
from dopsd.training.adapters import unmoved
from dopsd.training.roles import Teacher


class Batches(Protocol):
    """Random access to micro-batches: the same index gives the same batch."""

    def batch(self, index: int) -> Batch: ...


@dataclass(frozen=True)
class Plan:
    """How long and how fast. Steps are optimizer steps; `accumulate` micro-batches make one."""

    max_steps: int
    learning_rate: float
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    accumulate: int = 1
    clip: float = 1.0
    seed: int = 0
    most_skipped: int = 3  # steps in a row whose loss or gradient is not finite

    def learning_rate_at(self, step: int) -> float:
        """Of the step with this index (from 0): linear warm-up, then constant or cosine to 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: how many are done, what the method reported (mean over micro-batches),
    what it took; skipped: its loss or gradient was not finite, and nothing of it was applied."""

    step: int
    log: Mapping[str, float]
    grad_norm: float
    learning_rate: float
    images: int
    seconds: float
    skipped: bool = False


def generator_at(seed: int, index: int) -> torch.Generator:
    """The randomness of micro-batch `index`, on the CPU so that every device draws the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


def steps(
    roles: Roles,
    method: Method,
    batches: Batches,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    teacher: Teacher,
    device: torch.device,
    plan: Plan,
    start: int = 0,
) -> Iterator[StepReport]:
    """Train from optimizer step `start` to `plan.max_steps`, yielding after each.

    A step whose loss or gradient is not finite is skipped. Raises ValueError when
    `plan.most_skipped` in a row are, or when an adapter has not moved after the very first update,
    or nothing has.
    """
    skipped_in_a_row, untried = 0, start == 0
    for step in range(start, plan.max_steps):
        began = time.perf_counter()
        learning_rate = plan.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        told, images = backward(roles, method, batches, device, plan, step)
        log = {name: value.item() for name, value in told.items()}
        grad_norm = nn.utils.clip_grad_norm_(trainable.values(), plan.clip).item()
        skipped = not (math.isfinite(grad_norm) and math.isfinite(log["loss"]))
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        if skipped_in_a_row == plan.most_skipped:
            raise ValueError(
                f"step {step + 1}: loss {log['loss']:.3g}, gradient norm {grad_norm:.3g}, and {skipped_in_a_row} steps "
                "in a row were not finite. None of them was applied. Lower train.learning_rate."
            )
        if not skipped:
            optimizer.step()
            teacher.follow()
        optimizer.zero_grad(set_to_none=True)
        idle = (
            skipped or log.get("pairs") == 0
        )  # where every pair was dropped there is nothing to move by
        if untried and not idle:
            _refuse_unmoved(trainable, grad_norm)
        untried = untried and idle
        seconds = time.perf_counter() - began
        yield StepReport(step + 1, log, grad_norm, learning_rate, images, seconds, skipped)


def _refuse_unmoved(trainable: Mapping[str, nn.Parameter], grad_norm: float) -> None:
    still = unmoved(dict(trainable))
    if still or grad_norm == 0:
        which = (
            f"{len(still)} adapters have not moved (first: {still[0]})"
            if still
            else "no weight has moved"
        )
        raise ValueError(
            f"after the first update {which}: the gradient is exactly zero, so training would teach nothing. Check "
            "lora.targets and the method's contexts."
        )


def backward(
    roles: Roles, method: Method, batches: Batches, device: torch.device, plan: Plan, step: int
) -> tuple[dict[str, Tensor], int]:
    """The gradient of one optimizer step, piece by piece: what the pieces told (mean over
    micro-batches), and the number of images."""
    told: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    images = 0
    for micro in range(plan.accumulate):
        index = step * plan.accumulate + micro
        batch = batches.batch(index).to(device)
        images += len(batch)
        closed = False
        for piece in method.losses(roles, batch, generator_at(plan.seed, index)):
            closed = piece.last
            (piece.surrogate / plan.accumulate).backward()
            for name, value in piece.log.items():
                told[name] = told[name] + value / plan.accumulate
        assert closed, "a method must close its batch"
    return told, images
