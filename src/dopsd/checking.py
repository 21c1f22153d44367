"""What a recipe would do, and whether it can, before any weight is loaded."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from torch import nn

from dopsd.config.recipe import PromptSection, Recipe
from dopsd.data.buckets import bucket_sizes, nearest_bucket
from dopsd.data.folder import Example, Listing
from dopsd.data.importing import fill
from dopsd.data.prompts import read_questions
from dopsd.data.sources import Source, read_sources, seen_in_turn
from dopsd.evaluation.health import PROMPTS
from dopsd.evaluation.rewards import find_judge
from dopsd.export import refuse_unfit
from dopsd.forecast import Forecast, forecast, memory_of
from dopsd.images import Size, open_picture, picture_size
from dopsd.methods import missing
from dopsd.models import load_family
from dopsd.models.base import Family, Sight, cells_of, fitted_size
from dopsd.models.hub import Checkpoint
from dopsd.models.lora import read_lora, refuse_misfit
from dopsd.preview import Wanted
from dopsd.trackers import refuse_missing
from dopsd.training.adapters import Coverage, coverage, lora_sizes
from dopsd.training.trainable import Everything

log = logging.getLogger(__name__)

PREVIEWS = 4  # captions shown when the recipe names no prompts


@dataclass(frozen=True)
class Checked:
    """What `check` found before any weight was loaded."""

    family: Family
    listing: Listing
    buckets: dict[tuple[int, int], int]
    coverage: Coverage | Everything
    nfe: int
    forwards_per_picture: int  # network forwards, a backward counted as two


def family_of(recipe: Recipe) -> Family:
    """The recipe's checkpoint, its teacher seeing pictures as the recipe says."""
    model = recipe.model
    sight = Sight(model.teacher_context, model.vlm, model.teacher_suffix)
    return load_family(model.name_or_path, model.revision, sight, model.distilled_by)


def open_family(recipe: Recipe) -> Family:
    """The recipe's checkpoint, refused with one sentence when it or its method cannot be tuned."""
    family = family_of(recipe)
    if reason := missing(recipe.method, family.teacher_contexts):
        so_set = "" if missing(type(recipe.method), family.teacher_contexts) else " as it is set"
        raise ValueError(
            f"{recipe.method.name} cannot run on {family.name}{so_set}: {reason}. `dopsd list` shows what can."
        )
    if not family.distilled and not recipe.model.allow_base:
        by_file = ", or a file in model.distilled_by that makes it one" if family.distillable else ""
        raise ValueError(
            f"{recipe.model.name_or_path} is a many-step base model, and few-step tuning needs a distilled one such as "
            f"{family.repo}{by_file}. Set model.allow_base: true to tune it all the same."
        )
    return family


def check(recipe: Recipe) -> Checked:
    """Everything that can be known, and refused, before a weight is loaded."""
    refuse_missing(recipe)
    if (recipe.model.quantize or recipe.train.optimizer == "adamw_8bit") and find_spec("bitsandbytes") is None:
        key = "model.quantize" if recipe.model.quantize else "train.optimizer: adamw_8bit"
        raise ValueError(f"{key} needs bitsandbytes, which is not installed: pip install 'dopsd[quantize]'.")
    if model := recipe.health.text_model:
        Checkpoint(model, called=f"health.text_model {model}")
    if recipe.method.judged_by:
        find_judge(recipe.method.judged_by)
    family = open_family(recipe)
    listing = read_data(recipe)
    _refuse_references(recipe, family, listing)
    shapes = [picture_size(example.path) for example in listing.examples]
    buckets_of = [bucket_sizes(resolution, family.multiple) for resolution in resolutions_of(recipe, family)]
    cuts = [[nearest_bucket(*shape, sizes) for shape in shapes] for sizes in buckets_of]  # by resolution
    with init_empty_weights():
        network = family.empty_denoiser().network
    targets = recipe.lora.targets or family.lora_targets
    if recipe.adapter == "full":
        reach = Everything(sum(parameter.numel() for parameter in network.parameters()))
    else:
        reach = coverage(network, targets, recipe.lora.rank)
    _refuse_other_weights(recipe, family, network)
    if start := recipe.lora.init_from:
        refuse_unfit(start, read_lora(start, family), lora_sizes(network, targets, recipe.lora.rank))
    _refuse_long(recipe, family, listing, cuts)
    nfe = recipe.method.nfe or family.default_nfe
    recipe.method.refuse_walk(nfe)
    return Checked(
        family=family,
        listing=listing,
        buckets=dict(Counter(size for cut in cuts for size in cut)),
        coverage=reach,
        nfe=nfe,
        forwards_per_picture=recipe.method.forwards(nfe),
    )


