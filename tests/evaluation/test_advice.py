"""When to have stopped, from checkups in their order."""

import pytest

from dopsd.evaluation.advice import advise


def checkups(healthy: str) -> list[dict]:
    """A row every 50 steps; "-" is unhealthy."""
    sharpness = {"value": 0.8, "error": 0.01, "floor": 0.0, "limit": 0.9}
    rows = [(50 * (k + 1), each == "+") for k, each in enumerate(healthy)]
    return [{"step": s, "healthy": ok, "sharpness": sharpness | {"healthy": ok}} for s, ok in rows]


@pytest.mark.parametrize(
    ("healthy", "step", "said"),
    [
        ("++++", None, "No reason to stop before step 200"),
        ("+-++", None, "No reason"),  # one alone may be chance
        ("++--", 100, "Stop at step 100: from step 150 on it is no longer healthy (sharpness 0.80, limit 0.90)"),
        ("+-+--+", 150, "Stop at step 150"),
        ("+++-", 150, "Stop at step 150"),  # at the end nothing speaks for chance
        ("--++", None, "Unhealthy from the first checkup on, at step 50"),
    ],
)
def test_two_unhealthy_checkups_in_a_row_are_a_reason_to_stop_before_them(healthy, step, said):
    found = advise(checkups(healthy))
    assert found is not None and found.step == step and said in found.sentence


def test_without_checkups_there_is_no_advice():
    assert advise([]) is None
