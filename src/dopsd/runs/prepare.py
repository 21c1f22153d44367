"""Encode a run's images and prompts; the encoders leave memory before training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dopsd.config.recipe import Recipe
from dopsd.data.cache import Row, prepare, shown_to_teacher
from dopsd.data.folder import Example, Listing
from dopsd.diffusion.batch import Context
from dopsd.models.base import Family
from dopsd.runs.class_images import with_generated
from dopsd.runs.outputs.previews import Preview, read_previews
from dopsd.runs.resolve import (
    PREVIEWS,
    images_shown,
    replay_prompts,
    resolutions_of,
    unrelated_prompts,
)

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


@dataclass(frozen=True)
class _Material:
    """What the encoders leave behind before they leave memory."""

    rows: tuple[Row, ...]
    prior: tuple[Row, ...]  # class images, where the method wants them
    previews: tuple[Preview, ...]
    unrelated: Context  # of the health prompts
    replay: Context | None  # of the prompts to stay the same on, where the method wants them


def _read_and_encode(
    recipe: Recipe,
    family: Family,
    listing: Listing,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> _Material:
    """Cache latents and contexts, read the preview prompts; reader and VAE are gone when this
    returns."""
    needs = recipe.method.needs
    privileged = "privileged" in needs
    listing, beside = with_generated(recipe, family, listing, _doing("painting", progress))
    text_encoder = family.load_text_encoder(device, dtype, images=privileged)
    vae = family.load_vae(device, torch.float32)

    def encode(
        examples: Sequence[Example], resolution: int, privileged: bool, unconditional: bool
    ) -> tuple[Row, ...]:
        return prepare(
            examples,
            recipe.output_dir / "cache",
            text_encoder,
            vae,
            resolution=resolution,
            multiple=family.multiple,
            privileged=privileged,
            unconditional=unconditional,
            device=device,
            progress=_doing("caching", progress),
        )

    resolutions, unconditional = resolutions_of(recipe, family), recipe.data.caption_dropout > 0
    rows = tuple(
        row
        for each in resolutions
        for row in encode(listing.examples, each, privileged, unconditional)
    )
    previews = read_previews(
        images_shown(recipe, family, listing),
        text_encoder,
        [shown_to_teacher(row) for row in list(dict.fromkeys(rows))[:PREVIEWS]]
        if privileged
        else [],
    )
    return _Material(
        rows,
        prior=encode(beside, max(resolutions), privileged=False, unconditional=False)
        if beside
        else (),
        previews=previews,
        unrelated=text_encoder.context(list(unrelated_prompts(recipe, family))),
        replay=text_encoder.context(list(replay_prompts(recipe, family))).to("cpu")
        if "replay" in needs
        else None,
    )


def _doing(what: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    return (lambda done, total: progress(what, done, total)) if progress else None
