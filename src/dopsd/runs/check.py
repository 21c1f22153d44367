"""What a recipe would do, and whether it can, before any weight is loaded."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from torch import nn

from dopsd.config.recipe import Recipe
from dopsd.data.buckets import bucket_sizes, nearest_bucket
from dopsd.data.folder import Listing
from dopsd.evaluation.rewards import find_reward
from dopsd.images import Size, image_size, open_image
from dopsd.models import load_family
from dopsd.models.base import Family, fitted_size, network_on_meta
from dopsd.models.hub import Checkpoint
from dopsd.models.lora import read_lora, refuse_misfit
from dopsd.runs.outputs.lora_export import refuse_unfit
from dopsd.runs.outputs.trackers import refuse_missing
from dopsd.runs.resolve import (
    images_shown,
    open_family,
    read_data,
    replay_prompts,
    resolutions_of,
    unrelated_prompts,
)
from dopsd.training.adapters import Coverage, coverage, lora_sizes
from dopsd.training.trainable import AllWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """What `check` found before any weight was loaded."""

    family: Family
    listing: Listing
    buckets: dict[tuple[int, int], int]
    coverage: Coverage | AllWeights
    nfe: int
    forwards_per_image: int  # network forwards, a backward counted as two


def check(recipe: Recipe) -> Checked:
    """Everything that can be known, and refused, before a weight is loaded."""
    refuse_missing(recipe)
    if (recipe.model.quantize or recipe.train.optimizer == "adamw_8bit") and find_spec(
        "bitsandbytes"
    ) is None:
        key = "model.quantize" if recipe.model.quantize else "train.optimizer: adamw_8bit"
        raise ValueError(
            f"{key} needs bitsandbytes, which is not installed: pip install 'dopsd[quantize]'."
        )
    if model := recipe.health.text_model:
        Checkpoint(model, called=f"health.text_model {model}")
    if recipe.method.reward_name:
        find_reward(recipe.method.reward_name)
    family = open_family(recipe)
    listing = read_data(recipe)
    _refuse_references(recipe, family, listing)
    shapes = [image_size(example.path) for example in listing.examples]
    buckets_of = [
        bucket_sizes(resolution, family.multiple) for resolution in resolutions_of(recipe, family)
    ]
    cuts = [
        [nearest_bucket(*shape, sizes) for shape in shapes] for sizes in buckets_of
    ]  # by resolution
    network = network_on_meta(family)
    targets = recipe.lora.targets or family.lora_targets
    if recipe.adapter == "full":
        reach = AllWeights(sum(parameter.numel() for parameter in network.parameters()))
    else:
        reach = coverage(network, targets, recipe.lora.rank)
    _refuse_other_weights(recipe, family, network)
    if start := recipe.lora.init_from:
        refuse_unfit(
            start, read_lora(start, family), lora_sizes(network, targets, recipe.lora.rank)
        )
    _refuse_long(recipe, family, listing, cuts)
    nfe = recipe.method.nfe or family.default_nfe
    recipe.method.refuse_nfe(nfe)
    return Checked(
        family=family,
        listing=listing,
        buckets=dict(Counter(size for cut in cuts for size in cut)),
        coverage=reach,
        nfe=nfe,
        forwards_per_image=recipe.method.forwards(nfe),
    )


def _refuse_other_weights(recipe: Recipe, family: Family, network: nn.Module) -> None:
    """What is trained on instead of the deployed weights must be of their architecture."""
    if path := recipe.model.training_adapter:
        for module, (a, b) in read_lora(path, family).items():
            refuse_misfit(path, module, network, (len(b), a.shape[1]))
    if name := recipe.model.train_on:
        other = load_family(name)
        its = network_on_meta(other)
        shapes, wanted = (
            {n: p.shape for n, p in each.named_parameters()} for each in (its, network)
        )
        if other.name != family.name or shapes != wanted:
            raise ValueError(
                f"model.train_on {name} is of another architecture than {recipe.model.name_or_path}: a LoRA of one "
                "does not fit the other. Give a checkpoint of the same network, such as the many-step parent."
            )


def _refuse_long(
    recipe: Recipe, family: Family, listing: Listing, cuts: Sequence[Sequence[Size]]
) -> None:
    """Every caption and prompt must fit the student's context, and with an image the teacher's.
    cuts: the examples' sizes, by resolution."""
    captions = [
        (text, index) for index, e in enumerate(listing.examples) for text in (e.caption, *e.also)
    ]
    shown = [each.prompt for each in images_shown(recipe, family, listing)]
    other = list(unrelated_prompts(recipe, family))
    if "replay" in recipe.method.needs:
        other += replay_prompts(recipe, family)
    if recipe.method.to_generate and recipe.method.to_generate.prompt:
        other.append(recipe.method.to_generate.prompt)
    family.count_tokens([*(caption for caption, _ in captions), *shown, *other])
    if "privileged" in recipe.method.needs:
        side = max(resolutions_of(recipe, family))
        family.count_tokens(shown, [(side, side)] * len(shown))
        for cut in cuts:
            family.count_tokens(
                [caption for caption, _ in captions], [cut[index] for _, index in captions]
            )


def _refuse_references(recipe: Recipe, family: Family, listing: Listing) -> None:
    """An image to edit must be one that the family takes; in the data they are known to be images."""
    for path in dict.fromkeys(path for example in listing.examples for path in example.references):
        fitted_size(family, path, image_size(path))
    for path in dict.fromkeys(
        path for prompt in recipe.sample.prompts for path in prompt.references
    ):
        fitted_size(family, path, open_image(path).size)
