"""`dopsd init`, `inspect`, `list`, `schema`, `doctor`: recipes to start from, and what there is."""

from pathlib import Path
from typing import Annotated

import typer

from dopsd.cli.console import field, say, show_table, write_numbers
from dopsd.cli.options import AsJson, DistilledBy, Model

LABEL = 26  # columns


def init(
    method: Annotated[
        str, typer.Argument(help="Such as dopsd; `dopsd list` shows all, and what runs where.")
    ],
    model: Model = "pocket",
    distilled_by: DistilledBy = None,
    data: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    adapter: Annotated[
        str, typer.Option(help="lora, or full: every weight of the network.")
    ] = "lora",
    file: Annotated[Path, typer.Option("--out", help="Recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe for a model and a method: every key with its default and its
    meaning."""
    from dopsd.config.starter import starter_recipe
    from dopsd.files import write_text
    from dopsd.methods import METHODS, missing
    from dopsd.models import load_family

    if method not in METHODS:
        raise ValueError(f"{method} is no method: choose one of {', '.join(METHODS)}.")
    if adapter not in ("lora", "full"):
        raise ValueError(f"{adapter} is no adapter: choose lora or full.")
    if file.exists():
        raise ValueError(f"{file} exists and is not overwritten: choose another name with --out.")
    family = load_family(model, distilled_by=distilled_by)
    if why := missing(METHODS[method], family.teacher_contexts):
        raise ValueError(f"{method} cannot run on {family.name}: {why}.")
    recipe = starter_recipe(
        model,
        method,
        data,
        family=family.name,
        licence=family.licence,
        starting_points=family.starting_points(METHODS[method].model_construct()),
        adapter=adapter,
    )
    write_text(file, recipe)
    say(f"{file}; next: dopsd check {file}")


def inspect(
    file: Annotated[
        Path,
        typer.Argument(help="LoRA file, model folder, or the folder of a run.", show_default=False),
    ],
) -> None:
    """Show what a LoRA file or a model folder is: family, rank, method, steps, and which loaders
    take it and how."""
    from dopsd.models.folder import is_model
    from dopsd.models.inspection import inspect_lora, inspect_model
    from dopsd.runs.outputs.upload import result_of

    if (file / "config.yaml").is_file():
        file = result_of(file)
        field("result", file, LABEL)
    for label, value in (inspect_model if is_model(file) else inspect_lora)(file).lines:
        field(label, value, LABEL)


def list_methods(json_file: AsJson = None) -> None:
    """Show which method runs on which model family, and why not where it does not."""
    from dopsd.methods import METHODS, missing
    from dopsd.models import FAMILIES, family_class

    reasons = {
        family: {
            name: missing(method, family_class(family).teacher_contexts)
            for name, method in METHODS.items()
        }
        for family in FAMILIES
    }
    rows = [
        [family, *("yes" if why is None else f"no: {why}" for why in row.values())]
        for family, row in reasons.items()
    ]
    show_table(["family", *METHODS], rows)
    write_numbers(json_file, reasons)


def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    import json

    from dopsd.config.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def doctor() -> None:
    """Show what is installed, which device and which extras there are, and whether the hub can be
    reached."""
    from dopsd.cli.doctor import examine

    for label, value in examine():
        field(label, value, LABEL)
