"""Prompts that a run generates: of previews, of the health check, of retention."""

from collections.abc import Sequence
from typing import Any

from dopsd.config.recipe import PromptSection, Recipe
from dopsd.data.buckets import bucket_sizes, nearest_bucket
from dopsd.data.examples import Example, Listing
from dopsd.data.prompts import prompts_of
from dopsd.evaluation.health import PROMPTS
from dopsd.images import Size, image_size
from dopsd.models.base import Family, latent_size
from dopsd.models.pipeline import ImageRequest

PREVIEWED_CAPTIONS = 4  # captions that are previewed when the recipe names no prompts


def named_replay_prompts(recipe: Recipe) -> tuple[str, ...]:
    """`retention.prompts`, or the prompts of the one file that it names; none without retention.
    Raises ValueError for a file without any."""
    prompts = recipe.retention.prompts if recipe.retention.weight else ()
    return tuple(row.prompt for row in prompts_of(prompts, "retention.prompts"))


def named_health_prompts(recipe: Recipe) -> tuple[str, ...]:
    """`health.prompts`, likewise; two or more, or none."""
    prompts = tuple(row.prompt for row in prompts_of(recipe.health.prompts, "health.prompts"))
    if len(prompts) == 1:
        raise ValueError(
            f"health.prompts {recipe.health.prompts[0]} holds one prompt: the spread over prompts "
            "needs two or more."
        )
    return prompts


def unrelated_prompts(recipe: Recipe, family: Family) -> tuple[str, ...]:
    """Prompts that have nothing to do with the data, for health checks and previews."""
    return named_health_prompts(recipe) or family.unrelated_prompts or PROMPTS


def preview_prompts(recipe: Recipe) -> tuple[PromptSection, ...]:
    """`sample.prompts`, or the prompts of the one file that it names; a row of a .jsonl may have a
    seed, width and height of its own."""
    prompts = recipe.sample.prompts
    read = prompts_of([each.prompt for each in prompts], "sample.prompts")
    if [each.prompt for each in prompts] == [each.prompt for each in read]:
        return prompts
    own = ("seed", "width", "height")
    return tuple(
        _prompt(each.prompt, **{key: each.row[key] for key in own if key in each.row})
        for each in read
    )


def preview_requests(
    recipe: Recipe, family: Family, listing: Listing, side: int, health_prompts: Sequence[str]
) -> tuple[ImageRequest, ...]:
    """The recipe's prompts, or the first captions, and some of the health prompts. Raises
    ValueError for a size that the model cannot generate."""
    sample = recipe.sample
    unrelated = [_prompt(text) for text in health_prompts[: sample.unrelated]]
    shown = preview_prompts(recipe) or _first_captions(listing, bucket_sizes(side, family.multiple))
    previews = []
    for index, each in enumerate((*shown, *unrelated)):
        height = each.height or sample.height or side
        width = each.width or sample.width or side
        seed = sample.seed + index if each.seed is None else each.seed
        latent_shape = (family.channels, *latent_size(family, height, width))
        previews.append(ImageRequest(each.prompt, seed, latent_shape, each.references))
    return tuple(previews)


def _first_captions(listing: Listing, sizes: Sequence[Size]) -> tuple[PromptSection, ...]:
    """A prompt for each of the first different captions."""
    by_caption: dict[Any, Example] = {}
    for example in listing.examples:
        by_caption.setdefault((example.caption, example.references), example)
    return tuple(
        _prompt_of(example, sizes) for example in list(by_caption.values())[:PREVIEWED_CAPTIONS]
    )


def _prompt_of(example: Example, sizes: Sequence[Size]) -> PromptSection:
    """An example's caption as a prompt; an edited image keeps the shape that it is trained in."""
    if not example.references:
        return _prompt(example.caption)
    width, height = nearest_bucket(*image_size(example.path), sizes)
    return _prompt(example.caption, references=example.references, width=width, height=height)


def _prompt(text: str, **keys: Any) -> PromptSection:
    return PromptSection.model_validate({"prompt": text, **keys})
