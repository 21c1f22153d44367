"""`dopsd adapter train`: a de-distill adapter for a model that has none."""

from pathlib import Path
from typing import Annotated

import typer

from dopsd.cli.console import bars, out, summarise
from dopsd.cli.options import refusing

adapter = typer.Typer(
    no_args_is_help=True, help="LoRA that is merged while training, and off afterwards."
)


@adapter.callback()
def _group() -> None:
    """LoRA that is merged while training, and off afterwards."""


@adapter.command("train")
@refusing
def train_adapter(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="Of the pictures: .txt (one a line), .jsonl or a folder of .txt.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Local diffusers folder, hub id, or `pocket`.")
    ] = "pocket",
    images: Annotated[
        int, typer.Option(help="Painted a prompt, at the model's own number of steps.", min=1)
    ] = 4,
    steps: Annotated[
        int | None, typer.Option(help="Default: the model's own for SFT.", min=1)
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Default: the model's own.", min=1)] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs"),
    name: Annotated[
        str | None, typer.Option(help="Of the run and its file; default: <model>-dedistill.")
    ] = None,
    resume: Annotated[str | None, typer.Option(help="`latest` or a checkpoint folder.")] = None,
) -> None:
    """Paint images with the model and tune a de-distill adapter on them, for
    model.training_adapter."""
    from dopsd.data.prompts import read_prompts
    from dopsd.runs.check import check
    from dopsd.runs.resolve import resolve
    from dopsd.runs.train import train
    from dopsd.runs.training_adapter import adapter_recipe, default_name

    asked = [question.prompt for question in read_prompts(prompts)]
    changes = {
        "train": {"max_steps": steps} if steps else {},
        "lora": {"rank": rank} if rank else {},
        "output_dir": str(folder),
        "run_name": name or default_name(model),
    }
    with bars() as advance:
        recipe = adapter_recipe(
            model, asked, images, changes, lambda done, total: advance("painting", done, total)
        )
        run = resolve(recipe)
        summarise(run, check(run))
        for report in train(recipe, resume, advance, run):
            advance(f"training  loss {report.log['loss']:.4f}", report.step, recipe.train.max_steps)
    file = recipe.run_folder / f"{recipe.run_name}.safetensors"
    out.print(
        f"saved {file}; next: set model.training_adapter: {file} in a recipe", highlight=False
    )
