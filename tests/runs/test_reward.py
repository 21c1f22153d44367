"""Runs that a reward scores: a reward that answers badly ends them, and what was saved before is
kept."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.files import read_tensors
from dopsd.runs.memory import Forecast
from dopsd.runs.train import train
from dopsd.training.checkpoint import checkpoints

REWARDS = """
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

def falls_to_infinity(pictures, prompts):
    return falls_silent(pictures, prompts).nan_to_num(float("inf"))

def constant(pictures, prompts):
    return red(pictures, prompts) * 0

def fails(pictures):
    return red(pictures, pictures)

def whole_numbers(pictures, prompts):
    return torch.ones(len(pictures), dtype=torch.int64)
"""


def recipe_of(concept: Path, folder: Path, reward: str) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(concept)},
            "method": {"name": "pso_online", "reward": reward, "nfe": 2},
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
    (tmp_path / "own_judges.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_judges", raising=False)


def refused(recipe: Recipe, tmp_path: Path) -> str:
    """What `dopsd train` says of a run that it ends."""
    recipe.save_as(tmp_path / "recipe.yaml")
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    printed = " ".join(done.output.split())
    assert done.exit_code == 2 and "Traceback" not in printed, done.output
    return printed.rpartition("dopsd: ")[2]


@pytest.mark.parametrize("reward", ["falls_silent", "falls_to_infinity"])
def test_a_judge_that_falls_silent_ends_the_run_and_keeps_what_was_saved(
    reward, concept, tmp_path, desk
):
    said = refused(recipe_of(concept, tmp_path / "runs", f"own_judges:{reward}"), tmp_path)
    assert said.startswith(
        f"the reward own_judges:{reward} gave no image of 4 rollouts in a row a finite score"
    )
    kept = checkpoints(tmp_path / "runs" / "run")[-1]
    assert kept.name == "step-000003"  # two steps with a reward, one without
    assert read_tensors(kept / "student.safetensors")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("own_judges:one_number", "returned torch.float32 [] for 1 images"),
        ("own_judges:whole_numbers", "returned torch.int64 [1] for 1 images"),
        ("own_judges:fails", "the reward own_judges:fails failed on 1 images (TypeError: "),
        ("own_judges:nobody", "cannot be imported"),
        ("own_judges:calls", "is a int, which cannot be called"),
        ("no_such_module:judge", "cannot be imported"),
    ],
)
def test_a_judge_that_cannot_judge_is_one_sentence_and_exit_2(
    reward, words, concept, tmp_path, desk
):
    assert words in refused(recipe_of(concept, tmp_path / "runs", reward), tmp_path)
    assert not list((tmp_path / "runs").glob("run/*.safetensors"))


def test_a_judge_that_tells_nothing_apart_is_said_to(concept, tmp_path, desk, caplog):
    list(train(recipe_of(concept, tmp_path / "runs", "own_judges:constant")))
    said = [
        record.getMessage()
        for record in caplog.records
        if "gave the same scores" in record.getMessage()
    ]
    assert said == [
        "The reward own_judges:constant gave the same scores to 4 rollouts in a row: pairs of equal "
        "score teach nothing."
    ]


def test_check_says_that_the_judges_own_model_comes_on_top(concept, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dopsd.runs.memory.forecast_run", lambda *_, **__: Forecast(1, 1)
    )  # takes seconds, and is tested
    scorer = tmp_path / "scorer"
    scorer.mkdir()
    for reward, words in (
        ("red", ""),
        (f"pickscore={scorer}", f"the reward's own model, {scorer}, comes on top"),
    ):
        recipe_of(concept, tmp_path / "runs", reward).save_as(tmp_path / "recipe.yaml")
        done = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")])
        assert done.exit_code == 0 and words in done.output.replace("\n", ""), done.output
        assert words or "comes on top" not in done.output
