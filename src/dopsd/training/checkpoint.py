"""A run's state on disk: student, teacher and optimizer as safetensors, the step as JSON, in one
atomic folder.

Batches, noise and learning rate are functions of the step, so nothing else needs saving for a
bit-equal resume.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dopsd.files import (
    atomic_path,
    load_optimizer_tensors,
    optimizer_tensors,
    read_tensors,
    sha256_of,
    shorten,
    write_json,
    write_tensors,
)
from dopsd.training.roles import Teacher


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the state after `step` optimizer steps lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir())


def save_checkpoint(
    run: Path,
    step: int,
    student: Mapping[str, Tensor],
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    keep_last: int | None = None,
) -> Path:
    """Write the state after `step` steps; the folder appears whole or not at all. Then all but the
    last `keep_last` checkpoints are removed (None: none is)."""
    path = checkpoint_path(run, step)
    with atomic_path(path) as temporary:
        state = {
            "student": student,
            "teacher": teacher.state,
            "optimizer": optimizer_tensors(optimizer),
        }
        files = [temporary / f"{name}.safetensors" for name, tensors in state.items() if tensors]
        for file in files:
            write_tensors(file, state[file.stem])
        hashes = {file.name: sha256_of(file) for file in files}
        write_json(temporary / "state.json", {"step": step, "sha256": hashes})
    for old in checkpoints(run)[:-keep_last] if keep_last else []:
        shutil.rmtree(old)
    return path


def load_checkpoint(
    path: Path,
    student: Mapping[str, nn.Parameter],
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Put the state back; returns the number of steps done. Raises ValueError when the folder is
    damaged or its adapters are not those of this run."""
    state = path / "state.json"
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
        damaged = [
            name for name, wanted in found["sha256"].items() if sha256_of(path / name) != wanted
        ]
        step = int(found["step"])
        if step < 0:
            raise ValueError(f"it says step {step}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {shorten(str(error))}"
        raise ValueError(
            f"{path} is no whole checkpoint of dopsd (state.json: {reason})."
        ) from error
    if damaged:
        raise ValueError(
            f"{path} is damaged: the bytes of {', '.join(damaged)} are not those that were written."
        )
    _put(path / "student.safetensors", student)
    if teacher.state:
        _put(path / "teacher.safetensors", teacher.state)
    load_optimizer_tensors(optimizer, read_tensors(path / "optimizer.safetensors"))
    return step


@torch.no_grad()
def _put(path: Path, target: Mapping[str, Tensor]) -> None:
    saved = read_tensors(path)
    if differing := sorted(saved.keys() ^ target.keys()):
        raise ValueError(
            f"{path} has other adapters than this run (first: {differing[0]}): was lora.targets changed?"
        )
    for name, tensor in target.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"{path} has {name} of shape {tuple(saved[name].shape)}: was lora.rank changed?"
            )
        tensor.copy_(saved[name])
