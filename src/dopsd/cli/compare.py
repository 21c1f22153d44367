"""`dopsd compare`, `demo`: recipes, LoRA files and models side by side."""

from pathlib import Path
from typing import Annotated

import typer

from dopsd.cli.console import field, say, show_table, write_numbers
from dopsd.cli.options import AsJson, Changes, forwards_of, seeds_of
from dopsd.cli.progress import progress_bar


def compare(
    recipes: Annotated[
        list[Path],
        typer.Argument(
            help="Recipes, the first of which names model and data; LoRAs, as FILE or "
            "FILE@STRENGTH, with + between those used together; model folders.",
            show_default=False,
        ),
    ],
    change: Changes = None,
    json_file: AsJson = None,
    report: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("compare.html"),
    nfe: Annotated[
        str | None,
        typer.Option(help="Network forwards, several by commas: 1,2,4,8. Default: the model's."),
    ] = None,
    equal: Annotated[
        str | None,
        typer.Option(help="Train all on the first recipe's budget of images, seconds or forwards."),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Train each recipe with each of these seeds, such as 0,1,2. Default: its own."
        ),
    ] = None,
    replicates: Annotated[
        int, typer.Option(help="Data sets of the data's benchmark to repeat it on.", min=1)
    ] = 1,
) -> None:
    """Train recipes and compare the results on the same data, noise and metrics. What is finished
    is not done again."""
    from dopsd.config.recipe import load_recipe
    from dopsd.models.folder import is_model
    from dopsd.models.lora_source import is_lora
    from dopsd.runs.comparison.budget import rule_of
    from dopsd.runs.comparison.compare import compare as compare_recipes

    nfes, rule, train_seeds = forwards_of(nfe), rule_of(equal), seeds_of(seeds)
    tuned = [path for path in recipes if is_model(path) or is_lora(path)]
    loaded = [load_recipe(path, change or ()) for path in recipes if path not in tuned]
    with progress_bar() as advance:
        outcome = compare_recipes(
            loaded, report, advance, tuned, nfes, rule, replicates, train_seeds
        )
    show_table(outcome.header, outcome.table)
    write_numbers(json_file, outcome.numbers)
    field("report", report)


def demo(
    json_file: AsJson = None,
    thing: Annotated[
        int | None, typer.Option(help="Seed of another object, from 1000000 on.", min=0)
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for images, runs and report; default: runs/demo, or runs/demo-<thing>.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Tune the pocket model on four images of a new object, by plain fine-tuning and with
    retention, and compare what they learn and keep: a few minutes on a CPU."""
    from dopsd.pocket.demo import THING
    from dopsd.pocket.demo import demo as run_demo

    folder = folder or Path("runs/demo" if thing is None else f"runs/demo-{thing}")
    with progress_bar() as advance:
        result = run_demo(folder, THING if thing is None else thing, advance)
    show_table(result.header, result.table)
    write_numbers(json_file, result.numbers)
    for sentence in result.sentences:
        say(sentence)
    for label, value in result.results:
        field(label, value)
