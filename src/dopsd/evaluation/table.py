"""Measures of galleries as rows: value, paired difference to the base, noise floor, and what could not be measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dopsd.evaluation.image_sets import AGAIN, BASE, Gallery, Progress
from dopsd.evaluation.metrics import Found, find_measure, named_measure
from dopsd.evaluation.metrics.fid import fid, kid
from dopsd.evaluation.scores import Scored, Unmeasured, features, score
from dopsd.evaluation.statistics import Interval, bootstrap, paired

ENOUGH = 2048  # pictures, below which FID depends more on their number than on what they show
HEADER = ["measure", "pictures", "nfe", "value", "minus base", "noise floor", "note"]


@dataclass(frozen=True)
class Row:
    """One measure of one gallery. difference: to the base on the same prompts and noise; floor: how far the base is
    from itself on other noise; a difference within it says nothing."""

    measure: str
    better: str  # higher or lower
    gallery: str = ""
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
        return [self.measure + arrow, self.gallery or "-", str(self.nfe or "-"), *shown, floor, self.note]

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
    measures: Sequence[str],
    galleries: Sequence[Gallery],
    reference: Sequence[Path],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Row]:
    """Rows of each measure, one model in memory at a time; what it found lies under `folder/scores`. reference: the
    pictures that FID and KID compare with. A measure whose model cannot be had is a row that says so."""
    rows: list[Row] = []
    for name in measures:
        short, _, measure = named_measure(name)
        better = "higher" if measure.higher else "lower"
        try:
            try:
                found = find_measure(name)
            except ValueError as error:
                raise Unmeasured(str(error)) from error
            if measure.needs == "set":
                rows += _of_sets(found, better, galleries, reference, folder, device, progress)
            else:
                rows += _of_pictures(found, better, galleries, folder, device, progress)
        except Unmeasured as gap:
            rows.append(Row(short, better, note=f"not measured: {gap}"))
    return rows


def _of_pictures(
    found: Found, better: str, galleries: Sequence[Gallery], folder: Path, device: torch.device, progress: Progress
) -> list[Row]:
    scored = dict(zip(galleries, score(found, galleries, folder, device, progress), strict=True))
    if not any(each.asked for each in scored.values()):
        raise Unmeasured("no prompt has a target picture that it would be compared with.")
    rows = []
    for gallery in (g for g in galleries if g.name != AGAIN):
        base, again = (_beside(gallery, name, scored) for name in (BASE, AGAIN))
        mine = scored[gallery]
        difference = paired(mine.values, base.values) if base and gallery.name != BASE else None
        floor = _reach(paired(again.values, base.values)) if base and again else None
        note = "; ".join([*_remarks(found, mine), *_weight(difference, floor)])
        rows.append(
            Row(found.short, better, gallery.name, gallery.nfe, bootstrap(mine.values), difference, floor, note)
        )
    return rows


def _beside(gallery: Gallery, name: str, scored: Mapping[Gallery, Any]) -> Any:
    """What the gallery of that name at the same number of forwards scored."""
    return next((each for other, each in scored.items() if other.name == name and other.nfe == gallery.nfe), None)


def _reach(interval: Interval) -> float:
    """The farther end of an interval around no difference."""
    return max(abs(interval.low), abs(interval.high))


def _weight(difference: Interval | None, floor: float | None) -> list[str]:
    """What to say of a difference that seeds alone would make."""
    if difference is None or ((difference.low > 0 or difference.high < 0) and abs(difference.value) > (floor or 0)):
        return []
    return ["no difference beyond noise"]


def _remarks(found: Found, scored: Scored) -> list[str]:
    remarks = []
    if scored.answered < scored.asked:
        remarks.append(f"{scored.asked - scored.answered} of {scored.asked} pictures without an answer")
    usual = Path(found.measure.model or "").name
    if usual and Path(found.model).name != usual:
        remarks.append(f"not comparable with numbers by {usual}")
    if len(scored.values) < 2:
        remarks.append("one prompt: the interval is over its seeds")
    return remarks


def _of_sets(
    found: Found,
    better: str,
    galleries: Sequence[Gallery],
    reference: Sequence[Path],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Row]:
    if not reference:
        raise Unmeasured("there are no target pictures: name them with --targets, or in the prompts.")
    sets = [reference, *([picture.path for picture in gallery.pictures] for gallery in galleries)]
    theirs, *ours = features(found, sets, folder, device, progress)
    values, notes = {}, {}
    for gallery, mine in zip(galleries, ours, strict=True):
        note = f"{len(mine)} pictures against {len(theirs)}"
        if found.short == "kid":
            values[gallery], spread = kid(mine, theirs)
            note += f", {spread:.1g} over subsets"
        else:
            values[gallery] = fid(mine, theirs)
            if min(len(mine), len(theirs)) < ENOUGH:
                note += "; of few pictures: compare at equal numbers only"
        notes[gallery] = note
    rows = []
    for gallery in (g for g in galleries if g.name != AGAIN):
        base, again = (_beside(gallery, name, values) for name in (BASE, AGAIN))
        value = values[gallery]
        difference = _alone(value - base) if base is not None and gallery.name != BASE else None
        floor = abs(again - base) if base is not None and again is not None else None
        rows.append(
            Row(found.short, better, gallery.name, gallery.nfe, _alone(value), difference, floor, notes[gallery])
        )
    return rows


def _alone(value: float) -> Interval:
    """A value that has no interval: it is of a whole set."""
    return Interval(value, -math.inf, math.inf)
