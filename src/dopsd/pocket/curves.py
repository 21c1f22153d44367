"""Recipes trained on a pocket concept with looks along the way: what was learned and what was kept
after so many steps, for how many forwards of the network."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.diffusion.rollout import Velocity
from dopsd.diffusion.sampling import noise_for
from dopsd.evaluation.curves import Look
from dopsd.models import load_family
from dopsd.pocket.benchmark import (
    MEASURED,
    NOISE_SEED,
    UNRELATED,
    ConceptQuestions,
    ConceptResult,
    TeacherSees,
    evaluate_concept,
)
from dopsd.pocket.world.datasets import concept_of
from dopsd.runs.comparison.budget import forwards_a_step
from dopsd.runs.train import train_in_memory

RANK, BATCH = 16, 4
DRIFT = "drift"  # see Bench.drift
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ConceptLook(Look):
    """A look on the concept benchmark. values: the metrics of MEASURED and `drift`. forwards,
    seconds: of training so far; a backward counts as two forwards."""

    forwards: float
    seconds: float
    result: ConceptResult


class Bench:
    """The pocket model and one concept: trains recipes on its images, and measures models."""

    def __init__(self, data: Path, unrelated: int = UNRELATED, stream: int | None = None):
        """data: a folder of a concept. unrelated: how many prompts measure what is kept. stream:
        of the random numbers that draw them; default: those of `dopsd compare`."""
        concept = concept_of(data)
        assert concept is not None, f"{data} holds no concept of the pocket world"
        self.data, self.family = data, load_family("pocket")
        self.vae = self.family.load_vae(CPU, torch.float32)
        self.base: Velocity = self.family.load_denoiser(CPU, torch.float32)
        side = self.family.resolution // self.family.vae_scale_factor
        self.latent_shape = (self.family.channels, side, side)
        self.schedule = self.family.schedule(self.family.default_nfe, side, side)
        text_encoder = self.family.load_text_encoder(CPU, torch.float32, images=True)
        self.questions = ConceptQuestions.encode(
            concept.seed, text_encoder, data, unrelated, concept.kind, stream
        )
        self._first_velocity = self._velocity_on_noise(self.base)

    def evaluate(
        self,
        velocity: Velocity,
        teacher_sees: TeacherSees | None = None,
        noise_seed: int = NOISE_SEED,
    ) -> ConceptResult:
        """Generate and measure, as `evaluate_concept`."""
        return evaluate_concept(
            self.questions,
            velocity,
            self.vae,
            self.schedule,
            self.latent_shape,
            teacher_sees,
            noise_seed,
        )

    def drift(self, velocity: Velocity) -> np.ndarray:
        """How far the clean latents that one step from noise gives are from the base model's, on
        the unrelated prompts: RMSE [N], in units of a latent's deviation over the data."""
        difference = self._velocity_on_noise(velocity) - self._first_velocity
        moved = float(self.schedule.times[0]) * difference
        return moved.square().flatten(1).mean(1).sqrt().double().numpy()

    def look(
        self, velocity: Velocity, step: int = 0, forwards: float = 0.0, seconds: float = 0.0
    ) -> ConceptLook:
        """Measure a model after `step` optimizer steps; 0 is the base model."""
        result = self.evaluate(velocity)
        values = {metric: getattr(result, metric) for metric in MEASURED}
        values[DRIFT] = self.drift(velocity)
        return ConceptLook(step, values, forwards, seconds, result)

    def curve(self, recipe: Recipe, steps: Sequence[int]) -> Iterator[ConceptLook]:
        """Train the recipe to the last of `steps`, and look after each of them."""
        cost, seconds = forwards_a_step(recipe, self.family.default_nfe), 0.0
        for report, session in train_in_memory(recipe):
            seconds += report.seconds
            if report.step in steps:
                student = session.deployed_roles.student
                yield self.look(student, report.step, cost * report.step, seconds)
            if report.step == max(steps):
                return

    @torch.no_grad()
    def _velocity_on_noise(self, velocity: Velocity) -> torch.Tensor:
        """The first velocity of the unrelated prompts' rollouts, [N, C, h, w]."""
        scenes, count = len(self.questions.scenes), len(self.questions.stated)
        seeds = range(NOISE_SEED + scenes, NOISE_SEED + scenes + count)
        z = noise_for(seeds, *self.latent_shape).start
        return velocity(z, self.schedule.times[:1].expand(count), self.questions.unrelated_context)


def concept_recipe(
    sections: Mapping[str, Mapping[str, Any]], data: Path, folder: Path, name: str
) -> Recipe:
    """A recipe for pocket on the images in `data`, with `sections` over the settings that all arms
    share: LoRA of RANK, BATCH images a step, nothing written on the way."""
    shared: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": "pocket", "memory": "high"},
        "data": {"folder": str(data)},
        "lora": {"rank": RANK},
        "train": {"batch_size": BATCH},
        "sample": {"every": 0},
        "save": {"every": 0},
    }
    tree = {
        section: shared.get(section, {}) | dict(sections.get(section, {}))
        for section in (*shared, *(set(sections) - set(shared)))
    }
    return parse_recipe(tree | {"output_dir": str(folder), "run_name": name})
