"""The demo: the pocket model tuned on four images of a new thing by plain fine-tuning (SFT) and by
the default of this package, with looks along both trainings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dopsd.config.recipe import Recipe
from dopsd.evaluation.curves import Look, difference_at_equal_learning, sentence_of
from dopsd.evaluation.pages import SAME_NOISE, Panel, Section, write_page
from dopsd.evaluation.plots import Curve, plot_against
from dopsd.images import open_image, to_pil
from dopsd.models.lora_source import LoraFile
from dopsd.models.pipeline import ImagePipeline
from dopsd.pocket.benchmark import DEFINITIONS, render_scenes
from dopsd.pocket.curves import Bench, ConceptLook, concept_recipe
from dopsd.pocket.world.captions import caption_of
from dopsd.pocket.world.datasets import HELD_OUT, Concept, concept_of, write_concept
from dopsd.runs.comparison.compare import train_once
from dopsd.runs.prepare import Progress

THING = HELD_OUT + 3  # its seed; the pocket model never saw it
SAVES = 8  # LoRA files that a training leaves; the first, second, fourth and last are measured
# Sections of each arm's recipe, as in recipes/pocket-identity-*.yaml.
ARMS: dict[str, dict[str, Any]] = {
    "sft": {
        "method": {"name": "sft"},
        "train": {"max_steps": 800, "learning_rate": 3e-4},
    },
    "ours": {
        "method": {"name": "sft"},
        "retention": {"weight": 1},
        "train": {"max_steps": 100, "learning_rate": 1e-3},
    },
}
NAMES = {"base": "untouched", "sft": "SFT", "ours": "SFT + retention"}
COLUMNS = {
    "thing_error": "error on the thing",
    "thing_hit": "recognised",
    "thing_sharp": "its sharpness",
    "sharpness": "sharpness",
    "attributes": "follows prompts",
}
LEARNED, KEPT = "thing_error", ("sharpness", "attributes")
SHOWN = 4  # images of a kind


@dataclass(frozen=True)
class Demo:
    """header, table: a row for each model at its last look. numbers: the same and every look, for
    JSON. sentences: what is shown. results: label -> file or command, most important last."""

    header: list[str]
    table: list[list[str]]
    numbers: dict[str, Any]
    sentences: list[str]
    results: list[tuple[str, str]]


def demo(folder: Path, thing: int, progress: Progress) -> Demo:
    """Draw four images of thing `thing` into `folder/images`, tune with each arm, look along the
    way, and write `folder/report.html`. Raises ValueError for a thing that was in pocket's
    training, and for a folder of another thing."""
    # The images.
    data, report, concept = folder / "images", folder / "report.html", Concept("thing", thing)
    if thing < HELD_OUT:
        raise ValueError(
            f"--thing {thing}: things below {HELD_OUT} were in the pocket model's training; give "
            f"{HELD_OUT} or more."
        )
    before = concept_of(data)
    if before and before != concept:
        raise ValueError(f"{folder} is of {before.kind} {before.seed}: choose another --out.")
    write_concept(data, thing)

    # Train and measure.
    bench = Bench(data)
    recipes = {arm: arm_recipe(arm, data, folder) for arm in ARMS}
    progress("measuring the untouched model", 0, 1)
    base = bench.look(bench.base)
    curves = {arm: [base, *_looks(recipe, bench, progress)] for arm, recipe in recipes.items()}

    # What they show.
    last = {"base": base} | {arm: curve[-1] for arm, curve in curves.items()}
    header, table = _table(last)
    sentences = sentences_of(curves)
    panels = [_training_panel(data), *_panels(bench, concept, last)]
    definitions = {label: DEFINITIONS[metric] for metric, label in COLUMNS.items()}
    sections = [
        Section("What it learned, and what it still knows", [SAME_NOISE], panels=panels),
        Section("Along the training", curves=_drawn(curves)),
        Section("What this shows", sentences),
        Section("Metrics", (), header, table, definitions),
    ]
    write_page(report, "Four images of a new thing", "", _intro(bench), sections)
    lora = recipes["ours"].result()
    results = [
        ("try", f'dopsd sample "a {concept.name} toy on night" --lora {lora}'),
        ("LoRA file", str(lora)),
        ("report", f"{report} (open it in a browser: the images side by side)"),
    ]
    return Demo(header, table, _numbers(thing, last, curves), sentences, results)


def arm_recipe(arm: str, data: Path, folder: Path) -> Recipe:
    """The recipe of an arm on this data; its run is `folder/<arm>`."""
    save = {"every": ARMS[arm]["train"]["max_steps"] // SAVES}
    return concept_recipe(ARMS[arm] | {"save": save}, data, folder, arm)


def look_steps(recipe: Recipe) -> list[int]:
    """The steps after which an arm is measured."""
    every = recipe.save.every
    return [every, 2 * every, 4 * every, recipe.train.max_steps]


def _looks(recipe: Recipe, bench: Bench, progress: Progress) -> Iterator[ConceptLook]:
    """Train the recipe unless it is finished, and measure the LoRA files that it left."""
    train_once(recipe, progress)
    pipeline, steps = ImagePipeline(bench.family), look_steps(recipe)
    for done, step in enumerate(steps, start=1):
        lora = recipe.result("" if step == steps[-1] else f"-step{step:06d}")
        yield bench.look(pipeline.load_denoiser([LoraFile(lora)]), step)
        progress(f"measuring {recipe.run_name}", done, len(steps))


def _intro(bench: Bench) -> str:
    return (
        f"A small model that needs {bench.family.default_nfe} steps an image was tuned twice on "
        f"four images of a thing it had never seen: by plain fine-tuning ({NAMES['sft']}), and by "
        f"{NAMES['ours']}, which also holds the model where it was on images that have nothing to "
        "do with the four."
    )


def _means(look: ConceptLook) -> dict[str, float]:
    return {metric: look.mean(metric) for metric in COLUMNS}


def _table(last: Mapping[str, ConceptLook]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [NAMES[name], *(f"{value:.3f}" for value in _means(look).values())]
        for name, look in last.items()
    ]
    return ["model", *COLUMNS.values()], rows


def _numbers(
    thing: int, last: Mapping[str, ConceptLook], curves: Mapping[str, Sequence[ConceptLook]]
) -> dict[str, Any]:
    """The last look of each model, then every look of each arm."""
    looks = {
        arm: [{"step": look.step} | _means(look) for look in curve] for arm, curve in curves.items()
    }
    ends = {name: _means(look) for name, look in last.items()}
    return ends | {"thing": thing, "names": NAMES, "looks": looks}


def sentences_of(curves: Mapping[str, Sequence[Look]]) -> list[str]:
    """What each arm learned and kept at its end, and what ours keeps more at equal learning."""
    sentences = []
    for arm, curve in curves.items():
        first, end = curve[0], curve[-1]
        kept = ", ".join(f"{end.mean(each) / first.mean(each):.0%} of {each}" for each in KEPT)
        sentences.append(
            f"After {end.step} steps {NAMES[arm]} shows the thing in {end.mean('thing_hit'):.0%} "
            f"of new scenes, and on unrelated prompts keeps {kept}."
        )
    for metric in KEPT:
        gain = difference_at_equal_learning(curves["ours"], curves["sft"], LEARNED, metric)
        sentences.append(sentence_of(gain, metric, NAMES["ours"], NAMES["sft"]))
    return [*sentences, "Intervals are over prompts: one thing, one training of each."]


def _drawn(curves: Mapping[str, Sequence[Look]]) -> list[Curve]:
    """What is kept over what was learned, as shares of the untouched model's."""
    drawn = []
    for metric in KEPT:
        lines = {
            NAMES[arm]: np.array(
                [
                    (
                        1 - look.mean(LEARNED) / curve[0].mean(LEARNED),
                        look.mean(metric) / curve[0].mean(metric),
                    )
                    for look in curve
                ]
            )
            for arm, curve in curves.items()
        }
        about = "Dots: looks along the training, from the untouched model at the upper left."
        title = f"Share of {metric} kept, over the share of the error removed"
        drawn.append(plot_against(title, lines, "error removed:", about))
    return drawn


def _training_panel(data: Path) -> Panel:
    images = tuple(open_image(file) for file in sorted(data.glob("*.png")))
    return Panel("The four training images", ("",) * len(images), (("", images),))


def _panels(bench: Bench, concept: Concept, last: Mapping[str, ConceptLook]) -> list[Panel]:
    """The thing in new scenes, and unrelated prompts: a group for each prompt."""
    scenes, stated = bench.questions.scenes[:SHOWN], bench.questions.stated[:SHOWN]
    things = {NAMES[name]: look.result.thing_images[:SHOWN] for name, look in last.items()}
    others = {NAMES[name]: look.result.unrelated_images[:SHOWN] for name, look in last.items()}
    return [
        Panel(
            "The thing in new scenes",
            tuple(concept.caption(scene, concept.name) for scene in scenes),
            _rows({"how it should look": render_scenes(scenes)} | things),
        ),
        Panel(
            "Prompts that have nothing to do with it",
            tuple(caption_of(each) for each in stated),
            _rows(others),
        ),
    ]


def _rows(images: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[Image.Image, ...]], ...]:
    return tuple((name, tuple(to_pil(each))) for name, each in images.items())
