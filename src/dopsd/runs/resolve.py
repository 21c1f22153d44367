"""What a recipe means for its checkpoint and data, answered once: `ResolvedRun`.

Check, memory forecast, preparation, session, outputs and comparison take the result and do not ask
the recipe and the family again.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch

from dopsd.config.recipe import Recipe
from dopsd.data.buckets import bucket_sizes, nearest_bucket
from dopsd.data.examples import Listing
from dopsd.data.importing import fill_folder
from dopsd.data.prompts import is_file_name
from dopsd.data.sources import Source, read_sources, show_next_image
from dopsd.diffusion.flow import Schedule
from dopsd.evaluation.rewards import find_reward
from dopsd.images import Size, image_size
from dopsd.methods import missing
from dopsd.models import load_family
from dopsd.models.base import Family, TeacherVision, latent_size
from dopsd.models.hub import Checkpoint
from dopsd.models.pipeline import ImageRequest, device_and_dtype
from dopsd.models.prompt_teacher import PROMPT
from dopsd.models.single_file import folder_of
from dopsd.runs.captions import with_fitting_captions
from dopsd.runs.outputs.trackers import refuse_unready
from dopsd.runs.prompts import named_replay_prompts, preview_requests, unrelated_prompts
from dopsd.training.optimizers import refuse_unready as refuse_unready_optimizer


@dataclass(frozen=True)
class ResolvedRun:
    """A recipe with everything that follows from its checkpoint and its data.

    resolutions: sides of the square buckets, in pixels; every image is trained at each.
    sizes: by resolution, the size (width, height) at which each example is trained.
    health_prompts: unrelated to the data. replay_prompts: of retention, else empty.
    nfe: forwards of the rollout in training; deployed_nfe: of previews and of the deployed model.
    dtype: of the frozen weights on `device`.
    """

    recipe: Recipe
    family: Family
    listing: Listing
    resolutions: tuple[int, ...]
    sizes: tuple[tuple[Size, ...], ...]
    previews: tuple[ImageRequest, ...]
    health_prompts: tuple[str, ...]
    replay_prompts: tuple[str, ...]
    nfe: int
    deployed_nfe: int
    device: torch.device
    dtype: torch.dtype

    @property
    def side(self) -> int:
        """Side of the largest square bucket, in pixels."""
        return max(self.resolutions)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of that square in latents."""
        return latent_size(self.family, self.side, self.side)

    @property
    def buckets(self) -> dict[Size, int]:
        """How many examples are trained at each size (width, height)."""
        return dict(Counter(size for sizes in self.sizes for size in sizes))

    @property
    def learns_from_teacher(self) -> bool:
        """Whether the method has a teacher that is shown images."""
        return "privileged" in self.recipe.method.needs

    @property
    def teacher_sees_images(self) -> bool:
        """Whether that teacher sees images, or reads a better prompt."""
        return self.family.teacher_context != PROMPT

    @property
    def lora_targets(self) -> str:
        """Regular expression over the names of the modules that get an adapter."""
        return self.recipe.lora.targets or self.family.lora_targets

    @property
    def lora_alpha(self) -> float:
        """Alpha of the adapters; by default their rank."""
        return self.recipe.lora.alpha or self.recipe.lora.rank

    @property
    def lora_scale(self) -> float:
        """What an adapter's output is multiplied by: alpha / rank."""
        return self.lora_alpha / self.recipe.lora.rank

    @cached_property
    def data_sha256(self) -> str:
        """Hash of all images and captions, in any order."""
        return self.listing.fingerprint()

    @cached_property
    def rows_sha256(self) -> str:
        """Hash of all images and captions in their order, on which batches depend."""
        return self.listing.fingerprint(in_order=True)

    def schedule(self, nfe: int | None, height: int, width: int) -> Schedule:
        """The sampler's times for latents of height x width; nfe None: the model's own."""
        return self.family.schedule(nfe or self.family.default_nfe, height, width)

    def deployed_schedule(self, height: int, width: int) -> Schedule:
        """The times that previews and the deployed model take."""
        return self.schedule(self.deployed_nfe, height, width)


def resolve(recipe: Recipe) -> ResolvedRun:
    """Open the checkpoint's configs, read the data's listing, and work out everything else.

    No weight is loaded. Raises ValueError, in one sentence, for what is missing: a package, the
    checkpoint, a folder of images, an image that cannot be used; and where the method cannot run on
    the model.
    """
    # What the recipe names must be there before anything is read.
    _refuse_missing_requirements(recipe)
    family = open_family(recipe)

    # The data, and the size at which each example is trained.
    listing = read_data(recipe)
    resolutions = recipe.data.resolution or (family.resolution,)
    _refuse_off_grid(recipe, family)
    listing = with_fitting_captions(
        listing,
        family,
        _sizes(listing, resolutions, family),
        "privileged" in recipe.method.needs,
        recipe.data.skip_bad,
    )
    sizes = _sizes(listing, resolutions, family)

    # Prompts that are generated while training.
    health_prompts = unrelated_prompts(recipe, family)
    previews = preview_requests(recipe, family, listing, max(resolutions), health_prompts)

    device = device_and_dtype()[0]
    return ResolvedRun(
        recipe=recipe,
        family=family,
        listing=listing,
        resolutions=resolutions,
        sizes=sizes,
        previews=previews,
        health_prompts=health_prompts,
        replay_prompts=named_replay_prompts(recipe),
        nfe=recipe.method.nfe or family.default_nfe,
        deployed_nfe=recipe.sample.nfe or family.default_nfe,
        device=device,
        dtype=frozen_dtype(recipe, device),
    )


