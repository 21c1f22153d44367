"""What a resolved run would do, and everything that can be refused before a weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from dopsd.data.buckets import (
    CroppedImage,
    EnlargedImage,
    cropped_images,
    enlarged_images,
)
from dopsd.data.cache import CacheForecast, forecast_cache
from dopsd.data.loader import BucketVisits, count_visits
from dopsd.images import Size, image_size, open_image
from dopsd.models import load_family
from dopsd.models.base import fitted_size, latent_size, network_on_meta
from dopsd.models.lora import read_lora, refuse_misfit
from dopsd.models.lora_source import as_loras
from dopsd.models.prompt_teacher import PROMPT
from dopsd.runs.outputs.lora_export import refuse_unfit, summed
from dopsd.runs.resolve import ResolvedRun
from dopsd.training.adapters import Coverage, coverage, lora_sizes
from dopsd.training.trainable import AllWeights


@dataclass(frozen=True)
class Checked:
    """What training would do.

    coverage: which weights train. forwards_per_image: network forwards that one image costs, a
    backward counted as two, its share of a step's retention included. visits: by size, how many
    images the run trains on. enlarged: images that are smaller than the size they are trained at.
    cropped: images of which little is trained on. cache: what encoding writes to disk, without
    images that are still to be generated.
    """

    coverage: Coverage | AllWeights
    forwards_per_image: float
    visits: dict[Size, BucketVisits]
    enlarged: tuple[EnlargedImage, ...]
    cropped: tuple[CroppedImage, ...]
    cache: CacheForecast

    @property
    def images(self) -> int:
        """Images that the run trains on, repeated ones counted each time."""
        return sum(bucket.visits for bucket in self.visits.values())


def check(run: ResolvedRun) -> Checked:
    """Refuse what cannot be trained, and count what would be. No weight is loaded.

    Raises ValueError, in one sentence, for weights or LoRA files of another architecture, captions
    and prompts over the model's limit, images to edit that the model does not take, and steps that
    the method cannot take.
    """
    recipe, family = run.recipe, run.family
    _refuse_unfit_references(run)
    _refuse_same_prompts(run)
    network = network_on_meta(family)
    if recipe.adapter == "full":
        trained = AllWeights(sum(parameter.numel() for parameter in network.parameters()))
    else:
        trained = coverage(network, run.lora_targets, recipe.lora.rank)
    _refuse_other_architectures(run, network)
    if loras := as_loras(recipe.lora.init_from):
        own_sizes = lora_sizes(network, run.lora_targets, recipe.lora.rank)
        refuse_unfit(summed(loras, family), own_sizes)
    tokens = _count_tokens(run)
    recipe.method.refuse_schedule(run.schedule(run.nfe, *run.latent_size))
    forwards = recipe.objective.forwards_per_step(run.nfe, recipe.images_per_step)
    _refuse_unused_prompts(run)
    return Checked(
        coverage=trained,
        forwards_per_image=forwards / recipe.images_per_step,
        visits=_count_visits(run),
        enlarged=tuple(enlarged_images(*_paths_and_buckets(run))),
        cropped=tuple(cropped_images(*_paths_and_buckets(run))),
        cache=_forecast_cache(run, tokens),
    )


def _refuse_same_prompts(run: ResolvedRun) -> None:
    """A teacher that only reads must read something else than the student, or the loss is 0."""
    if not run.learns_from_teacher or run.teacher_sees_images:
        return
    without = [example for example in run.listing.examples if not example.teacher_text]
    if without and not run.recipe.model.teacher_suffix:
        raise ValueError(
            f"with model.teacher_context: {PROMPT} the teacher reads a better prompt, and for "
            f"{len(without)} of {len(run.listing.examples)} images (first: "
            f"{without[0].path.name}) it would read the student's own, which teaches nothing: name "
            "one as `teacher_text` in metadata.jsonl, or set model.teacher_suffix."
        )


def _refuse_other_architectures(run: ResolvedRun, network: nn.Module) -> None:
    """The weights that are trained on instead of the deployed ones must be of the same
    architecture."""
    model = run.recipe.model
    if path := model.training_adapter:
        for module, delta in read_lora(path, run.family).items():
            refuse_misfit(path, module, network, delta)
    if model.train_on:
        other = load_family(model.train_on)
        if other.name != run.family.name or _shapes(network_on_meta(other)) != _shapes(network):
            raise ValueError(
                f"model.train_on {model.train_on} is of another architecture than "
                f"{model.name_or_path}: a LoRA of one does not fit the other. Give a checkpoint of "
                "the same network, such as the many-step model that it was distilled from."
            )


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def _refuse_unused_prompts(run: ResolvedRun) -> None:
    """Each replayed prompt needs an image of the base model where retention learns from those."""
    retention, count = run.recipe.retention, len(run.replay_prompts)
    if retention.states == "samples" and retention.samples < count:
        raise ValueError(
            f"retention.samples is {retention.samples}, and there are {count} replayed prompts, "
            f"which take turns: set retention.samples to {count} or more, or name fewer prompts."
        )


@dataclass(frozen=True)
class _TokenCounts:
    """Tokens of each caption, and of each caption with an image of a size beside it."""

    captions: dict[str, int]
    with_image: dict[tuple[str, Size], int]


def _count_tokens(run: ResolvedRun) -> _TokenCounts:
    """Raises ValueError where a caption or prompt does not fit the student's context, or with an
    image the teacher's."""
    family, method = run.family, run.recipe.method
    captions = [
        (caption, index)
        for index, example in enumerate(run.listing.examples)
        for caption in (example.caption, *example.also)
    ]
    texts = [caption for caption, _ in captions]
    previewed = [preview.prompt for preview in run.previews]
    others = [*run.health_prompts, *run.replay_prompts, ""]
    if method.to_generate and method.to_generate.prompt:
        others.append(method.to_generate.prompt)
    prompts = [*texts, *previewed, *others]
    counts = _TokenCounts(dict(zip(prompts, family.count_tokens(prompts), strict=True)), {})
    if run.learns_from_teacher:
        family.count_tokens(previewed, [(run.side, run.side)] * len(previewed))
        for sizes in run.sizes:
            pairs = [
                (run.listing.examples[index].read_by_teacher(caption), sizes[index])
                for caption, index in captions
            ]
            if run.recipe.data.caption_dropout:
                pairs += [("", size) for size in sizes]
            lengths = family.count_tokens([caption for caption, _ in pairs], [s for _, s in pairs])
            counts.with_image.update(zip(pairs, lengths, strict=True))
    return counts


