"""Numbers of a run over its steps, as lines in the unit square that a page draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

POINTS = 1000  # of a curve; in a longer run each point is the mean of consecutive steps
# Of metrics.jsonl, whatever the method.
COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "images", "seconds", "skipped")
WIDE = 20  # highest over lowest value from which a curve is logarithmic

Metrics = Sequence[Mapping[str, float | None]]  # None: it was not finite


@dataclass(frozen=True)
class Curve:
    """Lines over steps as (name, colour of CSS, points [N, 2]), points in the unit square, y
    downward. steps: at the left and right end; values: at the bottom, in the middle and at the top.
    """

    title: str
    lines: Sequence[tuple[str, str, np.ndarray]]
    steps: tuple[float, float]
    values: tuple[float, float, float]


def curves_of(metrics: Metrics) -> list[Curve]:
    """Loss, its parts at the steps of the walk, gradient norm, and whatever else the method
    reported."""
    names = dict.fromkeys(name for row in metrics for name in row)
    parts = sorted(
        (name for name in names if name.startswith("loss_at_")), key=lambda name: (len(name), name)
    )
    singles = ["grad_norm", *(name for name in names if name not in COLUMNS and name not in parts)]
    together = [curve_of("loss at each step of the walk", metrics, parts)] if parts else []
    return [
        curve_of("loss", metrics, ["loss"]),
        *together,
        *(curve_of(name, metrics, [name]) for name in singles),
    ]


def curve_of(title: str, metrics: Metrics, names: Sequence[str]) -> Curve:
    """One name: as measured, and smoothed. Several: smoothed only, from blue (first) to orange
    (last)."""
    lines = []
    for index, name in enumerate(names):
        points = _thinned(
            np.array([(row["step"], row[name]) for row in metrics if row.get(name) is not None])
        )
        if len(names) == 1:
            lines.append(("as measured", "var(--faint)", points))
        hue = 220 + 170 * index / max(1, len(names) - 1)
        lines.append(
            ("smoothed" if len(names) == 1 else name, f"hsl({hue:.0f} 65% 52%)", _smoothed(points))
        )
    everything = np.concatenate([points for _, _, points in lines])
    (left, low), (right, high) = everything.min(axis=0), everything.max(axis=0)
    logarithmic = low > 0 and high > WIDE * low
    low = low if logarithmic else min(low, 0)

    def place(points: np.ndarray) -> np.ndarray:
        steps, values = points.T
        risen = (
            np.log(values / low) / np.log(high / low)
            if logarithmic
            else (values - low) / ((high - low) or 1)
        )
        return np.stack([(steps - left) / ((right - left) or 1), 1 - risen], axis=1)

    middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
    placed = [(name, colour, place(points)) for name, colour, points in lines]
    return Curve(
        title + (" (logarithmic)" if logarithmic else ""),
        placed,
        (left, right),
        (low, middle, high),
    )


def _thinned(points: np.ndarray) -> np.ndarray:
    group = math.ceil(len(points) / POINTS)
    return np.array(
        [points[start : start + group].mean(axis=0) for start in range(0, len(points), group)]
    )


def _smoothed(points: np.ndarray) -> np.ndarray:
    """Each value becomes the mean of its neighbours, a fortieth of the curve on either side."""
    reach = len(points) // 40 + 1
    means = [points[max(0, i - reach) : i + reach + 1, 1].mean() for i in range(len(points))]
    return np.stack([points[:, 0], means], axis=1)
