"""Checkpoint of a run: student, teacher and optimizer as safetensors and the step as JSON, in a
folder that appears complete or not at all.

Batches, noise and learning rate are functions of the step, so nothing else is needed to resume bit
for bit.
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
    """Folder of the state after `step` optimizer steps."""
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
    """Write the state after `step` optimizer steps and return its folder. Then remove all but the
    last `keep_last` checkpoints (None: remove none)."""
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
    """Restore the state in place and return the number of optimizer steps done. Raises ValueError
    where the folder is damaged or of other adapters than this run's."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        damaged = [
            name for name, expected in state["sha256"].items() if sha256_of(path / name) != expected
        ]
        step = int(state["step"])
        if step < 0:
            raise ValueError(f"the step is {step}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {shorten(str(error))}"
        raise ValueError(
            f"{path} is not a complete checkpoint of dopsd (state.json: {reason})."
        ) from error
    if damaged:
        raise ValueError(
            f"{path} is damaged: {', '.join(damaged)} have other bytes than were written."
        )
    _load_into(path / "student.safetensors", student)
    if teacher.state:
        _load_into(path / "teacher.safetensors", teacher.state)
    load_optimizer_tensors(optimizer, read_tensors(path / "optimizer.safetensors"))
    return step


@torch.no_grad()
def _load_into(path: Path, target: Mapping[str, Tensor]) -> None:
    saved = read_tensors(path)
    if differing := sorted(saved.keys() ^ target.keys()):
        raise ValueError(
            f"{path} has other adapters than this run (first: {differing[0]}): was lora.targets "
            "changed?"
        )
    for name, tensor in target.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"{path} has {name} of shape {tuple(saved[name].shape)}: was lora.rank changed?"
            )
        tensor.copy_(saved[name])
