"""Curves: where their points are placed."""

import numpy as np
import pytest

from dopsd.evaluation.plots import MAX_POINTS, SMOOTHED_FROM, plot_against, plot_curve


def rows(values: list[float | None]) -> list[dict[str, float | None]]:
    return [{"step": step, "loss": value} for step, value in enumerate(values, start=1)]


def test_a_short_curve_is_drawn_as_measured_from_zero_to_its_highest_value():
    curve = plot_curve("loss", rows([1.0, 4.0, 2.0]), ["loss"])
    ((name, _, points),) = curve.lines
    assert name == "as measured" and curve.values == (0, 2.0, 4.0) and curve.ends == (1, 3)
    assert points.tolist() == [[0, 0.75], [0.5, 0], [1, 0.5]]


def test_a_long_curve_is_smoothed_as_well():
    values = [float(step % 2) + 1 for step in range(SMOOTHED_FROM)]
    measured, smoothed = plot_curve("loss", rows(values), ["loss"]).lines
    assert [measured[0], smoothed[0]] == ["as measured", "smoothed"]
    assert np.ptp(smoothed[2][1:-1, 1]) == pytest.approx(np.ptp(measured[2][:, 1]) / 3)


def test_a_wide_range_is_drawn_on_a_logarithmic_scale():
    curve = plot_curve("loss", rows([100.0, 10.0, 1.0]), ["loss"])
    assert curve.title == "loss (logarithmic)" and curve.values == pytest.approx((1, 10, 100))
    assert curve.lines[0][2][:, 1] == pytest.approx([0, 0.5, 1])


def test_steps_that_were_not_finite_are_left_out():
    curve = plot_curve("loss", rows([1.0, None, 2.0]), ["loss"])
    assert curve.lines[0][2][:, 0].tolist() == [0, 1]
    assert plot_curve("loss", rows([None]), ["loss"]) is None


def test_a_long_run_is_thinned_to_means_of_consecutive_steps():
    curve = plot_curve("loss", rows([1.0, 3.0] * MAX_POINTS), ["loss"])
    points = curve.lines[0][2]
    assert len(points) == MAX_POINTS and np.ptp(points[:, 1]) == 0


def test_one_number_over_another_fills_the_square_and_marks_its_points():
    lines = {"sft": np.array([[0.0, 1.0], [0.5, 0.5]]), "ours": np.array([[0.0, 1.0], [0.4, 0.9]])}
    curve = plot_against("kept", lines, "learned")
    assert curve.axis == "learned" and curve.marked
    assert curve.ends == (0, 0.5) and curve.values == (0.5, 0.75, 1)
    assert curve.lines[0][2].tolist() == [[0, 0], [1, 1]]
    assert curve.lines[1][2] == pytest.approx(np.array([[0, 0], [0.8, 0.2]]))
