"""The front door: `dopsd init | check | train | ...`. Exit codes: 0 fine, 1 our bug, 2 bad input,
130 or 143 stopped.

Only parses and prints; the work is in run.py and compare.py, imported when a command needs it.
"""

from pathlib import Path
from typing import Annotated

import typer

from dopsd.cli.adapter import adapter
from dopsd.cli.console import bars, err, foretell, forwards_of, out, show, summarise, write_numbers
from dopsd.cli.evaluate import evaluate, preflight, prompts
from dopsd.cli.options import AsJson, Changes, DistilledBy, RecipeFile, refusing

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune few-step text-to-image models without losing the few steps.",
)


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
        typer.Option(
            "--out", help="Folder to write, or .safetensors file; default: data, or beside it."
        ),
    ] = None,
    image_column: Annotated[str, typer.Option(help="Of a data set.")] = "image",
    caption_column: Annotated[
        list[str] | None, typer.Option(help="Repeatable: all are kept.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    rejected_column: Annotated[
        str | None, typer.Option(help="Of a data set of pairs: the worse picture.")
    ] = None,
) -> None:
    """Turn a data set in another shape into a folder of images with metadata.jsonl, or a pickled
    weights file into safetensors."""
    from dopsd.data.importing import import_data
    from dopsd.models.pickle_import import convert_pickle

    if source.endswith(".bin"):
        file = target or Path(source).with_suffix(".safetensors")
        count = convert_pickle(Path(source), file)
        out.print(f"{count} tensors in {file}", highlight=False)
        return
    folder = target or Path("data")
    count = import_data(source, folder, image_column, caption_column or (), split, rejected_column)
    out.print(
        f"{count} pictures in {folder}; next: dopsd init dopsd --data {folder}", highlight=False
    )


@app.command()
@refusing
def caption(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="A Qwen3-VL: hub id or local folder.")
    ] = "Qwen/Qwen3-VL-4B-Instruct",
    question: Annotated[
        str | None, typer.Option(help="What to ask of each picture; default: one sentence.")
    ] = None,
    most_tokens: Annotated[int, typer.Option(help="Longest caption.", min=1)] = 120,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also where there is a caption.")
    ] = False,
) -> None:
    """Write a caption beside each image that has none, by a local vision-language model."""
    from dopsd.data.captioning import QUESTION, uncaptioned, write_captions
    from dopsd.models.pipeline import device_and_dtype
    from dopsd.models.vlm import Captioner

    todo, kept = uncaptioned(folder, overwrite)
    if todo:
        captioner = Captioner(model, *device_and_dtype())
        with bars() as advance:
            write_captions(
                todo,
                lambda image: captioner.caption(image, question or QUESTION, most_tokens),
                lambda done, total: advance("captions", done, total),
            )
    out.print(
        f"{len(todo)} captions written, {kept} kept; read them before you train", highlight=False
    )


@app.command()
@refusing
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    import json

    from dopsd.config.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
@refusing
def inspect(
    file: Annotated[
        Path, typer.Argument(help="LoRA file, or a model's folder.", show_default=False)
    ],
) -> None:
    """Say what a LoRA file or a model's folder is: family, rank, method, steps, and which loaders
    take it and how."""
    from dopsd.models.folder import is_model
    from dopsd.models.inspection import inspect_lora, inspect_model

    for label, value in (inspect_model if is_model(file) else inspect_lora)(file).lines:
        out.print(f"{label:<26} {value}", markup=False, highlight=False)


@app.command()
@refusing
def doctor() -> None:
    """Say what is installed, which device is there, which extras are missing, and whether the hub
    can be reached."""
    from dopsd.cli.doctor import examine

    for label, value in examine():
        out.print(f"{label:<26} {value}", markup=False, highlight=False)


@app.command("list")
@refusing
def list_cells(json_file: AsJson = None) -> None:
    """Print which method runs on which family, and why not where it does not."""
    from dopsd.methods import METHODS, missing
    from dopsd.models import FAMILIES, family_class

    cells = {
        family: {
            name: missing(method, family_class(family).teacher_contexts)
            for name, method in METHODS.items()
        }
        for family in FAMILIES
    }
    show(
        ["family", *METHODS],
        [
            [f, *("yes" if why is None else f"no: {why}" for why in row.values())]
            for f, row in cells.items()
        ],
    )
    write_numbers(json_file, cells)


@app.command()
@refusing
def demo(
    json_file: AsJson = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for pictures, runs and report.")
    ] = Path("runs/demo"),
) -> None:
    """Four images of a new thing, tuned on the pocket model with D-OPSD and with SFT: see the
    difference on a CPU."""
    from dopsd.pocket.demo import demo as run_demo

    with bars() as advance:
        outcome = run_demo(folder, advance)
    show(outcome.header, outcome.table)
    write_numbers(json_file, outcome.numbers)
    out.print(f"report {folder / 'report.html'}", highlight=False)
