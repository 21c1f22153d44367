"""The forecast of peak memory against the meter on real steps, and what `model.memory` makes of it."""

from dataclasses import replace

import pytest
import torch

from dopsd.config.recipe import parse_recipe
from dopsd.data.cache import prepare
from dopsd.data.folder import read_folder
from dopsd.data.loader import Loader
from dopsd.models import load_family
from dopsd.runs.memory import forecast
from dopsd.runs.resolve import resolve
from dopsd.runs.session import Session
from dopsd.training.loop import Plan, train_steps
from dopsd.training.memory_meter import LiveBytes

CPU = torch.device("cpu")
CASES = [
    ("dopsd", False, torch.float32, {"batch_size": 4}),
    ("dopsd", True, torch.float32, {"batch_size": 1, "gradient_accumulation_steps": 2}),
    ("dopsd", True, torch.bfloat16, {"batch_size": 2}),
    ("sft", False, torch.float32, {"batch_size": 2}),
    ("sft", True, torch.float32, {"batch_size": 4}),
    ("pso_online", False, torch.float32, {"batch_size": 4}),
    ("pso_online", True, torch.bfloat16, {"batch_size": 2}),
]
LABELS = {"pso_online": {"reward": "red"}}


@pytest.mark.parametrize(("method", "recompute", "dtype", "train"), CASES)
def test_the_forecast_is_within_a_tenth_of_the_meter(
    method, recompute, dtype, train, concept, tmp_path, pocket_text_encoder
):
    recipe = parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "low" if recompute else "high"},
            "data": {"folder": str(concept)},
            "method": {"name": method} | LABELS.get(method, {}),
            "lora": {"rank": 8},
            "train": train,
            "output_dir": str(tmp_path),
            "run_name": "measured",
        }
    )
    family = load_family("pocket")
    examples = read_folder(concept).examples
    rows = prepare(
        examples,
        tmp_path / "cache",
        pocket_text_encoder,
        family.load_vae(CPU, torch.float32),
        resolution=family.resolution,
        multiple=family.multiple,
        privileged=method == "dopsd",
        device=CPU,
    )
    loader = Loader(rows, recipe.train.batch_size, seed=0)
    plan = Plan(
        max_steps=2, learning_rate=1e-4, accumulation_steps=recipe.train.gradient_accumulation_steps
    )
    run = replace(resolve(recipe), dtype=dtype)
    session = Session.open(run, recompute, pocket_text_encoder.context(["a toy"]))
    student, teacher = session.trainable, session.teacher.tensors
    tensors = [
        *family.load_denoiser(CPU, dtype).network.parameters(),
        *student.values(),
        *teacher.values(),
    ]
    tensors += [
        p for name, p in student.items() if ".lora_B." in name
    ]  # the base's, which are zero
    if recipe.method.reward_name:  # what the reward looks through
        tensors += family.load_vae(CPU, torch.float32).autoencoder.parameters()
    resident = sum(tensor.nbytes for tensor in tensors)
    with LiveBytes() as meter:
        for _ in train_steps(
            session.roles,
            recipe.method,
            loader,
            session.trainable,
            session.optimizer,
            session.teacher,
            CPU,
            plan,
        ):
            pass
    side = family.resolution, family.resolution
    found = forecast(recipe, family, side, [e.caption for e in examples], dtype, recompute)
    assert found.peak == pytest.approx(resident + meter.peak, rel=0.1)
    assert (
        resident < found.resident < found.peak
    )  # the optimizer's moments came with the first step


def test_the_forecast_runs_where_loss_steps_are_drawn_at_random():
    """It works on tensors without values, so the draw must not read one."""
    method = {"name": "dopsd", "loss_steps": 2}
    recipe = parse_recipe(
        {
            "model": {"name_or_path": "pocket"},
            "data": {"folder": "."},
            "method": method,
            "run_name": "forecast",
        }
    )
    side = load_family("pocket").resolution
    forecast_bytes = forecast(
        recipe, load_family("pocket"), (side, side), ["a toy"], torch.float32, low_memory=True
    )
    assert 0 < forecast_bytes.resident < forecast_bytes.peak
