"""Runs that a judge scores: a judge that answers badly ends them, and what was saved before is kept."""

from pathlib import Path

import pytest

from dopsd.recipe import Recipe, parse_recipe
from dopsd.run import train
from dopsd.training.checkpoint import checkpoints

JUDGES = """
import torch
calls = 0

def red(pictures, prompts):
    assert pictures.shape[1:] == (3, 64, 64) and 0 <= pictures.min() and pictures.max() <= 1
    assert len(prompts) == len(pictures)
    return pictures[:, 0].mean((1, 2))

def falls_silent(pictures, prompts):
    global calls
    calls += 1
    return red(pictures, prompts) * (1 if calls <= 4 else float("nan"))

def one_number(pictures, prompts):
    return red(pictures, prompts).mean()

def whole_numbers(pictures, prompts):
    return torch.ones(len(pictures), dtype=torch.int64)
"""


def recipe_of(lesson: Path, folder: Path, judge: str) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(lesson)},
            "method": {"name": "pso_online", "judge": judge, "nfe": 2},
            "lora": {"rank": 2},
            "train": {"max_steps": 6, "max_skipped_steps": 2},
            "sample": {"every": 0, "prompts": "a toy", "unrelated": 0},
            "health": {"every": 0},
            "save": {"every": 1},
            "output_dir": str(folder),
            "run_name": "run",
        }
    )


@pytest.fixture()
def desk(tmp_path, monkeypatch):
    (tmp_path / "own_judges.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_judges", raising=False)


def test_a_judge_that_falls_silent_ends_the_run_and_keeps_what_was_saved(lesson, tmp_path, desk):
    steps = []
    with pytest.raises(ValueError, match="answered NaN for every picture of 4 walks in a row"):
        for report in train(recipe_of(lesson, tmp_path / "runs", "own_judges:falls_silent")):
            steps.append(report.step)
    assert steps == [1, 2, 3]  # two steps with a judge, one without
    assert checkpoints(tmp_path / "runs" / "run")[-1].name == "step-000003"


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("own_judges:one_number", r"answered torch.float32 \[\] to 1 pictures"),
        ("own_judges:whole_numbers", r"answered torch.int64 \[1\] to 1 pictures"),
        ("own_judges:nobody", "cannot be imported"),
        ("own_judges:calls", "is a int, which cannot be called"),
        ("no_such_module:judge", "cannot be imported"),
    ],
)
def test_a_judge_that_cannot_judge_is_one_sentence(judge, said, lesson, tmp_path, desk):
    with pytest.raises(ValueError, match=said):
        list(train(recipe_of(lesson, tmp_path / "runs", judge)))
    assert not list((tmp_path / "runs").glob("run/*.safetensors"))
