"""Preflight: can the teacher, shown a training image, generate what the student cannot?

D-OPSD learns what its teacher generates and no more. Before anything is trained both generate each
caption from the same noise, the teacher with the training image in its context. The share of the
student's distance by which the teacher is nearer to that image tells what there is to learn; one
sentence sums up the data set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dopsd.config.recipe import Recipe
from dopsd.data.cache import Row, prepare, read_context
from dopsd.evaluation.image_distance import SIDE, distances, nearer
from dopsd.evaluation.metrics import ResolvedMetric, find_metric
from dopsd.evaluation.pages import Panel, write_comparison
from dopsd.evaluation.statistics import Interval
from dopsd.images import cover_crop, open_image, to_pil
from dopsd.models.base import latent_size
from dopsd.models.lora_source import as_loras
from dopsd.models.pipeline import EncodedRequest, ImagePipeline, ImageRequest
from dopsd.models.prompt_teacher import PROMPT
from dopsd.runs.check import check
from dopsd.runs.resolve import ResolvedRun, resolve

ENOUGH = 0.15  # share by which the teacher must be nearer; set on other things than it is tested on
MAX_IMAGES = 16  # that are compared where a data set has more
SEEDS = 4
HEADER = ["image", "student's distance", "teacher's distance", "teacher nearer by", ""]

Distance = Callable[[Tensor, Tensor], Tensor]  # images [S, 3, H, W], target [3, H, W] -> [S]
Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


@dataclass(frozen=True)
class Comparison:
    """One training image and what was generated from its caption.

    target: the image as it is cropped for training. student, teacher: uint8 [S, H, W, 3], one for
    each of S seeds; the distances to the target are [S].
    """

    name: str
    caption: str
    target: Image.Image
    student: Tensor
    teacher: Tensor
    student_distance: np.ndarray
    teacher_distance: np.ndarray

    @property
    def nearer(self) -> Interval:
        """Share of the student's distance by which the teacher is nearer."""
        return nearer(self.student_distance[None], self.teacher_distance[None])


@dataclass(frozen=True)
class Preflight:
    """The comparisons, how many images the data set has, and the conclusion.

    verdict: "can", "little" or "cannot" (`verdict_of`).
    """

    comparisons: tuple[Comparison, ...]
    dataset_size: int
    nearer: Interval
    verdict: str
    sentence: str

    def as_numbers(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "nearer": self.nearer._asdict(),
            "images_in_the_set": self.dataset_size,
            "images": [
                {
                    "image": each.name,
                    "caption": each.caption,
                    "student_distance": each.student_distance.tolist(),
                    "teacher_distance": each.teacher_distance.tolist(),
                    "nearer": each.nearer._asdict(),
                }
                for each in self.comparisons
            ],
        }

    def table(self) -> list[list[str]]:
        """One row for each image, and one for the whole set, under HEADER."""
        rows = [
            [
                each.name,
                f"{each.student_distance.mean():.3f}",
                f"{each.teacher_distance.mean():.3f}",
                _percent(each.nearer),
                "" if each.nearer.value >= ENOUGH else "too little",
            ]
            for each in self.comparisons
        ]
        return [*rows, ["all", "", "", _percent(self.nearer), self.verdict]]


def preflight(
    recipe: Recipe,
    report: Path,
    progress: Progress,
    seeds: int = SEEDS,
    max_images: int = MAX_IMAGES,
    metric: str | None = None,
) -> Preflight:
    """Compare student and teacher on up to `max_images` images of a recipe's data, from `seeds`
    noises each, and write the page.

    metric: name of a distance to a target image, instead of the distance of downscaled pixels.
    Raises ValueError for a metric that is no such distance, and for a recipe whose method has no
    teacher that is shown images.
    """
    if "privileged" not in recipe.method.needs:
        raise ValueError(
            f"{recipe.method.name} learns from the images themselves and not from a teacher that "
            "is shown them, so preflight has nothing to compare. Give it a recipe of dopsd."
        )
    distance = find_metric(metric) if metric else None
    if distance and (distance.metric.needs != "target" or distance.metric.higher):
        raise ValueError(
            f"{metric} is no distance to a target image: preflight takes dino or lpips."
        )
    run = resolve(recipe)
    check(run)
    comparisons = _compare(run, seeds, max_images, distance, progress)
    total = nearer(
        np.stack([each.student_distance for each in comparisons]),
        np.stack([each.teacher_distance for each in comparisons]),
    )
    result = Preflight(
        comparisons=comparisons,
        dataset_size=len(run.listing.examples),
        nearer=total,
        verdict=verdict_of(total),
        sentence=_sentence(run, comparisons, total),
    )
    _write_page(report, recipe, result, seeds, metric)
    return result


def verdict_of(share: Interval) -> str:
    """From the share by which the teacher is nearer: "cannot" where that may be chance, "little"
    below ENOUGH, else "can"."""
    if share.low <= 0:
        return "cannot"
    return "can" if share.value >= ENOUGH else "little"


