"""`dopsd sample`, `fuse`: images from a model with a LoRA, and a model with the LoRA added."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dopsd.cli.console import note, say
from dopsd.cli.options import (
    LORA_HELP,
    DistilledBy,
    Loras,
    Side,
    Strength,
    TakenModel,
)
from dopsd.cli.progress import progress_bar

if TYPE_CHECKING:
    from dopsd.models.lora import ModelReference


def sample(
    prompts: Annotated[
        list[str],
        typer.Argument(help="Prompts, or a .txt or .jsonl file of them.", show_default=False),
    ],
    model: TakenModel = None,
    lora: Loras = None,
    strength: Strength = 1.0,
    nfe: Annotated[
        int | None, typer.Option(help="Network forwards; default: the model's own.", min=1)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the first image; the next takes seed + 1.", min=0, max=2**62)
    ] = 0,
    width: Side = None,
    height: Side = None,
    reference: Annotated[
        list[Path] | None, typer.Option(help="Image to edit. Repeatable, in order.")
    ] = None,
    distilled_by: DistilledBy = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for the images; none is overwritten.")
    ] = Path("samples"),
) -> None:
    """Generate an image for each prompt, as the deployed pipeline would."""
    from dopsd.data.prompts import prompts_of
    from dopsd.files import atomic_path
    from dopsd.models.pipeline import sample as sample_prompts

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder for the images with --out.")
    taken = taken_model(model, lora, distilled_by)
    with progress_bar() as advance:
        images = sample_prompts(
            taken.name_or_path,
            [each.prompt for each in prompts_of(prompts, "PROMPTS")],
            lora,
            strength,
            nfe,
            seed,
            width,
            height,
            reference or (),
            taken.distilled_by,
            lambda done, total: advance("generating", done, total),
        )
    for index, image in enumerate(images):
        path = free_path(folder / f"{index}_{seed + index}.png")
        with atomic_path(path) as temporary:
            image.save(temporary, "png")
        say(str(path))


def fuse(
    lora: Annotated[
        list[str], typer.Argument(help=f"{LORA_HELP}. Several are added up.", show_default=False)
    ],
    model: TakenModel = None,
    strength: Strength = 1.0,
    distilled_by: DistilledBy = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder to write, which must not exist.")
    ] = Path("fused"),
) -> None:
    """Write the model with LoRAs added to its weights, as a diffusers folder."""
    from dopsd.models.folder import fuse as fuse_loras

    taken = taken_model(model, lora, distilled_by)
    fuse_loras(taken.name_or_path, lora, folder, strength, taken.distilled_by)
    say(f"{folder}; open it with diffusers, or: dopsd sample PROMPT --model {folder}")


def taken_model(
    model: str | None, lora: Sequence[str] | None, distilled_by: str | None = None
) -> "ModelReference":
    """The model that was given, or the one that a LoRA file names, which is then printed. Raises
    ValueError where there is neither."""
    from dopsd.models.lora import model_for
    from dopsd.models.lora_source import as_loras

    loras = as_loras(lora)
    reference = model_for(loras, model, distilled_by)
    if model is None:
        by = f", distilled by {reference.distilled_by}" if reference.distilled_by else ""
        source = str(loras[0].path) if len(loras) == 1 else "one of the LoRA files"
        note(f"model: {reference.name_or_path}{by}, as {source} says")
    return reference


def free_path(path: Path) -> Path:
    """The path, or, where it exists, the first of name-2, name-3, ... that does not."""
    if not path.exists():
        return path
    names = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(name for name in names if not name.exists())
