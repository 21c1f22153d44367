"""Optimizers beside AdamW: what they need, that they train, and that resuming loses nothing."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from dopsd.files import load_optimizer_tensors, optimizer_tensors
from dopsd.training import optimizers
from dopsd.training.optimizers import PACKAGES, make_optimizer, refuse_unready, stepping

NAMES = ["adamw", "adafactor", "lion", "prodigy", "schedule_free_adamw"]
RATES = {"prodigy": 1.0, "lion": 1e-3}
TARGET = torch.linspace(-1, 1, 12).view(3, 4)


def made(name: str, weight: nn.Parameter) -> torch.optim.Optimizer:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name][1])
    return make_optimizer(name, [weight], RATES.get(name, 1e-2), 0.0, foreach=None)


def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, index: int) -> None:
    with stepping(optimizer):
        noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(index))
        (weight - TARGET + 0.1 * noise).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_comes_near_the_minimum_of_a_noisy_quadratic(name):
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = made(name, weight)
    for index in range(1500):
        step(optimizer, weight, index)
    assert (weight - TARGET).square().mean() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_resuming_from_named_tensors_repeats_every_bit(name):
    straight = nn.Parameter(torch.zeros(3, 4))
    optimizer = made(name, straight)
    for index in range(7):
        step(optimizer, straight, index)
    named = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizer).items()}
    saved = named, straight.detach().clone()
    for index in range(7, 12):
        step(optimizer, straight, index)

    resumed = nn.Parameter(saved[1])
    again = made(name, resumed)
    load_optimizer_tensors(again, saved[0])
    for index in range(7, 12):
        step(again, resumed, index)
    assert torch.equal(resumed, straight)
    left, right = optimizer_tensors(optimizer), optimizer_tensors(again)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_the_weights_of_a_schedule_free_run_are_the_averaged_ones_between_steps():
    """Their running average in closed form: with a constant rate, x is the mean of all z."""
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = made("schedule_free_adamw", weight)
    fast = []
    for index in range(5):
        step(optimizer, weight, index)
        fast.append(optimizer.state[weight]["z"].clone())
        torch.testing.assert_close(weight.data, torch.stack(fast).mean(0), atol=1e-6, rtol=1e-5)


def test_adamw_keeps_the_state_that_it_had():
    """Old checkpoints stay readable: nothing is added to what AdamW saves."""
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = made("adamw", weight)
    step(optimizer, weight, 0)
    assert set(optimizer_tensors(optimizer)) == {"0.step", "0.exp_avg", "0.exp_avg_sq"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda module: None)
    package, _, extra = PACKAGES[name]
    with pytest.raises(ValueError, match=rf"needs {package}, .* pip install 'dopsd\[{extra}\]'"):
        refuse_unready(name, 1.0, "constant")


def test_settings_that_an_optimizer_cannot_work_with_are_refused(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda module: True)
    with pytest.raises(ValueError, match=r"learning_rate is 0\.0001, .*set train.learning_rate: 1"):
        refuse_unready("prodigy", 1e-4, "constant")
    with pytest.raises(ValueError, match="takes the place of a schedule"):
        refuse_unready("schedule_free_adamw", 1e-3, "cosine")
    refuse_unready("prodigy", 1.0, "cosine")


def test_a_whole_run_with_an_optimizer_resumes_bit_for_bit(concept, tmp_path):
    from safetensors.torch import load_file

    from dopsd.config.recipe import parse_recipe
    from dopsd.runs.train import train

    name = "adafactor" if find_spec("prodigyopt") is None else "prodigy"

    def recipe(run_name: str, steps: int):
        return parse_recipe(
            {
                "model": {"name_or_path": "pocket", "memory": "high"},
                "data": {"folder": str(concept)},
                "method": {"name": "sft"},
                "lora": {"rank": 2},
                "train": {"max_steps": steps, "optimizer": name, "learning_rate": 1},
                "sample": {"every": 0, "prompts": "a star", "unrelated": 0},
                "health": {"every": 0},
                "output_dir": str(tmp_path),
                "run_name": run_name,
            }
        )

    list(train(recipe("straight", 4)))
    list(train(recipe("broken", 2)))
    list(train(recipe("broken", 4), "latest"))
    left, right = (load_file(recipe(each, 4).result()) for each in ("straight", "broken"))
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
