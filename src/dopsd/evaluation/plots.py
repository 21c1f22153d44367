"""Numbers of a run over its steps, or one number over another, as lines in the unit square that a
page draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MAX_POINTS = 1000  # of a curve; in a longer run each point is the mean of consecutive steps
SMOOTHED_FROM = 20  # points from which a curve is smoothed
LOGARITHMIC_FROM = 20  # highest over lowest value from which a curve is logarithmic

# Rows of metrics.jsonl; None: the number was not finite
Metrics = Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Curve:
    """Lines as (name, CSS colour, points [N, 2]), points in the unit square, y downward.

    ends: of the horizontal axis, left and right. values: at the bottom, in the middle and at the
    top. definition: what is drawn, in a sentence. axis: what the lines run over. marked: every
    point is drawn as a dot as well."""

    title: str
    lines: Sequence[tuple[str, str, np.ndarray]]
    ends: tuple[float, float]
    values: tuple[float, float, float]
    definition: str = ""
    axis: str = "step"
    marked: bool = False


def plot_curve(
    title: str, metrics: Metrics, names: Sequence[str], definition: str = ""
) -> Curve | None:
    """One name: as measured, and smoothed. Several: smoothed only, from blue (first) to orange
    (last). Short curves are not smoothed. None where no row has a value."""
    lines = []
    for index, name in enumerate(names):
        measured = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        if not measured:
            continue
        points = _thin(np.array(measured))
        colour, is_long = _colour(index, len(names)), len(points) >= SMOOTHED_FROM
        if len(names) > 1:
            lines.append((name, colour, _smooth(points) if is_long else points))
        elif is_long:
            lines.append(("as measured", "var(--faint)", points))
            lines.append(("smoothed", colour, _smooth(points)))
        else:
            lines.append(("as measured", colour, points))
    if not lines:
        return None
    every_point = np.concatenate([points for _, _, points in lines])
    (left, low), (right, high) = every_point.min(axis=0), every_point.max(axis=0)
    logarithmic = low > 0 and high > LOGARITHMIC_FROM * low
    low = low if logarithmic else min(low, 0)

    def place(points: np.ndarray) -> np.ndarray:
        steps, values = points.T
        if logarithmic:
            heights = np.log(values / low) / np.log(high / low)
        else:
            heights = (values - low) / ((high - low) or 1)
        return np.stack([(steps - left) / ((right - left) or 1), 1 - heights], axis=1)

    return Curve(
        title + (" (logarithmic)" if logarithmic else ""),
        [(name, colour, place(points)) for name, colour, points in lines],
        (left, right),
        (low, math.sqrt(low * high) if logarithmic else (low + high) / 2, high),
        definition,
    )


def plot_against(
    title: str, lines: Mapping[str, np.ndarray], axis: str, definition: str = ""
) -> Curve:
    """Lines through marked points [N, 2] (x, y), from blue (first) to orange (last). axis: the name
    of x. Both axes end at the outermost points."""
    every_point = np.concatenate(list(lines.values()))
    low, high = every_point.min(axis=0), every_point.max(axis=0)
    span = np.where(high > low, high - low, 1.0)

    def place(points: np.ndarray) -> np.ndarray:
        x, y = ((points - low) / span).T
        return np.stack([x, 1 - y], axis=1)

    placed = [
        (name, _colour(index, len(lines)), place(points))
        for index, (name, points) in enumerate(lines.items())
    ]
    (left, bottom), (right, top) = low.tolist(), high.tolist()
    ends = round(left, 3), round(right, 3)
    return Curve(title, placed, ends, (bottom, (bottom + top) / 2, top), definition, axis, True)


def _colour(index: int, count: int) -> str:
    return f"hsl({220 + 170 * index / max(1, count - 1):.0f} 65% 52%)"


def steps_per_point(steps: int) -> int:
    """How many consecutive steps a point of a curve is the mean of."""
    return max(1, math.ceil(steps / MAX_POINTS))


def _thin(points: np.ndarray) -> np.ndarray:
    group = steps_per_point(len(points))
    return np.array(
        [points[start : start + group].mean(axis=0) for start in range(0, len(points), group)]
    )


def _smooth(points: np.ndarray) -> np.ndarray:
    """Each value becomes the mean of its neighbours, a fortieth of the curve on either side."""
    reach = len(points) // 40 + 1
    means = [points[max(0, i - reach) : i + reach + 1, 1].mean() for i in range(len(points))]
    return np.stack([points[:, 0], means], axis=1)
