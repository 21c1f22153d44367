"""A file that makes a base SDXL a few-step model, `model.distilled_by`: a LoRA or a whole UNet,
here or on the hub."""

from pathlib import Path
from typing import Literal

from dopsd.files import tensor_names
from dopsd.models.hub import hub_address, weights_here

KEY = "model.distilled_by"


def address_of(name: str) -> tuple[str, str]:
    """Folder or repository, and file, as they may be told to others."""
    if Path(name).is_file():
        return "path/to", Path(name).name
    return hub_address(name, KEY)


def refuse_no_distiller(name: str) -> None:
    """Raise ValueError for a file that cannot distil, as far as can be known without fetching it."""
    if not name.endswith(".safetensors"):
        raise ValueError(
            f"{KEY} {name} is no .safetensors file: `dopsd import` turns a .bin into one."
        )
    if file := weights_here(name, KEY):
        kind_of(file)


def kind_of(file: Path) -> Literal["lora", "unet"]:
    """What a file that distils is, by the names in it. Raises ValueError where it can be neither."""
    names = tensor_names(file)
    if any("lora" in each for each in names):
        return "lora"
    if "conv_in.weight" not in names:
        raise ValueError(f"{KEY} {file} holds neither a LoRA nor a UNet with diffusers' names.")
    return "unet"
