"""The questions of a comparison, and each candidate's answers: the same prompts and noise for all,
kept on disk.

On a pocket concept dataset they are its exam; elsewhere the recipe's prompts are shown, and prompts
that name nothing of the data are measured for bleed. What was answered once is read again, so that
a comparison can be interrupted.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dopsd.config.recipe import Recipe
from dopsd.diffusion.rollout import Velocity
from dopsd.evaluation.benchmarks import SHOWN, Benchmark, BenchmarkResult, Kind
from dopsd.evaluation.image_distance import distances
from dopsd.files import read_tensors, sha256_of, write_tensors
from dopsd.images import cover_crop, open_image
from dopsd.models import load_family
from dopsd.models.base import latent_size
from dopsd.models.folder import is_model
from dopsd.models.pipeline import EncodedRequest, ImagePipeline, ImageRequest
from dopsd.pocket.benchmark import HELD_OUT, ManyStepModel, PocketConcept, concept_of
from dopsd.runs.resolve import ResolvedRun, resolve

LAYOUT = 1  # part of every key: raise it when the same question would be answered otherwise
TARGETS = 16  # images of the data that neutral prompts are held against
NEUTRAL_SEEDS = (960_000, 960_001)  # a neutral prompt is generated from both


@dataclass(frozen=True)
class Candidate:
    """A model. base: untouched; floor: untouched, on other noise; teacher: untouched, with an image
    in its context; parent: what it was distilled from; tuned: with this LoRA."""

    name: str
    kind: Kind = "tuned"
    lora: Path | None = None


class Evaluator:
    """A recipe's model, the questions on its data, and the folder of answers."""

    def __init__(self, recipe: Recipe, folder: Path):
        run = resolve(recipe)
        self.family = run.family
        self._weights = self.family.checkpoint.mark(recipe.model.distilled_by)
        self.thing = concept_of(recipe.data.folder)
        self._folder, self._pipeline = folder, ImagePipeline(self.family)
        self.questions: Benchmark = (
            Images(run, self._pipeline)
            if self.thing is None
            else PocketConcept(recipe, self.family, self._pipeline.device, self._pipeline.dtype)
        )

    def answers(self, candidate: Candidate, nfes: Sequence[int]) -> dict[int, BenchmarkResult]:
        """At each number of forwards; asks only what is not there."""
        files = {nfe: self._folder / f"{self._key(candidate, nfe)}.safetensors" for nfe in nfes}
        if missing := [nfe for nfe in nfes if not files[nfe].is_file()]:
            velocity = self._velocity(candidate)
            for nfe in missing:
                _write(files[nfe], self.questions.ask(velocity, nfe, candidate.kind))
        return {nfe: _read(file) for nfe, file in files.items()}

    def _velocity(self, candidate: Candidate) -> Velocity:
        pipeline = self._pipeline
        if candidate.kind == "parent":
            unconditional = self.family.load_text_encoder(
                pipeline.device, pipeline.dtype, images=False
            ).context([""])
            return ManyStepModel(self.family.checkpoint.folder, unconditional)
        if candidate.lora and is_model(candidate.lora):
            return ImagePipeline(load_family(str(candidate.lora))).load_denoiser()
        return pipeline.load_denoiser(candidate.lora)

    def _key(self, candidate: Candidate, nfe: int) -> str:
        lora = candidate.lora
        if lora and is_model(lora):
            lora = [
                sha256_of(file)
                for file in sorted((lora / self.family.export_prefix).glob("*.safetensors"))
            ]
        elif lora:
            lora = sha256_of(lora)
        parts = [LAYOUT, self._weights, candidate.kind, lora, nfe, self.questions.about]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Images:
    """The recipe's prompts, shown; and neutral prompts (captions without the trigger word, and
    prompts that have nothing to do with the data), of which each image's distance to the nearest
    training image is measured."""

    def __init__(self, run: ResolvedRun, pipeline: ImagePipeline):
        listing, trigger = run.listing, run.recipe.data.trigger
        self._pipeline = pipeline
        self._wanted, self._side = run.previews, run.side
        plain = (
            [" ".join(e.caption.replace(trigger, " ").split()) for e in listing.examples]
            if trigger
            else []
        )
        self._neutral = list(dict.fromkeys([*plain[:SHOWN], *run.health_prompts]))
        examples = listing.examples
        count = min(TARGETS, len(examples))
        self._targets = [examples[index * len(examples) // count].path for index in range(count)]
        asked = [
            [
                each.prompt,
                each.seed,
                list(each.latent_shape),
                [sha256_of(path) for path in each.references],
            ]
            for each in self._wanted
        ]
        self.about = [
            "images",
            asked,
            self._side,
            self._neutral,
            [sha256_of(path) for path in self._targets],
        ]
        self.captions: Mapping[str, tuple[str, ...]] = {
            "The recipe's prompts": tuple(each.prompt for each in self._wanted),
            "Prompts that name nothing of the data": tuple(self._neutral[:SHOWN]),
        }
        self.truth: Mapping[str, Sequence[Tensor]] = {}

    @cached_property
    def _encoded(self) -> tuple[list[EncodedRequest], list[EncodedRequest]]:
        """The shown and the neutral prompts, encoded when something is asked for the first time."""
        family = self._pipeline.family
        latent_shape = (family.channels, *latent_size(family, self._side, self._side))
        neutral = [ImageRequest(prompt, 0, latent_shape) for prompt in self._neutral]
        encoded = self._pipeline.encode([*self._wanted, *neutral])
        return encoded[: len(self._wanted)], encoded[len(self._wanted) :]

    def ask(self, velocity: Velocity, nfe: int, kind: Kind) -> BenchmarkResult:
        wanted, neutral = self._encoded
        aside = HELD_OUT if kind == "floor" else 0
        shown = self._pipeline.generate(
            velocity, [each.with_seed(each.request.seed + aside) for each in wanted], nfe
        )
        on_each_noise = [each.with_seed(seed + aside) for each in neutral for seed in NEUTRAL_SEEDS]
        plain = torch.stack(self._pipeline.generate(velocity, on_each_noise, nfe))
        far = [distances(plain.numpy(), np.asarray(target)) for target in self._cropped()]
        nearest = np.min(far, axis=0)
        shown_plain = list(plain[:: len(NEUTRAL_SEEDS)][:SHOWN])
        return BenchmarkResult(
            {"others_error": nearest.reshape(len(neutral), -1)},
            dict(zip(self.captions, (shown, shown_plain), strict=True)),
        )

    def _cropped(self) -> Iterator[Any]:
        for path in self._targets:
            yield cover_crop(open_image(path), (self._side, self._side))


def _write(file: Path, answer: BenchmarkResult) -> None:
    values = {
        f"value/{name}": torch.from_numpy(np.asarray(each, dtype=float))
        for name, each in answer.values.items()
    }
    images = {
        f"{topic}/{k:02d}": p for topic, each in answer.images.items() for k, p in enumerate(each)
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
