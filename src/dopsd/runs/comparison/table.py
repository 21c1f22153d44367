"""Comparison table with paired bootstrap intervals, its verdict and definitions, image grids."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dopsd.evaluation.benchmarks import Benchmark, BenchmarkResult
from dopsd.evaluation.pages import Panel
from dopsd.evaluation.statistics import Interval, bootstrap, paired
from dopsd.images import to_pil
from dopsd.runs.comparison.evaluate import Candidate

COSTS = ("seconds", "images", "forwards")
# Bleed is derived: by how much OTHERS is lower than the base model's.
BLEED, OTHERS = "bleed", "others_error"
CELLS = {
    "a cell": "the mean; its difference to the base model on the same prompts and noise; after ± "
    "half of the 95% bootstrap interval of that difference over prompts",
    "base, other noise": "the noise floor: the base model again, on noise of other seeds",
    "seconds, images, forwards": "of training; a backward counts as two forwards",
}
MANY_STEP = (
    "what the base model was distilled from, with classifier-free guidance: two forwards a step"
)


@dataclass(frozen=True)
class Comparison:
    """A table to print, and the same as numbers for JSON."""

    header: list[str]
    table: list[list[str]]
    numbers: dict[str, Any]


@dataclass
class Entry:
    """One row of the comparison: a model in every repeat (a data set and a seed).

    cost: seconds, images and forwards of training, means over repeats. results: by number of
    forwards, one for each repeat.
    """

    candidates: list[Candidate]
    cost: dict[str, float] = field(default_factory=dict)
    advice: str | None = None
    results: dict[int, list[BenchmarkResult]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.candidates[0].name

    @property
    def kind(self) -> str:
        return self.candidates[0].kind

    def values(self, nfe: int, metric: str) -> list[np.ndarray] | None:
        """[prompts, seeds] for each repeat; None where this model is not measured by the metric."""
        parts = [np.asarray(result.values[metric]) for result in self.results[nfe]]
        return [part.reshape(len(part), -1) for part in parts] if len(parts[0]) else None


def tabulate(entries: Sequence[Entry], nfes: Sequence[int], metrics: Sequence[str]) -> Comparison:
    """A row for each model and number of forwards: each metric, and its difference to the base
    model's (the first entry's) at the same number, with half the 95% interval of the paired
    difference."""
    many = len(nfes) > 1
    header = ["model", *(["NFE"] if many else []), *metrics, *COSTS]
    base, table, numbers = entries[0], [], {}
    for entry in entries:
        cost = [f"{entry.cost[name]:.0f}" if entry.cost else "-" for name in COSTS]
        by_nfe: dict[str, Any] = {}
        for nfe in nfes:
            scores = {metric: _score(entry, base, nfe, metric) for metric in metrics}
            cells = [_cell(score, entry is base, metric) for metric, score in scores.items()]
            table.append([entry.name, *([str(nfe)] if many else []), *cells, *cost])
            by_nfe[str(nfe)] = {
                metric: score and score.as_numbers() for metric, score in scores.items()
            }
        costs = {name: entry.cost.get(name) for name in COSTS}
        numbers[entry.name] = {
            "kind": entry.kind,
            "nfe": by_nfe,
            "advice": entry.advice,
            **costs,
        }
    return Comparison(header, table, numbers)


@dataclass(frozen=True)
class _Score:
    """A metric's mean, its paired difference to the base model's, and its mean in each repeat."""

    value: Interval
    difference: Interval
    replicates: list[float]

    @property
    def half_interval(self) -> float:
        return (self.difference.high - self.difference.low) / 2

    def as_numbers(self) -> dict[str, Any]:
        return {
            **self.value._asdict(),
            "difference": self.difference._asdict(),
            "replicates": self.replicates,
        }


def _score(entry: Entry, base: Entry, nfe: int, metric: str) -> _Score | None:
    measured = OTHERS if metric == BLEED else metric
    parts, base_parts = entry.values(nfe, measured), base.values(nfe, measured)
    if parts is None or base_parts is None:
        return None
    if metric == BLEED:  # is a difference itself
        parts = [theirs - ours for ours, theirs in zip(parts, base_parts, strict=True)]
        base_parts = [np.zeros_like(part) for part in parts]
    values, base_values = np.concatenate(parts, axis=1), np.concatenate(base_parts, axis=1)
    means = [float(np.nanmean(part)) for part in parts]
    return _Score(bootstrap(values), paired(values, base_values), means)


def _cell(score: _Score | None, is_base: bool, metric: str) -> str:
    if score is None:
        return "-"
    value = f"{score.value.value:.3f}"
    difference = score.difference
    if is_base:
        return "0" if metric == BLEED else value
    half_interval = f"±{score.half_interval:.3f}"
    if metric == BLEED:
        return f"{value}{half_interval}"
    return f"{value} {difference.value:+.3f}{half_interval}"


def panels(benchmark: Benchmark, entries: Sequence[Entry], nfes: Sequence[int]) -> list[Panel]:
    """A grid of images for each topic and number of forwards, from the first repeat; the noise
    floor is left out."""
    shown = [entry for entry in entries if entry.kind != "floor"]
    grids = []
    for topic, captions in benchmark.captions.items():
        for nfe in nfes:
            rows = [(entry.name, entry.results[nfe][0].images.get(topic, ())) for entry in shown]
            if truth := benchmark.truth.get(topic):
                rows.insert(0, ("how it should look", truth))
            pil_rows = tuple(
                (name, tuple(pil for image in images for pil in to_pil(image[None])))
                for name, images in rows
                if images
            )
            title = f"{topic}, NFE {nfe}" if len(nfes) > 1 else topic
            grids.append(Panel(title, captions, pil_rows))
    return grids


def verdict(entries: Sequence[Entry], nfe: int, metrics: Sequence[str]) -> str:
    """In which metrics each tuned model differs from the base model by more than its 95%
    interval."""
    sentences = []
    for entry in entries:
        if entry.kind != "tuned":
            continue
        scores = {metric: _score(entry, entries[0], nfe, metric) for metric in metrics}
        differences = [
            f"{metric} ({score.difference.value:+.3f}±{score.half_interval:.3f})"
            for metric, score in scores.items()
            if score and not score.difference.low <= 0 <= score.difference.high
        ]
        listed = ", ".join(differences) or "no metric"
        sentences.append(f"{entry.name} differs from the base model in {listed}.")
    return " ".join(sentences)


def definitions(entries: Sequence[Entry], benchmark: Benchmark) -> dict[str, str]:
    """What the columns, cells and rows of the table are."""
    rows = {entry.name: MANY_STEP for entry in entries if entry.kind == "many_step"}
    return {**benchmark.definitions, **rows, **CELLS}


def notes(entries: Sequence[Entry], nfes: Sequence[int], benchmark: Benchmark) -> list[str]:
    """Sentences under the images: the spread over repeats, how much of what was learned bled, and
    where training should have stopped."""
    tuned = [entry for entry in entries if entry.kind == "tuned"]
    sentences = _spread(tuned, entries[0], nfes[-1], benchmark.metrics)
    if benchmark.learned:
        sentences += _share_that_bled(tuned, entries[0], nfes[-1], benchmark.learned)
    return [*sentences, *(f"{entry.name}: {entry.advice}" for entry in tuned if entry.advice)]


def _spread(tuned: Sequence[Entry], base: Entry, nfe: int, metrics: Sequence[str]) -> list[str]:
    """The standard deviation over trainings, which the intervals over prompts do not hold."""
    rows = []
    for entry in tuned:
        if len(set(entry.candidates)) > 1:
            scores = {metric: _score(entry, base, nfe, metric) for metric in metrics}
            spreads = [
                f"{metric} {np.std(score.replicates, ddof=1):.3f}"
                for metric, score in scores.items()
                if score
            ]
            rows.append(f"{entry.name} {', '.join(spreads)}")
    if not rows:
        return []
    return [
        f"Standard deviation over the {len(base.candidates)} trainings of each recipe at {nfe} "
        f"forwards: {'; '.join(rows)}. The intervals are over prompts, with these trainings."
    ]


def _share_that_bled(tuned: Sequence[Entry], base: Entry, nfe: int, learned: str) -> list[str]:
    shares = []
    for entry in tuned:
        gain, bleed = (_score(entry, base, nfe, metric) for metric in (learned, BLEED))
        if gain and bleed and gain.difference.high < 0:
            shares.append(f"{entry.name} {-bleed.value.value / gain.difference.value:.0%}")
    if not shares:
        return []
    return [
        f"Of what was learned under the thing's name, this share also shows under other names, at "
        f"{nfe} forwards: {', '.join(shares)}."
    ]
