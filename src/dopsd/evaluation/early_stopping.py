"""Early stopping advice: one sentence from the health checks of a run (health.jsonl)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Advice:
    """step: the last step to train to; None if there is no reason to stop earlier, or no healthy
    step to return to."""

    step: int | None
    sentence: str


def advise(rows: Sequence[Mapping[str, Any]]) -> Advice | None:
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
