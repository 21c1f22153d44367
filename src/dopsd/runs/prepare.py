"""Encode a run's images and prompts; the encoders leave memory before training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dopsd.data.cache import Row, prepare
from dopsd.data.examples import Example
from dopsd.diffusion.batch import Context, Replay
from dopsd.diffusion.components import TextEncoder
from dopsd.runs.base_samples import BaseSamples, base_samples
from dopsd.runs.class_images import with_generated
from dopsd.runs.outputs.previews import Preview, read_previews
from dopsd.runs.prompts import PREVIEWED_CAPTIONS
from dopsd.runs.resolve import ResolvedRun

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


@dataclass(frozen=True)
class EncodedRun:
    """What the encoders leave behind.

    rows: the training images, cached. prior: class images, where the method wants them.
    health: contexts of the health prompts. replays: what retention draws from, a group for each
    size; empty without retention.
    """

    rows: tuple[Row, ...]
    prior: tuple[Row, ...]
    previews: tuple[Preview, ...]
    health: Context
    replays: tuple[Replay, ...]


def encode_run(run: ResolvedRun, progress: Progress | None = None) -> EncodedRun:
    """Cache latents and contexts and encode the preview prompts.

    Text encoder and VAE are in memory only meanwhile. Raises ValueError for an image or caption
    that cannot be encoded.
    """
    recipe, family = run.recipe, run.family

    # Images that the base model generates: class images or rejected ones, and those of retention.
    listings, class_examples = with_generated(run, _named(progress, "generating"))
    samples = base_samples(run, _named(progress, "generating for retention"))
    text_encoder = family.load_text_encoder(run.device, run.dtype, images=run.learns_from_teacher)
    vae = family.load_vae(run.device, torch.float32)

    def cache_rows(
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
            device=run.device,
            progress=_named(progress, "caching"),
        )

    # The training images at every resolution, and the class images at the largest.
    unconditional = recipe.data.caption_dropout > 0
    rows = tuple(
        row
        for resolution, listing in zip(run.resolutions, listings, strict=True)
        for row in cache_rows(listing.examples, resolution, run.learns_from_teacher, unconditional)
    )
    prior = cache_rows(class_examples, run.side, False, False) if class_examples else ()

    # The prompts of previews and of the health check.
    shown = list(dict.fromkeys(rows))[:PREVIEWED_CAPTIONS] if run.learns_from_teacher else []
    return EncodedRun(
        rows=rows,
        prior=prior,
        previews=read_previews(run.previews, text_encoder, shown, run.teacher_sees_images),
        health=text_encoder.context(list(run.health_prompts)),
        replays=_replays(run, samples, text_encoder),
    )


def _replays(
    run: ResolvedRun, samples: Sequence[BaseSamples], text_encoder: TextEncoder
) -> tuple[Replay, ...]:
    """The replayed prompts encoded, each with its image where there are images."""
    if not run.replay_prompts:
        return ()
    contexts = {
        prompt: text_encoder.context([prompt]).to("cpu")
        for prompt in dict.fromkeys(run.replay_prompts)
    }

    def stacked(prompts: Sequence[str]) -> Context:
        return Context.stack([contexts[prompt] for prompt in prompts])

    if not samples:
        return (Replay(stacked(run.replay_prompts)),)
    return tuple(Replay(stacked(group.prompts), group.latents) for group in samples)


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    """The progress callback for one thing that is being done."""
    return (lambda done, total: progress(what, done, total)) if progress else None
