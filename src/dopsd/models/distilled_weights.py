"""A file that makes a base SDXL a few-step model, `model.distilled_by`: a LoRA or a whole UNet,
local or on the hub."""

from pathlib import Path
from typing import Literal

from dopsd.files import tensor_names
from dopsd.models.hub import hub_address, weights_here

KEY = "model.distilled_by"


def address_of(name: str) -> tuple[str, str]:
    """Repository and file name for a model card; a local file gets a placeholder folder."""
    if Path(name).is_file():
        return "path/to", Path(name).name
    return hub_address(name, KEY)


def refuse_no_distiller(name: str) -> None:
    """Raise ValueError for a file that cannot distil, as far as is known without fetching it."""
    if not name.endswith(".safetensors"):
        raise ValueError(
            f"{KEY} {name} is not a .safetensors file: `dopsd import` converts a .bin."
        )
    if file := weights_here(name, KEY):
        kind_of(file)


def kind_of(file: Path) -> Literal["lora", "unet"]:
    """Whether a file is a LoRA or a UNet, by its tensors' names. Raises ValueError for neither."""
    names = tensor_names(file)
    if any("lora" in name for name in names):
        return "lora"
    if "conv_in.weight" not in names:
        raise ValueError(f"{KEY} {file} holds neither a LoRA nor a UNet with diffusers' names.")
    return "unet"
