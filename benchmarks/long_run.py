"""Training far too long: when a few-step model collapses, whether the health check's advice comes
in time, and what bleeds.

    python benchmarks/long_run.py         # one thing, LONGER times the recipes; an hour on a core

Health is checked every CHECK_EVERY steps. The concept benchmark is run for the LoRA of the advised
step, of the recipe's own length, and of the end. Numbers go to benchmarks/results/long_run.json;
what is finished is not done again.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dopsd.config.recipe import load_recipe
from dopsd.config.schema import INTERMEDIATE
from dopsd.evaluation.early_stopping import advise
from dopsd.files import write_json
from dopsd.models.lora_source import LoraFile
from dopsd.pocket.benchmark import METRICS
from dopsd.pocket.world.datasets import write_concept
from dopsd.runs.comparison.evaluate import Candidate, Evaluator
from dopsd.runs.comparison.table import Entry, tabulate
from dopsd.runs.outputs.folder import read_rows
from dopsd.runs.train import train
from dopsd.training.checkpoint import checkpoints

THING = 1_000_700
LONGER = {"sft": 10, "dopsd": 5}  # times the recipe's steps
CHECK_EVERY = {"sft": 100, "dopsd": 50}
RESULTS = Path(__file__).parent / "results" / "long_run.json"


def main(
    folder: Annotated[Path, typer.Option(help="For images and runs.")] = Path("runs/long"),
) -> None:
    """Train, evaluate, and write the numbers."""
    torch.set_num_threads(1)
    concept = folder / f"thing-{THING}"
    if not concept.is_dir():
        write_concept(concept, THING)
    found: dict[str, Any] = {"thing": THING}
    for method, every in CHECK_EVERY.items():
        name, file = f"{method}-{THING}", Path(f"recipes/pocket-identity-{method}.yaml")
        usual = load_recipe(file).train.max_steps
        last = LONGER[method] * usual
        changes = [
            f"data.folder={concept}",
            f"output_dir={folder}",
            f"run_name={name}",
            f"save.every={every}",
            f"health.every={every}",
            "sample.every=0",
            f"train.max_steps={last}",
        ]
        recipe = load_recipe(file, changes)
        run = recipe.run_folder
        if not _lora(run, last).exists():
            for _ in train(recipe, "latest" if checkpoints(run) else None):
                pass
        advice = advise([row for row in read_rows(run / "health.jsonl") if row["step"] <= last])
        assert advice is not None
        evaluator = Evaluator(recipe, folder / "answers")
        nfe = evaluator.family.default_nfe
        steps = sorted({usual, last, advice.step or last})
        tuned = [Candidate(str(step), loras=(LoraFile(_lora(run, step)),)) for step in steps]
        entries = []
        for candidate in (
            Candidate("base", "base"),
            Candidate("base, other noise", "floor"),
            *tuned,
        ):
            entries.append(Entry([candidate]))
            entries[-1].results = {nfe: [evaluator.results(candidate, (nfe,))[nfe]]}
            print(method, candidate.name, flush=True)
        models = tabulate(entries, (nfe,), METRICS).numbers
        scores = {label: row["nfe"][str(nfe)] for label, row in models.items()}
        found[method] = {
            "recipe_steps": usual,
            "steps": last,
            "advised": advice.step,
            "advice": advice.sentence,
            "after": scores,
        }
        write_json(RESULTS, found)


def _lora(run: Path, step: int) -> Path:
    """What the run left after a step; the end has a name of its own."""
    left = run / INTERMEDIATE / f"{run.name}-step{step:06d}.safetensors"
    return left if left.exists() else run / f"{run.name}.safetensors"


if __name__ == "__main__":
    typer.run(main)
