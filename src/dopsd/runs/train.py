"""One run: a recipe becomes a LoRA. Assembles the rooms and keeps house (log, preview, save);
computes nothing itself.

The only room that knows all others; only `cli`, `compare` and the package's face import it.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from accelerate import Accelerator

from dopsd.config.recipe import Recipe, TrainSection
from dopsd.data.loader import Loader
from dopsd.runs.check import Checked, check
from dopsd.runs.environment import _environment
from dopsd.runs.health_monitor import HealthMonitor
from dopsd.runs.interrupts import Stopped, Unhealthy, noticing_signals
from dopsd.runs.memory import choose_low_memory
from dopsd.runs.outputs.folder import Metrics, claimed, read_rows, write_header
from dopsd.runs.outputs.model_card import write_card
from dopsd.runs.outputs.previews import _show_examples
from dopsd.runs.outputs.report import write_report
from dopsd.runs.outputs.trackers import Trackers, tracking
from dopsd.runs.prepare import Progress, _Material, _read_and_encode
from dopsd.runs.resolve import dtype_of, unrelated_prompts
from dopsd.runs.session import Session
from dopsd.training.checkpoint import load_checkpoint, save_checkpoint
from dopsd.training.loop import Plan, StepReport, steps

log = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    resume: str | None = None,
    progress: Progress | None = None,
    checked: Checked | None = None,
) -> Iterator[StepReport]:
    """Run a recipe: a generator of optimizer steps that logs, previews and saves between them.

    resume: "latest", a checkpoint folder, or None for a new run. checked: what `check` found, if
    asked before. Leaves `<run_name>.safetensors` and `report.html` in the run folder. Raises
    ValueError for bad input, before anything is trained where it can be known; after a SIGINT or
    SIGTERM, `Stopped` once the step that was under way is saved.
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
    session: Session,
    material: _Material,
    start: int,
    noticed: Callable[[], int | None],
    trackers: Trackers,
) -> Iterator[StepReport]:
    """The steps from `start` on, with what is written between them."""
    recipe, folder = session.recipe, session.recipe.run_folder
    metrics, plan = Metrics(folder / "metrics.jsonl", start), _plan(recipe.train)
    loader = Loader(
        material.rows,
        recipe.train.batch_size,
        recipe.train.seed,
        recipe.data.caption_dropout,
        material.prior,
        material.replay,
    )
    prompts = unrelated_prompts(recipe, session.family)
    monitor = HealthMonitor(session, material.unrelated, prompts, start, trackers)
    spent, enough = (
        sum(row["seconds"] for row in read_rows(metrics.path)),
        recipe.train.max_seconds or math.inf,
    )
    for report in steps(
        session.roles,
        recipe.method,
        loader,
        session.trainable,
        session.optimizer,
        session.teacher,
        session.device,
        plan,
        start,
    ):
        metrics.add(report)
        about = ("grad_norm", "learning_rate", "images", "seconds", "skipped")
        told = {name: getattr(report, name) for name in about}
        trackers.numbers("train", {**report.log, **told}, report.step)
        spent += report.seconds
        done, signal = report.step == plan.max_steps or spent >= enough, noticed()
        due = _due(report.step, recipe.save.every)
        if done or _due(report.step, recipe.sample.every):
            _preview(session, material, report.step, trackers)
        illness = monitor.state(report.step, done)
        # Before the last checkpoint: a run killed in between does its last steps again and exports
        if done:
            session.export(recipe.result(), report.step)
            write_card(recipe, session.family, session.metadata(report.step), report.step)
            write_report(folder)
        elif due:
            session.export(recipe.result(f"-step{report.step:06d}"), report.step)
            _keep_last_models(recipe)
        if done or due or signal or illness:
            keep = recipe.save.keep_last
            save_checkpoint(
                folder, report.step, session.trainable, session.teacher, session.optimizer, keep
            )
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
        for old in sorted(recipe.run_folder.glob(f"{recipe.run_name}-step*"))[
            : -recipe.save.keep_last
        ]:
            shutil.rmtree(old)


def _preview(session: Session, material: _Material, step: int, trackers: Trackers) -> None:
    folder = session.preview(material.previews, session.recipe.run_folder, step)
    trackers.image("previews", folder / "grid.png", step)


def _restore(session: Session, states: Sequence[Path]) -> int:
    """Put back the first state that is whole; the steps it had done. Raises ValueError when none
    is."""
    for index, state in enumerate(states):
        try:
            done = load_checkpoint(state, session.trainable, session.teacher, session.optimizer)
            session.student.publish()
            return done
        except ValueError as error:
            if index == len(states) - 1:
                raise
            log.warning(
                "checkpoint=%s unusable=%s going_back_to=%s",
                state.name,
                error,
                states[index + 1].name,
            )
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


def _load(recipe: Recipe, found: Checked, progress: Progress | None) -> tuple[_Material, Session]:
    """Encode, let the encoders go, and load the network."""
    accelerator = Accelerator()
    device, dtype = accelerator.device, dtype_of(recipe, accelerator.device)
    material = _read_and_encode(recipe, found.family, found.listing, device, dtype, progress)
    low_memory, images = choose_low_memory(recipe, found, device, dtype), found.listing
    data = {"images": str(len(images.examples)), "data_sha256": images.fingerprint()}
    return material, Session.open(
        recipe, found.family, accelerator, dtype, low_memory, data, material.previews[0].student.context
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
