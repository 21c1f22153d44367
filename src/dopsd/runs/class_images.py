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
from dopsd.data.buckets import bucket_sizes, nearest_bucket
from dopsd.data.examples import Example, Listing
from dopsd.data.metadata import METADATA
from dopsd.data.sources import split_captions
from dopsd.files import atomic_path, write_jsonl
from dopsd.images import Size, image_size, to_pil
from dopsd.models.base import Family, latent_size
from dopsd.models.pipeline import ImagePipeline, ImageRequest
from dopsd.runs.resolve import ResolvedRun

FIRST_SEED = 2**30  # far from the seeds of previews, health checks and comparisons
Progress = Callable[[int, int], None]  # images done, of how many
Kind = tuple[str, Size]  # a prompt, and the size that its images are generated at


def with_generated(
    run: ResolvedRun, progress: Progress | None = None
) -> tuple[tuple[Listing, ...], tuple[Example, ...]]:
    """Generate what the method asks for.

    Returns the run's listing for each of its resolutions, and the class images of a method with
    prior preservation (else none). Where the method learns from generated pairs, the examples have
    rejected images of the size that the example itself is trained at: a pair whose images had
    different shapes before the crop would teach that difference.
    """
    recipe, family, listing = run.recipe, run.family, run.listing
    wanted = recipe.method.to_generate
    unchanged = (listing,) * len(run.resolutions)
    if wanted is None:
        return unchanged, ()
    if wanted.what == "prior":
        assert wanted.prompt is not None, "class images have a prompt"
        square = bucket_sizes(run.side, family.multiple)[0]
        kind = (wanted.prompt, square)
        files = generate_once(recipe, family, [kind], wanted.count, progress)
        return unchanged, tuple(Example(path, wanted.prompt) for path in files[kind])
    if wanted.prompt is None:
        listing = split_captions(listing)
    kinds_by_resolution = []
    for resolution in run.resolutions:
        buckets = bucket_sizes(resolution, family.multiple)
        kinds_by_resolution.append(
            [
                (wanted.prompt or e.caption, nearest_bucket(*image_size(e.path), buckets))
                for e in listing.examples
            ]
        )
    kinds = list(dict.fromkeys(kind for kinds in kinds_by_resolution for kind in kinds))
    files = generate_once(recipe, family, kinds, wanted.count, progress)
    return tuple(
        replace(
            listing,
            examples=tuple(
                replace(example, rejected=tuple(files[kind]))
                for example, kind in zip(listing.examples, kinds, strict=True)
            ),
        )
        for kinds in kinds_by_resolution
    ), ()


def generate_once(
    recipe: Recipe,
    family: Family,
    kinds: Sequence[Kind],
    count: int,
    progress: Progress | None = None,
) -> dict[Kind, list[Path]]:
    """The files of `count` images of each kind, which are different. Missing ones are generated;
    the networks are in memory only during that time."""
    nfe = family.default_nfe
    folder = _folder(recipe, family, kinds, count)
    requests: dict[Path, tuple[Kind, int]] = {
        folder / f"{place:04d}-{number:03d}.png": (kind, FIRST_SEED + place * count + number)
        for place, kind in enumerate(sorted(kinds))
        for number in range(count)
    }
    missing = {path: request for path, request in requests.items() if not path.is_file()}
    if missing:
        rows = [
            {"file_name": path.name, "text": prompt} for path, ((prompt, _), _) in requests.items()
        ]
        write_jsonl(folder / METADATA[0], rows)
        pipeline = ImagePipeline(family)
        encoded = pipeline.encode(
            [
                ImageRequest(prompt, seed, (family.channels, *latent_size(family, height, width)))
                for (prompt, (width, height)), seed in missing.values()
            ]
        )
        denoiser = pipeline.load_denoiser()
        for request, path in zip(encoded, missing, strict=True):
            if progress:
                progress(sum(1 for file in requests if file.is_file()), len(requests))
            # One at a time: an image does not depend on which others are missing.
            (image,) = to_pil(torch.stack(pipeline.generate(denoiser, [request], nfe)))
            with atomic_path(path) as temporary:
                image.save(temporary, "png")
    return {
        kind: [path for path, (other, _) in requests.items() if other == kind] for kind in kinds
    }


def _folder(recipe: Recipe, family: Family, kinds: Sequence[Kind], count: int) -> Path:
    """The folder of the images, named by a hash of everything that they depend on."""
    weights = family.checkpoint.mark(recipe.model.distilled_by)
    key = [weights, sorted(kinds), count, family.default_nfe, FIRST_SEED]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return recipe.output_dir / "cache" / "generated" / name
