"""One run: a recipe becomes a LoRA. Assembles the rooms and keeps house (log, preview, save); computes nothing itself.

The only room that knows all others; only cli imports it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from diffusers import __version__ as diffusers_version
from PIL import Image

from dopsd import __version__
from dopsd.batch import Context
from dopsd.data.buckets import bucket_sizes, cover_crop, nearest_bucket
from dopsd.data.cache import Row, prepare
from dopsd.data.folder import Listing, open_picture, picture_size
from dopsd.data.loader import Loader
from dopsd.data.sources import Source, read_sources
from dopsd.deployed import cells_of
from dopsd.evaluation.health import PROMPTS
from dopsd.evaluation.report import write_report
from dopsd.export import read_lora
from dopsd.families import load_family
from dopsd.families.base import Family
from dopsd.methods import METHODS, missing
from dopsd.preview import Preview, read_previews
from dopsd.recipe import Recipe, TrainSection
from dopsd.run_folder import Metrics, claimed, write_header
from dopsd.session import Session
from dopsd.stopping import Stopped, Unhealthy, noticing_signals
from dopsd.training.adapters import Coverage, coverage
from dopsd.training.checkpoint import load_checkpoint, save_checkpoint
from dopsd.training.loop import Plan, StepReport, steps
from dopsd.ward import Ward

log = logging.getLogger(__name__)

PREVIEWS = 4  # captions shown when the recipe names no prompts
Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


@dataclass(frozen=True)
class Checked:
    """What `check` found before any weight was loaded."""

    family: Family
    listing: Listing
    buckets: dict[tuple[int, int], int]
    coverage: Coverage
    nfe: int
    forwards_per_picture: int  # network forwards, a backward counted as two


@dataclass(frozen=True)
class _Material:
    """What the encoders leave behind before they leave memory."""

    rows: tuple[Row, ...]
    previews: tuple[Preview, ...]
    unrelated: Context  # of the health prompts


def open_family(recipe: Recipe) -> Family:
    """The recipe's checkpoint, refused with one sentence when it or its method cannot be tuned."""
    family = load_family(recipe.model.name_or_path, recipe.model.vlm, recipe.model.revision)
    if reason := missing(METHODS[recipe.method.name], family.teacher_contexts):
        raise ValueError(f"{recipe.method.name} cannot run on {family.name}: {reason}. `dopsd list` shows what can.")
    if not family.distilled and not recipe.model.allow_base:
        raise ValueError(
            f"{recipe.model.name_or_path} is a many-step base model, and few-step tuning needs a distilled one such as "
            f"{family.repo}. Set model.allow_base: true to tune it all the same."
        )
    if recipe.lora.init_from:
        read_lora(recipe.lora.init_from, family)  # refused now rather than after the pictures are cached
    return family


def check(recipe: Recipe) -> Checked:
    """Everything that can be known, and refused, before a weight is loaded."""
    family = open_family(recipe)
    listing = _read_data(recipe)
    buckets: dict[tuple[int, int], int] = {}
    for resolution in resolutions_of(recipe, family):
        sizes = bucket_sizes(resolution, family.multiple)
        for example in listing.examples:
            size = nearest_bucket(*picture_size(example.path), sizes)
            buckets[size] = buckets.get(size, 0) + 1
    with init_empty_weights():
        network = family.empty_network()
    nfe = recipe.method.nfe or family.default_nfe
    return Checked(
        family=family,
        listing=listing,
        buckets=buckets,
        coverage=coverage(network, recipe.lora.targets or family.lora_targets, recipe.lora.rank),
        nfe=nfe,
        forwards_per_picture=recipe.method.forwards(nfe),
    )


def train(
    recipe: Recipe, resume: str | None = None, progress: Progress | None = None, checked: Checked | None = None
) -> Iterator[StepReport]:
    """Run a recipe: a generator of optimizer steps that logs, previews and saves between them.

    resume: "latest", a checkpoint folder, or None for a new run. checked: what `check` found, if asked before. Leaves
    `<run_name>.safetensors` and `report.html` in the run folder. Raises ValueError for bad input, before anything is
    trained where it can be known; after a SIGINT or SIGTERM, `Stopped` once the step that was under way is saved.
    """
    found = checked or check(recipe)
    family, listing = found.family, found.listing
    with claimed(recipe, resume) as states:
        material, session = _load(recipe, family, listing, progress)
        start = _restore(session, states)
        write_header(recipe, _environment(family, listing, session.device), fresh=not states)
        if start == 0:
            session.preview(material.previews, recipe.run_folder, 0)
        with noticing_signals() as noticed:
            yield from _train(session, material, start, noticed)


