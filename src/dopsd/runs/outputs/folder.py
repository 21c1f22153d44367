"""A run's folder: who may write it, what stands in it besides samples and weights, and where a run
goes on.

config.yaml (the resolved recipe), env.json, metrics.jsonl (a row a step), run.log, checkpoints/,
run.lock.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dopsd.config.recipe import Recipe, load_recipe
from dopsd.files import append_jsonl, read_jsonl, write_json, write_jsonl, writing
from dopsd.training.checkpoint import checkpoints
from dopsd.training.loop import StepReport

log = logging.getLogger(__name__)

FREE = {
    ("train", "max_steps"),
    ("train", "max_seconds"),
    ("model", "memory"),
    ("model", "offload"),
}  # what a resumed run may change of what makes its numbers


@contextmanager
def claimed(recipe: Recipe, resume: str | None) -> Iterator[list[Path]]:
    """Hold the recipe's run folder, and give the checkpoints to go on from, best first (none: a new
    run).

    Raises ValueError when the folder holds another run, when another process is writing it, or when
    there is nothing to resume. While held, what dopsd logs also goes to run.log.
    """
    folder = recipe.run_folder
    states = _states(recipe, resume)
    lock = FileLock(folder / "run.lock")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"{folder} is being written by another process (run.lock is held): let it end, or choose another "
                "run_name (--set run_name=...)."
            ) from error
    handler = logging.FileHandler(folder / "run.log", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    house = logging.getLogger("dopsd")
    house.addHandler(handler)
    try:
        yield states
    finally:
        house.removeHandler(handler)
        handler.close()
        lock.release()
        if not (folder / "config.yaml").exists():  # refused before it began: nothing is left behind
            for name in ("run.log", "run.lock"):
                (folder / name).unlink(missing_ok=True)


def _states(recipe: Recipe, resume: str | None) -> list[Path]:
    folder = recipe.run_folder
    if resume is None:
        if (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{folder} already holds a run. Go on with --resume latest, or choose another run_name "
                "(--set run_name=...)."
            )
        return []
    states = (
        checkpoints(folder)[::-1]
        if resume == "latest"
        else [p for p in [Path(resume)] if p.is_dir()]
    )
    if not states:
        where = folder if resume == "latest" else resume
        raise ValueError(
            f"there is no checkpoint to resume from in {where}; remove the folder to start again."
        )
    _refuse_other_recipe(recipe, folder)
    for name in ("metrics.jsonl", "health.jsonl"):
        read_rows(folder / name)
    return states


def _refuse_other_recipe(recipe: Recipe, folder: Path) -> None:
    """A resumed run may be longer, save and sample otherwise; what makes its numbers must be the
    same."""
    before = load_recipe(folder / "config.yaml")
    if before.adapter != recipe.adapter:
        raise ValueError(
            f"{folder} was begun with adapter = {before.adapter}, now it is {recipe.adapter}: a resumed run must be "
            "the same run. Put it back, or choose another run_name."
        )
    for section in ("model", "data", "method", "lora", "train"):
        old, new = getattr(before, section).model_dump(), getattr(recipe, section).model_dump()
        for key in old.keys() | new.keys():
            if old.get(key) != new.get(key) and (section, key) not in FREE:
                raise ValueError(
                    f"{folder} was begun with {section}.{key} = {old.get(key)}, now it is {new.get(key)}: a resumed "
                    "run must be the same run. Put it back, or choose another run_name."
                )


def write_header(recipe: Recipe, environment: Mapping[str, Any], fresh: bool) -> None:
    """`config.yaml` for a fresh run, and `env.json`."""
    if fresh:
        recipe.save_as(recipe.run_folder / "config.yaml")
    write_json(
        recipe.run_folder / "env.json",
        dict(environment) | {"started": time.strftime("%Y-%m-%d %H:%M:%S")},
    )


OLD_KEYS = {"pictures": "images"}


def with_current_keys(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a run folder of any version, under the keys that are written today."""
    return {OLD_KEYS.get(key, key): value for key, value in record.items()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSONL file with a row a step; the last may be cut where a run was killed.
    Raises ValueError for a row that is none."""
    rows = []
    for number, record in read_jsonl(path, is_log=True):
        row = with_current_keys(record)
        if type(row.get("step")) is not int:
            raise ValueError(f"{path} line {number} has no `step`: the run folder is damaged.")
        rows.append(row)
    return rows


class Rows:
    """A JSONL file with a row for each of some steps. Rows after `steps_done`, which a resumed run
    writes again, go first."""

    def __init__(self, path: Path, steps_done: int):
        self.path = path
        write_jsonl(path, [row for row in read_rows(path) if row["step"] <= steps_done])

    def append(self, row: Mapping[str, Any]) -> None:
        append_jsonl(self.path, [row])


class Metrics(Rows):
    """metrics.jsonl: one row for each step."""

    def add(self, report: StepReport) -> None:
        """Append a step. What is not finite becomes null: JSON has no NaN."""
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
                "step=%d skipped=yes loss=%s grad_norm=%s",
                report.step,
                row["loss"],
                report.grad_norm,
            )
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.append(finite)
