"""A run's folder: who may write it, where a run goes on, and its logs.

It holds config.yaml (the resolved recipe), env.json, metrics.jsonl and health.jsonl (a row a step),
run.log, checkpoints/, samples/, the exported weights, README.md and report.html; run.lock while a
process writes it.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from filelock import FileLock, Timeout

from dopsd.config.recipe import Recipe, load_recipe
from dopsd.files import append_jsonl, read_jsonl, write_json, write_jsonl, writing
from dopsd.training.checkpoint import checkpoints
from dopsd.training.loop import StepReport

log = logging.getLogger(__name__)

ON_SCREEN = {"screen": True}  # `extra` of a log record that the command line prints as well

# What a resumed run may change; everything else that makes its numbers must stay as it was.
CHANGEABLE = {
    ("train", "max_steps"),
    ("train", "max_seconds"),
    ("model", "memory"),
    ("model", "offload"),
}
NUMERIC_SECTIONS = ("model", "data", "method", "lora", "train", "retention")


@contextmanager
def claimed(recipe: Recipe, resume: str | None) -> Iterator[list[Path]]:
    """Lock the recipe's run folder, and give the checkpoints to go on from, the latest first (none
    for a new run).

    Raises ValueError where the folder holds another run, where another process is writing it, and
    where there is nothing to resume. While the folder is held, log records go to run.log too.
    """
    folder = recipe.run_folder
    states = _checkpoints_to_resume(recipe, resume)
    lock = FileLock(folder / "run.lock")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"{folder} is being written by another process (run.lock is held): let it end, or "
                "choose another run_name (--set run_name=...)."
            ) from error
    handler = logging.FileHandler(folder / "run.log", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("dopsd")
    logger.addHandler(handler)
    try:
        yield states
    finally:
        logger.removeHandler(handler)
        handler.close()
        lock.release()
        # A run that was refused before it began leaves nothing behind.
        if not (folder / "config.yaml").exists():
            for name in ("run.log", "run.lock", "trackers.json"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _checkpoints_to_resume(recipe: Recipe, resume: str | None) -> list[Path]:
    folder = recipe.run_folder
    if resume is None:
        if (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{folder} already holds a run. Go on with --resume latest, or choose another "
                "run_name (--set run_name=...)."
            )
        return []
    if resume == "latest":
        states = checkpoints(folder)[::-1]
    else:
        states = [path for path in [Path(resume)] if path.is_dir()]
    if not states or not folder.exists():
        raise ValueError(_nothing_to_resume(folder, resume))
    _refuse_other_recipe(recipe, folder)
    for name in ("metrics.jsonl", "health.jsonl"):
        read_rows(folder / name)
    return states


def _nothing_to_resume(folder: Path, resume: str) -> str:
    """One sentence: what is missing, and what to do."""
    if not folder.exists():
        return f"{folder} holds no run yet: leave out --resume to start one."
    if resume != "latest":
        return (
            f"--resume {resume}: there is no such checkpoint folder. Give --resume latest, or a "
            f"folder under {folder / 'checkpoints'}."
        )
    if not (folder / "config.yaml").exists():
        return f"{folder} holds no run yet: leave out --resume to start one."
    return (
        f"{folder} holds a run without a checkpoint: there is nothing to resume from. Remove the "
        "folder and leave out --resume to start again."
    )


def _refuse_other_recipe(recipe: Recipe, folder: Path) -> None:
    """A resumed run may be longer, save and preview at other steps; what makes its numbers must be
    the same."""
    before = load_recipe(folder / "config.yaml")
    changed = None
    if before.adapter != recipe.adapter:
        changed = ("adapter", before.adapter, recipe.adapter)
    for section in NUMERIC_SECTIONS:
        old, new = _numeric_keys(before, section), _numeric_keys(recipe, section)
        for key in old.keys() | new.keys():
            if old.get(key) != new.get(key) and (section, key) not in CHANGEABLE:
                changed = changed or (f"{section}.{key}", old.get(key), new.get(key))
    if changed:
        name, old, new = changed
        raise ValueError(
            f"{folder} was begun with {name} = {old}, now it is {new}: a resumed run must be the "
            "same run. Put it back, or choose another run_name."
        )
    steps = before.train.max_steps, recipe.train.max_steps
    if recipe.train.lr_schedule == "cosine" and steps[0] != steps[1]:
        raise ValueError(
            f"{folder} was begun with train.max_steps = {steps[0]}, now it is {steps[1]}: "
            "train.lr_schedule: cosine falls to 0 at that step, so the learning rate would jump. "
            "Put it back, or start a new run from the result: lora.init_from."
        )


def _numeric_keys(recipe: Recipe, section: str) -> dict[str, Any]:
    """A section's keys; of `data`, folders without where they lie, which the data's hash is for."""
    keys = getattr(recipe, section).model_dump()
    if section == "data":
        keys["more"] = tuple({**source, "folder": None} for source in keys["more"])
        del keys["folder"]
    return keys


def refuse_other_data(recipe: Recipe, rows_sha256: str) -> None:
    """A resumed run must train on the same images and captions in the same order, wherever they
    lie. Raises ValueError where their hash is not the one in env.json; a run folder without one is
    warned about."""
    file = recipe.run_folder / "env.json"
    before = _hash_in(file) if file.is_file() else None
    if before is None:
        log.warning("%s holds no hash of the data: it may have changed since the run began.", file)
    elif before != rows_sha256:
        raise ValueError(
            f"the images or captions of {recipe.run_folder}, or their order, have changed since it "
            f"was begun (hash {before[:12]}, now {rows_sha256[:12]}): a resumed run must be the "
            "same run. Put them back, or choose another run_name."
        )


def _hash_in(file: Path) -> str | None:
    try:
        environment = json.loads(file.read_text(encoding="utf-8"))
        return environment["data"].get("rows_sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}).") from error


def write_header(recipe: Recipe, environment: Mapping[str, Any], fresh: bool) -> None:
    """Write `env.json`, and for a fresh run `config.yaml`."""
    if fresh:
        recipe.save_as(recipe.run_folder / "config.yaml")
    started = {"started": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_json(recipe.run_folder / "env.json", dict(environment) | started)


OLD_KEYS = {"pictures": "images"}  # of run folders that older versions wrote


def with_current_keys(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a run folder of any version, under the keys that are written today."""
    return {OLD_KEYS.get(key, key): value for key, value in record.items()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file with a row for each step, without a last one that a kill cut short.
    Raises ValueError for a row without a step."""
    rows = []
    for number, record in read_jsonl(path, is_log=True):
        row = with_current_keys(record)
        if type(row.get("step")) is not int:
            raise ValueError(f"{path} line {number} has no `step`: the run folder is damaged.")
        rows.append(row)
    return rows


def seconds_per_step(recipe: Recipe) -> float | None:
    """Median seconds of an optimizer step of this run so far; None before its first."""
    rows = read_rows(recipe.run_folder / "metrics.jsonl")
    return median(row["seconds"] for row in rows) if rows else None


class Rows:
    """A JSONL file with a row for each of some steps. Rows after `steps_done`, which a resumed run
    writes again, are removed when it is opened."""

    def __init__(self, path: Path, steps_done: int):
        self.path = path
        write_jsonl(path, [row for row in read_rows(path) if row["step"] <= steps_done])

    def append(self, row: Mapping[str, Any]) -> None:
        append_jsonl(self.path, [row])


class Metrics(Rows):
    """metrics.jsonl: one row for each step."""

    def add(self, report: StepReport) -> None:
        """Append a step. What is not finite is written as null, for JSON has no NaN."""
        row = {
            "step": report.step,
            **report.log,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "images": report.images,
            "seconds": round(report.seconds, 4),
        }
        if report.skipped:
            row["skipped"] = True
            log.warning(
                "Step %d was skipped: loss %.3g and gradient norm %.3g are not both finite.",
                report.step,
                row["loss"],
                report.grad_norm,
            )
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.append(finite)
