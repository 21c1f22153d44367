"""Runs as curves: what a model has learned and kept at looks along its training, and what two runs
keep where they have learned equally much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dopsd.evaluation.statistics import Interval, paired


@dataclass(frozen=True)
class Look:
    """A model after `step` optimizer steps; step 0 is the base model. values: metric -> one value a
    prompt, [N] or [prompts, seeds], the same prompts and noise at every look."""

    step: int
    values: Mapping[str, np.ndarray]

    def mean(self, metric: str) -> float:
        return float(np.nanmean(self.values[metric]))


def equal_learning(curves: Sequence[Sequence[Look]], error: str) -> float:
    """The lowest error that every curve reaches."""
    return max(min(look.mean(error) for look in curve) for curve in curves)


def values_at(curve: Sequence[Look], error: str, level: float, kept: str) -> np.ndarray:
    """The values of a metric where the mean error first falls to `level`, interpolated linearly
    between the looks around that. Raises ValueError where the curve does not fall so far."""
    before = curve[0]
    for after in curve:
        if after.mean(error) <= level:
            fall = before.mean(error) - after.mean(error)
            share = (before.mean(error) - level) / fall if fall > 0 else 1.0
            return before.values[kept] + share * (after.values[kept] - before.values[kept])
        before = after
    raise ValueError(f"no look has an {error} of {level:.3f} or less.")


def difference_at_equal_learning(
    ours: Sequence[Look], other: Sequence[Look], error: str, kept: str
) -> Interval:
    """What `ours` keeps more than `other` where both have the lowest error that both reach: the
    mean paired difference and its 95% interval over prompts."""
    level = equal_learning([ours, other], error)
    return paired(values_at(ours, error, level, kept), values_at(other, error, level, kept))


def sentence_of(gain: Interval, metric: str, ours: str, other: str) -> str:
    """What such a difference shows, in words."""
    where = "where both have learned equally much"
    if gain.low > 0:
        return f"{ours} keeps more {metric} than {other} {where}: by {gain}."
    if gain.high < 0:
        return f"{ours} keeps less {metric} than {other} {where}: by {-gain.value:.3f} " + (
            f"[{-gain.high:.3f}, {-gain.low:.3f}]."
        )
    return f"Not shown: that {ours} keeps more {metric} than {other} {where} ({gain})."
