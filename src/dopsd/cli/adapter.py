"""`dopsd adapter train`: a de-distill adapter for a model that has none."""

from pathlib import Path
from typing import Annotated

import typer

from dopsd.cli.console import field
from dopsd.cli.options import Model, Resume
from dopsd.cli.progress import progress_bar
from dopsd.cli.summary import print_summary

HELP = "De-distill adapters: a LoRA that is merged while training, and left out afterwards."


def group() -> None:
    """De-distill adapters: a LoRA that is merged while training, and left out afterwards."""


def train_adapter(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="Prompts to generate: .txt (one a line), .jsonl or a folder of .txt.",
            show_default=False,
        ),
    ],
    model: Model = "pocket",
    images: Annotated[int, typer.Option(help="Generated for each prompt.", min=1)] = 4,
    steps: Annotated[
        int | None, typer.Option(help="Default: the model's own for SFT.", min=1)
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Default: the model's own.", min=1)] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs"),
    name: Annotated[
        str | None, typer.Option(help="Of the run and its file; default: <model>-dedistill.")
    ] = None,
    resume: Resume = None,
) -> None:
    """Generate images with the model and train a de-distill adapter on them, for
    model.training_adapter."""
    from dopsd.data.prompts import read_prompts
    from dopsd.runs.check import check
    from dopsd.runs.resolve import resolve
    from dopsd.runs.train import train
    from dopsd.runs.training_adapter import adapter_recipe, default_name

    texts = [question.prompt for question in read_prompts(prompts)]
    changes = {
        "train": {"max_steps": steps} if steps else {},
        "lora": {"rank": rank} if rank else {},
        "output_dir": str(folder),
        "run_name": name or default_name(model),
    }
    with progress_bar() as advance:
        recipe = adapter_recipe(
            model, texts, images, changes, lambda done, total: advance("generating", done, total)
        )
    run = resolve(recipe)
    print_summary(run, check(run))
    with progress_bar() as advance:
        for report in train(recipe, resume, advance, run):
            advance(f"training  loss {report.log['loss']:.4f}", report.step, recipe.train.max_steps)
    field("adapter", recipe.result())
    field("next", f"set model.training_adapter: {recipe.result()} in a recipe")
