"""Metrics of image sets as table rows: value, paired difference to the base, and noise floor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dopsd.evaluation.image_sets import AGAIN, BASE, ImageSet, Progress
from dopsd.evaluation.metrics import ResolvedMetric, find_metric, named_metric
from dopsd.evaluation.metrics.fid import fid, kid
from dopsd.evaluation.scores import MetricUnavailable, Scores, features, score
from dopsd.evaluation.statistics import Interval, bootstrap, paired

ENOUGH = 2048  # images; with fewer, FID depends more on their number than on what they show
HEADER = ["metric", "images", "nfe", "value", "minus base", "noise floor", "note"]


@dataclass(frozen=True)
class Row:
    """One metric of one image set. difference: to the base model on the same prompts and noise.
    floor: how far the base model is from itself on other noise; a difference within it means
    nothing."""

    metric: str
    better: str  # higher or lower
    image_set: str = ""
    nfe: int | None = None
    value: Interval | None = None
    difference: Interval | None = None
    floor: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """The cells of the columns in HEADER."""
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
        """The row as JSON, with null for NaN and infinity."""
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
    """The rows of each metric, one model in memory at a time; scores are stored in
    `folder/scores`. reference: the images that FID and KID compare with. A metric whose model is
    missing becomes a row that says so."""
    rows: list[Row] = []
    for name in metrics:
        short, _, metric = named_metric(name)
        better = "higher" if metric.higher else "lower"
        try:
            try:
                resolved = find_metric(name)
            except ValueError as error:
                raise MetricUnavailable(str(error)) from error
            if metric.needs == "set":
                rows += _rows_of_sets(
                    resolved, better, image_sets, reference, folder, device, progress
                )
            else:
                rows += _rows_of_images(resolved, better, image_sets, folder, device, progress)
        except MetricUnavailable as gap:
            rows.append(Row(short, better, note=f"not measured: {gap}"))
    return rows


def _rows_of_images(
    resolved: ResolvedMetric,
    better: str,
    image_sets: Sequence[ImageSet],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Row]:
    scores = score(resolved, image_sets, folder, device, progress)
    by_set = dict(zip(image_sets, scores, strict=True))
    if not any(each.applicable for each in scores):
        raise MetricUnavailable("no prompt has a target image to compare with.")
    rows = []
    for image_set in (g for g in image_sets if g.name != AGAIN):
        base, again = (_same_nfe(image_set, name, by_set) for name in (BASE, AGAIN))
        own = by_set[image_set]
        difference = paired(own.values, base.values) if base and image_set.name != BASE else None
        floor = _farther_end(paired(again.values, base.values)) if base and again else None
        note = "; ".join([*_remarks(resolved, own), *_if_within_noise(difference, floor)])
        rows.append(
            Row(
                resolved.short,
                better,
                image_set.name,
                image_set.nfe,
                bootstrap(own.values),
                difference,
                floor,
                note,
            )
        )
    return rows


def _same_nfe(image_set: ImageSet, name: str, by_set: Mapping[ImageSet, Any]) -> Any:
    """The value of the image set `name` at the same number of forwards; None if there is none."""
    for other, value in by_set.items():
        if other.name == name and other.nfe == image_set.nfe:
            return value
    return None


def _farther_end(interval: Interval) -> float:
    """The end of an interval that is farther from 0, as a distance."""
    return max(abs(interval.low), abs(interval.high))


def _if_within_noise(difference: Interval | None, floor: float | None) -> list[str]:
    """A remark on a difference that other seeds alone would make."""
    if difference is None or (
        (difference.low > 0 or difference.high < 0) and abs(difference.value) > (floor or 0)
    ):
        return []
    return ["no difference beyond noise"]


def _remarks(resolved: ResolvedMetric, scores: Scores) -> list[str]:
    remarks = []
    if scores.finite < scores.applicable:
        without = scores.applicable - scores.finite
        remarks.append(f"{without} of {scores.applicable} images without a score")
    default = Path(resolved.metric.model or "").name
    if default and Path(resolved.model).name != default:
        remarks.append(f"not comparable with numbers by {default}")
    if len(scores.values) < 2:
        remarks.append("one prompt: the interval is over its seeds")
    return remarks


def _rows_of_sets(
    resolved: ResolvedMetric,
    better: str,
    image_sets: Sequence[ImageSet],
    reference: Sequence[Path],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Row]:
    if not reference:
        raise MetricUnavailable(
            "there are no target images: name them with --targets, or in the prompts file."
        )
    sets = [reference, *([image.path for image in image_set.images] for image_set in image_sets)]
    reference_features, *set_features = features(resolved, sets, folder, device, progress)
    values, notes = {}, {}
    for image_set, own in zip(image_sets, set_features, strict=True):
        note = f"{len(own)} images against {len(reference_features)}"
        if resolved.short == "kid":
            values[image_set], spread = kid(own, reference_features)
            note += f", {spread:.1g} over subsets"
        else:
            values[image_set] = fid(own, reference_features)
            if min(len(own), len(reference_features)) < ENOUGH:
                note += "; few images: compare at equal numbers only"
        notes[image_set] = note
    rows = []
    for image_set in (g for g in image_sets if g.name != AGAIN):
        base, again = (_same_nfe(image_set, name, values) for name in (BASE, AGAIN))
        value = values[image_set]
        difference = (
            _without_interval(value - base) if base is not None and image_set.name != BASE else None
        )
        floor = abs(again - base) if base is not None and again is not None else None
        rows.append(
            Row(
                resolved.short,
                better,
                image_set.name,
                image_set.nfe,
                _without_interval(value),
                difference,
                floor,
                notes[image_set],
            )
        )
    return rows


def _without_interval(value: float) -> Interval:
    """The value of a whole set, which has no interval."""
    return Interval(value, -math.inf, math.inf)
