"""The comparison table from made-up results: differences, shares and spreads by arithmetic."""

from pathlib import Path

import numpy as np
import pytest

from dopsd.evaluation.benchmarks import BenchmarkResult
from dopsd.models.lora_source import LoraFile
from dopsd.pocket.benchmark import METRICS, ConceptBenchmark
from dopsd.runs.comparison.evaluate import Candidate
from dopsd.runs.comparison.table import Entry, definitions, notes, tabulate, verdict

LEARNED, RETAINED = METRICS[:3], METRICS[3:]
BENCHMARK = ConceptBenchmark.__new__(ConceptBenchmark)  # its metrics and definitions, no model


def result(shift: float, bled: float, teacher: bool = False) -> BenchmarkResult:
    """Values around 0.3: lower by `shift` under the thing's name and by `bled` under others."""
    noise = np.random.default_rng(1).normal(0, 0.02, 24)
    values = {name: 0.3 + noise - shift for name in LEARNED}
    retained = {
        name: np.zeros(0) if teacher else 0.3 + noise
        for name in ("sharpness", "speckle", "attributes")
    }
    others = np.zeros(0) if teacher else 0.3 + noise - bled
    return BenchmarkResult(values | retained | {"others_error": others}, {})


@pytest.fixture()
def entries() -> list[Entry]:
    lineup = [
        (Candidate("base", "base"), result(0, 0)),
        (Candidate("teacher", "teacher"), result(0.1, 0, teacher=True)),
        (Candidate("tuned"), result(0.08, 0.02)),
    ]
    return [Entry([who], results={nfe: [what] for nfe in (1, 4)}) for who, what in lineup]


def test_differences_are_paired_so_shared_noise_leaves_them(entries):
    scores = tabulate(entries, (1, 4), METRICS).numbers["tuned"]["nfe"]["4"]
    difference = scores["thing_error"]["difference"]
    assert (difference["low"], difference["value"], difference["high"]) == pytest.approx(
        (-0.08, -0.08, -0.08)
    )
    assert scores["thing_error"]["high"] - scores["thing_error"]["low"] > 0.01
    assert (
        scores["bleed"]["value"] == pytest.approx(0.02)
        and scores["sharpness"]["difference"]["value"] == 0
    )


def test_there_is_a_row_for_each_model_and_number_of_forwards(entries):
    outcome = tabulate(entries, (1, 4), METRICS)
    assert [row[:2] for row in outcome.table] == [
        [n, k] for n in ("base", "teacher", "tuned") for k in ("1", "4")
    ]
    assert tabulate(entries, (4,), METRICS).header == [
        "model",
        *METRICS,
        "seconds",
        "images",
        "forwards",
    ]
    teacher = outcome.numbers["teacher"]["nfe"]["1"]
    assert [name for name in METRICS if teacher[name] is None] == list(RETAINED)
    assert (
        outcome.table[4][2] == f"{np.mean(result(0.08, 0).values['thing_error']):.3f} -0.080±0.000"
    )


def test_the_share_that_bled_is_said(entries):
    assert any("tuned 25%" in note for note in notes(entries, (1, 4), BENCHMARK))


def test_repeats_are_averaged_and_each_is_listed(entries):
    both = [
        Entry(e.candidates * 2, results={4: [e.results[4][0], result(0.04, 0.0)]}) for e in entries
    ]
    score = tabulate(both, (4,), METRICS).numbers["tuned"]["nfe"]["4"]["thing_error"]
    assert score["replicates"][1] - score["replicates"][0] == pytest.approx(0.04)
    # The base model of the second repeat learned as much, so that the mean difference is halved.
    assert score["difference"]["value"] == pytest.approx(-0.04)


def test_the_spread_over_trainings_is_told(entries):
    base = entries[0]
    shifts = (0.08, 0.04, 0.06)
    loras = [Candidate("tuned", loras=(LoraFile(Path(f"{k}.safetensors")),)) for k in range(3)]
    many = [
        Entry(base.candidates * 3, results={4: base.results[4] * 3}),
        Entry(loras, results={4: [result(shift, 0.02) for shift in shifts]}),
    ]
    (sentence,) = (note for note in notes(many, (4,), BENCHMARK) if "Standard deviation" in note)
    assert "tuned thing_error 0.020, thing_hit 0.020, thing_sharp 0.020, bleed 0.000" in sentence
    assert not any("Standard deviation" in note for note in notes(entries, (4,), BENCHMARK))


def test_the_verdict_names_only_differences_beyond_their_interval(entries):
    (sentence,) = verdict(entries, 4, METRICS).splitlines()
    assert sentence == (
        "tuned differs from the base model in thing_error (-0.080±0.000), thing_hit "
        "(-0.080±0.000), thing_sharp (-0.080±0.000), bleed (+0.020±0.000)."
    )


def test_a_model_like_the_base_differs_in_no_metric(entries):
    same = Entry([Candidate("same")], results=entries[0].results)
    assert verdict([entries[0], same], 4, METRICS) == (
        "same differs from the base model in no metric."
    )


def test_every_column_is_defined_below_the_table(entries):
    terms = ", ".join(definitions(entries, BENCHMARK))
    assert all(column in terms for column in tabulate(entries, (4,), METRICS).header[1:])
