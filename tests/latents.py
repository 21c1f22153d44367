"""Latents at the end of sampling, which tests compare with those of diffusers' pipelines."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dopsd.diffusion.batch import Context
from dopsd.diffusion.sampling import Noise, sample_in_chunks
from dopsd.models.base import Family
from dopsd.models.lora_source import Loras, as_loras
from dopsd.models.pipeline import ImagePipeline, ImageRequest


def sample_latents(
    family: Family,
    prompts: Sequence[str],
    noise: Noise,
    lora: Loras = None,
    strength: float = 1.0,
    nfe: int | None = None,
    references: Sequence[Path] = (),
) -> Tensor:
    """Clean latents [B, C, h, w] of the prompts as `dopsd sample` reaches them from `noise`."""
    pipeline = ImagePipeline(family)
    requests = [
        ImageRequest(prompt, seed, noise.latent_shape, tuple(references))
        for prompt, seed in zip(prompts, noise.seeds, strict=True)
    ]
    context = Context.stack([each.context for each in pipeline.encode(requests)])
    denoiser = pipeline.load_denoiser(as_loras(lora, strength))
    schedule = family.schedule(nfe or family.default_nfe, *noise.latent_shape[1:])
    scale = family.vae_scale_factor
    with torch.no_grad():
        chunks = sample_in_chunks(denoiser, schedule, context.to(pipeline.device), noise, scale)
        return torch.cat(list(chunks))
