"""When a run should have ended: its health checks (health.jsonl) as one sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Advice:
    """step: the last one to train to (None: there is no reason to end earlier, or no healthy step
    to go back to)."""

    step: int | None
    sentence: str


def advise(rows: Sequence[Mapping[str, Any]]) -> Advice | None:
    """From rows of health.jsonl, in order; None where there was no health check. A model that
    recovers had not collapsed: what counts is the healthy health check after which there was none.
    """
    if not rows:
        return None
    healthy = [index for index, row in enumerate(rows) if row["healthy"]]
    if healthy and healthy[-1] == len(rows) - 1:
        passing = len(rows) - len(healthy)
        some = (
            f" ({passing} of {len(rows)} checkups were not healthy, and it recovered)"
            if passing
            else ""
        )
        return Advice(
            None,
            f"No reason to stop before step {rows[-1]['step']}: the last checkup was healthy{some}.",
        )
    ill = rows[healthy[-1] + 1 if healthy else 0]
    metrics = {name: found for name, found in ill.items() if name not in ("step", "healthy")}
    why = ", ".join(
        f"{n} {m['value']:.2f}, limit {m['limit']:.2f}"
        for n, m in metrics.items()
        if not m["healthy"]
    )
    if not healthy:
        return Advice(
            None,
            f"Unhealthy from the first checkup on, at step {ill['step']} ({why}): lower "
            "train.learning_rate, or look sooner (health.every).",
        )
    step = int(rows[healthy[-1]]["step"])
    return Advice(
        step, f"Stop at step {step}: after it no checkup was healthy (step {ill['step']}: {why})."
    )
