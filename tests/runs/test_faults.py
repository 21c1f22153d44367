"""Faults lose no work: kills at any moment, signals, a full disk, damaged checkpoints, losses that
are not finite."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.methods.base import Loss
from dopsd.runs.train import train
from dopsd.training.checkpoint import checkpoints

STEPS = 12


def recipe_for(concept: Path, output: Path, name: str, **changes: dict) -> Recipe:
    tree: dict = {
        "model": {"name_or_path": "pocket", "memory": "high"},
        "data": {"folder": str(concept)},
        "method": {"name": "dopsd", "nfe": 2, "teacher_decay": 0.9},
        "lora": {"rank": 2},
        "train": {"max_steps": STEPS, "batch_size": 1, "learning_rate": 1e-3},
        "sample": {"every": 0, "prompts": "a star"},
        "save": {"every": 1},
        "output_dir": str(output),
        "run_name": name,
    }
    for section, values in changes.items():
        tree[section] = tree[section] | values
    return parse_recipe(tree)


def finish(recipe: Recipe, resume: str | None = None) -> None:
    for _ in train(recipe, resume):
        pass


def results(recipe: Recipe) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What equal runs have in common: metrics without times, and the tensors of the last checkpoint
    and of the LoRA file."""
    lines = (recipe.run_folder / "metrics.jsonl").read_text().splitlines()
    rows = [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in lines
    ]
    last = checkpoints(recipe.run_folder)[-1]
    tensors = {
        f"{file.stem}.{n}": t
        for file in sorted(last.glob("*.safetensors"))
        for n, t in load_file(file).items()
    }
    return rows, tensors | {f"lora.{n}": t for n, t in load_file(_lora(recipe)).items()}


def _lora(recipe: Recipe) -> Path:
    return recipe.run_folder / f"{recipe.run_name}.safetensors"


def assert_same_results(left: Recipe, right: Recipe) -> None:
    (left_rows, left_tensors), (right_rows, right_tensors) = results(left), results(right)
    assert left_rows == right_rows
    assert left_tensors.keys() == right_tensors.keys()
    assert all(torch.equal(left_tensors[name], right_tensors[name]) for name in left_tensors)


