"""`dopsd sample`, `fuse`: images from a model with a LoRA, and a model with the LoRA added."""

from pathlib import Path
from typing import Annotated

import typer

from dopsd.cli.console import say
from dopsd.cli.options import DistilledBy, Lora, Model, Side, Strength


def sample(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.", show_default=False)],
    model: Model = "pocket",
    lora: Lora = None,
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
    folder: Annotated[Path, typer.Option("--out", help="Folder for the images.")] = Path("samples"),
) -> None:
    """Generate an image for each prompt, as the deployed pipeline would."""
    from dopsd.files import writing
    from dopsd.models.pipeline import sample as sample_prompts

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder for the images with --out.")
    images = sample_prompts(
        model, prompts, lora, strength, nfe, seed, width, height, reference or (), distilled_by
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        path = folder / f"{index}_{seed + index}.png"
        image.save(path)
        say(str(path))


def fuse(
    lora: Annotated[Path, typer.Argument(help="LoRA file (.safetensors).", show_default=False)],
    model: Model = "pocket",
    strength: Strength = 1.0,
    distilled_by: DistilledBy = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("fused"),
) -> None:
    """Write the model with a LoRA added to its weights, as a diffusers folder."""
    from dopsd.models.folder import fuse as fuse_lora

    fuse_lora(model, lora, folder, strength, distilled_by)
    say(f"{folder}; open it with diffusers, or: dopsd sample PROMPT --model {folder}")
