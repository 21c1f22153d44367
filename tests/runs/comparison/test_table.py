"""The table of a comparison, from answers that are made up: differences, floors and shares by plain
arithmetic."""

import numpy as np
import pytest

from dopsd.evaluation.benchmarks import BenchmarkResult
from dopsd.runs.comparison.evaluate import Candidate
from dopsd.runs.comparison.table import KEPT, METRICS, Entry, notes, tabulate

RNG = np.random.default_rng(0)
LEARNED = ("thing_error", "thing_hit")


def answer(shift: float, bled: float, teacher: bool = False) -> BenchmarkResult:
    """As far below 0.3 as `shift` under the thing's name, and `bled` under others."""
    noise = np.random.default_rng(1).normal(0, 0.02, 24)
    values = {name: 0.3 + noise - shift for name in LEARNED}
    kept = {
        name: np.zeros(0) if teacher else 0.3 + noise
        for name in ("sharpness", "speckle", "attributes")
    }
    others = np.zeros(0) if teacher else 0.3 + noise - bled
    return BenchmarkResult(values | kept | {"others_error": others}, {})


@pytest.fixture()
def entries() -> list[Entry]:
    lineup = [
        (Candidate("base", "base"), answer(0, 0)),
        (Candidate("teacher", "teacher"), answer(0.1, 0, teacher=True)),
        (Candidate("tuned"), answer(0.08, 0.02)),
    ]
    return [Entry([who], answers={nfe: [what] for nfe in (1, 4)}) for who, what in lineup]


def test_differences_are_paired_so_shared_noise_leaves_them(entries):
    found = tabulate(entries, (1, 4), measured=True).numbers["tuned"]["nfe"]["4"]
    by = found["thing_error"]["difference"]
    assert (by["low"], by["value"], by["high"]) == pytest.approx((-0.08, -0.08, -0.08))
    assert found["thing_error"]["high"] - found["thing_error"]["low"] > 0.01
    assert (
        found["bleed"]["value"] == pytest.approx(0.02)
        and found["sharpness"]["difference"]["value"] == 0
    )


def test_there_is_a_row_for_each_model_and_number_of_forwards(entries):
    outcome = tabulate(entries, (1, 4), measured=True)
    assert [row[:2] for row in outcome.table] == [
        [n, k] for n in ("base", "teacher", "tuned") for k in ("1", "4")
    ]
    assert tabulate(entries, (4,), measured=True).header == [
        "model",
        *METRICS,
        "seconds",
        "images",
        "forwards",
    ]
    teacher = outcome.numbers["teacher"]["nfe"]["1"]
    assert [name for name in METRICS if teacher[name] is None] == list(KEPT)
    assert (
        outcome.table[4][2] == f"{np.mean(answer(0.08, 0).values['thing_error']):.3f} -0.080±0.000"
    )


def test_the_share_that_bled_is_said(entries):
    assert any("tuned 25%" in note for note in notes(entries, (1, 4), measured=True))


def test_units_stand_beside_each_other_and_each_is_kept(entries):
    both = [
        Entry(e.candidates * 2, answers={4: [e.answers[4][0], answer(0.04, 0.0)]}) for e in entries
    ]
    found = tabulate(both, (4,), measured=True).numbers["tuned"]["nfe"]["4"]["thing_error"]
    assert found["replicates"][1] - found["replicates"][0] == pytest.approx(0.04)
    assert found["difference"]["value"] == pytest.approx(
        -0.04
    )  # the second unit's base learned as much: no difference
