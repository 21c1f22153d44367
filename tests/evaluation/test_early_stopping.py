"""Early stopping advice from health checks in order, and the plateau on synthetic runs."""

import numpy as np
import pytest

from dopsd.evaluation.early_stopping import advise, plateau


def health_checks(healthy: str) -> list[dict]:
    """A row every 50 steps; "-" is unhealthy."""
    sharpness = {"value": 0.8, "error": 0.01, "floor": 0.0, "limit": 0.9}
    rows = [(50 * (k + 1), each == "+") for k, each in enumerate(healthy)]
    return [{"step": s, "healthy": ok, "sharpness": sharpness | {"healthy": ok}} for s, ok in rows]


@pytest.mark.parametrize(
    ("healthy", "step", "sentence"),
    [
        ("++++", None, "No reason to stop before step 200: the last health check was healthy."),
        ("+-++", None, "(1 of 4 checks were not healthy, and the model recovered)"),
        (
            "++--",
            100,
            "Stop at step 100: after it no health check was healthy "
            "(step 150: sharpness 0.80, limit 0.90)",
        ),
        ("+-+--+", None, "No reason"),
        ("+-+--", 150, "Stop at step 150"),
        ("--", None, "Unhealthy from the first health check on, at step 50"),
    ],
)
def test_the_last_healthy_check_is_the_step_to_stop_at_unless_the_run_ends_healthy(
    healthy, step, sentence
):
    advice = advise(health_checks(healthy))
    assert advice is not None and advice.step == step and sentence in advice.sentence


def test_without_health_checks_there_is_no_advice():
    assert advise([]) is None


EVERY = 50  # steps between health checks
STEPS = np.arange(1, 601)


def first_plateau(losses: np.ndarray, drifts: np.ndarray, patience: int = 3) -> int | None:
    """The step at which a run with this loss at each step and this drift at each check ends."""
    checks = []
    for index, drift in enumerate(drifts):
        step = EVERY * (index + 1)
        checks.append({"step": step, "healthy": True, "drift": {"value": float(drift)}})
        metrics = [{"step": s + 1, "loss": float(losses[s])} for s in range(step)]
        if plateau(checks, metrics, patience):
            return step
    return None


def noise_of(seed: int, size: int, share: float) -> np.ndarray:
    return 1 + share * np.random.default_rng(seed).standard_normal(size)


GROWING = np.linspace(0.1, 0.5, 12)
FALLS_UNTIL_300 = np.where(STEPS <= 300, 1 - 0.7 * STEPS / 300, 0.3)


def test_a_run_ends_once_its_loss_is_flat_and_its_drift_grows():
    """Three checks after the fall has ended: the interval before them is the last one of the fall
    at step 450, and flat at 500."""
    ends = {first_plateau(FALLS_UNTIL_300 * noise_of(s, 600, 0.2), GROWING) for s in range(20)}
    assert ends <= {450, 500} and 500 in ends


@pytest.mark.parametrize("patience", [2, 3, 4])
def test_without_noise_the_first_interval_of_the_window_must_be_flat_itself(patience):
    assert first_plateau(FALLS_UNTIL_300, GROWING, patience) == 350 + EVERY * patience


def test_a_run_that_still_learns_goes_on():
    falling = np.exp(-STEPS / 300)
    ends = [first_plateau(falling * noise_of(s, 600, 0.2), GROWING) for s in range(20)]
    assert ends == [None] * 20


def test_a_run_that_does_not_drift_goes_on():
    """Flat drift that only chance moves, and drift that falls."""
    flat = np.full(600, 0.3)
    for seed in range(20):
        losses = flat * noise_of(seed, 600, 0.2)
        assert first_plateau(losses, np.full(12, 0.3)) is None
        assert first_plateau(losses, GROWING[::-1]) is None
    by_chance = [first_plateau(flat, 0.3 * noise_of(s, 12, 0.01)) for s in range(200)]
    assert sum(end is not None for end in by_chance) < 10


def test_growth_below_5_percent_or_with_a_step_back_does_not_count():
    flat = np.full(600, 0.3) * noise_of(0, 600, 0.2)
    assert first_plateau(flat, np.linspace(0.3, 0.35, 12)) is None
    assert first_plateau(flat, np.tile([0.2, 0.3, 0.25, 0.4], 3)) is None


def test_the_reason_names_the_step_the_losses_and_the_drift():
    checks = [{"step": 50 * k, "healthy": True, "drift": {"value": 0.1 * k}} for k in range(1, 5)]
    metrics = [{"step": step, "loss": 0.3 + 0.01 * (step % 2)} for step in range(1, 201)]
    metrics[7]["loss"] = None  # a step that was skipped
    assert plateau(checks, metrics, 3) == (
        "since step 50 the loss has not fallen (0.305 before, 0.305 since), and drift has grown "
        "from 0.10 to 0.40"
    )
    assert plateau(checks[:3], metrics, 3) is None
