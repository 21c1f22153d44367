"""The program `dopsd`: registers the commands, which are plain functions in the files beside this.

Importing it loads no torch; a command imports what it needs when it is called.
"""

from typing import Annotated

import typer

from dopsd import __version__
from dopsd.cli import adapter, compare, data, evaluate, generate, tools, train
from dopsd.cli.console import say
from dopsd.cli.options import guarded, unwrapped

HELP = """Tune few-step text-to-image models without losing the few steps.

Exit codes: 0 success; 1 a bug in dopsd, with its traceback; 2 the input cannot be used, or memory
ran out; 3 training stopped because the model lost its few-step health; 130 or 143 stopped by Ctrl-C
or SIGTERM."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=unwrapped(HELP)
)


<<<<<<< HEAD
@app.command()
@refusing
def check(
    recipe: RecipeFile,
    change: Changes = None,
    card: Annotated[
        float | None, typer.Option(help="GiB of a GPU to plan for; default: this machine.", min=0)
    ] = None,
    ahead: Annotated[
        bool, typer.Option("--preflight", help="Look what the teacher paints, too.")
    ] = False,
) -> None:
    """Say what a recipe would do and how much memory it would take, or why it cannot, before any
    weight is loaded."""
    from dopsd.config.recipe import load_recipe
    from dopsd.runs.check import check as check_run
    from dopsd.runs.resolve import resolve

    loaded = load_recipe(recipe, change or ())
    run = resolve(loaded)
    summarise(run, check_run(run))
    foretell(run, card)
    if ahead:
        preflight(recipe, change)
    elif "privileged" in loaded.method.needs:
        out.print(
            f"next       dopsd preflight {recipe}: can the teacher show what your pictures show?",
            highlight=False,
        )


app.command()(refusing(preflight))


@app.command()
@refusing
def train(
    recipe: RecipeFile,
    change: Changes = None,
    resume: Annotated[str | None, typer.Option(help="`latest` or a checkpoint folder.")] = None,
) -> None:
    """Tune: writes the LoRA file, previews, metrics and report.html into <output_dir>/<run_name>."""
    from dopsd.config.recipe import load_recipe
    from dopsd.runs.check import check as check_run
    from dopsd.runs.interrupts import Stopped, Unhealthy
    from dopsd.runs.resolve import resolve
    from dopsd.runs.train import train as train_recipe

    loaded = load_recipe(recipe, change or ())
    run = resolve(loaded)
    summarise(run, check_run(run))
    try:
        with bars() as advance:
            for report in train_recipe(loaded, resume, advance, run):
                advance(
                    f"training  loss {report.log['loss']:.4f}", report.step, loaded.train.max_steps
                )
    except Stopped as stop:
        err.print(
            f"dopsd: stopped by {stop.name} after step {stop.step}, which is saved; --resume latest goes on."
        )
        raise
    except Unhealthy as stop:
        err.print(f"dopsd: stopped after step {stop.step}: {stop.found}.")
        err.print(f"The last healthy result, if any, is in {loaded.run_folder}.")
        raise
    out.print(f"saved {loaded.result()} (reopened and compared)", highlight=False)
    out.print(f"report {loaded.run_folder / 'report.html'}", highlight=False)


@app.command()
@refusing
def sample(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="Local diffusers folder, hub id, or `pocket`.")
    ] = "pocket",
    lora: Annotated[
        Path | None, typer.Option(help="LoRA file (.safetensors) to paint with.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Of the LoRA; 1 is what was trained.")] = 1.0,
    nfe: Annotated[
        int | None, typer.Option(help="Network forwards; default: the model's own.", min=1)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the first picture; the next takes seed + 1.", min=0, max=2**62)
    ] = 0,
    width: Annotated[
        int | None, typer.Option(help="Pixels; default: the model's own.", min=1)
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels; default: the model's own.", min=1)
    ] = None,
    reference: Annotated[
        list[Path] | None, typer.Option(help="Picture to edit. Repeatable, in order.")
    ] = None,
    distilled_by: DistilledBy = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path(
        "samples"
    ),
) -> None:
    """Paint prompts, as the deployed pipeline would."""
    from dopsd.files import writing
    from dopsd.models.pipeline import sample as sample_prompts

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder for the pictures with --out.")
    images = sample_prompts(
        model, prompts, lora, strength, nfe, seed, width, height, reference or (), distilled_by
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        path = folder / f"{index}_{seed + index}.png"
        image.save(path)
        out.print(str(path), highlight=False)


@app.command()
@refusing
def fuse(
    lora: Annotated[Path, typer.Argument(help="LoRA file (.safetensors).", show_default=False)],
    model: Annotated[
        str, typer.Option(help="Local diffusers folder, hub id, or `pocket`.")
    ] = "pocket",
    strength: Annotated[float, typer.Option(help="Of the LoRA; 1 is what was trained.")] = 1.0,
    distilled_by: DistilledBy = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("fused"),
) -> None:
    """Write the model with a LoRA added to its weights, as a diffusers folder."""
    from dopsd.models.folder import fuse as fuse_lora

    fuse_lora(model, lora, folder, strength, distilled_by)
    out.print(
        f"{folder}; open it with diffusers, or: dopsd sample PROMPT --model {folder}",
        highlight=False,
    )


@app.command()
@refusing
def compare(
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipes; LoRA files, models.", show_default=False)
    ],
    change: Changes = None,
    json_file: AsJson = None,
    report: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("compare.html"),
    nfe: Annotated[
        str | None, typer.Option(help="Forwards, e.g. 1,2,4,8: what step budget holds.")
    ] = None,
    equal: Annotated[
        str | None, typer.Option(help="To the first recipe in pictures, seconds or forwards.")
    ] = None,
    replicates: Annotated[int, typer.Option(help="Pocket lessons to repeat it on.", min=1)] = 1,
) -> None:
    """Run recipes side by side: same data, noise and measures. What is finished is not done again."""
    from dopsd.config.recipe import load_recipe
    from dopsd.models.folder import is_model
    from dopsd.runs.comparison.budget import rule_of
    from dopsd.runs.comparison.compare import compare as compare_recipes

    nfes, rule = forwards_of(nfe), rule_of(equal)
    tuned = [path for path in recipes if path.suffix == ".safetensors" or is_model(path)]
    loaded = [load_recipe(path, change or ()) for path in recipes if path not in tuned]
    with bars() as advance:
        outcome = compare_recipes(loaded, report, advance, tuned, nfes, rule, replicates)
    show(outcome.header, outcome.table)
    write_numbers(json_file, outcome.numbers)
    out.print(f"report {report}", highlight=False)


app.command()(refusing(evaluate))
app.command()(refusing(prompts))
app.add_typer(adapter, name="adapter")


@app.command()
@refusing
def init(
    method: Annotated[
        str, typer.Argument(help="Such as dopsd; `dopsd list` shows them all, and what runs where.")
    ],
    model: Annotated[
        str, typer.Option(help="Local diffusers folder, hub id, or `pocket`.")
    ] = "pocket",
    distilled_by: DistilledBy = None,
    data: Annotated[Path, typer.Option(help="Folder of pictures.")] = Path("data"),
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
    write_text(file, starter_recipe(model, family, method, data, adapter))
    out.print(f"{file}; next: dopsd check {file}", highlight=False)


@app.command("import")
@refusing
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="The reference code's .jsonl, a data set (hub id or folder), or a weights file (.bin)."
        ),
    ],
    target: Annotated[
        Path | None,
=======
def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"dopsd {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
>>>>>>> main
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


for name, command in {
    "init": tools.init,
    "check": train.check,
    "preflight": train.preflight,
    "train": train.train,
    "sample": generate.sample,
    "fuse": generate.fuse,
    "compare": compare.compare,
    "evaluate": evaluate.evaluate,
    "prompts": evaluate.prompts,
    "import": data.import_,
    "caption": data.caption,
    "inspect": tools.inspect,
    "list": tools.list_methods,
    "schema": tools.schema,
    "doctor": tools.doctor,
    "demo": compare.demo,
}.items():
    app.command(name)(guarded(command))

group = typer.Typer(no_args_is_help=True, help=adapter.HELP)
group.callback()(adapter.group)
group.command("train")(guarded(adapter.train_adapter))
app.add_typer(group, name="adapter")
