"""When to have stopped, from health checks in their order."""

import pytest

from dopsd.evaluation.early_stopping import advise


def health_checks(healthy: str) -> list[dict]:
    """A row every 50 steps; "-" is unhealthy."""
    sharpness = {"value": 0.8, "error": 0.01, "floor": 0.0, "limit": 0.9}
    rows = [(50 * (k + 1), each == "+") for k, each in enumerate(healthy)]
    return [{"step": s, "healthy": ok, "sharpness": sharpness | {"healthy": ok}} for s, ok in rows]


@pytest.mark.parametrize(
    ("healthy", "step", "said"),
    [
        ("++++", None, "No reason to stop before step 200: the last checkup was healthy."),
        ("+-++", None, "(1 of 4 checkups were not healthy, and it recovered)"),
        (
            "++--",
            100,
            "Stop at step 100: after it no checkup was healthy (step 150: sharpness 0.80, limit 0.90)",
        ),
        ("+-+--+", None, "No reason"),
        ("+-+--", 150, "Stop at step 150"),
        ("--", None, "Unhealthy from the first checkup on, at step 50"),
    ],
)
def test_the_last_healthy_checkup_is_the_place_to_stop_unless_the_run_ends_healthy(
    healthy, step, said
):
    found = advise(health_checks(healthy))
    assert found is not None and found.step == step and said in found.sentence


def test_without_checkups_there_is_no_advice():
    assert advise([]) is None
