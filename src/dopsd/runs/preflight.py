"""Before hours of training: does the teacher, with a training image in its context, generate what
the student cannot?

D-OPSD learns what its teacher generates, no more. So both generate each caption on the same noise,
the teacher beside the image, and the share by which the teacher comes nearer says what there is to
learn. One sentence for the set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dopsd.config.recipe import Recipe
from dopsd.data.cache import Row, prepare, read_context
from dopsd.evaluation.image_distance import SIDE, distances, nearer
from dopsd.evaluation.metrics import Found, find_metric
from dopsd.evaluation.pages import Panel, write_comparison
from dopsd.evaluation.statistics import Interval
from dopsd.images import cover_crop, open_image, to_pil
from dopsd.models.base import Family, latent_size
from dopsd.models.pipeline import EncodedRequest, ImagePipeline, ImageRequest
from dopsd.runs.check import check
from dopsd.runs.resolve import ResolvedRun, resolve

# Share by which the teacher must be nearer; set on other things than those it is judged on
ENOUGH = 0.15
MOST = 16  # images that are looked at where a set has more
SEEDS = 4
Distance = Callable[
    [torch.Tensor, torch.Tensor], torch.Tensor
]  # images and their target, in [0, 1]
Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many
HEADER = ["picture", "student's distance", "teacher's distance", "teacher nearer by", ""]


@dataclass(frozen=True)
class Look:
    """One training image as it is trained on, and what was generated from its caption: uint8 [S, H,
    W, 3] each, and how far each is from it, [S]."""

    name: str
    caption: str
    target: Image.Image
    student: torch.Tensor
    teacher: torch.Tensor
    student_distance: np.ndarray
    teacher_distance: np.ndarray

    @property
    def nearer(self) -> Interval:
        return nearer(self.student_distance[None], self.teacher_distance[None])


@dataclass(frozen=True)
class Preflight:
    """What was seen, of how many images, and what follows. verdict: "can", "little" or "cannot"."""

    looks: tuple[Look, ...]
    images: int
    nearer: Interval
    verdict: str
    sentence: str

    def as_numbers(self) -> dict[str, Any]:
        """What --json writes."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "nearer": self.nearer._asdict(),
            "pictures_in_the_set": self.images,
            "images": [
                {
                    "picture": look.name,
                    "caption": look.caption,
                    "student_distance": look.student_distance.tolist(),
                    "teacher_distance": look.teacher_distance.tolist(),
                    "nearer": look.nearer._asdict(),
                }
                for look in self.looks
            ],
        }

    def table(self) -> list[list[str]]:
        """A row an image, and the set."""
        rows = [
            [
                look.name,
                f"{look.student_distance.mean():.3f}",
                f"{look.teacher_distance.mean():.3f}",
                _percent(look.nearer),
                "" if look.nearer.value >= ENOUGH else "too little",
            ]
            for look in self.looks
        ]
        return [*rows, ["all", "", "", _percent(self.nearer), self.verdict]]


def preflight(
    recipe: Recipe,
    report: Path,
    progress: Progress,
    seeds: int = SEEDS,
    most: int = MOST,
    metric: str | None = None,
) -> Preflight:
    """Look at up to `most` images of a recipe's data, on `seeds` noises each, and write the page.
    measure: the name of a distance to a target image, instead of that of reduced pixels. Raises
    ValueError for a measure that is none, and for a recipe whose method has no teacher that sees
    images."""
    if "privileged" not in recipe.method.needs:
        raise ValueError(
            f"{recipe.method.name} learns from the pictures themselves, not from a teacher who sees them: "
            "preflight has nothing to ask. Give it a recipe of dopsd."
        )
    far = find_metric(metric) if metric else None
    if far and (far.metric.needs != "target" or far.metric.higher):
        raise ValueError(
            f"{metric} is no distance to a target picture: preflight takes dino or lpips."
        )
    run = resolve(recipe)
    check(run)
    looks = _look(run, seeds, most, far, progress)
    total = nearer(
        np.stack([e.student_distance for e in looks]), np.stack([e.teacher_distance for e in looks])
    )
    verdict = verdict_of(total)
    result = Preflight(
        looks,
        len(run.listing.examples),
        total,
        verdict,
        _sentence(recipe, run.family, looks, total),
    )
    _write_page(report, recipe, result, seeds, metric)
    return result


def verdict_of(found: Interval) -> str:
    """ "cannot": not nearer beyond chance; "little": nearer, by less than ENOUGH; "can": by ENOUGH
    or more."""
    if found.low <= 0:
        return "cannot"
    return "can" if found.value >= ENOUGH else "little"


