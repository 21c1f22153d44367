"""`dopsd check`, `train`, `preflight`: what a recipe would do, a run, and what it can learn."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dopsd.cli.console import field, note, say, show_table, write_numbers
from dopsd.cli.options import AsJson, Changes, RecipeFile, Resume
from dopsd.cli.progress import progress_bar
from dopsd.cli.summary import print_data, print_memory, print_result, print_summary


def check(
    recipe: RecipeFile,
    change: Changes = None,
    card: Annotated[
        float | None, typer.Option(help="GiB of a GPU to plan for; default: this machine.", min=0)
    ] = None,
    with_preflight: Annotated[
        bool, typer.Option("--preflight", help="Also run `dopsd preflight`.")
    ] = False,
) -> None:
    """Show what a recipe would do and how much memory it takes, or why it cannot run, before any
    weight is loaded."""
    from dopsd.config.recipe import load_recipe
    from dopsd.runs.check import check as check_run
    from dopsd.runs.resolve import resolve

    loaded = load_recipe(recipe, change or ())
    run = resolve(loaded)
    checked = check_run(run)
    print_summary(run, checked)
    print_data(run, checked)
    print_memory(run, card)
    if with_preflight:
        preflight(recipe, change)
        return
    options = "".join(f" --set {shlex.quote(each)}" for each in change or ())
    if "privileged" in loaded.method.needs:
        field("optional", f"dopsd preflight {shlex.quote(str(recipe))}{options}")
        field("", "  can the teacher generate what your images show?")
    field("next", f"dopsd train {shlex.quote(str(recipe))}{options}")


def train(recipe: RecipeFile, change: Changes = None, resume: Resume = None) -> None:
    """Train: writes the LoRA file, previews, metrics and report.html into
    <output_dir>/<run_name>."""
    from dopsd.config.recipe import load_recipe
    from dopsd.runs.check import check as check_run
    from dopsd.runs.interrupts import Stopped, Unhealthy
    from dopsd.runs.resolve import resolve
    from dopsd.runs.train import train as train_recipe

    loaded = load_recipe(recipe, change or ())
    run = resolve(loaded)
    print_summary(run, check_run(run))
    steps = loaded.train.max_steps
    try:
        with progress_bar() as advance:
            for report in train_recipe(loaded, resume, advance, run):
                advance(f"training  loss {report.log['loss']:.4f}", report.step, steps)
    except Stopped as stop:
        note(
            f"dopsd: stopped by {stop.name} after step {stop.step}, which is saved; "
            "--resume latest goes on from there."
        )
        raise
    except Unhealthy as stop:
        note(f"dopsd: stopped after step {stop.step}: {stop.reason}.")
        note(f"The last healthy result, if any, is in {loaded.run_folder}.")
        raise
    print_result(loaded)


def preflight(
    recipe: RecipeFile,
    change: Changes = None,
    json_file: AsJson = None,
    report: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("preflight.html"),
    seeds: Annotated[int, typer.Option(help="Images generated for each caption.", min=4)] = 4,
    images: Annotated[
        int, typer.Option(help="Training images to look at, evenly over the set.", min=1)
    ] = 16,
    metric: Annotated[
        str | None,
        typer.Option(help="Distance: dino[=FOLDER], lpips=FOLDER; default: reduced pixels."),
    ] = None,
) -> None:
    """Show whether D-OPSD can learn these images: generate as student and as teacher, before
    anything is trained."""
    from dopsd.config.recipe import load_recipe
    from dopsd.runs.preflight import HEADER
    from dopsd.runs.preflight import preflight as run_preflight

    loaded = load_recipe(recipe, change or ())
    with progress_bar() as advance:
        result = run_preflight(loaded, report, advance, seeds, images, metric)
    show_table(HEADER, result.table())
    write_numbers(json_file, result.as_numbers())
    field("report", report)
    say(result.sentence)
