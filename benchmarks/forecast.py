"""What a step of a recipe would take of a GPU's memory, by shapes alone: no weight, no GPU, no
network.

    python benchmarks/forecast.py recipes/{zimage,klein,sdxl}-*.yaml \\
        --json benchmarks/results/forecast.json
    python benchmarks/forecast.py recipes/zimage-turbo-identity-dopsd.yaml --set model.quantize=nf4

As `dopsd check --card` says, without the checkpoints: full_size.py writes their configs, in
bfloat16. A caption is of about 100 tokens (SDXL's of 77), rows that are edited have one reference
of the target's size. Half a minute to three minutes a row on one CPU core.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from full_size import write_configs

from dopsd.cli.options import Changes
from dopsd.config.recipe import Recipe, load_recipe
from dopsd.models import load_family
from dopsd.models.base import Family, TeacherVision
from dopsd.runs.memory import forecast


def family_of(recipe: Recipe, folder: Path) -> Family:
    """The recipe's checkpoint by its shapes, written into an empty folder."""
    write_configs(recipe.model.name_or_path, folder)
    return load_family(
        str(folder),
        teacher_vision=TeacherVision(
            recipe.model.teacher_context, None, recipe.model.teacher_suffix
        ),
    )


def main(
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipes for checkpoints that full_size.py knows.")
    ],
    change: Changes = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the rows go.")] = None,
) -> None:
    """Print a row for each recipe and `model.memory`: resident and peak of a step, in GiB."""
    torch.set_num_threads(1)
    rows = []
    for path in recipes:
        recipe = load_recipe(path, change or ())
        with TemporaryDirectory() as folder:
            family = family_of(recipe, Path(folder))
            side = max(recipe.data.resolution, default=family.resolution)
            references = [(side, side)] * ("editing" in path.stem)
            for level in ("low",) if recipe.model.offload else ("low", "high"):
                caption = "star " * (60 if family.name == "sdxl" else 90)
                found = forecast(
                    recipe,
                    family,
                    (side, side),
                    [caption],
                    torch.bfloat16,
                    level == "low",
                    references,
                )
                resident, peak = found.resident / 2**30, found.peak / 2**30
                print(f"{path.stem}  {level}  resident {resident:.1f}  peak {peak:.1f}", flush=True)
                rows.append(
                    {
                        "recipe": path.stem,
                        "memory": level,
                        "resident_gib": resident,
                        "peak_gib": peak,
                    }
                )
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