def _train(
    session: Session, material: _Material, start: int, noticed: Callable[[], int | None]
) -> Iterator[StepReport]:
    """The steps from `start` on, with what is written between them."""
    recipe, folder = session.recipe, session.recipe.run_folder
    metrics, plan = Metrics(folder / "metrics.jsonl", start), _plan(recipe.train)
    loader = Loader(material.rows, recipe.train.batch_size, recipe.train.seed, recipe.data.caption_dropout)
    ward = Ward(session, material.unrelated, start)
    for report in steps(
        session.roles, recipe.method, loader, session.trainable, session.optimizer, session.teacher,
        session.accelerator, plan, start,
    ):  # fmt: skip
        metrics.add(report)
        done, signal = report.step == plan.max_steps, noticed()
        due = _due(report.step, recipe.save.every)
        if done or _due(report.step, recipe.sample.every):
            session.preview(material.previews, folder, report.step)
        illness = ward.visit(report.step, done)
        if done:  # before the last checkpoint: a run killed in between does its last steps again and exports
            session.export(folder / f"{recipe.run_name}.safetensors", report.step)
            write_report(folder)
        elif due:
            session.export(folder / f"{recipe.run_name}-step{report.step:06d}.safetensors", report.step)
        if done or due or signal or illness:
            keep = recipe.save.keep_last
            save_checkpoint(folder, report.step, session.trainable, session.teacher, session.optimizer, keep)
        yield report
        if signal and not done:
            raise Stopped(signal, report.step)
        if illness:
            raise Unhealthy(report.step, illness)


def _restore(session: Session, states: Sequence[Path]) -> int:
    """Put back the first state that is whole; the steps it had done. Raises ValueError when none is."""
    for index, state in enumerate(states):
        try:
            return load_checkpoint(state, session.trainable, session.teacher, session.optimizer)
        except ValueError as error:
            if index == len(states) - 1:
                raise
            log.warning("checkpoint=%s unusable=%s going_back_to=%s", state.name, error, states[index + 1].name)
    return 0


def _plan(settings: TrainSection) -> Plan:
    return Plan(
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay=settings.lr_schedule,
        accumulate=settings.gradient_accumulation_steps,
        clip=settings.max_grad_norm,
        seed=settings.seed,
        most_skipped=settings.max_skipped_steps,
    )


def _environment(family: Family, listing: Listing, device: torch.device) -> dict[str, Any]:
    threads = f"{device.type}, {torch.get_num_threads()} threads"
    return {
        "dopsd": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers_version,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "family": family.name,
        "licence_of_base": family.licence,
        "pictures": len(listing.examples),
        "refused": [[str(path.name), why] for path, why in listing.refused],
    }


def preview_prompts(recipe: Recipe) -> list[str]:
    """The prompts a run shows: the recipe's, or its first captions."""
    return _preview_prompts(recipe, _read_data(recipe))


def _preview_prompts(recipe: Recipe, listing: Listing) -> list[str]:
    captions = dict.fromkeys(example.caption for example in listing.examples)
    return list(recipe.sample.prompts or captions)[: len(recipe.sample.prompts) or PREVIEWS]


def resolutions_of(recipe: Recipe, family: Family) -> tuple[int, ...]:
    """The sides of the square buckets in pixels: every picture is trained on at each."""
    return recipe.data.resolution or (family.resolution,)


def _read_data(recipe: Recipe) -> Listing:
    data = recipe.data
    sources = [
        Source(s.folder, s.instance_prompt, s.caption_extension, s.repeats, s.weight) for s in (data, *data.more)
    ]
    return read_sources(sources, data.trigger, data.skip_bad)


def _dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    if recipe.model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if recipe.model.dtype == "bf16" else torch.float32


def _load(recipe: Recipe, family: Family, listing: Listing, progress: Progress | None) -> tuple[_Material, Session]:
    """Encode, let the encoders go, and load the network."""
    accelerator = Accelerator()
    device, dtype = accelerator.device, _dtype(recipe, accelerator.device)
    material = _read_and_encode(recipe, family, listing, device, dtype, progress)
    return material, Session.open(recipe, family, accelerator, dtype)


def _read_and_encode(
    recipe: Recipe,
    family: Family,
    listing: Listing,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> _Material:
    """Cache latents and contexts, read the preview prompts; reader and painter are gone when this returns."""
    privileged = "privileged" in recipe.method.needs
    reader = family.load_reader(device, dtype, pictures=privileged)
    painter = family.load_painter(device, torch.float32)
    rows: list[Row] = []
    for resolution in resolutions_of(recipe, family):
        rows += prepare(
            listing.examples,
            recipe.output_dir / "cache",
            reader,
            painter,
            resolution=resolution,
            multiple=family.multiple,
            privileged=privileged,
            untold=recipe.data.caption_dropout > 0,
            device=device,
            progress=(lambda done, total: progress("caching", done, total)) if progress else None,
        )
    wanted, side = recipe.sample, max(resolutions_of(recipe, family))
    height, width = cells_of(family, wanted.height or side, wanted.width or side)
    previews = read_previews(
        _preview_prompts(recipe, listing),
        reader,
        pictures=[_crop(row) for row in rows[:PREVIEWS]] if privileged else [],
        cells=(family.channels, height, width),
        seed=wanted.seed,
    )
    unrelated = reader.context(list(recipe.health.prompts or family.unrelated_prompts or PROMPTS))
    return _Material(tuple(rows), previews, unrelated)


def _crop(row: Row) -> Image.Image:
    return cover_crop(open_picture(row.example.path), row.size)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
