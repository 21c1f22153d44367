"""The claim on real images: SFT and the default arm tuned on a folder of captioned images, and at
looks along both trainings what they have learned (DINO) and kept (sharpness, CLIP, health)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_steps import nested

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.data.folder import read_folder
from dopsd.data.prompts import EvaluationPrompt, read_prompts
from dopsd.evaluation.health import METRICS as HEALTH_METRICS
from dopsd.evaluation.health import PROMPTS as UNRELATED
from dopsd.evaluation.image_sets import AGAIN, BASE, GeneratedImage, ImageSet, fill
from dopsd.evaluation.metrics import find_metric
from dopsd.evaluation.scores import read_image, score
from dopsd.methods import METHODS
from dopsd.models import load_family
from dopsd.models.base import latent_size
from dopsd.models.lora_source import as_loras
from dopsd.models.pipeline import ImagePipeline, ImageRequest, device_and_dtype
from dopsd.pocket.demo import ARMS
from dopsd.runs.outputs.folder import read_rows
from dopsd.runs.prepare import Progress
from dopsd.runs.train import train

PROMPTS, SEEDS = 8, 2  # of each kind; images a prompt
SAVE_EVERY = 50  # steps
ERROR, KEPT = "dino", ("sharpness", "clip")


class OutOfTime(Exception):
    """The minutes are used up; what is finished is saved."""


@dataclass(frozen=True)
class Claim:
    """What is tuned, and how it is measured. metrics: names of `dino` and `clip` with their models.
    prompts: of the object, with real images as targets; None: the captions with their images.
    size: side of images in pixels."""

    model: str
    data: Path
    folder: Path
    metrics: tuple[str, ...]
    size: int
    prompts: Path | None = None

    def questions(self) -> tuple[list[EvaluationPrompt], list[EvaluationPrompt]]:
        """Prompts of the object, and prompts that have nothing to do with it. Raises ValueError for
        prompts of the object without a target."""
        if self.prompts:
            of_object = read_prompts(self.prompts)
        else:
            examples = read_folder(self.data).examples
            of_object = tuple(EvaluationPrompt(each.caption, each.path) for each in examples)
        if any(each.target is None for each in of_object):
            raise ValueError(f"{self.prompts}: each prompt needs a real image as its `target`.")
        unrelated = load_family(self.model).unrelated_prompts or UNRELATED
        return list(of_object[:PROMPTS]), [EvaluationPrompt(text) for text in unrelated[:PROMPTS]]

    def recipe(self, arm: str, steps: int) -> Recipe:
        """The arm's recipe by the family's recommended settings, ending after `steps`."""
        sections: Mapping[str, Any] = ARMS[arm]
        method = METHODS[sections["method"]["name"]].model_construct()
        tree = nested(load_family(self.model).starting_points(method))
        for section in {"method", "retention"} & sections.keys():
            tree[section] = tree.get(section, {}) | sections[section]
        tree["train"] = tree.get("train", {}) | {"max_steps": steps}
        return parse_recipe(
            tree
            | {
                "model": {"name_or_path": self.model},
                "data": {"folder": self.data, "resolution": self.size},
                "sample": {"every": 0},
                "health": {"every": 10**6},  # at the end
                "save": {"every": SAVE_EVERY},
                "output_dir": self.folder / "runs",
                "run_name": arm,
            }
        )

    def measure_base(self, other_noise: bool, progress: Progress) -> dict[str, Any]:
        """The base model on the noise that the arms get, or on other noise: the noise floor."""
        return self._measure(AGAIN if other_noise else BASE, None, progress)

    def measure_look(
        self, arm: str, steps: int, has_time: Callable[[], bool], progress: Progress
    ) -> dict[str, Any]:
        """Train the arm on to this many steps, from where it is, and measure it. Raises OutOfTime
        where the time ends before; the next call goes on from the last checkpoint."""
        recipe = self.recipe(arm, steps)
        begun = (recipe.run_folder / "metrics.jsonl").exists()
        for report in train(recipe, "latest" if begun else None, progress):
            progress(f"training {arm}", report.step, steps)
            if report.step % SAVE_EVERY == 0 and report.step < steps and not has_time():
                raise OutOfTime
        health = read_rows(recipe.run_folder / "health.jsonl")[-1]
        seconds = sum(row["seconds"] for row in read_rows(recipe.run_folder / "metrics.jsonl"))
        row = self._measure(f"{arm}-{steps}", recipe.result(), progress)
        return row | {"arm": arm, "step": steps, "seconds": seconds, "health": health}

    def _measure(self, name: str, lora: Path | None, progress: Progress) -> dict[str, Any]:
        """Values [prompts, seeds] of each metric: dino on the object's prompts, sharpness and clip
        on the others. notes: why a metric is missing. images: SEEDS for each prompt, those of the
        object first. prompts: of the object, and the others."""
        of_object, unrelated = self.questions()
        questions = [*of_object, *unrelated]
        image_set = self._image_set(name, questions)
        if not all(image.path.exists() for image in image_set.images):
            pipeline = ImagePipeline(family := load_family(self.model))
            shape = (family.channels, *latent_size(family, self.size, self.size))
            encoded = pipeline.encode([ImageRequest(each.prompt, 0, shape) for each in questions])
            fill([image_set], pipeline, pipeline.load_denoiser(as_loras(lora)), encoded, progress)
        values, notes = {"sharpness": _sharpness(image_set)}, {}
        for metric in self.metrics:
            short = metric.partition("=")[0]
            try:
                resolved = find_metric(metric)
                (scores,) = score(
                    resolved, [image_set], self.folder, device_and_dtype()[0], progress
                )
            except ValueError as error:
                notes[short] = str(error)
                continue
            values[short] = scores.values
        first = len(of_object)
        tables = {
            metric: (table[:first] if metric == ERROR else table[first:]).tolist()
            for metric, table in values.items()
        }
        images = [image.path.relative_to(self.folder).as_posix() for image in image_set.images]
        prompts = [[each.prompt for each in kind] for kind in (of_object, unrelated)]
        return {"values": tables, "notes": notes, "images": images, "prompts": prompts}

    def _image_set(self, name: str, questions: list[EvaluationPrompt]) -> ImageSet:
        place = self.folder / "images" / name
        images = (
            GeneratedImage(
                place / f"{row:02}_{seed}.png", each.prompt, each.target, each.kind, row, seed
            )
            for row, each in enumerate(questions)
            for seed in range(SEEDS)
        )
        return ImageSet(name, tuple(images), load_family(self.model).default_nfe)


def _sharpness(image_set: ImageSet) -> np.ndarray:
    """Sharpness of each image, [prompts, seeds], as in the health check."""
    pixels = [
        read_image(image.path).permute(1, 2, 0).double().numpy() for image in image_set.images
    ]
    images = np.stack(pixels)
    return HEALTH_METRICS["sharpness"]((images, images)).reshape(image_set.shape)