def _sentence(recipe: Recipe, family: Family, looks: Sequence[Look], total: Interval) -> str:
    method, verdict = recipe.method.name, verdict_of(total)
    by = f"given the picture it comes nearer to it than the student by {_percent(total)} of the student's distance"
    if verdict == "can":
        weak = [look.name for look in looks if look.nearer.high < ENOUGH]
        but = f", but not these pictures: {', '.join(weak)}" if weak else ""
        return f"{method} can learn this set with this teacher{but}: {by}."
    advice = f"Try {' or '.join(_others(recipe, family))}; what the teacher does not paint, {method} does not learn."
    if verdict == "little":
        return f"{method} will learn little of this set with this teacher: {by}, less than {ENOUGH:.0%}. {advice}"
    return f"{method} cannot learn this set with this teacher: {by}, which may be chance. {advice}"


def _percent(found: Interval) -> str:
    return f"{found.value:.0%} [{found.low:.0%}, {found.high:.0%}]"


def _others(recipe: Recipe, family: Family) -> list[str]:
    """What else there is to try, for this family."""
    now = recipe.model.teacher_context or family.teacher_contexts[0]
    contexts = [f"model.teacher_context: {name}" for name in family.teacher_contexts if name != now]
    eyes = ["another model.vlm"] if now == "vlm" else []
    return [*contexts, *eyes, "captions that leave to the picture what only it shows", "method sft"]


def _look(
    run: ResolvedRun, seeds: int, most: int, far: Found | None, progress: Progress
) -> tuple[Look, ...]:
    recipe, family = run.recipe, run.family
    pipeline = ImagePipeline(family, run.dtype)
    rows = _read(run, most, pipeline, progress)
    denoiser = pipeline.load_denoiser(recipe.lora.init_from)
    distance = far.made(far.model, run.device) if far else None
    looks = []
    for done, row in enumerate(rows):
        progress("painting", done, len(rows))
        width, height = row.size
        latent_shape = (family.channels, *latent_size(family, height, width))
        request = ImageRequest(row.example.caption, recipe.sample.seed, latent_shape)
        assert row.privileged is not None
        student, teacher = (
            torch.stack(pipeline.generate(denoiser, on_each_noise, recipe.sample.nfe))
            for on_each_noise in (
                _on_each_noise(EncodedRequest(request, read_context(path)), seeds)
                for path in (row.context, row.privileged)
            )
        )
        target = cover_crop(open_image(row.example.path), row.size)
        apart = [_distances(distance, images, np.asarray(target)) for images in (student, teacher)]
        looks.append(
            Look(row.example.path.name, row.example.caption, target, student, teacher, *apart)
        )
    progress("painting", len(rows), len(rows))
    return tuple(looks)


def _on_each_noise(encoded: EncodedRequest, seeds: int) -> list[EncodedRequest]:
    return [encoded.with_seed(encoded.request.seed + index) for index in range(seeds)]


def _distances(distance: Distance | None, images: torch.Tensor, target: np.ndarray) -> np.ndarray:
    """By a measure, or of reduced pixels: uint8 [S, H, W, 3] and [H, W, 3] -> [S]."""
    if distance is None:
        return distances(images.numpy(), target)
    replicate = [
        each.float().movedim(-1, -3) / 255 for each in (images, torch.from_numpy(target.copy()))
    ]
    return distance(*replicate).double().cpu().numpy()


def _read(
    run: ResolvedRun, most: int, pipeline: ImagePipeline, progress: Progress
) -> tuple[Row, ...]:
    """Captions, and captions with their images, as training reads them and into the same cache;
    spread evenly over the set where it has more than `most` images."""
    family, examples = run.family, run.listing.examples
    count = min(most, len(examples))
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
        progress=lambda done, total: progress("reading", done, total),
    )


def _write_page(
    path: Path, recipe: Recipe, result: Preflight, seeds: int, metric: str | None
) -> None:
    columns = tuple(f"seed {recipe.sample.seed + index}" for index in range(seeds))
    panels = [
        Panel(
            f"{look.name}: {look.caption}",
            columns,
            (
                ("your picture", (look.target,)),
                ("student: the caption alone", tuple(to_pil(look.student))),
                ("teacher: the picture beside it", tuple(to_pil(look.teacher))),
            ),
        )
        for look in result.looks
    ]
    pixels = f"Distance: root mean square difference to the training picture, 0 to 1, both reduced to {SIDE} cells."
    by = f"Distance: {metric}; the bound was set for that of pixels." if metric else pixels
    notes = [
        f"{len(result.looks)} of {result.images} pictures, {seeds} noises each. {by} Intervals: 95% bootstrap over "
        "noises; for all, over pictures.",
        f"At least {ENOUGH:.0%} nearer is called enough. The measure sees where which colours are; for the rest "
        "look at the pictures.",
    ]
    write_comparison(
        path,
        f"Preflight of {recipe.run_name}",
        result.sentence,
        HEADER,
        result.table(),
        panels,
        notes,
    )
