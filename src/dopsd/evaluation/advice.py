"""When a run should have ended: its checkups (health.jsonl) as one sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IN_A_ROW = 2  # unhealthy checkups that are no chance; one at the very end counts as well


@dataclass(frozen=True)
class Advice:
    """step: the last one to train to (None: there is no reason to end earlier, or no healthy step to go back to)."""

    step: int | None
    sentence: str


def advise(rows: Sequence[Mapping[str, Any]]) -> Advice | None:
    """From rows of health.jsonl, in order; None where there was no checkup."""
    if not rows:
        return None
    for index, row in enumerate(rows):
        if not any(each["healthy"] for each in rows[index : index + IN_A_ROW]):
            return _ended(row, rows[index - 1] if index else None)
    return Advice(None, f"No reason to stop before step {rows[-1]['step']}: no two checkups in a row were unhealthy.")


def _ended(ill: Mapping[str, Any], before: Mapping[str, Any] | None) -> Advice:
    measures = {name: found for name, found in ill.items() if name not in ("step", "healthy")}
    why = ", ".join(f"{n} {m['value']:.2f}, limit {m['limit']:.2f}" for n, m in measures.items() if not m["healthy"])
    if before is None:
        return Advice(None, f"Unhealthy from the first checkup on, at step {ill['step']} ({why}): lower "
                            "train.learning_rate, or look sooner (health.every).")  # fmt: skip
    return Advice(int(before["step"]), f"Stop at step {before['step']}: from step {ill['step']} on it is no longer "
                                       f"healthy ({why}).")  # fmt: skip
