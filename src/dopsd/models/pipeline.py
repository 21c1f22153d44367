"""The model as its users run it: prompts to images, with or without a LoRA file."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from dopsd.diffusion.sampling import Noise, decode_images, noise_for, sample_in_chunks
from dopsd.images import open_image, to_pil
from dopsd.models import load_family
from dopsd.models.base import Family, fitted_size, latent_size
from dopsd.models.lora import merge_lora, read_lora, refuse_strength


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
    """Paint prompts as deployed, image i from seed + i; references: images that every prompt edits.
    Sizes in pixels; None: the first reference's, else the model's own. distilled_by: what makes a
    base a few-step model."""
    refuse_strength(strength)
    family = load_family(name_or_path, distilled_by=distilled_by)
    edited = [open_image(path) for path in references]
    sizes = [
        fitted_size(family, path, image.size)
        for path, image in zip(references, edited, strict=True)
    ]
    usual = sizes[0] if sizes else (family.resolution, family.resolution)
    latent_shape = latent_size(family, height or usual[1], width or usual[0])
    noise = noise_for(range(seed, seed + len(prompts)), family.channels, *latent_shape)
    clean = sample_latents(family, prompts, noise, lora, strength, nfe, edited)
    return to_pil(decode_images(family.load_vae(clean.device, torch.float32), clean))


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
    context = family.load_text_encoder(device, dtype, images=False).context(
        list(prompts), references=edited
    )
    denoiser = family.load_denoiser(device, dtype)
    if lora:
        merge_lora(denoiser.network, lora, family, strength)
    schedule = family.schedule(nfe or family.default_nfe, *noise.latent_shape[1:])
    return torch.cat(
        list(sample_in_chunks(denoiser, schedule, context, noise, family.vae_scale_factor))
    )


def deployed_on() -> tuple[torch.device, torch.dtype]:
    """The device accelerate chooses here, and the dtype that networks are deployed in on it."""
    device = Accelerator().device
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32
