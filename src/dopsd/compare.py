"""Recipes side by side: same data, prompts, noise and measures. `demo` is a comparison whose recipes are built in.

Where the data is a pocket lesson every model sits the lesson's exam; elsewhere the pictures speak, beside the cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dopsd.checking import family_of, pictures_shown, read_data
from dopsd.deployed import deployed_on
from dopsd.evaluation.report import Panel, write_comparison
from dopsd.families.base import Denoiser, Family, Painter
from dopsd.families.lora import merge_lora, read_lora
from dopsd.paint import noise_for, to_images
from dopsd.pocket.exam import Answers, Sheet, interval, lesson_of, sit, truth, write_lesson
from dopsd.preview import paint_each
from dopsd.recipe import Recipe, parse_recipe
from dopsd.run import Progress, train
from dopsd.run_folder import read_rows

MEASURES = ("thing_error", "thing_hit", "sharpness", "speckle", "attributes")
KEPT = ("sharpness", "speckle", "attributes")  # read on unrelated prompts; the teacher's row has none
SHOWN = 8  # pictures of a row in the report
DEMO_THING = 1_000_003
DEMO_STEPS = {"dopsd": 150, "sft": 800}  # about equal wall time: 16 and 3 forward units a picture
DEMO_RATE = {"dopsd": 1e-3, "sft": 3e-4}  # the best of benchmarks/claim.py sweep, on other things


@dataclass(frozen=True)
class Outcome:
    """What a comparison found: a table to print, and the same as numbers."""

    header: list[str]
    table: list[list[str]]
    numbers: dict[str, Any]


@dataclass
class Contestant:
    """A model in a comparison: its name, its LoRA (None = the untouched model), and what the tuning cost."""

    name: str
    lora: Path | None = None
    seconds: float | None = None
    pictures: int | None = None
    seeing: bool = False  # the untouched model with the picture in context: the teacher
    answers: Answers | None = None
    images: tuple[Image.Image, ...] = field(default=())


def compare(recipes: Sequence[Recipe], report: Path, progress: Progress, loras: Sequence[Path] = ()) -> Outcome:
    """Run the recipes that are not finished, then judge them, further LoRA files (of any tool) and the untouched model
    on the same questions, those of the first recipe. Raises ValueError without a recipe, and for a LoRA that does not
    fit, before anything is trained."""
    if not recipes:
        raise ValueError("give at least one recipe: its model, prompts and data are what LoRA files are compared on.")
    first = recipes[0]
    family = family_of(first)
    for lora in loras:
        read_lora(lora, family)
    for other in recipes[1:]:
        if (other.model.name_or_path, other.data.folder) != (first.model.name_or_path, first.data.folder):
            raise ValueError(
                f"{other.run_name} and {first.run_name} differ in model or data; a comparison needs the same of both."
            )
    contestants = [Contestant("base"), *(_trained(recipe, progress) for recipe in recipes)]
    contestants += [Contestant(lora.stem, lora) for lora in loras]
    if lesson_of(first.data.folder) is not None:
        contestants.insert(1, Contestant("teacher", seeing=True))
    return judge(first, contestants, report, title="Comparison", intro="Same data, prompts, noise and measures.")


def demo(folder: Path, progress: Progress) -> Outcome:
    """Draw a thing that the pocket model never saw, tune on four pictures of it with each method, and compare."""
    lesson = folder / "pictures"
    write_lesson(lesson, DEMO_THING)
    recipes = [demo_recipe(method, lesson, folder) for method in DEMO_STEPS]
    contestants = [Contestant("base"), Contestant("teacher", seeing=True)]
    contestants += [_trained(recipe, progress) for recipe in recipes]
    return judge(
        recipes[0],
        contestants,
        folder / "report.html",
        title="Four pictures of a new thing",
        intro="A few-step model was tuned on four pictures of a thing it had never seen, with D-OPSD and with plain "
        "fine-tuning (SFT) for about the same time. Rows share prompts and noise. Look for the thing in the first "
        "grid, and at what the model still knows in the second. D-OPSD can learn what its teacher paints, not more.",
    )


def demo_recipe(method: str, lesson: Path, folder: Path) -> Recipe:
    """The demo's recipe of a method: what recipes/pocket-identity-*.yaml say, on this lesson."""
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(lesson)},
            "method": {"name": method},
            "lora": {"rank": 16},
            "train": {"max_steps": DEMO_STEPS[method], "batch_size": 4, "learning_rate": DEMO_RATE[method]},
            "sample": {"every": 0},
            "save": {"every": 0},
            "output_dir": str(folder),
            "run_name": method,
        }
    )