def _sentence(run: ResolvedRun, comparisons: Sequence[Comparison], total: Interval) -> str:
    method, verdict = run.recipe.method.name, verdict_of(total)
    evidence = (
        "shown the training image, the teacher comes nearer to it by "
        f"{_percent(total)} of the student's distance"
    )
    if verdict == "can":
        weak = [each.name for each in comparisons if each.nearer.high < ENOUGH]
        exceptions = f", except these images: {', '.join(weak)}" if weak else ""
        return f"{method} can learn this set with this teacher{exceptions}: {evidence}."
    advice = (
        f"Try {' or '.join(_alternatives(run))}; {method} does not learn what the teacher does not "
        "generate."
    )
    if verdict == "little":
        return (
            f"{method} will learn little of this set with this teacher: {evidence}, less than "
            f"{ENOUGH:.0%}. {advice}"
        )
    return (
        f"{method} cannot learn this set with this teacher: {evidence}, which may be chance. "
        f"{advice}"
    )


def _percent(share: Interval) -> str:
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"


def _alternatives(run: ResolvedRun) -> list[str]:
    """What else can be tried with this model."""
    contexts = run.family.teacher_contexts
    current = run.recipe.model.teacher_context or contexts[0]
    others = [name for name in contexts if name not in (current, PROMPT)]
    other_contexts = [f"model.teacher_context: {name}" for name in others]
    other_vlm = ["another model.vlm"] if current == "vlm" else []
    captions = "captions that leave out what only the image shows"
    return [*other_contexts, *other_vlm, captions, "method sft"]


def _compare(
    run: ResolvedRun, seeds: int, max_images: int, metric: ResolvedMetric | None, progress: Progress
) -> tuple[Comparison, ...]:
    recipe, family = run.recipe, run.family
    pipeline = ImagePipeline(family, run.dtype)
    rows = _encode(run, max_images, pipeline, progress)
    denoiser = pipeline.load_denoiser(as_loras(recipe.lora.init_from))
    distance = metric.load(run.device) if metric else None
    comparisons = []
    for done, row in enumerate(rows):
        progress("generating", done, len(rows))
        width, height = row.size
        latent_shape = (family.channels, *latent_size(family, height, width))
        request = ImageRequest(row.example.caption, recipe.sample.seed, latent_shape)

        def generate(context_file: Path, request: ImageRequest = request) -> Tensor:
            encoded = EncodedRequest(request, read_context(context_file))
            on_each_noise = [encoded.with_seed(request.seed + index) for index in range(seeds)]
            return torch.stack(pipeline.generate(denoiser, on_each_noise, recipe.sample.nfe))

        assert row.privileged is not None
        student, teacher = generate(row.context), generate(row.privileged)
        target = cover_crop(open_image(row.example.path), row.size)
        comparisons.append(
            Comparison(
                name=row.example.path.name,
                caption=row.example.caption,
                target=target,
                student=student,
                teacher=teacher,
                student_distance=_distances(distance, student, np.asarray(target)),
                teacher_distance=_distances(distance, teacher, np.asarray(target)),
            )
        )
    progress("generating", len(rows), len(rows))
    return tuple(comparisons)


def _distances(distance: Distance | None, images: Tensor, target: np.ndarray) -> np.ndarray:
    """By a metric, or of downscaled pixels: uint8 [S, H, W, 3] and [H, W, 3] -> [S]."""
    if distance is None:
        return distances(images.numpy(), target)
    pixels, target_pixels = (
        each.float().movedim(-1, -3) / 255 for each in (images, torch.from_numpy(target.copy()))
    )
    return distance(pixels, target_pixels).double().cpu().numpy()


def _encode(
    run: ResolvedRun, max_images: int, pipeline: ImagePipeline, progress: Progress
) -> tuple[Row, ...]:
    """Images spread evenly over the data set, with the contexts of student and teacher, encoded as
    training does and into the same cache."""
    family, examples = run.family, run.listing.examples
    count = min(max_images, len(examples))
    chosen = [examples[index * len(examples) // count] for index in range(count)]
    return prepare(
        chosen,
        run.recipe.output_dir / "cache",
        family.load_text_encoder(run.device, run.dtype, images=True),
        pipeline.vae,
        resolution=run.side,
        multiple=family.multiple,
        privileged=True,
        device=run.device,
        progress=lambda done, total: progress("caching", done, total),
    )


def _write_page(
    path: Path, recipe: Recipe, result: Preflight, seeds: int, metric: str | None
) -> None:
    columns = tuple(f"seed {recipe.sample.seed + index}" for index in range(seeds))
    panels = [
        Panel(
            f"{each.name}: {each.caption}",
            columns,
            (
                ("your image", (each.target,)),
                ("student: the caption alone", tuple(to_pil(each.student))),
                ("teacher: caption and image", tuple(to_pil(each.teacher))),
            ),
        )
        for each in result.comparisons
    ]
    measured_by = metric or (
        "root mean square difference to the training image (0 to 1), both downscaled to "
        f"{SIDE} pixels on the longer side"
    )
    suited = ", for which the threshold was not set" if metric else ""
    definitions = {
        "distance": f"{measured_by}, mean over {seeds} noises{suited}",
        "teacher nearer by": "the part of the student's distance that the teacher is nearer, with "
        "its 95% bootstrap interval over noises; in the last row over images",
        "too little": f"less than {ENOUGH:.0%}",
    }
    notes = [
        f"{len(result.comparisons)} of {result.dataset_size} images were compared. The distance "
        "sees where which colours are; for everything else look at the images.",
    ]
    write_comparison(
        path,
        f"Preflight of {recipe.run_name}",
        "",
        HEADER,
        result.table(),
        panels,
        notes,
        result.sentence,
        definitions,
    )