def _sizes(
    listing: Listing, resolutions: Sequence[int], family: Family
) -> tuple[tuple[Size, ...], ...]:
    """By resolution, the size at which each example is trained."""
    shapes = [image_size(example.path) for example in listing.examples]
    return tuple(
        tuple(nearest_bucket(*shape, buckets) for shape in shapes)
        for buckets in (bucket_sizes(side, family.multiple) for side in resolutions)
    )


def open_family(recipe: Recipe) -> Family:
    """The recipe's checkpoint. Raises ValueError where its method cannot run on it, and for a
    many-step model without `model.allow_base`."""
    model, method = recipe.model, recipe.method
    vision = TeacherVision(model.teacher_context, model.vlm, model.teacher_suffix)
    name = model.name_or_path
    if model.config:
        converted = recipe.output_dir / "cache" / "models"
        name = str(folder_of(Path(name), model.config, converted))
    family = load_family(name, model.revision, vision, model.distilled_by)
    if reason := missing(method, family.teacher_contexts):
        as_set = "" if missing(type(method), family.teacher_contexts) else " as it is set"
        raise ValueError(
            f"{method.name} cannot run on {family.name}{as_set}: {reason}. `dopsd list` shows what "
            "can."
        )
    if not family.distilled and not model.allow_base:
        by_file = ", or a file in model.distilled_by that makes it one" * family.distillable
        raise ValueError(
            f"{model.name_or_path} is a many-step base model, and few-step tuning needs a "
            f"distilled one such as {family.repo}{by_file}. Set model.allow_base: true to tune it "
            "all the same."
        )
    return family


def read_data(recipe: Recipe) -> Listing:
    """The examples of every folder of the recipe; a folder that `dataset` fills is filled first."""
    sections = (recipe.data, *recipe.data.more)
    for section in sections:
        if section.dataset:
            fill_folder(
                section.folder,
                section.dataset,
                section.image_column,
                section.caption_column,
                section.split,
                section.rejected_column,
                recipe.data.skip_bad,
            )
    sources = [
        Source(
            section.folder,
            section.instance_prompt,
            section.trigger,
            section.caption_extension,
            section.caption_lines,
            section.masks,
            section.repeats,
            section.weight,
        )
        for section in sections
    ]
    listing = read_sources(sources, recipe.data.skip_bad)
    _refuse_unused_masks(recipe, listing)
    if recipe.method.teacher_sees_another:
        listing = show_next_image(listing)
    _refuse_incomplete_pairs(recipe, listing)
    return listing


def frozen_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Of the frozen weights on a device: by `model.dtype`; auto is bfloat16 on a GPU, else
    float32."""
    if recipe.model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if recipe.model.dtype == "bf16" else torch.float32


def _refuse_missing_requirements(recipe: Recipe) -> None:
    """Trackers, bitsandbytes, the reward and the health model that the recipe names must exist."""
    refuse_unready(recipe)
    _refuse_file_as_caption(recipe)
    if recipe.model.quantize and find_spec("bitsandbytes") is None:
        raise ValueError(
            "model.quantize needs bitsandbytes, which is not installed: pip install "
            "'dopsd[quantize]'."
        )
    train = recipe.train
    refuse_unready_optimizer(train.optimizer, train.learning_rate, train.lr_schedule)
    if model := recipe.health.text_model:
        Checkpoint(model, called=f"health.text_model {model}")
    if recipe.method.reward_name:
        find_reward(recipe.method.reward_name)


def _refuse_file_as_caption(recipe: Recipe) -> None:
    """Keys that hold one caption read no file."""
    generated = recipe.method.to_generate
    captions = [source.instance_prompt for source in (recipe.data, *recipe.data.more)]
    for caption in (*captions, generated.prompt if generated else None):
        if caption and is_file_name(caption):
            raise ValueError(
                f"{caption} stands where a caption is expected, and no file is read there: write "
                "the caption itself, or captions beside the images."
            )


def _refuse_off_grid(recipe: Recipe, family: Family) -> None:
    """Sides that the recipe names must be ones that the model can generate."""
    sample, multiple = recipe.sample, family.multiple
    named = [("data.resolution", side) for side in recipe.data.resolution]
    named += [("sample.width", sample.width), ("sample.height", sample.height)]
    for each in sample.prompts:
        named += [("the width of a prompt", each.width), ("the height of a prompt", each.height)]
    for key, side in named:
        if side is None or side % multiple == 0:
            continue
        below = side // multiple * multiple
        nearest = f"{below} or {below + multiple}" if below else str(multiple)
        raise ValueError(
            f"{key} is {side}; sides of this model's images are multiples of {multiple} pixels: "
            f"set {nearest}."
        )


def _refuse_unused_masks(recipe: Recipe, listing: Listing) -> None:
    """A method without masked loss would train on images whole that someone has masked."""
    masked = [example for example in listing.examples if example.mask]
    if masked and not recipe.method.takes_masks:
        raise ValueError(
            f"{recipe.method.name}, as it is set, has no masked loss, and {len(masked)} images "
            f"have masks (first: {masked[0].path.name}): set data.masks: ignore to train on them "
            "whole, or use dopsd, sft or dreambooth."
        )


def _refuse_incomplete_pairs(recipe: Recipe, listing: Listing) -> None:
    """A method that learns from the data's own pairs needs both images of each."""
    if "rejected" not in recipe.method.needs or recipe.method.to_generate:
        return
    if alone := [example for example in listing.examples if not example.rejected]:
        raise ValueError(
            f"{recipe.method.name} learns from pairs, and {len(alone)} of "
            f"{len(listing.examples)} images (first: {alone[0].path.name}) have no rejected one: "
            "name it in a metadata.jsonl, as `chosen`, `rejected`, `text`."
        )
