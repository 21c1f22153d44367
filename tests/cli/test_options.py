"""Exit codes and sentences of what can go wrong in any command."""

import os
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from dopsd.cli.options import forwards_of, guarded, seeds_of


def run(command, *words: str):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(guarded(command))
    result = CliRunner().invoke(app, list(words))
    return result, " ".join(result.output.split())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_lack_of_memory_is_a_sentence_with_the_setting_that_helps(error):
    def train(recipe: str) -> None:
        raise error

    def sample(width: int = 8) -> None:
        raise error

    result, printed = run(train, "recipe.yaml")
    assert result.exit_code == 2 and "dopsd: out of memory. Set model.memory: low" in printed
    result, printed = run(sample)
    assert result.exit_code == 2 and "smaller --width and --height" in printed


def test_lack_of_memory_while_a_part_is_read_is_not_a_damaged_file():
    def train(recipe: str) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except RuntimeError as error:
            raise ValueError("the vae cannot be read; it is damaged.") from error

    result, printed = run(train, "recipe.yaml")
    assert result.exit_code == 2 and "out of memory" in printed and "damaged" not in printed


def test_any_other_error_is_a_bug_and_keeps_its_traceback():
    def broken() -> None:
        raise RuntimeError("shapes do not match")

    result, printed = run(broken)
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError) and not printed


@pytest.mark.parametrize(
    ("size", "rank"),
    [
        ("WORLD_SIZE", "RANK"),
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ],
)
def test_several_processes_are_refused_by_the_first_and_the_others_are_silent(size, rank):
    outputs = []
    for number in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-m", "dopsd", "train", "recipe.yaml"],
            env={**os.environ, size: "2", rank: number},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and not done.stdout
        outputs.append(done.stderr)
    assert outputs[0].startswith("dopsd: dopsd was started as 2 processes") and not outputs[1]


def test_one_process_of_a_launcher_is_like_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    result, printed = run(lambda: print("done"))
    assert result.exit_code == 0 and printed == "done"


def test_every_command_takes_verbose_and_help_is_one_paragraph_each():
    def command(count: int) -> None:
        """Count to a number,
        and stop there.

        Then more."""

    assert guarded(command).__doc__ == "Count to a number, and stop there.\n\nThen more."
    printed = run(command, "--help")[1]
    assert "Count to a number, and stop there. Then more." in printed
    assert "--verbose" in printed and "-v" in printed


def test_forwards_are_sorted_and_each_once():
    assert forwards_of("4, 1,2,2") == (1, 2, 4) and forwards_of(None) == ()
    for text in ("", "0", "1,", "1001", "two"):
        with pytest.raises(ValueError, match="give numbers from 1 to 1000"):
            forwards_of(text)


def test_seeds_begin_at_zero():
    assert seeds_of("0,2,1") == (0, 1, 2) and seeds_of(None) == ()
    with pytest.raises(ValueError, match="--seeds -1: give numbers from 0"):
        seeds_of("-1")


@pytest.mark.parametrize(
    "command",
    [
        ("check", b"\xff.yaml"),
        ("check", "recipe.yaml", "--set", b"run_name=caf\xe9"),
        ("sample", b"a caf\xe9", "--model", "pocket"),
        ("inspect", b"\xff.safetensors"),
        ("import", b"\xff", "--out", "out"),
    ],
)
def test_an_argument_that_is_not_utf8_is_a_sentence(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dopsd", *command], capture_output=True, cwd=tmp_path
    )
    assert done.returncode == 2 and b"is not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr and not any(tmp_path.iterdir())
