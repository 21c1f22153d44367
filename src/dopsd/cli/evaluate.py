"""`dopsd evaluate`, `prompts`: images measured, and the prompts to measure on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dopsd.cli.console import say, show_table, write_numbers
from dopsd.cli.generate import taken_model
from dopsd.cli.options import AsJson, Side, Strength, TakenModel, forwards_of
from dopsd.cli.progress import progress_bar

if TYPE_CHECKING:
    from dopsd.data.prompts import EvaluationPrompt
    from dopsd.evaluation.image_sets import ImageSet

Images = Annotated[
    Path,
    typer.Argument(
        help="Images to measure; with --prompts, the folder to generate into.", show_default=False
    ),
]
Metrics = Annotated[
    list[str],
    typer.Option(
        "--metric",
        "--measure",
        help="NAME, NAME=MODEL (hub id or folder), or module:attribute. Repeatable; see "
        "docs/metrics.md.",
        show_default=False,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="Generate images of these prompts: .txt (one a line), .jsonl, or a folder of .txt."
    ),
]
TunedLora = Annotated[
    Path | None,
    typer.Option(help="LoRA file (.safetensors); the model without it is generated, too."),
]
Forwards = Annotated[
    str | None,
    typer.Option(help="Network forwards, several by commas: 1,2,4,8. Default: the model's own."),
]
Base = Annotated[
    Path | None,
    typer.Option(help="Without --prompts: images of the same names by the untuned model."),
]
Targets = Annotated[
    Path | None,
    typer.Option(
        help="Real images: what fid and kid compare with, and, by the same names, dino and lpips."
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(help="Also write the images as the scorers of `geneval` or `dpg` read them."),
]


def evaluate(
    folder: Images,
    metric: Metrics,
    prompts: Prompts = None,
    model: TakenModel = None,
    lora: TunedLora = None,
    strength: Strength = 1.0,
    seeds: Annotated[int, typer.Option(help="Images for each prompt.")] = 4,
    nfe: Forwards = None,
    width: Side = None,
    height: Side = None,
    base: Base = None,
    targets: Targets = None,
    layout: Layout = None,
    json_file: AsJson = None,
) -> None:
    """Measure images: values, differences to the untuned model and noise floors, with intervals
    over prompts and seeds. If it was interrupted, the same call goes on where it was."""
    from dopsd.data.prompts import read_prompts
    from dopsd.evaluation.image_sets import Plan, generate_image_sets
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
            "--base is for images that are there already; with --prompts the untuned model's "
            "images are generated."
        )
    if not prompts and (lora or nfe or width or height):
        raise ValueError(
            "--lora, --nfe, --width and --height are for generating: give --prompts as well."
        )
    real_images = _real_images(targets, questions)
    with progress_bar() as advance:
        if prompts:
            taken = taken_model(model, [str(lora)] if lora else None)
            if taken.distilled_by:
                raise ValueError(
                    f"{lora} belongs to a model that another file distils, and evaluate takes a "
                    f"whole model: run `dopsd fuse {lora}`, and give its folder as --model."
                )
            name = taken.name_or_path
            plan = Plan(name, questions, lora, strength, seeds, forwards_of(nfe), width, height)
            image_sets = generate_image_sets(plan, folder, advance)
        else:
            image_sets = _given_image_sets(folder, base, targets, captioned=needs != {"set"})
        rows = tabulate(metric, image_sets, real_images, folder, device_and_dtype()[0], advance)
    if layout:
        for image_set in image_sets:
            target = folder / layout / f"{image_set.name}-nfe-{image_set.nfe}"
            LAYOUTS[layout](image_set, questions, target)
    show_table(HEADER, [row.cells() for row in rows])
    write_numbers(json_file, [row.numbers() for row in rows])


def _real_images(targets: Path | None, questions: Sequence["EvaluationPrompt"]) -> list[Path]:
    """The images of --targets, or those that the prompts name, each once."""
    from dopsd.data.folder_files import images_in

    if not targets:
        return list(dict.fromkeys(each.target for each in questions if each.target))
    if not targets.is_dir() or not (images := images_in(targets)):
        raise ValueError(f"no images in {targets}: --targets wants a folder of images.")
    return list(images)


def _given_image_sets(
    folder: Path, base: Path | None, targets: Path | None, captioned: bool
) -> list["ImageSet"]:
    """The image sets of the folder and of --base, which must pair by name."""
    from dopsd.evaluation.image_sets import BASE, read_image_set, refuse_unpaired

    image_sets = [read_image_set(folder, "images", captioned, targets)]
    if base:
        image_sets.append(read_image_set(base, BASE, captioned, targets))
        refuse_unpaired(*image_sets)
    return image_sets


def prompts(
    folder: Annotated[Path, typer.Argument(help="Captioned training images.", show_default=False)],
    trigger: Annotated[
        str,
        typer.Option(help="The name of the object or style in captions.", show_default=False),
    ],
    style: Annotated[
        bool, typer.Option("--style", help="The trigger names a style, not an object.")
    ] = False,
    class_word: Annotated[
        str | None, typer.Option(help="What the object is, such as dog; prompts must not say it.")
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
    with progress_bar() as advance:
        count = write_test_prompts(
            images,
            file,
            lambda image, question: captioner.answer([image], question, MOST_TOKENS),
            trigger,
            "style" if style else "object",
            class_word,
            lambda done, total: advance("writing prompts", done, total),
        )
    say(f"{count} prompts in {file}; read them before you evaluate")
