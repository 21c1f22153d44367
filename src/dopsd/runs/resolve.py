"""What a recipe means for its checkpoint and data, answered once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dopsd.config.recipe import PromptSection, Recipe
from dopsd.data.buckets import bucket_sizes, nearest_bucket
from dopsd.data.folder import Example, Listing
from dopsd.data.importing import fill
from dopsd.data.prompts import read_prompts
from dopsd.data.sources import Source, read_sources, seen_in_turn
from dopsd.evaluation.health import PROMPTS
from dopsd.images import Size, image_size
from dopsd.methods import missing
from dopsd.models import load_family
from dopsd.models.base import Family, TeacherVision, latent_size
from dopsd.models.pipeline import ImageRequest

PREVIEWS = 4  # captions shown when the recipe names no prompts


def family_of(recipe: Recipe) -> Family:
    """The recipe's checkpoint, its teacher seeing images as the recipe says."""
    model = recipe.model
    teacher_vision = TeacherVision(model.teacher_context, model.vlm, model.teacher_suffix)
    return load_family(model.name_or_path, model.revision, teacher_vision, model.distilled_by)


def open_family(recipe: Recipe) -> Family:
    """The recipe's checkpoint, refused with one sentence when it or its method cannot be tuned."""
    family = family_of(recipe)
    if reason := missing(recipe.method, family.teacher_contexts):
        so_set = "" if missing(type(recipe.method), family.teacher_contexts) else " as it is set"
        raise ValueError(
            f"{recipe.method.name} cannot run on {family.name}{so_set}: {reason}. `dopsd list` shows what can."
        )
    if not family.distilled and not recipe.model.allow_base:
        by_file = (
            ", or a file in model.distilled_by that makes it one" if family.distillable else ""
        )
        raise ValueError(
            f"{recipe.model.name_or_path} is a many-step base model, and few-step tuning needs a distilled one such as "
            f"{family.repo}{by_file}. Set model.allow_base: true to tune it all the same."
        )
    return family


def unrelated_prompts(recipe: Recipe, family: Family) -> tuple[str, ...]:
    """Prompts that have nothing to do with the data: the recipe's, the checkpoint's own, or the
    built-in ones."""
    return recipe.health.prompts or family.unrelated_prompts or PROMPTS


def images_shown(recipe: Recipe, family: Family, listing: Listing) -> list[ImageRequest]:
    """What a run shows: the recipe's prompts, or the first captions, and some unrelated prompts.
    Raises ValueError for a size that the family cannot generate."""
    sample, side = recipe.sample, max(resolutions_of(recipe, family))
    sizes = bucket_sizes(side, family.multiple)
    examples = {
        (e.caption, e.references): e for e in reversed(listing.examples)
    }.values()  # the first of each
    shown = (
        ()
        if sample.prompts
        else [_as_prompt(example, sizes) for example in list(reversed(examples))[:PREVIEWS]]
    )
    unrelated = [{"prompt": text} for text in unrelated_prompts(recipe, family)[: sample.unrelated]]
    prompts = [
        *sample.prompts,
        *(PromptSection.model_validate(each) for each in (*shown, *unrelated)),
    ]
    wanted = []
    for index, each in enumerate(prompts):
        height, width = each.height or sample.height or side, each.width or sample.width or side
        seed = sample.seed + index if each.seed is None else each.seed
        latent_shape = (family.channels, *latent_size(family, height, width))
        wanted.append(ImageRequest(each.prompt, seed, latent_shape, each.references))
    return wanted


def _as_prompt(example: Example, sizes: Sequence[Size]) -> dict[str, Any]:
    """What shows an example; an edited image keeps the shape that it is trained in."""
    if not example.references:
        return {"prompt": example.caption}
    width, height = nearest_bucket(*image_size(example.path), sizes)
    return {
        "prompt": example.caption,
        "references": example.references,
        "width": width,
        "height": height,
    }


def resolutions_of(recipe: Recipe, family: Family) -> tuple[int, ...]:
    """The sides of the square buckets in pixels: every image is trained on at each."""
    return recipe.data.resolution or (family.resolution,)


def read_data(recipe: Recipe) -> Listing:
    """Every folder of the recipe; one that a data set is to fill is filled first."""
    for s in (recipe.data, *recipe.data.more):
        if s.dataset:
            fill(s.folder, s.dataset, s.image_column, s.caption_column, s.split, s.rejected_column)
    data = recipe.data
    sources = [
        Source(s.folder, s.instance_prompt, s.caption_extension, s.repeats, s.weight)
        for s in (data, *data.more)
    ]
    listing = read_sources(sources, data.trigger, data.skip_bad)
    if recipe.method.teacher_sees_another:
        listing = seen_in_turn(listing)
    _refuse_unpaired(recipe, listing)
    return listing


def _refuse_unpaired(recipe: Recipe, listing: Listing) -> None:
    """A method that learns from the data's own pairs needs both sides of each."""
    if "rejected" not in recipe.method.needs or recipe.method.to_generate:
        return
    if alone := [example for example in listing.examples if not example.rejected]:
        raise ValueError(
            f"{recipe.method.name} learns from pairs, and {len(alone)} of {len(listing.examples)} pictures (first: "
            f"{alone[0].path.name}) have no rejected one: name it in a metadata.jsonl, as `chosen`, `rejected`, `text`."
        )


def replay_prompts(recipe: Recipe, family: Family) -> tuple[str, ...]:
    """Prompts on which a method with retention stays as it was: the recipe's, those of a file, or
    the health prompts. Raises ValueError for a file without any."""
    prompts = recipe.data.replay
    if len(prompts) == 1 and prompts[0].endswith((".txt", ".jsonl")):
        prompts = tuple(question.prompt for question in read_prompts(Path(prompts[0])))
    return prompts or unrelated_prompts(recipe, family)


def dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Of the frozen weights."""
    if recipe.model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if recipe.model.dtype == "bf16" else torch.float32
