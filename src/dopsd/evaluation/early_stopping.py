"""When a run should have stopped, from its health checks (health.jsonl), and whether it has reached
its plateau: learning no more, and only moving away from the base model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, variance
from typing import Any

CERTAIN = 2  # standard errors by which the loss must have fallen to count as falling
GROWTH = 0.05  # share by which drift must have grown over the checks that are looked at

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Advice:
    """step: the last step to train to; None if there is no reason to stop earlier, or no healthy
    step to return to."""

    step: int | None
    sentence: str


def plateau(checks: Rows, metrics: Rows, patience: int) -> str | None:
    """What shows, in a sentence, that a run has reached its plateau by its last health check; None
    where it has not.

    It has, over the last `patience` intervals between health checks, where both hold:

    - the loss is flat: its mean over these intervals is not lower, by more than two standard errors
      of the difference, than its mean over the interval before them;
    - drift grows: it is higher at each check than at the one before, and by 5% or more in all.

    checks: rows of health.jsonl in order. metrics: rows of metrics.jsonl; those without a finite
    loss are left out.
    """
    if len(checks) <= patience:
        return None
    *before, first = checks[: len(checks) - patience]
    last = checks[-1]["step"]
    drifts = [check["drift"]["value"] for check in checks[len(checks) - patience - 1 :]]
    grows = all(low < high for low, high in pairwise(drifts))
    if not grows or drifts[-1] < (1 + GROWTH) * drifts[0]:
        return None

    def losses(after: int, until: int) -> list[float]:
        return [
            row["loss"]
            for row in metrics
            if after < row["step"] <= until and row["loss"] is not None
        ]

    earlier = losses(before[-1]["step"] if before else 0, first["step"])
    later = losses(first["step"], last)
    if min(len(earlier), len(later)) < 2:
        return None
    error = math.sqrt(variance(earlier) / len(earlier) + variance(later) / len(later))
    if fmean(earlier) - fmean(later) > CERTAIN * error:
        return None
    return (
        f"since step {first['step']} the loss has not fallen ({fmean(earlier):.3g} before, "
        f"{fmean(later):.3g} since), and drift has grown from {drifts[0]:.2f} to {drifts[-1]:.2f}"
    )


def advise(rows: Rows) -> Advice | None:
    """Advice from the rows of health.jsonl in order; None without rows.

    A model that recovered had not collapsed: what counts is the last healthy check.
    """
    if not rows:
        return None
    healthy = [index for index, row in enumerate(rows) if row["healthy"]]
    if healthy and healthy[-1] == len(rows) - 1:
        unhealthy = len(rows) - len(healthy)
        recovered = (
            f" ({unhealthy} of {len(rows)} checks were not healthy, and the model recovered)"
            if unhealthy
            else ""
        )
        last = rows[-1]["step"]
        return Advice(
            None,
            f"No reason to stop before step {last}: the last health check was healthy{recovered}.",
        )
    first_bad = rows[healthy[-1] + 1 if healthy else 0]
    reason = ", ".join(
        f"{name} {metric['value']:.2f}, limit {metric['limit']:.2f}"
        for name, metric in first_bad.items()
        if name not in ("step", "healthy") and not metric["healthy"]
    )
    if not healthy:
        return Advice(
            None,
            f"Unhealthy from the first health check on, at step {first_bad['step']} ({reason}): "
            "lower train.learning_rate, or check earlier (health.every).",
        )
    step = int(rows[healthy[-1]]["step"])
    return Advice(
        step,
        f"Stop at step {step}: after it no health check was healthy (step {first_bad['step']}: "
        f"{reason}).",
    )
