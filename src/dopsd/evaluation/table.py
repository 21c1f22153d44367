"""Measures of image sets as rows: value, paired difference to the base, noise floor, and what could
not be measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dopsd.evaluation.image_sets import AGAIN, BASE, ImageSet, Progress
from dopsd.evaluation.metrics import Found, find_metric, named_metric
from dopsd.evaluation.metrics.fid import fid, kid
from dopsd.evaluation.scores import MetricUnavailable, Scored, features, score
from dopsd.evaluation.statistics import Interval, bootstrap, paired

ENOUGH = 2048  # images, below which FID depends more on their number than on what they show
HEADER = ["measure", "images", "nfe", "value", "minus base", "noise floor", "note"]


@dataclass(frozen=True)
class Row:
    """One measure of one image set. difference: to the base on the same prompts and noise; floor:
    how far the base is from itself on other noise; a difference within it says nothing."""

    metric: str
    better: str  # higher or lower
    image_set: str = ""
    nfe: int | None = None
    value: Interval | None = None
    difference: Interval | None = None
    floor: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """As HEADER says."""
        shown = [_text(each) for each in (self.value, self.difference)]
        floor = "-" if self.floor is None else f"{self.floor:.3f}"
        arrow = {"higher": " ↑", "lower": " ↓", "": ""}[self.better]
        return [
            self.metric + arrow,
            self.image_set or "-",
            str(self.nfe or "-"),
            *shown,
            floor,
            self.note,
        ]

    def numbers(self) -> dict[str, Any]:
        """The same for JSON, which knows neither NaN nor infinity."""
        row = asdict(self)
        for key in ("value", "difference"):
            if row[key] is not None:
                row[key] = [number if math.isfinite(number) else None for number in row[key]]
        return row


def _text(interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.value):
        return "-"
    return str(interval) if math.isfinite(interval.high - interval.low) else f"{interval.value:.3f}"


def tabulate(
    metrics: Sequence[str],
    image_sets: Sequence[ImageSet],
    reference: Sequence[Path],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Row]:
    """Rows of each measure, one model in memory at a time; what it found lies under
    `folder/scores`. reference: the images that FID and KID compare with. A measure whose model
    cannot be had is a row that says so."""
    rows: list[Row] = []
    for name in metrics:
        short, _, metric = named_metric(name)
        better = "higher" if metric.higher else "lower"
        try:
            try:
                found = find_metric(name)
            except ValueError as error:
                raise MetricUnavailable(str(error)) from error
            if metric.needs == "set":
                rows += _of_sets(found, better, image_sets, reference, folder, device, progress)
            else:
                rows += _of_images(found, better, image_sets, folder, device, progress)
        except MetricUnavailable as gap:
            rows.append(Row(short, better, note=f"not measured: {gap}"))
    return rows


def _of_images(
    found: Found,
    better: str,
    image_sets: Sequence[ImageSet],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Row]:
    scored = dict(zip(image_sets, score(found, image_sets, folder, device, progress), strict=True))
    if not any(each.asked for each in scored.values()):
        raise MetricUnavailable("no prompt has a target picture that it would be compared with.")
    rows = []
    for image_set in (g for g in image_sets if g.name != AGAIN):
        base, again = (_beside(image_set, name, scored) for name in (BASE, AGAIN))
        mine = scored[image_set]
        difference = paired(mine.values, base.values) if base and image_set.name != BASE else None
        floor = _reach(paired(again.values, base.values)) if base and again else None
        note = "; ".join([*_remarks(found, mine), *_weight(difference, floor)])
        rows.append(
            Row(
                found.short,
                better,
                image_set.name,
                image_set.nfe,
                bootstrap(mine.values),
                difference,
                floor,
                note,
            )
        )
    return rows


def _beside(image_set: ImageSet, name: str, scored: Mapping[ImageSet, Any]) -> Any:
    """What the image set of that name at the same number of forwards scored."""
    return next(
        (
            each
            for other, each in scored.items()
            if other.name == name and other.nfe == image_set.nfe
        ),
        None,
    )


def _reach(interval: Interval) -> float:
    """The farther end of an interval around no difference."""
    return max(abs(interval.low), abs(interval.high))


def _weight(difference: Interval | None, floor: float | None) -> list[str]:
    """What to say of a difference that seeds alone would make."""
    if difference is None or (
        (difference.low > 0 or difference.high < 0) and abs(difference.value) > (floor or 0)
    ):
        return []
    return ["no difference beyond noise"]


def _remarks(found: Found, scored: Scored) -> list[str]:
    remarks = []
    if scored.answered < scored.asked:
        remarks.append(
            f"{scored.asked - scored.answered} of {scored.asked} pictures without an answer"
        )
    usual = Path(found.metric.model or "").name
    if usual and Path(found.model).name != usual:
        remarks.append(f"not comparable with numbers by {usual}")
    if len(scored.values) < 2:
        remarks.append("one prompt: the interval is over its seeds")
    return remarks


def _of_sets(
    found: Found,
    better: str,
    image_sets: Sequence[ImageSet],
    reference: Sequence[Path],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Row]:
    if not reference:
        raise MetricUnavailable(
            "there are no target pictures: name them with --targets, or in the prompts."
        )
    sets = [reference, *([image.path for image in image_set.images] for image_set in image_sets)]
    theirs, *ours = features(found, sets, folder, device, progress)
    values, notes = {}, {}
    for image_set, mine in zip(image_sets, ours, strict=True):
        note = f"{len(mine)} pictures against {len(theirs)}"
        if found.short == "kid":
            values[image_set], spread = kid(mine, theirs)
            note += f", {spread:.1g} over subsets"
        else:
            values[image_set] = fid(mine, theirs)
            if min(len(mine), len(theirs)) < ENOUGH:
                note += "; of few pictures: compare at equal numbers only"
        notes[image_set] = note
    rows = []
    for image_set in (g for g in image_sets if g.name != AGAIN):
        base, again = (_beside(image_set, name, values) for name in (BASE, AGAIN))
        value = values[image_set]
        difference = _alone(value - base) if base is not None and image_set.name != BASE else None
        floor = abs(again - base) if base is not None and again is not None else None
        rows.append(
            Row(
                found.short,
                better,
                image_set.name,
                image_set.nfe,
                _alone(value),
                difference,
                floor,
                notes[image_set],
            )
        )
    return rows


def _alone(value: float) -> Interval:
    """A value that has no interval: it is of a whole set."""
    return Interval(value, -math.inf, math.inf)