def _count_visits(run: ResolvedRun) -> dict[Size, BucketVisits]:
    """By size, what the run's batches train on."""
    settings = run.recipe.train
    kinds = [
        (size, *(fitted_size(run.family, path, image_size(path)) for path in example.references))
        for sizes in run.sizes
        for example, size in zip(run.listing.examples, sizes, strict=True)
    ]
    batches = settings.max_steps * settings.gradient_accumulation_steps
    return count_visits(kinds, settings.batch_size, settings.seed, batches)


def _paths_and_buckets(run: ResolvedRun) -> tuple[list[Path], list[Size]]:
    """The image of each row that is trained on, and its size there."""
    paths = [example.path for example in run.listing.examples] * len(run.sizes)
    return paths, [size for sizes in run.sizes for size in sizes]


def _forecast_cache(run: ResolvedRun, tokens: _TokenCounts) -> CacheForecast:
    """From the shapes of latents (float32) and contexts (in the dtype of the text encoder)."""
    family, token_bytes = run.family, torch.empty((), dtype=run.dtype).element_size()

    def latent_bytes(size: Size) -> int:
        height, width = latent_size(family, size[1], size[0])
        return 4 * family.channels * height * width

    def mask_bytes(size: Size) -> int:
        height, width = latent_size(family, size[1], size[0])
        return 4 * height * width

    @cache
    def shape_of(references: tuple[Size, ...], shown: Size | None = None) -> tuple[int, int]:
        """Numbers of a token, and bytes of what a context holds besides tokens. shown: size of the
        image that the teacher sees."""
        edited = [list(references)] if references else None
        blank = family.blank_context([""], [shown] if shown else None, edited)
        return blank.tokens.shape[-1], sum(extra.nbytes for extra in blank.extras.values())

    def context_bytes(caption: str, references: Sequence[Size]) -> int:
        width, extra_bytes = shape_of(tuple(references))
        return tokens.captions[caption] * width * token_bytes + extra_bytes

    def privileged_bytes(caption: str, size: Size, references: Sequence[Size]) -> int:
        width, extra_bytes = shape_of(tuple(references), size)
        return tokens.with_image[caption, size] * width * token_bytes + extra_bytes

    return forecast_cache(
        run.listing.examples * len(run.sizes),
        [size for sizes in run.sizes for size in sizes],
        latent_bytes,
        context_bytes,
        privileged_bytes if run.learns_from_teacher else None,
        unconditional=run.recipe.data.caption_dropout > 0,
        mask_bytes=mask_bytes,
    )


def _refuse_unfit_references(run: ResolvedRun) -> None:
    """An image to edit must be one that the model takes. Those of the data are known to be images;
    those of the recipe's prompts are opened."""
    in_data = [path for example in run.listing.examples for path in example.references]
    for path in dict.fromkeys(in_data):
        fitted_size(run.family, path, image_size(path))
    in_prompts = [path for prompt in run.recipe.sample.prompts for path in prompt.references]
    for path in dict.fromkeys(in_prompts):
        fitted_size(run.family, path, open_image(path).size)
