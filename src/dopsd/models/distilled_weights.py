"""A file that makes a base SDXL a few-step model, `model.distilled_by`: a LoRA or a whole UNet,
local or on the hub."""

import logging
import re
from pathlib import Path
from typing import Literal

from dopsd.files import tensor_names
from dopsd.models.hub import hub_address, weights_here

log = logging.getLogger(__name__)

KEY = "model.distilled_by"
# Ways of distilling SDXL whose samplers are not here, by words in the names of their files.
NOT_HERE = {
    "hyper": "Hyper-SD",
    "lcm": "LCM",
    "tcd": "TCD",
    "pcm": "PCM",
    "flash": "Flash Diffusion",
    "turbo": "SDXL-Turbo",
}


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


def lightning_steps(name: str) -> int | None:
    """The steps that an SDXL-Lightning file was distilled for, by its name; None for another one,
    which is read as DMD2's. Raises ValueError for ways of distilling that are not supported.

    A file's tensors do not say how it was distilled, and another sampler than its own changes the
    images without any error.
    """
    shown = Path(name).name if Path(name).is_file() else name
    lowered = shown.lower()
    if "lightning" in lowered:
        steps = re.search(r"(\d+)[ _-]?step", lowered)
        if steps and steps[1] == "1":
            raise ValueError(
                f"{KEY} {name} predicts images in one step, not noise: take the file for 2, 4 or 8 "
                "steps."
            )
        return int(steps[1]) if steps else 4
    if "dmd" in lowered:
        return None
    for word, method in NOT_HERE.items():
        if re.search(rf"(?<![a-z]){word}(?![a-z])|{word}[-_]?(sd|lora)", lowered):
            raise ValueError(
                f"{KEY} {name} is named as one of {method}, whose sampler is not here: DMD2 and "
                "SDXL-Lightning are."
            )
    log.warning(
        "%s %s: its name does not say how it was distilled, and it is sampled as DMD2 is.",
        KEY,
        name,
    )
    return None


def kind_of(file: Path) -> Literal["lora", "unet"]:
    """Whether a file is a LoRA or a UNet, by its tensors' names. Raises ValueError for neither."""
    names = tensor_names(file)
    if any("lora" in name for name in names):
        return "lora"
    if "conv_in.weight" not in names:
        raise ValueError(f"{KEY} {file} holds neither a LoRA nor a UNet with diffusers' names.")
    return "unet"
