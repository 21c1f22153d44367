"""The forecast of peak memory against the memory that real steps take."""

from dataclasses import replace

import pytest
import torch

from dopsd.config.recipe import parse_recipe
from dopsd.data.cache import prepare
from dopsd.data.folder import read_folder
from dopsd.data.loader import Loader
from dopsd.data.replay import Replays
from dopsd.diffusion.batch import Replay
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
METHOD_SETTINGS = {"pso_online": {"reward": "red"}}
# Four replayed prompts beside one image take more than the image does.
REPLAYED = [
    ("sft", False, torch.float32, {"batch_size": 1}, states) for states in ("samples", "walk")
]


@pytest.mark.parametrize(
    ("method", "recompute", "dtype", "train", "replayed"),
    [*((*case, None) for case in CASES), *REPLAYED],
)
def test_the_forecast_is_within_a_tenth_of_the_measured_peak(
    method, recompute, dtype, train, replayed, concept, tmp_path, pocket_text_encoder
):
    recipe = parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "low" if recompute else "high"},
            "data": {"folder": str(concept)},
            "method": {"name": method} | METHOD_SETTINGS.get(method, {}),
            "lora": {"rank": 8},
            "retention": {"weight": 1, "states": replayed, "per_step": 4} if replayed else {},
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
    replays = None
    if replayed:
        images = torch.zeros(1, family.channels, 16, 16)
        replay = Replay(pocket_text_encoder.context([""]), images)
        replays = Replays([replay], count=4, micro_batches=1, seed=0)
    loader = Loader(rows, recipe.train.batch_size, seed=0, replays=replays)
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
    # The zero adapters of the base model.
    tensors += [p for name, p in student.items() if ".lora_B." in name]
    if recipe.method.reward_name:  # the reward is given decoded images
        tensors += family.load_vae(CPU, torch.float32).autoencoder.parameters()
    resident = sum(tensor.nbytes for tensor in tensors)
    with LiveBytes() as meter:
        for _ in train_steps(
            session.roles,
            recipe.objective,
            loader,
            session.trainable,
            session.optimizer,
            session.teacher,
            CPU,
            plan,
        ):
            pass
    side = family.resolution, family.resolution
    captions = [example.caption for example in examples]
    memory = forecast(recipe, family, side, captions, dtype, recompute)
    assert memory.peak == pytest.approx(resident + meter.peak, rel=0.1)
    # The forecast counts the optimizer's moments, which are created in the first step.
    assert resident < memory.resident < memory.peak


def test_the_forecast_works_where_loss_steps_are_drawn_at_random():
    """The forecast runs on meta tensors, so the draw must not read values."""
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
    memory = forecast(
        recipe, load_family("pocket"), (side, side), ["a toy"], torch.float32, low_memory=True
    )
    assert 0 < memory.resident < memory.peak
