"""The front door: `dopsd init | check | train | ...`. Exit codes: 0 fine, 1 our bug, 2 bad input, 130 or 143 stopped.

Only parses and prints; the work is in run.py and compare.py, imported when a command needs it.
"""

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dopsd.recipe import Recipe
    from dopsd.run import Checked

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune few-step text-to-image models without losing the few steps.",
)
WIDTH = 160  # where there is no terminal whose width must be kept
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
err = Console(stderr=True, soft_wrap=True)

RecipeFile = Annotated[Path, typer.Argument(help="Recipe (YAML); see recipes/.", show_default=False)]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a key: train.max_steps=500. Repeatable.")]
AsJson = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]


def refusing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Bad input (ValueError) becomes one sentence and exit code 2; anything else is our bug, with its traceback."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        for noisy in ("httpx", "accelerate", "diffusers", "transformers"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        try:
            return command(*args, **kwargs)
        except ValueError as error:
            logging.getLogger(__name__).debug("refused", exc_info=True)
            err.print(f"dopsd: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            err.print("dopsd: interrupted.", style="red")
            raise typer.Exit(130) from error

    return guarded


@app.command()
@refusing
def check(recipe: RecipeFile, change: Changes = None) -> None:
    """Say what a recipe would do, or why it cannot, before any weight is loaded."""
    from dopsd.recipe import load_recipe
    from dopsd.run import check as check_recipe

    loaded = load_recipe(recipe, change or ())
    summarise(loaded, check_recipe(loaded))


@app.command()
@refusing
def train(
    recipe: RecipeFile,
    change: Changes = None,
    resume: Annotated[str | None, typer.Option(help="`latest` or a checkpoint folder.")] = None,
) -> None:
    """Tune: writes the LoRA file, previews, metrics and report.html into <output_dir>/<run_name>."""
    from dopsd.recipe import load_recipe
    from dopsd.run import check as check_recipe
    from dopsd.run import train as train_recipe
    from dopsd.stopping import Stopped, Unhealthy

    loaded = load_recipe(recipe, change or ())
    found = check_recipe(loaded)
    summarise(loaded, found)
    try:
        with bars() as advance:
            for report in train_recipe(loaded, resume, advance, found):
                advance(f"training  loss {report.log['loss']:.4f}", report.step, loaded.train.max_steps)
    except Stopped as stop:
        err.print(f"dopsd: stopped by {stop.name} after step {stop.step}, which is saved; --resume latest goes on.")
        raise
    except Unhealthy as stop:
        err.print(f"dopsd: stopped after step {stop.step}: {stop.found}.")
        err.print(f"The last healthy LoRA, if any, is in {loaded.run_folder}.")
        raise
    out.print(f"saved {loaded.run_folder / loaded.run_name}.safetensors (reopened and compared)", highlight=False)
    out.print(f"report {loaded.run_folder / 'report.html'}", highlight=False)


@app.command()
@refusing
def sample(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.", show_default=False)],
    model: Annotated[str, typer.Option(help="Local diffusers folder, hub id, or `pocket`.")] = "pocket",
    lora: Annotated[Path | None, typer.Option(help="LoRA file (.safetensors) to paint with.")] = None,
    strength: Annotated[float, typer.Option(help="Of the LoRA; 1 is what was trained.")] = 1.0,
    nfe: Annotated[int | None, typer.Option(help="Network forwards; default: the model's own.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next takes seed + 1.")] = 0,
    width: Annotated[int | None, typer.Option(help="Pixels; default: the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the model's own.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("samples"),
) -> None:
    """Paint prompts, as the deployed pipeline would."""
    from dopsd.deployed import sample as sample_prompts

    images = sample_prompts(model, prompts, lora, strength, nfe, seed, width, height)
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        path = folder / f"{index}_{seed + index}.png"
        image.save(path)
        out.print(str(path), highlight=False)


@app.command()
@refusing
def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes to run side by side.", show_default=False)],
    change: Changes = None,
    json_file: AsJson = None,
    report: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("compare.html"),
) -> None:
    """Run recipes side by side: same data, noise and measures. Finished runs are not trained again."""
    from dopsd.compare import compare as compare_recipes
    from dopsd.recipe import load_recipe

    loaded = [load_recipe(path, change or ()) for path in recipes]
    with bars() as advance:
        outcome = compare_recipes(loaded, report, advance)
    show(outcome.header, outcome.table)
    write_numbers(json_file, outcome.numbers)
    out.print(f"report {report}", highlight=False)


@app.command()
@refusing
def init(
    method: Annotated[str, typer.Argument(help="dopsd or sft; `dopsd list` shows what runs where.")],
    model: Annotated[str, typer.Option(help="Local diffusers folder, hub id, or `pocket`.")] = "pocket",
    data: Annotated[Path, typer.Option(help="Folder of pictures.")] = Path("data"),
    file: Annotated[Path, typer.Option("--out", help="Recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe for a model and a method: every key with its default and its meaning."""
    from dopsd.families import load_family
    from dopsd.files import write_text
    from dopsd.methods import METHODS, missing
    from dopsd.starter import starter_recipe

    if method not in METHODS:
        raise ValueError(f"{method} is no method: choose one of {', '.join(METHODS)}.")
    if file.exists():
        raise ValueError(f"{file} exists and is not overwritten: choose another name with --out.")
    family = load_family(model)
    if why := missing(METHODS[method], family.teacher_contexts):
        raise ValueError(f"{method} cannot run on {family.name}: {why}.")
    write_text(file, starter_recipe(model, family, method, data))
    out.print(f"{file}; next: dopsd check {file}", highlight=False)


@app.command("import")
@refusing
def import_(
    source: Annotated[str, typer.Argument(help="The reference code's .jsonl, or a data set (hub id or folder).")],
    folder: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("data"),
    image_column: Annotated[str, typer.Option(help="Of a data set.")] = "image",
    caption_column: Annotated[list[str] | None, typer.Option(help="Repeatable: all are kept.")] = None,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
) -> None:
    """Turn a data set in another shape into a folder of pictures with metadata.jsonl."""
    from dopsd.data.importing import import_data

    count = import_data(source, folder, image_column, caption_column or (), split)
    out.print(f"{count} pictures in {folder}; next: dopsd init dopsd --data {folder}", highlight=False)


@app.command()
@refusing
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    import json

    from dopsd.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
@refusing
def inspect(file: Annotated[Path, typer.Argument(help="LoRA file (.safetensors).", show_default=False)]) -> None:
    """Say what a LoRA file is: family, rank, method, steps, and which loaders take it at what strength."""
    from dopsd.inspection import inspect_lora

    for label, value in inspect_lora(file).lines:
        out.print(f"{label:<26} {value}", markup=False, highlight=False)


@app.command()
@refusing
def doctor() -> None:
    """Say what is installed, which device is there, which extras are missing, and whether the hub can be reached."""
    from dopsd.doctor import examine

    for label, value in examine():
        out.print(f"{label:<26} {value}", markup=False, highlight=False)


@app.command("list")
@refusing
def list_cells(json_file: AsJson = None) -> None:
    """Print which method runs on which family, and why not where it does not."""
    from dopsd.families import FAMILIES, family_class
    from dopsd.methods import METHODS, missing

    cells = {
        family: {name: missing(method, family_class(family).teacher_contexts) for name, method in METHODS.items()}
        for family in FAMILIES
    }
    show(["family", *METHODS], [[f, *("yes" if why is None else f"no: {why}" for why in row.values())]
                                for f, row in cells.items()])  # fmt: skip
    write_numbers(json_file, cells)


@app.command()
@refusing
def demo(
    json_file: AsJson = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for pictures, runs and report.")] = Path("runs/demo"),
) -> None:
    """Four pictures of a new thing, tuned on the pocket model with D-OPSD and with SFT: see the difference on a CPU."""
    from dopsd.compare import demo as run_demo

    with bars() as advance:
        outcome = run_demo(folder, advance)
    show(outcome.header, outcome.table)
    write_numbers(json_file, outcome.numbers)
    out.print(f"report {folder / 'report.html'}", highlight=False)


def summarise(loaded: "Recipe", found: "Checked") -> None:
    """What a recipe would do, from what `check` found."""
    train, listing = loaded.train, found.listing
    out.print(f"model      {loaded.model.name_or_path} ({found.family.name}, {found.family.licence})", highlight=False)
    out.print(f"pictures   {len(listing.examples)}, captions from {listing.source}", highlight=False)
    for example in listing.examples[:3]:
        out.print(f"           {example.path.name}: {example.caption[:80]}", markup=False, highlight=False)
    for path, why in listing.refused:
        out.print(f"left out   {path.name}: {why}", markup=False, highlight=False)
    sizes = ", ".join(f"{count} at {width} x {height}" for (width, height), count in sorted(found.buckets.items()))
    out.print(f"buckets    {sizes}", highlight=False)
    out.print(f"LoRA       rank {loaded.lora.rank} on {found.coverage}", highlight=False)
    pictures = train.max_steps * train.batch_size * train.gradient_accumulation_steps
    out.print(
        f"training   {loaded.method.name}, {train.max_steps} steps, {pictures} pictures, "
        f"walks of {found.nfe} forwards; {pictures * found.forwards_per_picture} forward units (a backward counts two)",
        highlight=False,
    )


class bars:
    """Progress bars on a terminal, a plain line now and then elsewhere. Call it with (what, done, total)."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=err, disable=not err.is_terminal)
        self.tasks: dict[str, Any] = {}
        self.progress.start()
        return self.advance

    def advance(self, what: str, done: int, total: int) -> None:
        key = what.split("  ")[0]
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[key], completed=done, total=total, description=what)
        if not err.is_terminal and (done == total or done % max(1, total // 10) == 0):
            err.print(f"{what}  {done}/{total}", highlight=False)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def show(header: list[str], rows: list[list[str]]) -> None:
    """A table on standard output."""
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def write_numbers(path: Path | None, numbers: Any) -> None:
    """The same as JSON, where asked for."""
    if path:
        from dopsd.files import write_json

        write_json(path, numbers)
        out.print(f"numbers {path}", highlight=False)


if __name__ == "__main__":
    app()
