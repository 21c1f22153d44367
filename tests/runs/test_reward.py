"""Runs with a reward: unusable scores end the run, and saved checkpoints remain."""

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

def red(images, prompts):
    assert images.shape[1:] == (3, 64, 64) and 0 <= images.min() and images.max() <= 1
    assert len(prompts) == len(images)
    return images[:, 0].mean((1, 2))

def nan_after_four_calls(images, prompts):
    global calls
    calls += 1
    return red(images, prompts) * (1 if calls <= 4 else float("nan"))

def scalar(images, prompts):
    return red(images, prompts).mean()

def infinity_after_four_calls(images, prompts):
    return nan_after_four_calls(images, prompts).nan_to_num(float("inf"))

def constant(images, prompts):
    return red(images, prompts) * 0

def fails(images):
    return red(images, images)

def integers(images, prompts):
    return torch.ones(len(images), dtype=torch.int64)
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
def own_rewards(tmp_path, monkeypatch):
    """A working directory with the module `own_rewards`."""
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_rewards", raising=False)


def train_error(recipe: Recipe, tmp_path: Path) -> str:
    """The message with which `dopsd train` ends a run."""
    recipe.save_as(tmp_path / "recipe.yaml")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    printed = " ".join(result.output.split())
    assert result.exit_code == 2 and "Traceback" not in printed, result.output
    return printed.rpartition("dopsd: ")[2]


@pytest.mark.parametrize("reward", ["nan_after_four_calls", "infinity_after_four_calls"])
def test_a_reward_without_finite_scores_ends_the_run_and_keeps_its_checkpoints(
    reward, concept, tmp_path, own_rewards
):
    message = train_error(recipe_of(concept, tmp_path / "runs", f"own_rewards:{reward}"), tmp_path)
    assert message.startswith(
        f"the reward own_rewards:{reward} gave no image of 4 rollouts in a row a finite score"
    )
    last = checkpoints(tmp_path / "runs" / "run")[-1]
    assert last.name == "step-000003"  # two steps with finite scores, one without
    assert read_tensors(last / "student.safetensors")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("own_rewards:scalar", "returned torch.float32 [] for 1 images"),
        ("own_rewards:integers", "returned torch.int64 [1] for 1 images"),
        ("own_rewards:fails", "the reward own_rewards:fails failed on 1 images (TypeError: "),
        ("own_rewards:missing", "cannot be imported"),
        ("own_rewards:calls", "is a int, which cannot be called"),
        ("no_such_module:reward", "cannot be imported"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused_with_one_sentence(
    reward, message, concept, tmp_path, own_rewards
):
    assert message in train_error(recipe_of(concept, tmp_path / "runs", reward), tmp_path)
    assert not list((tmp_path / "runs").glob("run/*.safetensors"))


def test_a_reward_that_gives_equal_scores_is_reported_in_a_warning(
    concept, tmp_path, own_rewards, caplog
):
    list(train(recipe_of(concept, tmp_path / "runs", "own_rewards:constant")))
    warnings = [
        record.getMessage()
        for record in caplog.records
        if "gave the same scores" in record.getMessage()
    ]
    assert warnings == [
        "The reward own_rewards:constant gave the same scores to 4 rollouts in a row: pairs of "
        "equal score teach nothing."
    ]


def test_check_names_the_model_of_the_reward_that_the_forecast_leaves_out(
    concept, tmp_path, monkeypatch
):
    # The real forecast takes seconds and has tests of its own.
    monkeypatch.setattr("dopsd.runs.memory.forecast_run", lambda *_, **__: Forecast(1, 1))
    scorer = tmp_path / "scorer"
    scorer.mkdir()
    for reward, message in (
        ("red", ""),
        (f"pickscore={scorer}", f"the reward's own model, {scorer}, comes on top"),
    ):
        recipe_of(concept, tmp_path / "runs", reward).save_as(tmp_path / "recipe.yaml")
        result = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")])
        assert result.exit_code == 0 and message in result.output.replace("\n", ""), result.output
        assert message or "comes on top" not in result.output