def _refuse_other_weights(recipe: Recipe, family: Family, network: nn.Module) -> None:
    """What is trained on instead of the deployed weights must be of their architecture."""
    if path := recipe.model.training_adapter:
        for module, (a, b) in read_lora(path, family).items():
            refuse_misfit(path, module, network, (len(b), a.shape[1]))
    if name := recipe.model.train_on:
        other = load_family(name)
        with init_empty_weights():
            its = other.empty_denoiser().network
        shapes, wanted = ({n: p.shape for n, p in each.named_parameters()} for each in (its, network))
        if other.name != family.name or shapes != wanted:
            raise ValueError(
                f"model.train_on {name} is of another architecture than {recipe.model.name_or_path}: a LoRA of one "
                "does not fit the other. Give a checkpoint of the same network, such as the many-step parent."
            )


def _refuse_long(recipe: Recipe, family: Family, listing: Listing, cuts: Sequence[Sequence[Size]]) -> None:
    """Every caption and prompt must fit the student's context, and with a picture the teacher's. cuts: the examples'
    sizes, by resolution."""
    captions = [(text, index) for index, e in enumerate(listing.examples) for text in (e.caption, *e.also)]
    shown = [each.prompt for each in pictures_shown(recipe, family, listing)]
    other = list(unrelated_prompts(recipe, family))
    if "replay" in recipe.method.needs:
        other += replay_prompts(recipe, family)
    if recipe.method.to_paint and recipe.method.to_paint.prompt:
        other.append(recipe.method.to_paint.prompt)
    family.count_tokens([*(caption for caption, _ in captions), *shown, *other])
    if "privileged" in recipe.method.needs:
        side = max(resolutions_of(recipe, family))
        family.count_tokens(shown, [(side, side)] * len(shown))
        for cut in cuts:
            family.count_tokens([caption for caption, _ in captions], [cut[index] for _, index in captions])


def _refuse_references(recipe: Recipe, family: Family, listing: Listing) -> None:
    """A picture to edit must be one that the family takes; in the data they are known to be pictures."""
    for path in dict.fromkeys(path for example in listing.examples for path in example.references):
        fitted_size(family, path, picture_size(path))
    for path in dict.fromkeys(path for prompt in recipe.sample.prompts for path in prompt.references):
        fitted_size(family, path, open_picture(path).size)


def unrelated_prompts(recipe: Recipe, family: Family) -> tuple[str, ...]:
    """Prompts that have nothing to do with the data: the recipe's, the checkpoint's own, or the built-in ones."""
    return recipe.health.prompts or family.unrelated_prompts or PROMPTS


def pictures_shown(recipe: Recipe, family: Family, listing: Listing) -> list[Wanted]:
    """What a run shows: the recipe's prompts, or the first captions, and some unrelated prompts. Raises ValueError for
    a size that the family cannot paint."""
    sample, side = recipe.sample, max(resolutions_of(recipe, family))
    sizes = bucket_sizes(side, family.multiple)
    examples = {(e.caption, e.references): e for e in reversed(listing.examples)}.values()  # the first of each
    shown = () if sample.prompts else [_as_prompt(example, sizes) for example in list(reversed(examples))[:PREVIEWS]]
    unrelated = [{"prompt": text} for text in unrelated_prompts(recipe, family)[: sample.unrelated]]
    prompts = [*sample.prompts, *(PromptSection.model_validate(each) for each in (*shown, *unrelated))]
    wanted = []
    for index, each in enumerate(prompts):
        height, width = each.height or sample.height or side, each.width or sample.width or side
        seed = sample.seed + index if each.seed is None else each.seed
        cells = (family.channels, *cells_of(family, height, width))
        wanted.append(Wanted(each.prompt, seed, cells, each.references))
    return wanted


def _as_prompt(example: Example, sizes: Sequence[Size]) -> dict[str, Any]:
    """What shows an example; an edited picture keeps the shape that it is trained in."""
    if not example.references:
        return {"prompt": example.caption}
    width, height = nearest_bucket(*picture_size(example.path), sizes)
    return {"prompt": example.caption, "references": example.references, "width": width, "height": height}


def resolutions_of(recipe: Recipe, family: Family) -> tuple[int, ...]:
    """The sides of the square buckets in pixels: every picture is trained on at each."""
    return recipe.data.resolution or (family.resolution,)


