"""`dopsd preflight`, `evaluate`, `prompts`: what can be learned, images measured, and the prompts
they come from."""

from pathlib import Path
from typing import Annotated

import typer

from dopsd.cli.console import bars, forwards_of, out, show, write_numbers
from dopsd.cli.options import AsJson, Changes, RecipeFile


def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Pictures to measure; with --prompts, where they are painted.", show_default=False
        ),
    ],
    metric: Annotated[
        list[str],
        typer.Option(
            help="NAME, NAME=MODEL (hub id or folder), or module:attribute. Repeatable; docs/metrics.md.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Paint these: .txt (one a line), .jsonl, or a folder of .txt."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Local diffusers folder, hub id, or `pocket`.")
    ] = "pocket",
    lora: Annotated[
        Path | None,
        typer.Option(help="LoRA file (.safetensors); the untouched model is painted beside it."),
    ] = None,
    strength: Annotated[float, typer.Option(help="Of the LoRA; 1 is what was trained.")] = 1.0,
    seeds: Annotated[int, typer.Option(help="Pictures a prompt.")] = 4,
    nfe: Annotated[
        str | None,
        typer.Option(
            help="Network forwards, several by commas: 1,2,4,8. Default: the model's own."
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Pixels; default: the model's own.", min=1)
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels; default: the model's own.", min=1)
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Without --prompts: pictures of the same names by the untouched model."),
    ] = None,
    targets: Annotated[
        Path | None,
        typer.Option(
            help="Real pictures: what fid and kid compare with, and, by the same names, dino and lpips."
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Also write the pictures as `geneval` or `dpg` scorers read them."),
    ] = None,
    json_file: AsJson = None,
) -> None:
    """Measure images: values, differences to the base model and noise floors, with intervals over
    prompts and seeds. Stopped, it goes on where it was: call it again."""
    from dopsd.data.folder import images_in
    from dopsd.data.prompts import read_prompts
    from dopsd.evaluation.image_sets import (
        BASE,
        Plan,
        generate_image_sets,
        read_image_set,
        refuse_unpaired,
    )
    from dopsd.evaluation.layouts import LAYOUTS
    from dopsd.evaluation.metrics import named_metric
    from dopsd.evaluation.table import HEADER, tabulate
    from dopsd.models.pipeline import device_and_dtype

    needs = {named_metric(name)[2].needs for name in metric}
    questions = read_prompts(prompts) if prompts else ()
    if layout is not None and (layout not in LAYOUTS or not prompts):
        raise ValueError(
            f"--layout {layout}: give {' or '.join(LAYOUTS)}, and --prompts, the benchmark's own."
        )
    if base and prompts:
        raise ValueError(
            "--base is for pictures that are there already; with --prompts the untouched model is painted."
        )
    if not prompts and (lora or nfe or width or height):
        raise ValueError(
            "--lora, --nfe, --width and --height are for painting: give --prompts as well."
        )
    reference = [q.target for q in questions if q.target]
    if targets and (not targets.is_dir() or not (reference := images_in(targets))):
        raise ValueError(f"no pictures in {targets}: --targets wants a folder of pictures.")
    with bars() as advance:
        if prompts:
            plan = Plan(model, questions, lora, strength, seeds, forwards_of(nfe), width, height)
            image_sets = generate_image_sets(plan, folder, advance)
        else:
            image_sets = [read_image_set(folder, "pictures", needs != {"set"}, targets)]
            if base:
                image_sets.append(read_image_set(base, BASE, needs != {"set"}, targets))
                refuse_unpaired(*image_sets)
        rows = tabulate(
            metric,
            image_sets,
            list(dict.fromkeys(reference)),
            folder,
            device_and_dtype()[0],
            advance,
        )
    if layout:
        for image_set in image_sets:
            LAYOUTS[layout](
                image_set, questions, folder / layout / f"{image_set.name}-nfe-{image_set.nfe}"
            )
    show(HEADER, [row.cells() for row in rows])
    write_numbers(json_file, [row.numbers() for row in rows])


def prompts(
    folder: Annotated[
        Path, typer.Argument(help="Captioned training pictures.", show_default=False)
    ],
    trigger: Annotated[
        str,
        typer.Option(help="The name of the thing or the style in captions.", show_default=False),
    ],
    style: Annotated[
        bool, typer.Option("--style", help="The trigger names a style, not a thing.")
    ] = False,
    class_word: Annotated[
        str | None, typer.Option(help="What the thing is, such as dog; prompts must not say it.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="A Qwen3-VL: hub id or local folder.")
    ] = "Qwen/Qwen3-VL-8B-Instruct",
    file: Annotated[
        Path, typer.Option("--out", help="Prompts to write, for `dopsd evaluate --prompts`.")
    ] = Path("prompts.jsonl"),
) -> None:
    """Write test prompts for a concept: of each image its scene in other words, and four new
    scenes."""
    from dopsd.data.folder import read_folder
    from dopsd.evaluation.prompt_writer import MOST_TOKENS, write_test_prompts
    from dopsd.models.pipeline import device_and_dtype
    from dopsd.models.vlm import Captioner

    images = [(example.path, example.caption) for example in read_folder(folder).examples]
    captioner = Captioner(model, *device_and_dtype())
    with bars() as advance:
        count = write_test_prompts(
            images,
            file,
            lambda image, question: captioner.answer([image], question, MOST_TOKENS),
            trigger,
            "style" if style else "object",
            class_word,
            lambda done, total: advance("pictures", done, total),
        )
    out.print(f"{count} prompts in {file}; read them before you evaluate", highlight=False)


def preflight(
    recipe: RecipeFile,
    change: Changes = None,
    json_file: AsJson = None,
    report: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("preflight.html"),
    seeds: Annotated[
        int, typer.Option(help="Noises that each picture is painted from.", min=4)
    ] = 4,
    images: Annotated[
        int, typer.Option(help="Most pictures to look at, evenly over the set.", min=1)
    ] = 16,
    metric: Annotated[
        str | None, typer.Option(help="Distance: dino[=FOLDER], lpips=FOLDER; default: pixels.")
    ] = None,
) -> None:
    """Say whether D-OPSD can learn these images: generate as student and as teacher, before
    anything is trained."""
    from dopsd.config.recipe import load_recipe
    from dopsd.runs.preflight import HEADER
    from dopsd.runs.preflight import preflight as look_before

    with bars() as advance:
        result = look_before(
            load_recipe(recipe, change or ()), report, advance, seeds, images, metric
        )
    show(HEADER, result.table())
    write_numbers(json_file, result.as_numbers())
    out.print(f"report {report}", highlight=False)
    out.print(result.sentence, markup=False, highlight=False)
