"""The rows of benchmarks/results/claim.jsonl as curves, each relative to its base model."""

from collections.abc import Sequence
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
from claim_arms import ARMS

from dopsd.evaluation.curves import Look

Row = dict[str, Any]
Curve = list[Look]
# Of a look beside what it measures: `sharpness` is the share of the base model's, `attributes` the
# difference to it, `bleed` by how much thing_error under other names is lower.
AS_MEASURED = ("thing_error", "thing_hit", "thing_sharp", "drift", "forwards", "seconds")
GOAL = 0.6  # share of the gap in thing_error between base model and teacher that is closed


class Rows:
    """Rows of one checkpoint. A row's key: stage, regime, arm, concept, seed, rate, settings."""

    def __init__(self, rows: Sequence[Row]):
        self.all = list(rows)

    @cached_property
    def keys(self) -> frozenset[tuple[Any, ...]]:
        """The cells that are measured."""
        return frozenset(self._by_key)

    @cached_property
    def _by_key(self) -> dict[tuple[Any, ...], list[Row]]:
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.all:
            found.setdefault(tuple(row["key"]), []).append(row)
        return found

    def reference(self, stage: str, regime: str, concept: int, of: str = "base") -> Row | None:
        """The row of a model that needs no training."""
        rows = self._by_key.get((stage, regime, "references", concept, 0, None, ""), ())
        return next((row for row in rows if row["of"] == of), None)

    def curve(
        self, stage: str, regime: str, arm: str, concept: int, seed: int, rate: float
    ) -> Curve:
        """The looks of a training in order; empty where it is not measured, or failed."""
        base = self.reference(stage, regime, concept)
        rows = self._by_key.get((stage, regime, arm, concept, seed, rate, ARMS[arm].mark), ())
        if base is None or any("failed" in row for row in rows):
            return []
        return [Look(row["step"], _relative(row, base)) for row in rows]

    @cached_property
    def _last_rows(self) -> list[Row]:
        ends = [rows[-1] for rows in self._by_key.values()]
        return [row for row in ends if "wall" in row]

    @property
    def seconds_per_forward(self) -> float | None:
        """Of training, the median over trainings; None where there is none."""
        rates = [row["seconds"] / row["forwards"] for row in self._last_rows]
        return median(rates) if rates else None

    @property
    def seconds_per_look(self) -> float | None:
        """With what is loaded and encoded before the first look; median as above."""
        each = [
            (row["wall"] - row["seconds"]) / len(self._by_key[tuple(row["key"])])
            for row in self._last_rows
        ]
        return median(each) if each else None


def goal_of(rows: Rows, stage: str, regime: str, concept: int) -> float | None:
    """The thing_error at which learning counts as equal; None before the references are there."""
    base = rows.reference(stage, regime, concept)
    teacher = rows.reference(stage, regime, concept, "teacher, target")
    if base is None or teacher is None:
        return None
    return base["thing_error"] - GOAL * (base["thing_error"] - teacher["thing_error"])


def _relative(row: Row, base: Row) -> dict[str, np.ndarray]:
    values = {name: row[name] for name in AS_MEASURED}
    values["sharpness"] = row["sharpness"] / base["sharpness"]
    values["attributes"] = row["attributes"] - base["attributes"]
    values["bleed"] = base["others_error"] - row["others_error"]
    return {name: np.array([value]) for name, value in values.items()}
