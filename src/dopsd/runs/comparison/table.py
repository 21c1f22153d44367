"""Who did how well in a comparison: one table with paired intervals, the same as numbers, and grids
of images.

Knows answers, not models: what is asked is left to `contest`, who is trained to `compare`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dopsd.evaluation.benchmarks import Benchmark, BenchmarkResult
from dopsd.evaluation.pages import Panel
from dopsd.evaluation.statistics import Interval, bootstrap, paired
from dopsd.images import to_pil
from dopsd.runs.comparison.evaluate import Candidate

METRICS = ("thing_error", "thing_hit", "bleed", "sharpness", "speckle", "attributes")
KEPT = (
    "bleed",
    "sharpness",
    "speckle",
    "attributes",
)  # read on other prompts; the teacher's row has none
BLEED, OTHERS = "bleed", "others_error"  # bleed: how much lower than the base's this is


@dataclass(frozen=True)
class Outcome:
    """What a comparison found: a table to print, and the same as numbers."""

    header: list[str]
    table: list[list[str]]
    numbers: dict[str, Any]


@dataclass
class Entry:
    """A line-up of one candidate in every unit: what its tuning cost (mean over units), and its
    answers by number of forwards, unit by unit."""

    candidates: list[Candidate]
    cost: dict[str, float] = field(default_factory=dict)  # seconds, images, forwards
    advice: str | None = None
    answers: dict[int, list[BenchmarkResult]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.candidates[0].name

    def values(self, nfe: int, metric: str) -> np.ndarray | None:
        """Of every question, [N, units or seeds]; None where this candidate is not asked."""
        parts = [answer.values[metric] for answer in self.answers[nfe]]
        columns = [part[:, None] if part.ndim == 1 else part for part in parts]
        return np.concatenate(columns, axis=1) if len(parts[0]) else None


def tabulate(entries: Sequence[Entry], nfes: Sequence[int], measured: bool) -> Outcome:
    """A row a model and number of forwards: each measure, and by how much it differs from the base
    model's at the same number, give or take half the 95% interval of the paired difference.
    measured: on a pocket concept dataset."""
    metrics = METRICS if measured else (BLEED,)
    many = len(nfes) > 1
    header = ["model", *(["NFE"] if many else []), *metrics, "seconds", "images", "forwards"]
    base, table, numbers = entries[0], [], {}
    for entry in entries:
        cost = [f"{entry.cost[name]:.0f}" if entry.cost else "-" for name in header[-3:]]
        found: dict[str, Any] = {}
        for nfe in nfes:
            scores = {metric: _score(entry, base, nfe, metric) for metric in metrics}
            cells = [_cell(score, entry is base, metric) for metric, score in scores.items()]
            table.append([entry.name, *([str(nfe)] if many else []), *cells, *cost])
            found[str(nfe)] = {
                metric: score and score.as_numbers() for metric, score in scores.items()
            }
        kind = entry.candidates[0].kind
        numbers[entry.name] = {
            "kind": kind,
            "nfe": found,
            "advice": entry.advice,
            **{n: entry.cost.get(n) for n in header[-3:]},
        }
    return Outcome(header, table, numbers)


@dataclass(frozen=True)
class _Score:
    """A measure's mean, the paired difference to the base model's, and the mean in each unit."""

    value: Interval
    difference: Interval
    replicates: list[float]

    def as_numbers(self) -> dict[str, Any]:
        return {
            **self.value._asdict(),
            "difference": self.difference._asdict(),
            "replicates": self.replicates,
        }


def _score(entry: Entry, base: Entry, nfe: int, metric: str) -> _Score | None:
    mine = entry.values(nfe, OTHERS if metric == BLEED else metric)
    theirs = base.values(nfe, OTHERS if metric == BLEED else metric)
    if mine is None or theirs is None:
        return None
    if metric == BLEED:  # a difference already
        mine, theirs = theirs - mine, np.zeros_like(mine)
    return _Score(
        bootstrap(mine), paired(mine, theirs), [float(np.nanmean(column)) for column in mine.T]
    )


def _cell(score: _Score | None, is_base: bool, metric: str) -> str:
    if score is None:
        return "-"
    value = f"{score.value.value:.3f}"
    difference = score.difference
    if is_base:
        return "0" if metric == BLEED else value
    give_or_take = f"±{(difference.high - difference.low) / 2:.3f}"
    return (
        f"{value}{give_or_take}"
        if metric == BLEED
        else f"{value} {difference.value:+.3f}{give_or_take}"
    )


def panels(questions: Benchmark, entries: Sequence[Entry], nfes: Sequence[int]) -> list[Panel]:
    """A grid for each topic and number of forwards, of the first unit; nobody is shown on other
    noise."""
    shown = [entry for entry in entries if entry.candidates[0].kind != "floor"]
    found = []
    for topic, captions in questions.captions.items():
        for nfe in nfes:
            rows = [(entry.name, entry.answers[nfe][0].images.get(topic, ())) for entry in shown]
            wanted = questions.truth.get(topic)
            rows = [
                *([("how it should look", wanted)] if wanted else []),
                *(row for row in rows if row[1]),
            ]
            title = f"{topic}, NFE {nfe}" if len(nfes) > 1 else topic
            pil_rows = tuple(
                (name, tuple(i for p in images for i in to_pil(p[None]))) for name, images in rows
            )
            found.append(Panel(title, captions, pil_rows))
    return found


def notes(entries: Sequence[Entry], nfes: Sequence[int], measured: bool) -> list[str]:
    """What the table's words mean, how much of what was learned shows under other words, and when
    to have stopped."""
    said = [
        "Each cell: the mean; the mean difference to the untouched model on the same prompts and noise; after ± half "
        'of its 95% bootstrap interval over prompts. The row "base, other noise" is the noise floor. Forwards are '
        "those of training, a backward counted as two."
    ]
    if not measured:
        return [
            *said,
            "bleed: by how much pictures of prompts that name nothing of the data are nearer to the nearest "
            "training picture than the untouched model's (0 to 1; 0 is none).",
            *_advice(entries),
        ]
    said += [
        "thing_error (lower is better) and thing_hit (higher) compare 24 unseen scenes with the true thing; bleed is "
        "by how much thing_error falls, against the untouched model, where the prompt gives another name or none; "
        "sharpness, speckle (lower) and attributes are read on 96 unrelated prompts.",
        "The teacher is the untouched model with one of the pictures in its context: what D-OPSD learns from.",
    ]
    if any(entry.candidates[0].kind == "parent" for entry in entries):
        said.append(
            "The parent is the many-step model that it was distilled from, under guidance: two forwards a step."
        )
    nfe = nfes[-1]
    shares = []
    for entry in entries:
        if entry.candidates[0].kind == "tuned":
            learned, bled = (
                _score(entry, entries[0], nfe, metric) for metric in ("thing_error", BLEED)
            )
            if learned and bled and learned.difference.high < 0:
                shares.append(f"{entry.name} {-bled.value.value / learned.difference.value:.0%}")
    if shares:
        said.append(
            f"Of what was learned under the thing's name, at {nfe} forwards this also shows under others: "
            f"{', '.join(shares)}."
        )
    return [*said, *_advice(entries)]


def _advice(entries: Sequence[Entry]) -> list[str]:
    return [f"{entry.name}: {entry.advice}" for entry in entries if entry.advice]
