"""Curves of runs: what two of them keep where they have learned equally much."""

import numpy as np
import pytest

from dopsd.evaluation.curves import (
    Look,
    difference_at_equal_learning,
    equal_learning,
    values_at,
)


def look(step: int, error: float, kept: float) -> Look:
    spread = np.array([-0.1, 0.0, 0.1])
    return Look(step, {"error": error + spread, "kept": kept + spread})


BASE = look(0, 1.0, 1.0)
STEADY = [BASE, look(10, 0.6, 0.9), look(20, 0.2, 0.8)]
HASTY = [BASE, look(10, 0.4, 0.4), look(20, 0.5, 0.1)]


def test_equal_learning_is_the_lowest_error_that_every_curve_reaches():
    assert equal_learning([STEADY, HASTY], "error") == pytest.approx(0.4)


def test_values_are_interpolated_between_the_looks_around_a_level():
    assert values_at(STEADY, "error", 0.4, "kept").mean() == pytest.approx(0.85)
    assert values_at(STEADY, "error", 1.0, "kept").mean() == 1.0
    # Where a curve passes a level twice, the first time counts.
    assert values_at(HASTY, "error", 0.5, "kept").mean() == pytest.approx(0.5)


def test_a_level_that_a_curve_never_reaches_is_refused():
    with pytest.raises(ValueError, match=r"no look has an error of 0\.100 or less"):
        values_at(STEADY, "error", 0.1, "kept")


def test_the_difference_at_equal_learning_is_paired_over_prompts():
    difference = difference_at_equal_learning(STEADY, HASTY, "error", "kept")
    # The prompts differ, but by equally much in both curves: the interval has no width.
    assert tuple(difference) == pytest.approx((0.45, 0.45, 0.45))
