"""Images that the base model generates before training, as it is deployed: class images for prior
preservation, or rejected images for pairs.

They become an ordinary folder of images and captions under the run's cache, named by a hash of all
that they depend on. A folder that was interrupted is completed.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dopsd.config.recipe import Recipe
from dopsd.data.examples import Example, Listing
from dopsd.data.metadata import METADATA
from dopsd.data.sources import split_captions
from dopsd.files import atomic_path, write_jsonl
from dopsd.images import to_pil
from dopsd.models.base import Family, latent_size
from dopsd.models.pipeline import ImagePipeline, ImageRequest
from dopsd.runs.resolve import ResolvedRun

FIRST_SEED = 2**30  # far from the seeds of previews, health checks and comparisons
Progress = Callable[[int, int], None]  # images done, of how many


def with_generated(
    run: ResolvedRun, progress: Progress | None = None
) -> tuple[Listing, tuple[Example, ...]]:
    """Generate what the method asks for.

    Returns the run's listing, whose examples have rejected images where the method learns from
    generated pairs, and the class images of a method with prior preservation (else none).
    """
    recipe, family, listing = run.recipe, run.family, run.listing
    wanted = recipe.method.to_generate
    if wanted is None:
        return listing, ()
    if wanted.what == "prior":
        assert wanted.prompt is not None, "class images have a prompt"
        files = generate_once(recipe, family, [wanted.prompt], wanted.count, progress)
        return listing, tuple(Example(path, wanted.prompt) for path in files[wanted.prompt])
    if wanted.prompt is None:
        listing = split_captions(listing)
    prompts = [wanted.prompt or example.caption for example in listing.examples]
    files = generate_once(recipe, family, list(dict.fromkeys(prompts)), wanted.count, progress)
    examples = tuple(
        replace(example, rejected=tuple(files[prompt]))
        for example, prompt in zip(listing.examples, prompts, strict=True)
    )
    return replace(listing, examples=examples), ()


def generate_once(
    recipe: Recipe,
    family: Family,
    prompts: Sequence[str],
    count: int,
    progress: Progress | None = None,
) -> dict[str, list[Path]]:
    """The files of `count` images of each prompt. Missing ones are generated; the networks are in
    memory only during that time."""
    side, nfe = max(recipe.data.resolution, default=family.resolution), family.default_nfe
    folder = _folder(recipe, family, prompts, count, side)
    files = {
        (prompt, FIRST_SEED + place * count + number): folder / f"{place:04d}-{number:03d}.png"
        for place, prompt in enumerate(sorted(prompts))
        for number in range(count)
    }
    missing = {key: path for key, path in files.items() if not path.is_file()}
    if missing:
        rows = [{"file_name": path.name, "text": prompt} for (prompt, _), path in files.items()]
        write_jsonl(folder / METADATA[0], rows)
        latent_shape = (family.channels, *latent_size(family, side, side))
        pipeline = ImagePipeline(family)
        encoded = pipeline.encode(
            [ImageRequest(prompt, seed, latent_shape) for prompt, seed in missing]
        )
        denoiser = pipeline.load_denoiser()
        for request, path in zip(encoded, missing.values(), strict=True):
            if progress:
                progress(sum(1 for file in files.values() if file.is_file()), len(files))
            # One at a time: an image does not depend on which others are missing.
            (image,) = to_pil(torch.stack(pipeline.generate(denoiser, [request], nfe)))
            with atomic_path(path) as temporary:
                image.save(temporary, "png")
    return {
        prompt: [path for (other, _), path in files.items() if other == prompt]
        for prompt in prompts
    }


def _folder(recipe: Recipe, family: Family, prompts: Sequence[str], count: int, side: int) -> Path:
    """The folder of the images, named by a hash of everything that they depend on."""
    weights = family.checkpoint.mark(recipe.model.distilled_by)
    key = [weights, sorted(prompts), count, side, family.default_nfe, FIRST_SEED]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return recipe.output_dir / "cache" / "generated" / name
