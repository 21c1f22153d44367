"""The demo: four images of a new thing, tuned with each method on the pocket model."""

from pathlib import Path

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.pocket.benchmark import write_concept
from dopsd.runs.comparison.compare import _base_candidates, _tuned, reward
from dopsd.runs.comparison.evaluate import Evaluator
from dopsd.runs.comparison.table import Entry, Outcome
from dopsd.runs.prepare import Progress

DEMO_THING = 1_000_003


DEMO_STEPS = {"dopsd": 150, "sft": 800}  # about equal wall time: 16 and 3 forward units an image


DEMO_RATE = {"dopsd": 1e-3, "sft": 3e-4}  # the best of benchmarks/claim.py sweep, on other things


def demo(folder: Path, progress: Progress) -> Outcome:
    """Draw a thing that the pocket model never saw, tune on four images of it with each method, and
    compare."""
    concept = folder / "pictures"
    write_concept(concept, DEMO_THING)
    recipes = [demo_recipe(method, concept, folder) for method in DEMO_STEPS]
    evaluator = Evaluator(recipes[0], folder / "answers")
    nfe = evaluator.family.default_nfe
    entries = [Entry([candidate]) for candidate in _base_candidates(evaluator, many=False)]
    entries += _tuned(recipes, None, 1, nfe, progress)
    intro = (
        "A few-step model was tuned on four pictures of a thing it had never seen, with D-OPSD and with plain "
        "fine-tuning (SFT) for about the same time. Rows share prompts and noise. Look for the thing in the first "
        "grid, and at what the model still knows in the last. D-OPSD can learn what its teacher paints, not more."
    )
    return reward(
        [evaluator],
        entries,
        (nfe,),
        folder / "report.html",
        "Four pictures of a new thing",
        intro,
        progress,
    )


def demo_recipe(method: str, concept: Path, folder: Path) -> Recipe:
    """The demo's recipe of a method: what recipes/pocket-identity-*.yaml say, on this concept
    dataset."""
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(concept)},
            "method": {"name": method},
            "lora": {"rank": 16},
            "train": {
                "max_steps": DEMO_STEPS[method],
                "batch_size": 4,
                "learning_rate": DEMO_RATE[method],
            },
            "sample": {"every": 0},
            "save": {"every": 0},
            "output_dir": str(folder),
            "run_name": method,
        }
    )
