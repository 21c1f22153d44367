"""Logging to tensorboard, trackio or wandb, beside the run's own metrics.jsonl, by accelerate's
trackers.

tensorboard writes into <run folder>/tensorboard; the other two where their own settings say
(TRACKIO_DIR, WANDB_DIR). A resumed run continues in the same place and logs the steps after its
checkpoint again, with the same values.
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
    """The started trackers of one run; without any, every call does nothing."""

    def __init__(self, trackers: Sequence[GeneralTracker]):
        self._trackers = trackers

    def numbers(self, group: str, values: Mapping[str, float | bool], step: int) -> None:
        """Log values as `group/name` after `step` steps."""
        for tracker in self._trackers:
            tracker.log(
                {f"{group}/{name}": float(value) for name, value in values.items()}, step=step
            )

    def continue_after(self, step: int) -> None:
        """Make tensorboard drop what it holds of later steps, which are logged again; wandb and
        trackio get the same values twice."""
        for tracker in self._trackers:
            if isinstance(tracker, TensorBoardTracker):
                tracker.writer.close()
                tracker.init_kwargs["purge_step"] = step + 1
                tracker.start()

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""
        for tracker in self._trackers:
            image = Image.open(path).convert("RGB")
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            elif isinstance(tracker, WandBTracker):
                tracker.log_images({name: [image]}, step=step)
            else:
                import trackio

                tracker.log({name: trackio.Image(image, caption=f"step {step}")}, step=step)


def refuse_unready(recipe: Recipe) -> None:
    """Raise ValueError for a tracker of the recipe that is not installed, and for wandb where
    nobody is logged in; without network."""
    for name in recipe.track.to:
        if find_spec(name) is None:
            raise ValueError(
                f"track.to names {name}, which is not installed: pip install 'dopsd[{name}]'."
            )
        if name == "wandb":
            _refuse_no_login()


def _refuse_no_login() -> None:
    import wandb

    try:
        online = wandb.setup().settings.mode in ("online", "shared")
        logged_in = not online or wandb.login(prompt=False, verify=False)
    except wandb.Error as error:  # such as a key of the wrong length
        raise ValueError(f"track.to names wandb, whose login is broken: {error}") from error
    if not logged_in:
        raise ValueError(
            "track.to names wandb, and nobody is logged in: run `wandb login`, or set "
            "WANDB_MODE=offline to log without the service."
        )


@contextmanager
def tracking(recipe: Recipe, is_new: bool) -> Iterator[Trackers]:
    """Start the recipe's trackers, and finish them in the end. is_new: the run is not resumed.
    Raises ValueError where one cannot start."""
    started: list[GeneralTracker] = []
    try:
        for name in recipe.track.to:
            started.append(_start(name, recipe, is_new))
        yield Trackers(started)
    finally:
        for tracker in started:
            tracker.finish()


def _start(name: str, recipe: Recipe, is_new: bool) -> GeneralTracker:
    project, run_id = recipe.track.project, _run_id(recipe.run_folder)
    if name == "tensorboard":
        tracker: GeneralTracker = TensorBoardTracker(name, recipe.run_folder)
    elif name == "wandb":
        tracker = WandBTracker(project, id=run_id, name=recipe.run_name, resume="allow")
    else:
        tracker = TrackioTracker(project, name=f"{recipe.run_name}-{run_id}", resume="allow")
    try:
        tracker.start()
        if is_new:
            tracker.store_init_configuration(_flatten(recipe.model_dump(mode="json")))
    # Login, network, disk: each tracker raises what it likes, and the user needs its words
    except Exception as error:
        raise ValueError(
            f"{name} could not start ({error}). Remove it from track.to, or set it up."
        ) from error
    return tracker


def _run_id(folder: Path) -> str:
    """A random id of the run, the same after a resume."""
    path = folder / "trackers.json"
    if not path.exists():
        write_json(path, {"id": uuid4().hex[:12]})
    return json.loads(path.read_text(encoding="utf-8"))["id"]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str | float]:
    """A tree of settings as `section.key`, the way trackers show hyperparameters."""
    flat: dict[str, str | float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float) else str(value)
    return flat
