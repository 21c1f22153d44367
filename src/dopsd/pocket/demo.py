"""The demo: the pocket model tuned on four images of a new thing, with D-OPSD and with SFT."""

from dataclasses import dataclass
from pathlib import Path

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.pocket.world.captions import NAMES as CONCEPT_NAMES
from dopsd.pocket.world.datasets import write_concept
from dopsd.runs.comparison.compare import Repeat, measure, reference_candidates, train_recipes
from dopsd.runs.comparison.evaluate import Evaluator
from dopsd.runs.comparison.table import Comparison, Entry
from dopsd.runs.prepare import Progress

THING = 1_000_003  # its seed; the pocket model never saw it
STEPS = {"dopsd": 150, "sft": 800}  # of 4 images: equal forwards, 16 and 3 an image
LEARNING_RATES = {"dopsd": 1e-3, "sft": 3e-4}  # the best of benchmarks/claim.py sweep, other things
NAMES = {"dopsd": "D-OPSD", "sft": "SFT"}
INTRO = (
    "A few-step model was tuned on four images of a thing it had never seen, with D-OPSD and with "
    "plain fine-tuning (SFT), for as many forwards of the network. Images of one group share "
    "prompt and noise. The first groups show how well each learned the thing, the last what it "
    "still knows. D-OPSD can learn what its teacher generates, not more."
)


@dataclass(frozen=True)
class Demo:
    """comparison: the full table. header, table: the few columns that matter, for the terminal.
    sentences: what they say. results: label -> file, address or command, most important last."""

    comparison: Comparison
    header: list[str]
    table: list[list[str]]
    sentences: list[str]
    results: list[tuple[str, str]]


def demo(folder: Path, progress: Progress) -> Demo:
    """Draw four images of the thing into `folder/images`, tune with each method, and compare."""
    data, report = folder / "images", folder / "report.html"
    write_concept(data, THING)
    recipes = [demo_recipe(method, data, folder) for method in STEPS]
    evaluator = Evaluator(recipes[0], folder / "answers")
    nfe = evaluator.family.default_nfe
    references = reference_candidates(evaluator, many_step=False)
    entries = [Entry([candidate]) for candidate in references]
    entries += train_recipes(recipes, None, [Repeat()], nfe, progress)
    title = "Four images of a new thing"
    comparison = measure([evaluator], entries, (nfe,), report, title, INTRO, progress)
    header, table = _summary(comparison, nfe)
    name, lora = CONCEPT_NAMES[THING % len(CONCEPT_NAMES)], recipes[0].result()
    results = [
        ("try", f'dopsd sample "a {name} toy on night" --lora {lora}'),
        ("LoRA file", str(lora)),
        ("report", f"{report} (open it in a browser: the images side by side)"),
    ]
    return Demo(comparison, header, table, _sentences(comparison, nfe), results)


def demo_recipe(method: str, data: Path, folder: Path) -> Recipe:
    """The demo's recipe of a method: recipes/pocket-identity-<method>.yaml on this data."""
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(data)},
            "method": {"name": method},
            "lora": {"rank": 16},
            "train": {
                "max_steps": STEPS[method],
                "batch_size": 4,
                "learning_rate": LEARNING_RATES[method],
            },
            "sample": {"every": 0},
            "save": {"every": 0},
            "output_dir": str(folder),
            "run_name": method,
        }
    )


def _summary(comparison: Comparison, nfe: int) -> tuple[list[str], list[list[str]]]:
    """The columns of the table that show learning and forgetting, as plain numbers."""
    columns = {
        "thing_error": "error on the new thing",
        "bleed": "shows it unasked",
        "sharpness": "sharpness",
        "attributes": "follows prompts",
    }
    rows = []
    for name, numbers in comparison.numbers.items():
        scores = numbers["nfe"][str(nfe)]
        values = [scores[metric] for metric in columns]
        cells = ["-" if score is None else f"{score['value']:.3f}" for score in values]
        seconds = numbers["seconds"]
        time = "-" if seconds is None else f"{seconds:.0f} s"
        rows.append([NAMES.get(name, name), *cells, time])
    return ["model", *columns.values(), "training"], rows


def _sentences(comparison: Comparison, nfe: int) -> list[str]:
    """How to read the table, and what each method learned and kept."""
    scores = {name: row["nfe"][str(nfe)] for name, row in comparison.numbers.items()}

    def value(model: str, metric: str) -> float:
        return scores[model][metric]["value"]

    sentences = [
        "Lower is better for the two errors on the left, higher for the two columns on the right;",
        'the row "base, other noise" is how far chance alone moves each number.',
    ]
    reachable = value("base", "thing_error") - value("teacher", "thing_error")
    for name in STEPS:
        learned = (value("base", "thing_error") - value(name, "thing_error")) / reachable
        kept = value(name, "sharpness") / value("base", "sharpness")
        sentences.append(
            f"{NAMES[name]} closed {learned:.0%} of the gap between base and teacher and kept "
            f"{kept:.0%} of the sharpness."
        )
    return sentences