def fork_and_train(recipe: Recipe, resume: str | None) -> int:
    """Train in a forked child process, which need not import torch again; its process id. The child
    never returns from here."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
            finish(recipe, resume)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_killed_many_times_at_random_equals_the_uninterrupted_run_bitwise(
    kills, concept, tmp_path
):
    straight = recipe_for(concept, tmp_path, "straight")
    start = time.monotonic()
    finish(straight)
    lifetime = time.monotonic() - start
    rng, killed, attempt = np.random.default_rng(kills), 0, 0
    while killed < kills:
        attempt += 1
        broken, ended = recipe_for(concept, tmp_path, f"broken{attempt}"), False
        while not ended:
            saved = checkpoints(broken.run_folder)
            # Killed before its first checkpoint: the user removes the folder, as the error asks.
            if not saved:
                shutil.rmtree(broken.run_folder, ignore_errors=True)
            child = fork_and_train(broken, "latest" if saved else None)
            if killed < kills:
                time.sleep(rng.uniform(0, lifetime))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed += os.WIFSIGNALED(status)
            ended = os.WIFEXITED(status)
        assert os.WEXITSTATUS(status) == 0
        assert_same_results(straight, broken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_the_resumed_run_equals_the_uninterrupted_run_bitwise(
    number, code, concept, tmp_path
):
    straight, stopped = (
        recipe_for(concept, tmp_path, name, train={"max_steps": 40}, save={"every": 0})
        for name in ("straight", "stopped")
    )
    file = tmp_path / "stopped.yaml"
    stopped.save_as(file)
    child = subprocess.Popen(
        [sys.executable, "-m", "dopsd.cli", "train", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    metrics = stopped.run_folder / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.005)
    child.send_signal(number)
    _, printed = child.communicate()
    assert child.returncode == code
    assert f"stopped by {number.name} after step" in printed and "Traceback" not in printed
    assert not _lora(stopped).exists()
    finish(stopped, "latest")
    finish(straight)
    assert_same_results(straight, stopped)


def test_resuming_from_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(
    concept, tmp_path, caplog
):
    straight, damaged = (
        recipe_for(concept, tmp_path, name, train={"max_steps": 4})
        for name in ("straight", "damaged")
    )
    finish(straight)
    for report in train(damaged):
        if report.step == 3:
            break
    older, latest = checkpoints(damaged.run_folder)
    content = bytearray((latest / "teacher.safetensors").read_bytes())
    content[-1] ^= 1  # one bit of one weight: the file still opens
    (latest / "teacher.safetensors").write_bytes(content)
    finish(damaged, "latest")
    assert "step-000003" in caplog.text and "going back to step-000002" in caplog.text
    assert (older.name, latest.name) == ("step-000002", "step-000003")
    assert_same_results(straight, damaged)


def test_resuming_is_refused_when_every_checkpoint_is_damaged(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "lost", train={"max_steps": 2})
    finish(recipe)
    for path in checkpoints(recipe.run_folder):
        (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"step-000001 is not a complete checkpoint"):
        finish(recipe, "latest")


def test_a_run_keeps_its_last_checkpoints_and_every_lora_file(concept, tmp_path):
    recipe = recipe_for(
        concept, tmp_path, "rotated", train={"max_steps": 5}, save={"every": 1, "keep_last": 3}
    )
    finish(recipe)
    assert [path.name for path in checkpoints(recipe.run_folder)] == [
        "step-000003",
        "step-000004",
        "step-000005",
    ]
    loras = {path.name for path in recipe.run_folder.glob("*.safetensors")}
    steps = {path.name for path in (recipe.run_folder / "intermediate").iterdir()}
    assert loras == {"rotated.safetensors"}
    assert steps == {f"rotated-step00000{n}.safetensors" for n in (1, 2, 3, 4)}


def test_a_run_folder_that_another_process_writes_is_refused(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "shared", train={"max_steps": 1})
    recipe.run_folder.mkdir(parents=True)
    with (
        FileLock(recipe.run_folder / "run.lock"),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        finish(recipe)


def test_a_full_disk_ends_the_run_with_one_sentence_and_an_intact_last_checkpoint(
    concept, tmp_path
):
    recipe = recipe_for(concept, tmp_path, "full", train={"max_steps": 8})
    file = tmp_path / "full.yaml"
    recipe.save_as(file)
    for report in train(recipe):
        if report.step == 2:
            break
    before = {path: path.read_bytes() for path in checkpoints(recipe.run_folder)[-1].iterdir()}
    largest = max(len(content) for content in before.values())
    command = [sys.executable, "-m", "dopsd.cli", "train", str(file), "--resume", "latest"]

    def limit_file_size() -> None:  # a write over the limit fails as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1))

    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_file_size)
    assert run.returncode == 2, run.stderr
    assert "cannot be written" in run.stderr and "Traceback" not in run.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert not list(recipe.run_folder.rglob("*.part"))
    finish(recipe, "latest")
    straight = recipe_for(concept, tmp_path, "straight", train={"max_steps": 8})
    finish(straight)
    assert_same_results(straight, recipe)


def test_a_step_whose_loss_is_not_finite_is_skipped_and_logged(concept, tmp_path, monkeypatch):
    recipe = recipe_for(concept, tmp_path, "skipping", train={"max_steps": 4})
    recipe = parse_recipe(recipe.model_dump() | {"method": {"name": "sft"}})
    original = type(recipe.method).losses
    calls = iter(range(100))

    def not_finite_once(self, roles, batch, rng):
        broken = next(calls) == 1
        for piece in original(self, roles, batch, rng):
            yield (
                Loss(piece.surrogate * float("nan"), {"loss": float("nan")}, piece.last)
                if broken
                else piece
            )

    monkeypatch.setattr(type(recipe.method), "losses", not_finite_once)
    reports = list(train(recipe))
    assert [report.skipped for report in reports] == [False, True, False, False]
    lines = (recipe.run_folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    assert row["skipped"] is True and row["loss"] is None
    before, after = (load_file(recipe.result(f"-step00000{n}")) for n in (1, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (recipe.run_folder / "report.html").exists()
