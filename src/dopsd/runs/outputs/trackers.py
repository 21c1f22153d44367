"""What a run tells tensorboard, trackio or wandb beside its own metrics.jsonl, through accelerate's
trackers.

tensorboard writes into <run folder>/tensorboard; the other two where their own settings say
(TRACKIO_DIR, WANDB_DIR). A resumed run goes on in the same place: it repeats the straight run, so
what was told twice is the same twice.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from dopsd.config.recipe import Recipe
from dopsd.files import write_json


class Trackers:
    """The trackers of one run; with none of them every call does nothing."""

    def __init__(self, trackers: Sequence[GeneralTracker]):
        self._trackers = trackers

    def numbers(self, group: str, values: Mapping[str, float | bool], step: int) -> None:
        """Tell values as `group/name` after `step` steps."""
        for tracker in self._trackers:
            tracker.log(
                {f"{group}/{name}": float(value) for name, value in values.items()}, step=step
            )

    def image(self, name: str, path: Path, step: int) -> None:
        """Tell an image file."""
        for tracker in self._trackers:
            image = Image.open(path).convert("RGB")
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            elif isinstance(tracker, WandBTracker):
                tracker.log_images({name: [image]}, step=step)
            else:
                import trackio

                tracker.log({name: trackio.Image(image, caption=f"step {step}")}, step=step)


def refuse_missing(recipe: Recipe) -> None:
    """Raise ValueError for a tracker of the recipe that is not installed."""
    for name in recipe.track.to:
        if find_spec(name) is None:
            raise ValueError(
                f"track.to names {name}, which is not installed: pip install 'dopsd[{name}]'."
            )


@contextmanager
def tracking(recipe: Recipe, steps_done: int) -> Iterator[Trackers]:
    """The recipe's trackers, started and in the end finished. Raises ValueError when one cannot
    start."""
    started: list[GeneralTracker] = []
    try:
        for name in recipe.track.to:
            started.append(_start(name, recipe, steps_done))
        yield Trackers(started)
    finally:
        for tracker in started:
            tracker.finish()


def _start(name: str, recipe: Recipe, steps_done: int) -> GeneralTracker:
    folder, project = recipe.run_folder, recipe.track.project
    same_run = {"name": recipe.run_name, "resume": "allow"}
    if name == "tensorboard":  # what it holds of later steps is told again
        tracker: GeneralTracker = TensorBoardTracker(
            name, folder, purge_step=steps_done + 1 if steps_done else None
        )
    elif name == "wandb":
        tracker = WandBTracker(project, id=_identity(folder), **same_run)
    else:
        tracker = TrackioTracker(
            project, **same_run | {"name": f"{recipe.run_name}-{_identity(folder)}"}
        )
    try:
        tracker.start()
        if not steps_done:
            tracker.store_init_configuration(_flat(recipe.model_dump(mode="json")))
    # A service of its own: login, network, disk; whatever it says is what the user needs
    except Exception as error:
        raise ValueError(
            f"{name} could not start ({error}). Remove it from track.to, or set it up."
        ) from error
    return tracker


def _identity(folder: Path) -> str:
    """Of the run, the same after a resume."""
    path = folder / "trackers.json"
    if not path.exists():
        write_json(path, {"id": uuid4().hex[:12]})
    return json.loads(path.read_text(encoding="utf-8"))["id"]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str | float]:
    """A tree of settings as `section.key`, the way trackers show hyperparameters."""
    flat: dict[str, str | float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float) else str(value)
    return flat
