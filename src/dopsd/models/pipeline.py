"""The one way from prompts to images: encode, release the text encoder, sample, decode.

Everything that generates images goes through `generate_images`; what also has to open a checkpoint
does it through `ImagePipeline`, whose text encoder leaves memory before the denoiser is loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE, Denoiser, TextEncoder
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity
from dopsd.diffusion.sampling import Noise, decode_images, sample_in_chunks
from dopsd.images import open_image, to_pil
from dopsd.models import load_family
from dopsd.models.base import Family, fitted_size, latent_size
from dopsd.models.lora import merge_loras, model_for, read_lora
from dopsd.models.lora_source import LoraFile, Loras, as_loras

Progress = Callable[[int, int], None]  # images done, of how many


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """The device that accelerate chooses, and the dtype that networks are deployed in on it:
    bfloat16 on CUDA, float32 elsewhere."""
    device = Accelerator().device
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class ImageRequest:
    """An image to generate: its prompt, the seed of its noise, its latent shape (channels, height,
    width), and the files of the images that the prompt edits."""

    prompt: str
    seed: int
    latent_shape: tuple[int, int, int]
    references: tuple[Path, ...] = ()

    def encode(self, text_encoder: TextEncoder, seen: Image.Image | None = None) -> Context:
        """The student's context [1], or with `seen` that of a teacher that sees this image."""
        references = [[open_image(path) for path in self.references]] if self.references else None
        return text_encoder.context([self.prompt], [seen] if seen else None, references)


@dataclass(frozen=True)
class EncodedRequest:
    """A request and the context [1] that the denoiser reads for it."""

    request: ImageRequest
    context: Context

    def with_seed(self, seed: int) -> "EncodedRequest":
        """The same prompt on other noise."""
        return replace(self, request=replace(self.request, seed=seed))


class ImagePipeline:
    """A checkpoint's way from requests to images, on the device and in the dtype of deployment.

    Encode first, then load the denoiser: the two are gigabytes each and never in memory together.
    """

    def __init__(self, family: Family, dtype: torch.dtype | None = None):
        """dtype: of text encoder and denoiser; None: the one of deployment."""
        self.family = family
        self.device, deployed_dtype = device_and_dtype()
        self.dtype = dtype or deployed_dtype

    def encode(self, requests: Sequence[ImageRequest]) -> list[EncodedRequest]:
        """Encode each distinct prompt once, on its own, so that no context depends on the others.
        The text encoder is released on return; the contexts are in main memory."""
        contexts: dict[tuple[str, tuple[Path, ...]], Context] = {}
        if requests:
            text_encoder = self.family.load_text_encoder(self.device, self.dtype, images=False)
            for request in requests:
                if (key := (request.prompt, request.references)) not in contexts:
                    contexts[key] = request.encode(text_encoder).to("cpu")
        return [EncodedRequest(each, contexts[each.prompt, each.references]) for each in requests]

    def load_denoiser(self, loras: Sequence[LoraFile] = ()) -> Denoiser:
        """The denoiser, the LoRAs' deltas added to its weights."""
        denoiser = self.family.load_denoiser(self.device, self.dtype)
        if loras:
            merge_loras(denoiser.network, loras, self.family)
        return denoiser

    @cached_property
    def vae(self) -> VAE:
        """The VAE, float32; stays in memory with the pipeline."""
        return self.family.load_vae(self.device, torch.float32)

    def generate(
        self,
        velocity: Velocity,
        encoded: Sequence[EncodedRequest],
        nfe: int | None = None,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """The requests' images, uint8 [H, W, 3], in their order. nfe: forwards of the sampler;
        None: the checkpoint's own number."""

        def schedule_for(height: int, width: int) -> Schedule:
            return self.family.schedule(nfe or self.family.default_nfe, height, width)

        return generate_images(velocity, self.vae, schedule_for, encoded, self.device, progress)


def generate_images(
    velocity: Velocity,
    vae: VAE,
    schedule_for: Callable[[int, int], Schedule],
    encoded: Sequence[EncodedRequest],
    device: torch.device,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Each request's image, uint8 [H, W, 3] on the CPU. Requests of one latent shape and one layout
    of context are sampled together, in chunks (`diffusion.sampling`). schedule_for: from the latent
    height and width."""
    images: dict[int, Tensor] = {}
    kinds = [(each.request.latent_shape, each.context.layout) for each in encoded]
    for kind in dict.fromkeys(kinds):
        latent_shape, indices = kind[0], [i for i, other in enumerate(kinds) if other == kind]
        context = Context.stack([encoded[i].context for i in indices]).to(device)
        noise = Noise(tuple(encoded[i].request.seed for i in indices), latent_shape)
        schedule = schedule_for(*latent_shape[1:])
        chunks = sample_in_chunks(velocity, schedule, context, noise, vae.vae_scale_factor)
        remaining = iter(indices)
        for clean in chunks:
            decoded = decode_images(vae, clean)
            images |= zip(islice(remaining, len(decoded)), decoded, strict=True)
            if progress:
                progress(len(images), len(encoded))
    return [images[i] for i in range(len(encoded))]


def sample(
    name_or_path: str | None,
    prompts: Sequence[str],
    lora: Loras = None,
    strength: float = 1.0,
    nfe: int | None = None,
    seed: int = 0,
    width: int | None = None,
    height: int | None = None,
    references: Sequence[Path] = (),
    distilled_by: str | None = None,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """Generate one image for each prompt as the model is deployed, image i from seed + i.

    name_or_path: a diffusers folder, a hub id, or the name of a built-in model; None: the model in
    the LoRA file's metadata (`model_for`). lora: one or several, each a file, a folder, owner/name
    on the hub, or any of those with @STRENGTH. strength: multiplies that of all. nfe: forwards of
    the sampler; None: the model's own number. width, height: in pixels; None: of the first
    reference, else the model's own. references: images that every prompt edits. distilled_by: a
    file that makes a base checkpoint a few-step model. Raises ValueError for what the model cannot
    generate or load.
    """
    # Refuse before gigabytes are loaded.
    loras = as_loras(lora, strength)
    model = model_for(loras, name_or_path, distilled_by)
    family = load_family(model.name_or_path, distilled_by=model.distilled_by)
    sizes = [fitted_size(family, path, open_image(path).size) for path in references]
    default_width, default_height = sizes[0] if sizes else (family.resolution, family.resolution)
    size = latent_size(family, height or default_height, width or default_width)
    for each in loras:
        read_lora(each.path, family)

    requests = [
        ImageRequest(prompt, seed + index, (family.channels, *size), tuple(references))
        for index, prompt in enumerate(prompts)
    ]
    pipeline = ImagePipeline(family)
    encoded = pipeline.encode(requests)
    images = pipeline.generate(pipeline.load_denoiser(loras), encoded, nfe, progress)
    return [to_pil(image[None])[0] for image in images]
