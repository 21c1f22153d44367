"""Parity with diffusers on this device: the same prompt and noise through the checkpoint's own
pipeline and through dopsd's, in the dtype of deployment."""

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dopsd.diffusion.sampling import Noise, decode_images, noise_for, sample_in_chunks
from dopsd.models import load_family
from dopsd.models.base import Family, latent_size, plain_usage
from dopsd.models.pipeline import ImagePipeline, ImageRequest

PROMPT = "a red bicycle leaning against a brick wall"
SEED = 7


@torch.no_grad()
def compare_with_diffusers(model: str, side: int) -> dict[str, Any]:
    """Largest and mean difference of the last latents, beside their standard deviation, and of the
    decoded image in grey levels.

    dopsd decodes in float32, diffusers in the pipeline's dtype. Raises ValueError for a checkpoint
    whose diffusers pipeline takes other arguments than the number of steps.
    """
    family = load_family(model)
    nfe = family.default_nfe
    if family.usage(nfe) != plain_usage(nfe):
        raise ValueError(f"diffusers samples {model} with other arguments: it is not compared.")
    noise = noise_for([SEED], family.channels, *latent_size(family, side, side))
    pipeline = ImagePipeline(family)
    ours, our_image = _by_dopsd(pipeline, noise)
    theirs, their_image = _by_diffusers(family, noise, pipeline.dtype)
    latents = (ours - theirs).abs()
    image = np.abs(our_image.astype(int) - their_image.astype(int))
    return {
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "nfe": nfe,
        "latents": {
            "max": latents.max().item(),
            "mean": latents.mean().item(),
            "std": theirs.std().item(),
        },
        "image": {"max": int(image.max()), "mean": float(image.mean())},
    }


def _by_dopsd(pipeline: ImagePipeline, noise: Noise) -> tuple[Tensor, np.ndarray]:
    """Latents float32 [1, C, h, w] and image uint8 [H, W, 3]."""
    family = pipeline.family
    (encoded,) = pipeline.encode([ImageRequest(PROMPT, SEED, noise.latent_shape)])
    denoiser = pipeline.load_denoiser()
    schedule = family.schedule(family.default_nfe, *noise.latent_shape[1:])
    context = encoded.context.to(pipeline.device)
    (clean,) = sample_in_chunks(denoiser, schedule, context, noise, family.vae_scale_factor)
    return clean.float().cpu(), decode_images(pipeline.vae, clean)[0].numpy()


def _by_diffusers(family: Family, noise: Noise, dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
    """The same by the checkpoint's own pipeline."""
    pipe: Any = DiffusionPipeline.from_pretrained(family.checkpoint.whole(), torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()  # one part on the GPU at a time, as dopsd does it
    last: dict[str, Tensor] = {}

    def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(tensors)
        return tensors

    height, width = (side * family.vae_scale_factor for side in noise.latent_shape[1:])
    (image,) = pipe(
        prompt=PROMPT,
        height=height,
        width=width,
        num_inference_steps=family.default_nfe,
        guidance_scale=0.0,
        # On the CPU it draws the same noise, in the dtype that the pipeline wants.
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=keep,
    ).images
    latents = last["latents"].float().cpu()
    if latents.ndim == 3:  # a row of channels for each position
        latents = latents.mT
    return latents.reshape(1, *noise.latent_shape), np.asarray(image)
