"""The model as its users run it: prompts to pictures, with or without a LoRA file."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from dopsd.diffusion.sampling import Noise, noise_for, to_pictures, walked
from dopsd.families import load_family
from dopsd.families.base import Family, Size
from dopsd.families.lora import merge_lora, read_lora, refuse_strength
from dopsd.images import open_picture, to_images
from dopsd.model_folder import write_model


def sample(
    name_or_path: str,
    prompts: Sequence[str],
    lora: Path | None = None,
    strength: float = 1.0,
    nfe: int | None = None,
    seed: int = 0,
    width: int | None = None,
    height: int | None = None,
    references: Sequence[Path] = (),
    distilled_by: str | None = None,
) -> list[Image.Image]:
    """Paint prompts as deployed, picture i from seed + i; references: pictures that every prompt edits. Sizes in
    pixels; None: the first reference's, else the model's own. distilled_by: what makes a base a few-step model."""
    refuse_strength(strength)
    family = load_family(name_or_path, distilled_by=distilled_by)
    edited = [open_picture(path) for path in references]
    sizes = [fitted_size(family, path, image.size) for path, image in zip(references, edited, strict=True)]
    usual = sizes[0] if sizes else (family.resolution, family.resolution)
    cells = cells_of(family, height or usual[1], width or usual[0])
    noise = noise_for(range(seed, seed + len(prompts)), family.channels, *cells)
    clean = sample_latents(family, prompts, noise, lora, strength, nfe, edited)
    return to_images(to_pictures(family.load_painter(clean.device, torch.float32), clean))


def sample_latents(
    family: Family,
    prompts: Sequence[str],
    noise: Noise,
    lora: Path | None = None,
    strength: float = 1.0,
    nfe: int | None = None,
    references: Sequence[Image.Image] = (),
) -> torch.Tensor:
    """The clean latents [B, C, h, w] that the prompts' walks from `noise` end at."""
    if lora:
        read_lora(lora, family)  # refused before gigabytes are loaded
    device, dtype = deployed_on()
    edited = [references] * len(prompts) if references else None
    context = family.load_reader(device, dtype, pictures=False).context(list(prompts), references=edited)
    denoiser = family.load_denoiser(device, dtype)
    if lora:
        merge_lora(denoiser.network, lora, family, strength)
    schedule = family.schedule(nfe or family.default_nfe, *noise.cells[1:])
    return torch.cat(list(walked(denoiser, schedule, context, noise, family.cell)))


def fuse(name_or_path: str, lora: Path, folder: Path, strength: float = 1.0, distilled_by: str | None = None) -> None:
    """Write the checkpoint as a diffusers folder with the LoRA added to its weights: what opens it needs no LoRA."""
    if folder.exists():
        raise ValueError(f"{folder} exists and is not overwritten: choose another folder with --out.")
    family = load_family(name_or_path, distilled_by=distilled_by)
    read_lora(lora, family)  # refused before gigabytes are loaded
    network = family.load_denoiser(*deployed_on()).network
    merge_lora(network, lora, family, strength)
    write_model(folder, network, family)


def deployed_on() -> tuple[torch.device, torch.dtype]:
    """The device accelerate chooses here, and the dtype that networks are deployed in on it."""
    device = Accelerator().device
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


def fitted_size(family: Family, path: Path, size: Size) -> Size:
    """What a picture to edit is brought to. Raises ValueError where the family edits none, or none of this shape."""
    if family.reference_size is None:
        raise ValueError(f"{path} is a picture to edit, and {family.name} edits none: leave the references out.")
    try:
        return family.reference_size(size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def cells_of(family: Family, height: int, width: int) -> tuple[int, int]:
    """A picture size in pixels as latent cells. Raises ValueError where the family cannot paint it."""
    if height % family.multiple or width % family.multiple:
        raise ValueError(f"{width} x {height} pixels: both sides must be multiples of {family.multiple}.")
    return height // family.cell, width // family.cell
