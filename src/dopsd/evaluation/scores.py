"""Galleries under a measure: one model in memory at a time, and every score on disk as soon as it is known.

A score is kept under the content of what made it (picture, prompt, target), so that a second call goes on where one
ended, and a picture that was painted anew is measured anew.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dopsd.evaluation.image_sets import Gallery, Picture, Progress
from dopsd.evaluation.metrics import Found
from dopsd.evaluation.rewards import load_judge
from dopsd.files import read_tensors, sha256_of, write_tensors, writing
from dopsd.images import open_picture

AT_ONCE = 8  # pictures that a model looks at together


class Unmeasured(ValueError):
    """A measure's model, or what it compares with, is not there."""


@dataclass(frozen=True)
class Scored:
    """values: [prompts, seeds], NaN where nothing was asked or nothing answered; asked, answered: pictures."""

    values: np.ndarray
    asked: int

    @property
    def answered(self) -> int:
        return int(np.isfinite(self.values).sum())


class Scores:
    """A JSONL file of values by content. A row that a kill cut short is not counted."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            self.values = {row["key"]: float("nan") if row["value"] is None else float(row["value"]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}): remove it, and measure again.") from error
        self.cut = bool(lines) and not path.read_bytes().endswith(b"\n")

    def add(self, found: Sequence[tuple[str, str, float]]) -> None:
        """(key, file, value) of some pictures; NaN is null in the file."""
        rows = [{"key": key, "file": file, "value": None if np.isnan(v) else v} for key, file, v in found]
        text = "\n" * self.cut + "".join(json.dumps(row) + "\n" for row in rows)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        self.cut = False
        self.values |= {key: value for key, _, value in found}


def score(
    found: Found, galleries: Sequence[Gallery], folder: Path, device: torch.device, progress: Progress
) -> list[Scored]:
    """Each gallery's scores; prompts that the measure is not about (`Measure.skips`, or no target) are not asked.
    Raises Unmeasured where the measure's model cannot be had, and ValueError for a picture that cannot be read; what
    was scored before is kept."""
    store = Scores(_place(folder, found, "jsonl"))
    asked = [[p for p in gallery.pictures if _concerns(found, p)] for gallery in galleries]
    content = cache(_content)
    keys = {p: _key(p, found, content) for pictures in asked for p in pictures}
    todo = [[p for p in pictures if keys[p] not in store.values] for pictures in asked]
    try:
        measure = _load(found, device) if any(todo) else None
    except ValueError as error:
        raise Unmeasured(str(error)) from error
    for gallery, pictures in zip(galleries, todo, strict=True):
        done = 0
        for group, pixels in _groups(pictures):
            assert measure is not None
            values = [v if np.isfinite(v) else float("nan") for v in measure(group, pixels.to(device))]
            store.add([(keys[p], str(p.path), v) for p, v in zip(group, values, strict=True)])
            done += len(group)
            progress(f"{found.short} of {gallery.label}", done, len(pictures))
    tables = []
    for gallery, pictures in zip(galleries, asked, strict=True):
        table = np.full(gallery.shape, np.nan)
        for p in pictures:
            table[p.row, p.seed] = store.values[keys[p]]
        tables.append(Scored(table, len(pictures)))
    return tables


def features(
    found: Found, sets: Sequence[Sequence[Path]], folder: Path, device: torch.device, progress: Progress
) -> list[Tensor]:
    """Features [n, D] of each set of pictures, from disk where a call before made them."""
    network, answers = None, []
    for number, paths in enumerate(sets, start=1):
        content = hashlib.sha256("".join(map(_content, paths)).encode()).hexdigest()[:16]
        file = _place(folder, found, f"{content}.safetensors")
        if not file.exists():
            try:
                network = network or found.made(found.model, device)
            except ValueError as error:
                raise Unmeasured(str(error)) from error
            parts = []
            for done, path in enumerate(paths, start=1):
                parts.append(network(read_picture(path)[None]))
                progress(f"features of set {number}", done, len(paths))
            write_tensors(file, {"features": torch.cat(parts)})
        answers.append(read_tensors(file)["features"])
    return answers


def read_picture(path: Path) -> Tensor:
    """float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(open_picture(path), dtype=np.float32) / 255).permute(2, 0, 1)


def _concerns(found: Found, picture: Picture) -> bool:
    if found.measure.needs == "target" and picture.target is None:
        return False
    return not (picture.kind and picture.kind == found.measure.skips)


def _load(found: Found, device: torch.device) -> Callable[[Sequence[Picture], Tensor], list[float]]:
    """What scores pictures of one target and one size: (pictures, their pixels [B, 3, H, W]) -> values."""
    if found.measure.needs == "target":
        compare = found.made(found.model, device)

        def against(group: Sequence[Picture], pixels: Tensor) -> list[float]:
            assert group[0].target is not None
            return compare(pixels, read_picture(group[0].target).to(device)).tolist()

        return against
    judge = load_judge(found.name, device)
    return lambda group, pixels: judge(pixels, [picture.prompt for picture in group]).tolist()


def _groups(pictures: Sequence[Picture]) -> Iterator[tuple[list[Picture], Tensor]]:
    """Neighbours with one target and one size, AT_ONCE at most, and their pixels. Before a picture that cannot be read
    is refused, those before it go out."""
    group: list[Picture] = []
    pixels: list[Tensor] = []
    for picture in pictures:
        try:
            mine = read_picture(picture.path)
        except ValueError:
            if group:
                yield group, torch.stack(pixels)
            raise
        if group and (len(group) == AT_ONCE or picture.target != group[0].target or mine.shape != pixels[0].shape):
            yield group, torch.stack(pixels)
            group, pixels = [], []
        group.append(picture)
        pixels.append(mine)
    if group:
        yield group, torch.stack(pixels)


def _key(picture: Picture, found: Found, content: Callable[[Path], str]) -> str:
    """Of all that a score depends on but the measure, whose file this is."""
    beside = content(picture.target) if found.measure.needs == "target" and picture.target else picture.prompt
    return hashlib.sha256(f"{content(picture.path)} {beside}".encode()).hexdigest()[:24]


def _content(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error


def _place(folder: Path, found: Found, ending: str) -> Path:
    """fid and kid look at the same features."""
    name = "inception" if found.measure.needs == "set" else found.short
    mark = hashlib.sha256(f"{found.measure.made} {found.model}".encode()).hexdigest()[:8]
    return folder / "scores" / f"{re.sub('[^A-Za-z0-9._-]', '_', name)}-{mark}.{ending}"
