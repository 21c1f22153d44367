"""`dopsd import`, `caption`: a data set in another form, and captions for images without."""

from pathlib import Path
from typing import Annotated

import typer

from dopsd.cli.console import say
from dopsd.cli.progress import progress_bar


def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A data set (hub id or folder), the D-OPSD reference code's .jsonl, a pickled "
            "weights file (.bin), or a model in one file (.safetensors)."
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder to write; default: data, for a .safetensors its name. For a .bin: the "
            ".safetensors file.",
        ),
    ] = None,
    image_column: Annotated[str, typer.Option(help="Of a data set.")] = "image",
    caption_column: Annotated[
        list[str] | None, typer.Option(help="Of a data set. Repeatable: all captions are used.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    rejected_column: Annotated[
        str | None, typer.Option(help="Of a data set of pairs: the worse image.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="For a .safetensors: diffusers folder or hub id of the same model."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used, and list some.")
    ] = False,
) -> None:
    """Write a data set as a folder of images with metadata.jsonl, a pickled weights file as
    safetensors, or a model in one file as a diffusers folder."""
    from dopsd.data.importing import import_data
    from dopsd.models.pickle_import import convert_pickle
    from dopsd.models.single_file import import_model

    if source.endswith(".bin"):
        file = target or Path(source).with_suffix(".safetensors")
        count = convert_pickle(Path(source), file)
        say(f"{count} tensors in {file}")
        return
    if source.endswith(".safetensors"):
        folder = target or Path(source).with_suffix("")
        import_model(Path(source), config, folder)
        say(f"{folder}; use it as model.name_or_path or with --model")
        return
    folder = target or Path("data")
    count = import_data(
        source, folder, image_column, caption_column or (), split, rejected_column, skip_bad
    )
    say(f"{count} images in {folder}; next: dopsd init dopsd --data {folder}")


def caption(
    folder: Annotated[Path, typer.Argument(help="Folder of images.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="A Qwen3-VL: hub id or local folder.")
    ] = "Qwen/Qwen3-VL-4B-Instruct",
    question: Annotated[
        str | None, typer.Option(help="What to ask about each image; default: one sentence.")
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

    images, captioned = uncaptioned(folder, overwrite)
    if images:
        captioner = Captioner(model, *device_and_dtype())
        with progress_bar() as advance:
            write_captions(
                images,
                lambda image: captioner.caption(image, question or QUESTION, most_tokens),
                lambda done, total: advance("captioning", done, total),
            )
    say(
        f"{len(images)} captions written, {captioned} left as they were; read them before you train"
    )
