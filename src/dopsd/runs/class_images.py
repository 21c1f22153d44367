"""Images that the base model generates before training, as it is deployed: class images, or losers
for pairs.

They become an ordinary folder of images and captions under the run's cache, found again by
everything they depend on; one that was interrupted goes on where it stopped.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dopsd.config.recipe import Recipe
from dopsd.data.folder import METADATA, Example, Listing
from dopsd.data.sources import one_caption_each
from dopsd.files import atomic_path, write_jsonl
from dopsd.images import to_pil
from dopsd.models.base import Family, latent_size
from dopsd.models.pipeline import ImagePipeline, ImageRequest

FIRST_SEED = 960_000  # far from previews and health checks
Progress = Callable[[int, int], None]


def with_generated(
    recipe: Recipe, family: Family, listing: Listing, progress: Progress | None = None
) -> tuple[Listing, tuple[Example, ...]]:
    """The listing with the losers that the method wants generated, and the class images that it
    wants beside."""
    wanted = recipe.method.to_generate
    if wanted is None:
        return listing, ()
    if wanted.what == "prior":
        assert wanted.prompt is not None, "class pictures have a prompt"
        (generated,) = generate_ahead(
            recipe, family, [wanted.prompt], wanted.count, progress
        ).values()
        return listing, tuple(Example(path, wanted.prompt) for path in generated)
    if wanted.prompt is None:
        listing = one_caption_each(listing)
    prompt_of = [wanted.prompt or example.caption for example in listing.examples]
    generated_for = generate_ahead(
        recipe, family, list(dict.fromkeys(prompt_of)), wanted.count, progress
    )
    pairs = zip(listing.examples, prompt_of, strict=True)
    return replace(
        listing, examples=tuple(replace(e, rejected=tuple(generated_for[p])) for e, p in pairs)
    ), ()


def generate_ahead(
    recipe: Recipe,
    family: Family,
    prompts: Sequence[str],
    count: int,
    progress: Progress | None = None,
) -> dict[str, list[Path]]:
    """`count` images of each prompt, generated unless they are there: the files by prompt. The
    networks are in memory only meanwhile."""
    side, nfe = max(recipe.data.resolution, default=family.resolution), family.default_nfe
    key = [
        family.checkpoint.mark(recipe.model.distilled_by),
        sorted(prompts),
        count,
        side,
        nfe,
        FIRST_SEED,
    ]
    folder = (
        recipe.output_dir
        / "cache"
        / "generated"
        / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    )
    wanted = [
        (prompt, folder / f"{place:04d}-{number:03d}.png", FIRST_SEED + place * count + number)
        for place, prompt in enumerate(sorted(prompts))
        for number in range(count)
    ]
    missing = [each for each in wanted if not each[1].is_file()]
    if missing:
        rows = [{"file_name": path.name, "text": prompt} for prompt, path, _ in wanted]
        write_jsonl(folder / METADATA[0], rows)
        latent_shape = (family.channels, *latent_size(family, side, side))
        pipeline = ImagePipeline(family)
        encoded = pipeline.encode(
            [ImageRequest(prompt, seed, latent_shape) for prompt, _, seed in missing]
        )
        denoiser = pipeline.load_denoiser()
        present = len(wanted) - len(missing)
        for index, (each, (_, path, _)) in enumerate(zip(encoded, missing, strict=True)):
            if progress:
                progress(present + index, len(wanted))
            # One at a time: an image does not depend on which others are missing.
            (image,) = to_pil(torch.stack(pipeline.generate(denoiser, [each], nfe)))
            with atomic_path(path) as temporary:
                image.save(temporary, "png")
    return {prompt: [path for other, path, _ in wanted if other == prompt] for prompt in prompts}
