"""One run: a recipe becomes a LoRA. Assembles the rooms and keeps house (log, preview, save); computes nothing itself.

The only room that knows all others; only `cli`, `compare` and the package's face import it.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import __version__ as diffusers_version
from PIL import Image

from dopsd import __version__
from dopsd.card import write_card
from dopsd.checking import (
    PREVIEWS,
    Checked,
    check,
    dtype_of,
    lean_on,
    pictures_shown,
    replay_prompts,
    resolutions_of,
    unrelated_prompts,
)
from dopsd.config.recipe import Recipe, TrainSection
from dopsd.data.cache import Row, prepare, shown_to_teacher
from dopsd.data.folder import Example, Listing
from dopsd.data.loader import Loader
from dopsd.diffusion.batch import Context
from dopsd.evaluation.pages import write_report
from dopsd.files import atomic_path
from dopsd.generated import with_painted
from dopsd.images import cover_crop, grid, open_picture
from dopsd.models.base import Family
from dopsd.preview import Preview, read_previews
from dopsd.run_folder import Metrics, claimed, read_rows, write_header
from dopsd.session import Session
from dopsd.stopping import Stopped, Unhealthy, noticing_signals
from dopsd.trackers import Trackers, tracking
from dopsd.training.checkpoint import load_checkpoint, save_checkpoint
from dopsd.training.loop import Plan, StepReport, steps
from dopsd.ward import Ward

log = logging.getLogger(__name__)

EXAMPLES = 3  # pictures of the data that the report shows
Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


@dataclass(frozen=True)
class _Material:
    """What the encoders leave behind before they leave memory."""

    rows: tuple[Row, ...]
    prior: tuple[Row, ...]  # class pictures, where the method wants them
    previews: tuple[Preview, ...]
    unrelated: Context  # of the health prompts
    replay: Context | None  # of the prompts to stay the same on, where the method wants them


def train(
    recipe: Recipe, resume: str | None = None, progress: Progress | None = None, checked: Checked | None = None
) -> Iterator[StepReport]:
    """Run a recipe: a generator of optimizer steps that logs, previews and saves between them.

    resume: "latest", a checkpoint folder, or None for a new run. checked: what `check` found, if asked before. Leaves
    `<run_name>.safetensors` and `report.html` in the run folder. Raises ValueError for bad input, before anything is
    trained where it can be known; after a SIGINT or SIGTERM, `Stopped` once the step that was under way is saved.
    """
    found = checked or check(recipe)
    with claimed(recipe, resume) as states:
        material, session = _load(recipe, found, progress)
        start = _restore(session, states)
        write_header(recipe, _environment(found, session), fresh=not states)
        _show_examples(recipe, material.rows)
        with tracking(recipe, start) as trackers, noticing_signals() as noticed:
            if start == 0:
                _preview(session, material, 0, trackers)
            yield from _train(session, material, start, noticed, trackers)


def _train(
    session: Session, material: _Material, start: int, noticed: Callable[[], int | None], trackers: Trackers
) -> Iterator[StepReport]:
    """The steps from `start` on, with what is written between them."""
    recipe, folder = session.recipe, session.recipe.run_folder
    metrics, plan = Metrics(folder / "metrics.jsonl", start), _plan(recipe.train)
    loader = Loader(
        material.rows, recipe.train.batch_size, recipe.train.seed, recipe.data.caption_dropout, material.prior,
        material.replay,
    )  # fmt: skip
    prompts = unrelated_prompts(recipe, session.family)
    ward = Ward(session, material.unrelated, prompts, start, trackers)
    spent, enough = sum(row["seconds"] for row in read_rows(metrics.path)), recipe.train.max_seconds or math.inf
    for report in steps(
        session.roles, recipe.method, loader, session.trainable, session.optimizer, session.teacher,
        session.accelerator, plan, start,
    ):  # fmt: skip
        metrics.add(report)
        about = ("grad_norm", "learning_rate", "pictures", "seconds", "skipped")
        told = {name: getattr(report, name) for name in about}
        trackers.numbers("train", {**report.log, **told}, report.step)
        spent += report.seconds
        done, signal = report.step == plan.max_steps or spent >= enough, noticed()
        due = _due(report.step, recipe.save.every)
        if done or _due(report.step, recipe.sample.every):
            _preview(session, material, report.step, trackers)
        illness = ward.visit(report.step, done)
        if done:  # before the last checkpoint: a run killed in between does its last steps again and exports
            session.export(recipe.result(), report.step)
            write_card(recipe, session.family.usage(session.deployed_nfe), session.metadata(report.step), report.step)
            write_report(folder)
        elif due:
            session.export(recipe.result(f"-step{report.step:06d}"), report.step)
            _keep_last_models(recipe)
        if done or due or signal or illness:
            keep = recipe.save.keep_last
            save_checkpoint(folder, report.step, session.trainable, session.teacher, session.optimizer, keep)
        yield report
        if signal and not done:
            raise Stopped(signal, report.step)
        if illness:
            raise Unhealthy(report.step, illness)
        if done:
            return


def _keep_last_models(recipe: Recipe) -> None:
    """LoRA files are small and all kept; of whole models as many as of checkpoints."""
    if recipe.adapter == "full" and recipe.save.keep_last:
        for old in sorted(recipe.run_folder.glob(f"{recipe.run_name}-step*"))[: -recipe.save.keep_last]:
            shutil.rmtree(old)


def _show_examples(recipe: Recipe, rows: Sequence[Row]) -> None:
    """The first pictures: `samples/data-<i>.png`."""
    for index, row in enumerate(rows[:EXAMPLES]):
        with atomic_path(recipe.run_folder / "samples" / f"data-{index}.png") as temporary:
            _example(row).save(temporary, "png")


def _example(row: Row) -> Image.Image:
    """The picture as it is cut; beside it, first, those that it is edited from, no larger."""
    pictures = [*map(open_picture, row.example.references), _crop(row)]
    for picture in pictures:
        picture.thumbnail(row.size)
    return grid([[torch.from_numpy(np.array(picture)) for picture in pictures]])


def _preview(session: Session, material: _Material, step: int, trackers: Trackers) -> None:
    folder = session.preview(material.previews, session.recipe.run_folder, step)
    trackers.picture("previews", folder / "grid.png", step)


def _restore(session: Session, states: Sequence[Path]) -> int:
    """Put back the first state that is whole; the steps it had done. Raises ValueError when none is."""
    for index, state in enumerate(states):
        try:
            done = load_checkpoint(state, session.trainable, session.teacher, session.optimizer)
            session.student.publish()
            return done
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


def _quantized(session: Session) -> str:
    if session.quantization_gap is None:
        return "no"
    return f"{session.recipe.model.quantize}; the base's first velocity moved by {session.quantization_gap:.1%}"


def _environment(found: Checked, session: Session) -> dict[str, Any]:
    family, listing, device = found.family, found.listing, session.device
    threads = f"{device.type}, {torch.get_num_threads()} threads"
    return {
        "dopsd": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers_version,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "memory": "low" if session.lean else "high",
        "quantized": _quantized(session),
        "family": family.name,
        "licence_of_base": family.licence,
        "pictures": len(listing.examples),
        "data": {
            "pictures": len(listing.examples),
            "edited": sum(1 for example in listing.examples if example.references),
            "source": listing.source if not session.recipe.data.more else "several folders",
            "buckets": {f"{width} x {height}": count for (width, height), count in sorted(found.buckets.items())},
            "sha256": session.data["data_sha256"],
            "examples": [example.caption for example in listing.examples[:EXAMPLES]],
        },
        "refused": [[str(path.name), why] for path, why in listing.refused],
    }


def _load(recipe: Recipe, found: Checked, progress: Progress | None) -> tuple[_Material, Session]:
    """Encode, let the encoders go, and load the network."""
    accelerator = Accelerator()
    device, dtype = accelerator.device, dtype_of(recipe, accelerator.device)
    material = _read_and_encode(recipe, found.family, found.listing, device, dtype, progress)
    lean, pictures = lean_on(recipe, found, device, dtype), found.listing
    data = {"pictures": str(len(pictures.examples)), "data_sha256": pictures.fingerprint()}
    return material, Session.open(recipe, found.family, accelerator, dtype, lean, data, material.previews[0].context)


def _read_and_encode(
    recipe: Recipe,
    family: Family,
    listing: Listing,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> _Material:
    """Cache latents and contexts, read the preview prompts; reader and painter are gone when this returns."""
    needs = recipe.method.needs
    privileged = "privileged" in needs
    listing, beside = with_painted(recipe, family, listing, _doing("painting", progress))
    reader = family.load_reader(device, dtype, pictures=privileged)
    painter = family.load_painter(device, torch.float32)

    def encode(examples: Sequence[Example], resolution: int, privileged: bool, untold: bool) -> tuple[Row, ...]:
        return prepare(
            examples,
            recipe.output_dir / "cache",
            reader,
            painter,
            resolution=resolution,
            multiple=family.multiple,
            privileged=privileged,
            untold=untold,
            device=device,
            progress=_doing("caching", progress),
        )

    resolutions, untold = resolutions_of(recipe, family), recipe.data.caption_dropout > 0
    rows = tuple(row for each in resolutions for row in encode(listing.examples, each, privileged, untold))
    previews = read_previews(
        pictures_shown(recipe, family, listing),
        reader,
        [shown_to_teacher(row) for row in list(dict.fromkeys(rows))[:PREVIEWS]] if privileged else [],
    )
    return _Material(
        rows,
        prior=encode(beside, max(resolutions), privileged=False, untold=False) if beside else (),
        previews=previews,
        unrelated=reader.context(list(unrelated_prompts(recipe, family))),
        replay=reader.context(list(replay_prompts(recipe, family))).to("cpu") if "replay" in needs else None,
    )


def _doing(what: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    return (lambda done, total: progress(what, done, total)) if progress else None


def _crop(row: Row) -> Image.Image:
    return cover_crop(open_picture(row.example.path), row.size)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
