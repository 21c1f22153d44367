"""Galleries under a measure: one model in memory at a time, and every score on disk as soon as it
is known.

A score is kept under the content of what made it (image, prompt, target), so that a second call
goes on where one ended, and an image that was generated anew is measured anew.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dopsd.evaluation.image_sets import GeneratedImage, ImageSet, Progress
from dopsd.evaluation.metrics import Found
from dopsd.evaluation.rewards import load_reward
from dopsd.files import append_jsonl, read_jsonl, read_tensors, sha256_of, write_tensors
from dopsd.images import open_image

AT_ONCE = 8  # images that a model looks at together


class MetricUnavailable(ValueError):
    """A measure's model, or what it compares with, is not there."""


@dataclass(frozen=True)
class Scored:
    """values: [prompts, seeds], NaN where nothing was asked or nothing answered; asked, answered:
    images."""

    values: np.ndarray
    asked: int

    @property
    def answered(self) -> int:
        return int(np.isfinite(self.values).sum())


class Scores:
    """A JSONL log of values by content."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.values = {
                row["key"]: float("nan") if row["value"] is None else float(row["value"])
                for _, row in read_jsonl(path, is_log=True)
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}): remove it, and measure again."
            ) from error

    def add(self, found: Sequence[tuple[str, str, float]]) -> None:
        """(key, file, value) of some images; NaN is null in the file."""
        rows = [
            {"key": key, "file": file, "value": None if np.isnan(v) else v}
            for key, file, v in found
        ]
        append_jsonl(self.path, rows)
        self.values |= {key: value for key, _, value in found}


def score(
    found: Found,
    image_sets: Sequence[ImageSet],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Scored]:
    """Each image set's scores; prompts that the measure is not about (`Measure.skips`, or no
    target) are not asked. Raises Unmeasured where the measure's model cannot be had, and ValueError
    for an image that cannot be read; what was scored before is kept."""
    store = Scores(_place(folder, found, "jsonl"))
    asked = [[p for p in image_set.images if _concerns(found, p)] for image_set in image_sets]
    content = cache(_content)
    keys = {p: _key(p, found, content) for images in asked for p in images}
    todo = [[p for p in images if keys[p] not in store.values] for images in asked]
    try:
        metric = _load(found, device) if any(todo) else None
    except ValueError as error:
        raise MetricUnavailable(str(error)) from error
    for image_set, images in zip(image_sets, todo, strict=True):
        done = 0
        for group, pixels in _groups(images):
            assert metric is not None
            values = [
                v if np.isfinite(v) else float("nan") for v in metric(group, pixels.to(device))
            ]
            store.add([(keys[p], str(p.path), v) for p, v in zip(group, values, strict=True)])
            done += len(group)
            progress(f"{found.short} of {image_set.label}", done, len(images))
    tables = []
    for image_set, images in zip(image_sets, asked, strict=True):
        table = np.full(image_set.shape, np.nan)
        for p in images:
            table[p.row, p.seed] = store.values[keys[p]]
        tables.append(Scored(table, len(images)))
    return tables


def features(
    found: Found,
    sets: Sequence[Sequence[Path]],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Tensor]:
    """Features [n, D] of each set of images, from disk where a call before made them."""
    network, answers = None, []
    for number, paths in enumerate(sets, start=1):
        content = hashlib.sha256("".join(map(_content, paths)).encode()).hexdigest()[:16]
        file = _place(folder, found, f"{content}.safetensors")
        if not file.exists():
            try:
                network = network or found.made(found.model, device)
            except ValueError as error:
                raise MetricUnavailable(str(error)) from error
            parts = []
            for done, path in enumerate(paths, start=1):
                parts.append(network(read_image(path)[None]))
                progress(f"features of set {number}", done, len(paths))
            write_tensors(file, {"features": torch.cat(parts)})
        answers.append(read_tensors(file)["features"])
    return answers


def read_image(path: Path) -> Tensor:
    """float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(open_image(path), dtype=np.float32) / 255).permute(2, 0, 1)


def _concerns(found: Found, image: GeneratedImage) -> bool:
    if found.metric.needs == "target" and image.target is None:
        return False
    return not (image.kind and image.kind == found.metric.skips)


def _load(
    found: Found, device: torch.device
) -> Callable[[Sequence[GeneratedImage], Tensor], list[float]]:
    """What scores images of one target and one size: (images, their pixels [B, 3, H, W]) -> values."""
    if found.metric.needs == "target":
        compare = found.made(found.model, device)

        def against(group: Sequence[GeneratedImage], pixels: Tensor) -> list[float]:
            assert group[0].target is not None
            return compare(pixels, read_image(group[0].target).to(device)).tolist()

        return against
    reward = load_reward(found.name, device)
    return lambda group, pixels: reward(pixels, [image.prompt for image in group]).tolist()


def _groups(images: Sequence[GeneratedImage]) -> Iterator[tuple[list[GeneratedImage], Tensor]]:
    """Neighbours with one target and one size, AT_ONCE at most, and their pixels. Before an image
    that cannot be read is refused, those before it go out."""
    group: list[GeneratedImage] = []
    pixels: list[Tensor] = []
    for image in images:
        try:
            mine = read_image(image.path)
        except ValueError:
            if group:
                yield group, torch.stack(pixels)
            raise
        if group and (
            len(group) == AT_ONCE
            or image.target != group[0].target
            or mine.shape != pixels[0].shape
        ):
            yield group, torch.stack(pixels)
            group, pixels = [], []
        group.append(image)
        pixels.append(mine)
    if group:
        yield group, torch.stack(pixels)


def _key(image: GeneratedImage, found: Found, content: Callable[[Path], str]) -> str:
    """Of all that a score depends on but the measure, whose file this is."""
    beside = (
        content(image.target) if found.metric.needs == "target" and image.target else image.prompt
    )
    return hashlib.sha256(f"{content(image.path)} {beside}".encode()).hexdigest()[:24]


def _content(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error


def _place(folder: Path, found: Found, ending: str) -> Path:
    """fid and kid look at the same features."""
    name = "inception" if found.metric.needs == "set" else found.short
    mark = hashlib.sha256(f"{found.metric.made} {found.model}".encode()).hexdigest()[:8]
    return folder / "scores" / f"{re.sub('[^A-Za-z0-9._-]', '_', name)}-{mark}.{ending}"
