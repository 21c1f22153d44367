"""Images that the base model generates before training, for retention: kept as latents, because
they are neither looked at nor cut.

They lie under the run's cache, in a folder named by a hash of all that they depend on. A folder
that was interrupted is completed.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dopsd.data.buckets import bucket_sizes
from dopsd.data.cache import read_latents
from dopsd.diffusion.sampling import noise_for, sample_in_chunks
from dopsd.files import write_tensors
from dopsd.models.base import latent_size
from dopsd.models.pipeline import ImagePipeline, ImageRequest
from dopsd.runs.resolve import ResolvedRun

FIRST_SEED = 3 * 2**29  # beyond those of class images
Progress = Callable[[int, int], None]  # images done, of how many


@dataclass(frozen=True)
class BaseSamples:
    """Clean latents, float32 [N, C, h, w], for prompts in the same order."""

    prompts: tuple[str, ...]
    latents: Tensor


def base_samples(run: ResolvedRun, progress: Progress | None = None) -> tuple[BaseSamples, ...]:
    """What `retention.samples` asks for: one group for each resolution, of square images, whatever
    the shapes of the data's; none where retention needs no images.

    Missing ones are generated as the model is deployed; the networks are in memory only during that
    time.
    """
    retention = run.recipe.retention
    if not run.replay_prompts or retention.states != "samples":
        return ()
    files: dict[ImageRequest, Path] = {}
    groups = []
    for resolution in run.resolutions:
        requests = _requests(run, resolution)
        folder = _folder(run, requests)
        files |= {request: folder / f"{request.seed}.safetensors" for request in requests}
        groups.append(requests)
    _generate_missing(run, files, progress)
    return tuple(
        BaseSamples(
            tuple(request.prompt for request in requests),
            torch.stack([read_latents(files[request]) for request in requests]),
        )
        for requests in groups
    )


def _requests(run: ResolvedRun, resolution: int) -> list[ImageRequest]:
    """Square images of a resolution; the prompts take turns."""
    family, prompts = run.family, run.replay_prompts
    width, height = bucket_sizes(resolution, family.multiple)[0]
    shape = (family.channels, *latent_size(family, height, width))
    return [
        ImageRequest(prompts[index % len(prompts)], FIRST_SEED + index, shape)
        for index in range(run.recipe.retention.samples)
    ]


def _generate_missing(
    run: ResolvedRun, files: dict[ImageRequest, Path], progress: Progress | None
) -> None:
    missing = {request: path for request, path in files.items() if not path.is_file()}
    if not missing:
        return
    family, pipeline = run.family, ImagePipeline(run.family)
    encoded = pipeline.encode(list(missing))
    denoiser = pipeline.load_denoiser()
    for done, each in enumerate(encoded, len(files) - len(missing)):
        if progress:
            progress(done, len(files))
        # One at a time: an image does not depend on which others are missing.
        request = each.request
        (clean,) = sample_in_chunks(
            denoiser,
            family.schedule(family.default_nfe, *request.latent_shape[1:]),
            each.context.to(pipeline.device),
            noise_for([request.seed], *request.latent_shape),
            family.vae_scale_factor,
        )
        write_tensors(files[request], {"latents": clean[0]}, {"kind": "latents"})


def _folder(run: ResolvedRun, requests: list[ImageRequest]) -> Path:
    """The folder of these images, named by a hash of everything that they depend on."""
    weights = run.family.checkpoint.mark(run.recipe.model.distilled_by)
    asked = [[request.prompt, request.seed, request.latent_shape] for request in requests]
    key = [weights, asked, run.family.default_nfe]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return run.recipe.output_dir / "cache" / "generated" / name
