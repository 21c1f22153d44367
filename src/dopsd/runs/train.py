"""One run: from a recipe to a LoRA file. Puts the parts together, logs, previews and saves."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dopsd.config.recipe import Recipe
from dopsd.config.schema import INTERMEDIATE, TrainSection
from dopsd.data.loader import Loader
from dopsd.data.replay import Replays
from dopsd.runs.check import check
from dopsd.runs.environment import environment
from dopsd.runs.fit import choose_low_memory
from dopsd.runs.health_monitor import HealthMonitor
from dopsd.runs.interrupts import Stopped, Unhealthy, noticing_signals
from dopsd.runs.outputs.folder import (
    ON_SCREEN,
    Metrics,
    claimed,
    read_rows,
    refuse_other_data,
    write_header,
)
from dopsd.runs.outputs.metadata import weights_metadata
from dopsd.runs.outputs.model_card import write_card
from dopsd.runs.outputs.previews import generate_previews, preview_folder, write_data_images
from dopsd.runs.outputs.report import write_report
from dopsd.runs.outputs.trackers import Trackers, tracking
from dopsd.runs.outputs.verdict import State
from dopsd.runs.prepare import EncodedRun, Progress, encode_run
from dopsd.runs.resolve import ResolvedRun, resolve
from dopsd.runs.session import Session
from dopsd.training.checkpoint import load_checkpoint, save_checkpoint
from dopsd.training.loop import Plan, StepReport, train_steps

log = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    resume: str | None = None,
    progress: Progress | None = None,
    resolved: ResolvedRun | None = None,
) -> Iterator[StepReport]:
    """Train a recipe: a generator of optimizer steps that logs, previews and saves between them.

    resume: "latest", a checkpoint folder, or None for a new run. progress: called with what is
    being done, how many are done, and of how many. resolved: the recipe's `resolve`, where `check`
    has accepted it already.

    Leaves `<run_name>.safetensors` (or a model folder) and `report.html` in the run folder. Raises
    ValueError for bad input, wherever possible before anything is trained; after SIGINT or SIGTERM
    `Stopped`, once the step that was under way is saved.
    """
    run = resolved or resolve(recipe)
    if resolved is None:
        check(run)
    with (
        claimed(recipe, resume) as states,
        # Started first: a missing login or network is found before anything is encoded.
        tracking(recipe, is_new=not states) as trackers,
    ):
        if states:
            refuse_other_data(recipe, run.rows_sha256)

        # Encode, let the encoders leave memory, then load the network.
        encoded = encode_run(run, progress)
        low_memory = choose_low_memory(run, progress)
        log.info("Loading the network.", extra=ON_SCREEN)
        session = Session.open(run, low_memory, encoded.previews[0].student.context)

        # Go on from a checkpoint, or begin.
        start = _restore(session, states)
        _refuse_too_late(recipe, start)
        write_header(recipe, environment(session), fresh=not states)
        write_data_images(recipe.run_folder, encoded.rows, encoded.previews)

        with noticing_signals() as received_signal:
            if start:
                trackers.continue_after(start)
                if start == recipe.train.max_steps:
                    # The run was finished; its result may have been removed since.
                    if not preview_folder(recipe.run_folder, start).is_dir():
                        _preview(session, encoded, start, trackers)
                    _export_result(session, start)
                    write_report(recipe.run_folder, "finished")
            else:
                _preview(session, encoded, 0, trackers)
                write_report(recipe.run_folder, "running")
            yield from _train(session, encoded, start, received_signal, trackers)


def train_in_memory(recipe: Recipe) -> Iterator[tuple[StepReport, Session]]:
    """Train a recipe without a run folder, to measure between its steps: each optimizer step, and
    the session, whose `deployed_roles.student` is the tuned model. Only the cache of encoded images
    is written."""
    run = resolve(recipe)
    encoded = encode_run(run)
    session = Session.open(run, choose_low_memory(run), encoded.previews[0].student.context)
    for report in _steps(session, encoded, start=0):
        yield report, session


def _train(
    session: Session,
    encoded: EncodedRun,
    start: int,
    received_signal: Callable[[], int | None],
    trackers: Trackers,
) -> Iterator[StepReport]:
    """The steps from `start` on, with what is written between them."""
    run, recipe = session.run, session.run.recipe
    metrics = Metrics(recipe.run_folder / "metrics.jsonl", start)
    monitor = HealthMonitor(session, encoded.health, start, trackers)
    seconds = sum(row["seconds"] for row in read_rows(metrics.path))
    max_seconds = recipe.train.max_seconds or math.inf
    for report in _steps(session, encoded, start):
        step = report.step
        metrics.add(report)
        _track(trackers, report)

        # What is due after this step.
        seconds += report.seconds
        done, signal = step == recipe.train.max_steps or seconds >= max_seconds, received_signal()
        save_due = _due(step, recipe.save.every)
        reasons = monitor.after_step(step, done)
        unhealthy = reasons.unhealthy
        if reasons.plateau and not done:
            log.info("Step %d: ending: %s.", step, reasons.plateau, extra=ON_SCREEN)
            done = True
        preview_due = done or _due(step, recipe.sample.every)
        if preview_due:
            _preview(session, encoded, step, trackers)

        # Exports come before the last checkpoint: a run that is killed in between repeats its last
        # steps and exports again.
        if done:
            _export_result(session, step)
        elif save_due:
            path = recipe.result(f"-step{step:06d}")
            session.export(path, weights_metadata(run, step))
            _remove_old_models(recipe)
        if done or save_due or signal or unhealthy:
            save_checkpoint(
                recipe.run_folder,
                step,
                session.trainable,
                session.teacher,
                session.optimizer,
                recipe.save.keep_last,
            )
            log.info("Step %d: checkpoint saved.", step, extra=ON_SCREEN)
        # After the checkpoint, so that an error in the report loses no step.
        if preview_due or signal or unhealthy:
            write_report(recipe.run_folder, _state(done, bool(signal or unhealthy)))
        yield report
        if signal and not done:
            raise Stopped(signal, step)
        if unhealthy:
            raise Unhealthy(step, unhealthy)
        if done:
            return


def _steps(session: Session, encoded: EncodedRun, start: int) -> Iterator[StepReport]:
    recipe = session.run.recipe
    return train_steps(
        session.roles,
        recipe.objective,
        _loader(recipe, encoded),
        session.trainable,
        session.optimizer,
        session.teacher,
        session.run.device,
        _plan(recipe.train),
        start,
    )


def _loader(recipe: Recipe, encoded: EncodedRun) -> Loader:
    replays = None
    if encoded.replays:
        replays = Replays(
            encoded.replays,
            recipe.retention.per_step,
            recipe.train.gradient_accumulation_steps,
            recipe.train.seed,
        )
    return Loader(
        encoded.rows,
        recipe.train.batch_size,
        recipe.train.seed,
        recipe.data.caption_dropout,
        encoded.prior,
        replays,
    )


def _track(trackers: Trackers, report: StepReport) -> None:
    numbers = {
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "images": report.images,
        "seconds": report.seconds,
        "skipped": report.skipped,
    }
    trackers.numbers("train", {**report.log, **numbers}, report.step)


def _export_result(session: Session, step: int) -> None:
    """The result and its model card."""
    run, recipe = session.run, session.run.recipe
    metadata = weights_metadata(run, step)
    session.export(recipe.result(), metadata)
    write_card(recipe, run.family, metadata, step)


def _state(done: bool, interrupted: bool) -> State:
    """What the report says of a run after a step."""
    if done:
        return "finished"
    return "stopped" if interrupted else "running"


def _remove_old_models(recipe: Recipe) -> None:
    """LoRA files are small and all kept; of whole models as many as of checkpoints."""
    if recipe.adapter == "full" and recipe.save.keep_last:
        models = sorted((recipe.run_folder / INTERMEDIATE).glob(f"{recipe.run_name}-step*"))
        for old in models[: -recipe.save.keep_last]:
            shutil.rmtree(old)


def _preview(session: Session, encoded: EncodedRun, step: int, trackers: Trackers) -> None:
    """Generate the previews into `samples/step-N/`; the VAE is in memory only meanwhile."""
    run = session.run
    folder = preview_folder(run.recipe.run_folder, step)
    generate_previews(
        folder,
        encoded.previews,
        session.deployed_roles,
        session.load_vae(),
        run.deployed_schedule,
        run.device,
    )
    log.info("Step %d: previews in %s.", step, folder / "grid.png", extra=ON_SCREEN)
    trackers.image("previews", folder / "grid.png", step)


def _restore(session: Session, states: Sequence[Path]) -> int:
    """Load the first checkpoint that is whole and return the steps it had done; 0 without any.
    Raises ValueError when none is whole."""
    for index, state in enumerate(states):
        try:
            done = load_checkpoint(state, session.trainable, session.teacher, session.optimizer)
        except ValueError as error:
            if index == len(states) - 1:
                raise
            log.warning(
                "Checkpoint %s cannot be used (%s); going back to %s.",
                state.name,
                error,
                states[index + 1].name,
            )
        else:
            session.student.publish()
            return done
    return 0


def _refuse_too_late(recipe: Recipe, start: int) -> None:
    if start > (steps := recipe.train.max_steps):
        raise ValueError(
            f"{recipe.run_folder} is at step {start}, and train.max_steps is {steps}: set it to "
            f"{start} or more, or name an earlier checkpoint with --resume."
        )


def _plan(settings: TrainSection) -> Plan:
    return Plan(
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_schedule=settings.lr_schedule,
        accumulation_steps=settings.gradient_accumulation_steps,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        max_skipped_steps=settings.max_skipped_steps,
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
