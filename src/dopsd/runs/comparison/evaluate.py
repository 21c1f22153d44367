"""The models of a comparison and their results on the same prompts and noise, cached on disk.

Cached results make a comparison resumable.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dopsd.config.recipe import Recipe
from dopsd.diffusion.rollout import Velocity
from dopsd.evaluation.benchmarks import (
    TEACHERS,
    Benchmark,
    BenchmarkResult,
    Kind,
    find_benchmark,
)
from dopsd.files import read_tensors, sha256_of, write_tensors
from dopsd.models import load_family
from dopsd.models.base import Family
from dopsd.models.hub import Checkpoint
from dopsd.models.lora_source import LoraFile, find_lora
from dopsd.models.pipeline import ImagePipeline
from dopsd.runs.comparison.plain_images import PlainImages
from dopsd.runs.resolve import resolve

LAYOUT = 3  # part of every cache key: raise it when the same question gives another result


@dataclass(frozen=True)
class Candidate:
    """A model of the comparison. kind: see `evaluation.benchmarks.Kind`. loras: of a tuned model.
    model: its diffusers folder, where every weight was tuned."""

    name: str
    kind: Kind = "tuned"
    loras: tuple[LoraFile, ...] = ()
    model: Path | None = None


class Evaluator:
    """Measures candidates on the data of a recipe: with the benchmark that its folder belongs to,
    elsewhere as plain images."""

    def __init__(self, recipe: Recipe, folder: Path):
        """folder: for cached results."""
        run = resolve(recipe)
        self.family = run.family
        self._weights = self.family.checkpoint.mark(recipe.model.distilled_by)
        self._teacher = _teacher_mark(recipe, self.family)
        self._folder, self._pipeline = folder, ImagePipeline(self.family)
        registered = find_benchmark(recipe.data.folder)
        self.benchmark: Benchmark = (
            registered(recipe.data.folder, self._pipeline)
            if registered
            else PlainImages(run, self._pipeline)
        )

    def results(self, candidate: Candidate, nfes: Sequence[int]) -> dict[int, BenchmarkResult]:
        """The candidate's result at each number of forwards; only what is not cached is run."""
        files = {nfe: self._folder / f"{self._key(candidate, nfe)}.safetensors" for nfe in nfes}
        if missing := [nfe for nfe in nfes if not files[nfe].is_file()]:
            velocity = self._velocity(candidate)
            for nfe in missing:
                _write(files[nfe], self.benchmark.ask(velocity, nfe, candidate.kind))
        return {nfe: _read(file) for nfe, file in files.items()}

    def _velocity(self, candidate: Candidate) -> Velocity:
        if candidate.kind == "many_step":
            assert self.benchmark.many_step is not None
            return self.benchmark.many_step()
        if candidate.model:
            return ImagePipeline(load_family(str(candidate.model))).load_denoiser()
        return self._pipeline.load_denoiser(candidate.loras)

    def _key(self, candidate: Candidate, nfe: int) -> str:
        loras = [(sha256_of(find_lora(lora.path)), lora.strength) for lora in candidate.loras]
        tuned: Any = loras or None
        if candidate.model:
            network = sorted((candidate.model / self.family.export_prefix).glob("*.safetensors"))
            tuned = [sha256_of(file) for file in network]
        teacher = self._teacher if candidate.kind in TEACHERS else None
        about = self.benchmark.about
        parts = [LAYOUT, self._weights, candidate.kind, teacher, tuned, nfe, about]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _teacher_mark(recipe: Recipe, family: Family) -> list[Any]:
    """What a teacher's results depend on besides the checkpoint, as JSON: how it sees images, its
    VLM's weights, and the suffix of its prompts."""
    vlm = recipe.model.vlm and Checkpoint(recipe.model.vlm).mark(None)
    return [family.teacher_context, vlm, recipe.model.teacher_suffix]


def _write(file: Path, result: BenchmarkResult) -> None:
    values = {
        f"value/{name}": torch.from_numpy(np.asarray(each, dtype=float))
        for name, each in result.values.items()
    }
    images = {
        f"{topic}/{index:02d}": image
        for topic, shown in result.images.items()
        for index, image in enumerate(shown)
    }
    write_tensors(file, values | images)


def _read(file: Path) -> BenchmarkResult:
    values, images = {}, {}
    for name, tensor in sorted(read_tensors(file).items()):
        topic, _, rest = name.rpartition("/")
        if topic == "value":
            values[rest] = tensor.numpy()
        else:
            images.setdefault(topic, []).append(tensor)
    return BenchmarkResult(values, images)