def read_data(recipe: Recipe) -> Listing:
    """Every folder of the recipe; one that a data set is to fill is filled first."""
    for s in (recipe.data, *recipe.data.more):
        if s.dataset:
            fill(s.folder, s.dataset, s.image_column, s.caption_column, s.split, s.rejected_column)
    data = recipe.data
    sources = [
        Source(s.folder, s.instance_prompt, s.caption_extension, s.repeats, s.weight) for s in (data, *data.more)
    ]
    listing = read_sources(sources, data.trigger, data.skip_bad)
    if recipe.method.teacher_sees_another:
        listing = seen_in_turn(listing)
    _refuse_unpaired(recipe, listing)
    return listing


def _refuse_unpaired(recipe: Recipe, listing: Listing) -> None:
    """A method that learns from the data's own pairs needs both sides of each."""
    if "rejected" not in recipe.method.needs or recipe.method.to_paint:
        return
    if alone := [example for example in listing.examples if not example.rejected]:
        raise ValueError(
            f"{recipe.method.name} learns from pairs, and {len(alone)} of {len(listing.examples)} pictures (first: "
            f"{alone[0].path.name}) have no rejected one: name it in a metadata.jsonl, as `chosen`, `rejected`, `text`."
        )


def replay_prompts(recipe: Recipe, family: Family) -> tuple[str, ...]:
    """Prompts on which a method with retention stays as it was: the recipe's, those of a file, or the health prompts.
    Raises ValueError for a file without any."""
    prompts = recipe.data.replay
    if len(prompts) == 1 and prompts[0].endswith((".txt", ".jsonl")):
        prompts = tuple(question.prompt for question in read_questions(Path(prompts[0])))
    return prompts or unrelated_prompts(recipe, family)


def dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Of the frozen weights."""
    if recipe.model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if recipe.model.dtype == "bf16" else torch.float32


def foresee(recipe: Recipe, found: Checked, dtype: torch.dtype, lean: bool) -> Forecast:
    """Peak memory of a step at the largest bucket, and the largest references."""
    examples = found.listing.examples
    size = max(found.buckets, key=lambda size: size[0] * size[1])
    captions = [caption for example in examples for caption in (example.caption, *example.also)]
    edited = {e.references: [fitted_size(found.family, path, picture_size(path)) for path in e.references]
              for e in examples}  # fmt: skip
    largest = max(edited.values(), key=lambda sizes: sum(width * height for width, height in sizes))
    return forecast(recipe, found.family, size, captions, dtype, lean, largest)


def planned_for(recipe: Recipe, card: float | None) -> tuple[int, torch.dtype, str]:
    """Bytes, dtype and name of what a recipe would be trained on: a GPU of `card` GiB, or this machine."""
    if card is not None:
        return int(card * 2**30), dtype_of(recipe, torch.device("cuda")), f"a card of {card:g} GiB"
    device = Accelerator().device
    room = memory_of(device)
    return room, dtype_of(recipe, device), f"this machine's {device.type} with {room / 2**30:.0f} GiB"


def refuse_too_large(recipe: Recipe, peak: Forecast, room: int, where: str) -> None:
    """Raise ValueError where full fine-tuning's step, at the least memory that it can take, does not fit."""
    if not peak.fits(room):
        ways = [] if recipe.model.offload else ["model.offload: true (teacher and untouched model in main memory)"]
        ways += [] if recipe.train.optimizer == "adamw_8bit" else ["train.optimizer: adamw_8bit"]
        raise ValueError(
            f"full fine-tuning takes {peak.peak / 2**30:.2f} GiB in a step at model.memory: low, and with a tenth and "
            f"1 GiB to spare that is too much for {where}. Set {', '.join([*ways, 'a smaller data.resolution'])}, or "
            "tune LoRA (adapter: lora)."
        )


def lean_on(recipe: Recipe, found: Checked, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to save memory: as the recipe says, or where the device is too small to do without. Raises ValueError
    where full fine-tuning is too large for it all the same."""
    if recipe.adapter == "full":
        room, dtype, where = planned_for(recipe, None)
        refuse_too_large(recipe, foresee(recipe, found, dtype, lean=True), room, where)
    if recipe.model.offload:
        return True  # or all copies of the weights would stay alive until the end of a backward pass
    if recipe.model.memory != "auto":
        return recipe.model.memory == "low"
    peak, room = foresee(recipe, found, dtype, lean=False), memory_of(device)
    level = "high" if peak.fits(room) else "low"
    log.info("memory=auto chosen=%s high_would_take=%.1f_GiB device=%.1f_GiB", level, peak.peak / 2**30, room / 2**30)
    return level == "low"
