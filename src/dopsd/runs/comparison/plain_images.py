"""The benchmark of a folder of plain images: the recipe's prompts to look at, and bleed."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dopsd.data.captions import without_trigger
from dopsd.diffusion.rollout import Velocity
from dopsd.evaluation.benchmarks import FLOOR_SEED_OFFSET, SHOWN, BenchmarkResult, Kind
from dopsd.evaluation.image_distance import distances
from dopsd.files import sha256_of
from dopsd.images import cover_crop, open_image
from dopsd.models.base import latent_size
from dopsd.models.pipeline import EncodedRequest, ImagePipeline, ImageRequest
from dopsd.runs.resolve import ResolvedRun

TARGETS = 16  # training images that images of neutral prompts are compared with
NEUTRAL_SEEDS = (960_000, 960_001)  # a neutral prompt is generated from both


class PlainImages:
    """The recipe's prompts are shown. On neutral prompts (captions without the trigger word, and
    prompts that have nothing to do with the data) each image's distance to the nearest training
    image is measured."""

    metrics: tuple[str, ...] = ("bleed",)
    learned: str | None = None
    definitions: Mapping[str, str] = MappingProxyType(
        {
            "bleed": "by how much images of prompts that have nothing to do with the data are "
            "nearer to the nearest training image than the base model's (0 to 1); lower is better"
        }
    )
    asks_teacher: bool = False
    many_step: Callable[[], Velocity] | None = None

    def __init__(self, run: ResolvedRun, pipeline: ImagePipeline):
        self._pipeline, self._wanted, self._side = pipeline, run.previews, run.side
        examples = run.listing.examples

        # Neutral prompts, and the training images that they are compared with.
        plain: list[str] = []
        if trigger := run.recipe.data.trigger:
            plain = [without_trigger(example.caption, trigger) for example in examples]
        plain = [caption for caption in plain if caption]
        self._neutral = list(dict.fromkeys([*plain[:SHOWN], *run.health_prompts]))
        count = min(TARGETS, len(examples))
        self._targets = [examples[index * len(examples) // count].path for index in range(count)]

        wanted = [
            [
                each.prompt,
                each.seed,
                list(each.latent_shape),
                [sha256_of(p) for p in each.references],
            ]
            for each in self._wanted
        ]
        targets = [sha256_of(path) for path in self._targets]
        self.about: Any = ["images", wanted, self._side, self._neutral, targets]
        self.captions: Mapping[str, tuple[str, ...]] = {
            "The recipe's prompts": tuple(each.prompt for each in self._wanted),
            "Prompts that have nothing to do with the data": tuple(self._neutral[:SHOWN]),
        }
        self.truth: Mapping[str, Sequence[Tensor]] = {}

    @cached_property
    def _encoded(self) -> tuple[list[EncodedRequest], list[EncodedRequest]]:
        """The shown and the neutral prompts, encoded on first use."""
        family = self._pipeline.family
        latent_shape = (family.channels, *latent_size(family, self._side, self._side))
        neutral = [ImageRequest(prompt, 0, latent_shape) for prompt in self._neutral]
        encoded = self._pipeline.encode([*self._wanted, *neutral])
        return encoded[: len(self._wanted)], encoded[len(self._wanted) :]

    def ask(self, velocity: Velocity, nfe: int, kind: Kind) -> BenchmarkResult:
        """The recipe's prompts on their seeds, each neutral prompt on NEUTRAL_SEEDS."""
        wanted, neutral = self._encoded
        offset = FLOOR_SEED_OFFSET if kind == "floor" else 0
        requests = [each.with_seed(each.request.seed + offset) for each in wanted]
        shown = self._pipeline.generate(velocity, requests, nfe)
        requests = [each.with_seed(seed + offset) for each in neutral for seed in NEUTRAL_SEEDS]
        images = torch.stack(self._pipeline.generate(velocity, requests, nfe))

        errors = [distances(images.numpy(), target) for target in self._cropped_targets()]
        nearest = np.min(errors, axis=0).reshape(len(neutral), -1)
        shown_neutral = list(images[:: len(NEUTRAL_SEEDS)][:SHOWN])
        topics = dict(zip(self.captions, (shown, shown_neutral), strict=True))
        return BenchmarkResult({"others_error": nearest}, topics)

    def _cropped_targets(self) -> list[np.ndarray]:
        size = (self._side, self._side)
        return [np.asarray(cover_crop(open_image(path), size)) for path in self._targets]