def judge(recipe: Recipe, contestants: Sequence[Contestant], report: Path, title: str, intro: str) -> Outcome:
    """Ask every contestant the same questions and write the page."""
    family = family_of(recipe)
    device, dtype = deployed_on()
    thing = lesson_of(recipe.data.folder)
    reader = family.load_reader(device, dtype, pictures=thing is not None)
    painter = family.load_painter(device, torch.float32)
    if thing is not None:
        sheet = Sheet.write(thing, reader, recipe.data.folder)
        del reader  # gigabytes, as below
        for contestant in contestants:
            _examine(contestant, sheet, family, painter, _denoiser_of(contestant, family, device, dtype))
        panels = _exam_panels(contestants, sheet)
    else:
        wanted = pictures_shown(recipe, family, read_data(recipe))
        contexts = [each.read(reader) for each in wanted]
        del reader
        noises = [noise_for([each.seed], *each.cells) for each in wanted]
        nfe = recipe.sample.nfe or family.default_nfe
        schedules = [family.schedule(nfe, *each.cells[1:]) for each in wanted]
        for contestant in contestants:
            # the network is bound to no name, so that it leaves memory before the next one comes
            pictures = paint_each(
                _denoiser_of(contestant, family, device, dtype), contexts, painter, schedules, noises, device
            )
            contestant.images = tuple(image for picture in pictures for image in to_images(picture[None]))
        rows = tuple((c.name, c.images) for c in contestants)
        panels = [Panel("Same prompts, same noise", tuple(each.prompt for each in wanted), rows)]
    outcome = _tabulate(contestants, measured=thing is not None)
    write_comparison(report, title, intro, outcome.header, outcome.table, panels, _notes(thing is not None))
    return outcome


def _trained(recipe: Recipe, progress: Progress) -> Contestant:
    """The recipe's LoRA, trained now unless the run folder holds it already."""
    lora = recipe.run_folder / f"{recipe.run_name}.safetensors"
    config, metrics = recipe.run_folder / "config.yaml", recipe.run_folder / "metrics.jsonl"
    if lora.exists() and (missing := [file for file in (config, metrics) if not file.is_file()]):
        raise ValueError(f"{missing[0]} is missing beside a finished LoRA: remove {recipe.run_folder} to run it again.")
    if lora.exists() and config.read_text(encoding="utf-8") != recipe.to_yaml():
        raise ValueError(f"{recipe.run_folder} holds a run of another recipe; choose another run_name or output_dir.")
    if not lora.exists():
        for step in train(recipe, progress=progress):
            progress(f"{recipe.run_name}  loss {step.log['loss']:.4f}", step.step, recipe.train.max_steps)
    rows = read_rows(metrics)
    return Contestant(
        recipe.run_name,
        lora,
        seconds=sum(row["seconds"] for row in rows),
        pictures=int(sum(row["pictures"] for row in rows)),
    )


def _denoiser_of(contestant: Contestant, family: Family, device: torch.device, dtype: torch.dtype) -> Denoiser:
    denoiser = family.load_denoiser(device, dtype)
    if contestant.lora:
        merge_lora(denoiser.network, contestant.lora, family)
    return denoiser


def _examine(contestant: Contestant, sheet: Sheet, family: Family, painter: Painter, denoiser: Denoiser) -> None:
    side = family.resolution // family.cell
    schedule = family.schedule(family.default_nfe, side, side)
    contestant.answers = sit(sheet, denoiser, painter, schedule, (family.channels, side, side), contestant.seeing)


def _tabulate(contestants: Sequence[Contestant], measured: bool) -> Outcome:
    header = ["model", *(MEASURES if measured else ()), "seconds", "pictures"]
    table, numbers = [], {}
    for contestant in contestants:
        row: dict[str, float | None] = {}
        cells = [contestant.name]
        if measured:
            assert contestant.answers is not None
            means = contestant.answers.means()
            for measure in MEASURES:
                hidden = contestant.seeing and measure in KEPT
                row[measure] = None if hidden else means[measure]
                cells.append("-" if hidden else interval(getattr(contestant.answers, measure)))
        row |= {"seconds": contestant.seconds, "pictures": contestant.pictures}
        cells.append("-" if contestant.seconds is None else f"{contestant.seconds:.0f}")
        cells.append("-" if contestant.pictures is None else str(contestant.pictures))
        table.append(cells)
        numbers[contestant.name] = row
    return Outcome(header, table, numbers)


def _exam_panels(contestants: Sequence[Contestant], sheet: Sheet) -> list[Panel]:
    def rows(attribute: str, seeing: bool) -> tuple[tuple[str, tuple[Image.Image, ...]], ...]:
        return tuple(
            (c.name, tuple(to_images(getattr(c.answers, attribute)[:SHOWN])))
            for c in contestants
            if seeing or not c.seeing
        )

    scenes = sheet.scenes[:SHOWN]
    wanted = ("how it should look", tuple(to_images(truth(scenes))))
    learned = tuple(f"{scene.size}, {scene.place}, {scene.background}" for scene in scenes)
    kept = tuple(", ".join(stated.values()) or "(nothing stated)" for stated in sheet.stated[:SHOWN])
    return [
        Panel("The thing in new scenes", learned, (wanted, *rows("thing_pictures", seeing=True))),
        Panel("Unrelated prompts", kept, rows("unrelated_pictures", seeing=False)),
    ]


def _notes(measured: bool) -> list[str]:
    if not measured:
        return []
    return [
        "Numbers are means with 95% bootstrap intervals over pictures, one seed. thing_error (lower is better) and "
        "thing_hit (higher) compare 24 unseen scenes with the true thing; sharpness, speckle (lower) and attributes "
        "are read on 96 unrelated prompts.",
        "The teacher is the untouched model with one of the four pictures in its context: what D-OPSD learns from.",
    ]
