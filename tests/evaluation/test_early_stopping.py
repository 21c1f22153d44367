"""Early stopping advice from health checks in order."""

import pytest

from dopsd.evaluation.early_stopping import advise


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
