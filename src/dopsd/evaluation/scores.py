"""Scores of image sets under a metric, one model in memory at a time, each score saved at once.

A score is stored by the content that it depends on (image, prompt, target), so that a second call
resumes, and an image that was generated anew is scored anew.
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
from dopsd.evaluation.metrics import ResolvedMetric
from dopsd.evaluation.rewards import load_reward
from dopsd.files import append_jsonl, read_jsonl, read_tensors, sha256_of, write_tensors
from dopsd.images import open_image

BATCH = 8  # images that a model gets at once


class MetricUnavailable(ValueError):
    """The metric's model, or what it compares with, is missing."""


@dataclass(frozen=True)
class Scores:
    """values: [prompts, seeds], NaN where the metric does not apply or gave no number. applicable:
    images that the metric was asked about."""

    values: np.ndarray
    applicable: int

    @property
    def finite(self) -> int:
        """Images with a number."""
        return int(np.isfinite(self.values).sum())


class ScoreFile:
    """A JSONL log: content key -> score."""

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

    def add(self, scores: Sequence[tuple[str, str, float]]) -> None:
        """Append (key, image file, score) of some images; NaN is null in the file."""
        rows = [
            {"key": key, "file": file, "value": None if np.isnan(value) else value}
            for key, file, value in scores
        ]
        append_jsonl(self.path, rows)
        self.values |= {key: value for key, _, value in scores}


def score(
    resolved: ResolvedMetric,
    image_sets: Sequence[ImageSet],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Scores]:
    """The scores of each image set; what is stored below `folder` is not computed again.

    Prompts that the metric does not apply to (`Metric.skips`, or no target) are left out. Raises
    MetricUnavailable where the model cannot be loaded, and ValueError for an image that cannot be
    read; scores so far are kept.
    """
    # What is missing?
    file = ScoreFile(_file_of(folder, resolved, "jsonl"))
    applicable = [
        [image for image in image_set.images if _applies(resolved, image)]
        for image_set in image_sets
    ]
    content = cache(_content)
    keys = {image: _key(image, resolved, content) for images in applicable for image in images}
    missing = [
        [image for image in images if keys[image] not in file.values] for images in applicable
    ]

    # Score it.
    try:
        scorer = _load(resolved, device) if any(missing) else None
    except ValueError as error:
        raise MetricUnavailable(str(error)) from error
    for image_set, images in zip(image_sets, missing, strict=True):
        done = 0
        for batch, pixels in _batches(images):
            assert scorer is not None
            values = [
                value if np.isfinite(value) else float("nan")
                for value in scorer(batch, pixels.to(device))
            ]
            named = zip(batch, values, strict=True)
            file.add([(keys[image], str(image.path), value) for image, value in named])
            done += len(batch)
            progress(f"{resolved.short} of {image_set.label}", done, len(images))

    # Lay the scores out by prompt and seed.
    scores = []
    for image_set, images in zip(image_sets, applicable, strict=True):
        table = np.full(image_set.shape, np.nan)
        for image in images:
            table[image.row, image.seed] = file.values[keys[image]]
        scores.append(Scores(table, len(images)))
    return scores


def features(
    resolved: ResolvedMetric,
    sets: Sequence[Sequence[Path]],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> list[Tensor]:
    """Features [n, D] of each set of images; what is stored below `folder` is not computed
    again."""
    network, computed = None, []
    for number, paths in enumerate(sets, start=1):
        content = hashlib.sha256("".join(map(_content, paths)).encode()).hexdigest()[:16]
        file = _file_of(folder, resolved, f"{content}.safetensors")
        if not file.exists():
            try:
                network = network or resolved.load(device)
            except ValueError as error:
                raise MetricUnavailable(str(error)) from error
            parts = []
            for done, path in enumerate(paths, start=1):
                parts.append(network(read_image(path)[None]))
                progress(f"features of set {number}", done, len(paths))
            write_tensors(file, {"features": torch.cat(parts)})
        computed.append(read_tensors(file)["features"])
    return computed


def read_image(path: Path) -> Tensor:
    """An image file as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(open_image(path), dtype=np.float32) / 255).permute(2, 0, 1)


def _applies(resolved: ResolvedMetric, image: GeneratedImage) -> bool:
    if resolved.metric.needs == "target" and image.target is None:
        return False
    return not (image.kind and image.kind == resolved.metric.skips)


def _load(
    resolved: ResolvedMetric, device: torch.device
) -> Callable[[Sequence[GeneratedImage], Tensor], list[float]]:
    """The scorer of images with one target and one size: (images, pixels [B, 3, H, W]) ->
    scores."""
    if resolved.metric.needs == "target":
        compare = resolved.load(device)

        def with_target(batch: Sequence[GeneratedImage], pixels: Tensor) -> list[float]:
            assert batch[0].target is not None
            return compare(pixels, read_image(batch[0].target).to(device)).tolist()

        return with_target
    reward = load_reward(resolved.name, device)
    return lambda batch, pixels: reward(pixels, [image.prompt for image in batch]).tolist()


def _batches(images: Sequence[GeneratedImage]) -> Iterator[tuple[list[GeneratedImage], Tensor]]:
    """Up to BATCH consecutive images with one target and one size, and their pixels. What was read
    before an unreadable image is yielded before its error is raised."""
    batch: list[GeneratedImage] = []
    pixels: list[Tensor] = []
    for image in images:
        try:
            read = read_image(image.path)
        except ValueError:
            if batch:
                yield batch, torch.stack(pixels)
            raise
        if batch and (
            len(batch) == BATCH or image.target != batch[0].target or read.shape != pixels[0].shape
        ):
            yield batch, torch.stack(pixels)
            batch, pixels = [], []
        batch.append(image)
        pixels.append(read)
    if batch:
        yield batch, torch.stack(pixels)


def _key(image: GeneratedImage, resolved: ResolvedMetric, content: Callable[[Path], str]) -> str:
    """A hash of everything that a score depends on except the metric, which names the file."""
    compared = image.prompt
    if resolved.metric.needs == "target" and image.target:
        compared = content(image.target)
    return hashlib.sha256(f"{content(image.path)} {compared}".encode()).hexdigest()[:24]


def _content(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error


def _file_of(folder: Path, resolved: ResolvedMetric, ending: str) -> Path:
    """Where scores or features are stored; fid and kid share their features."""
    name = "inception" if resolved.metric.needs == "set" else resolved.short
    source = f"{resolved.metric.attribute} {resolved.model}"
    mark = hashlib.sha256(source.encode()).hexdigest()[:8]
    return folder / "scores" / f"{re.sub('[^A-Za-z0-9._-]', '_', name)}-{mark}.{ending}"
