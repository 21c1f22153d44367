"""The optimizer loop: one step's gradient, the learning rate, clipping, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from dopsd.diffusion.batch import Batch, Context
from dopsd.diffusion.flow import Schedule
from dopsd.methods import SFT, Roles
from dopsd.training.loop import Plan, steps
from dopsd.training.roles import Teacher

CPU = torch.device("cpu")


class Batches:
    """Micro-batches from a list; the same index gives the same batch."""

    def __init__(self, *batches: Batch):
        self.batches = batches

    def batch(self, index: int) -> Batch:
        return self.batches[index % len(self.batches)]


def images(*values: float) -> Batch:
    """One image of 2 x 2 equal latents for each value."""
    count = len(values)
    latents = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    context = Context(torch.zeros(count, 1, 1), (1,) * count)
    return Batch(latents, context, ("",) * count, torch.ones(count))


def two_steps() -> list[tuple[float, float, float]]:
    """Loss, gradient norm and weight after each of two steps of SFT on a network of one number."""
    scale = nn.Parameter(torch.ones(()))
    schedule = Schedule(torch.tensor([1.0, 0.5, 0.0]), (0.0, 0.0))

    def velocity(z, t, context):
        return scale * z

    roles = Roles(velocity, velocity, velocity, lambda nfe, height, width: schedule)
    weights = {"scale": scale}
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    plan = Plan(max_steps=2, learning_rate=0.1, clip=1e9)
    batches, teacher = Batches(images(0.5, 0.5)), Teacher(weights, 1.0)
    return [
        (report.log["loss"], report.grad_norm, scale.item())
        for report in steps(roles, SFT(), batches, weights, optimizer, teacher, CPU, plan)
    ]


def test_settings_of_accelerate_in_the_environment_change_no_number():
    """`accelerate launch` sets the first, and accelerate's own backward would follow both."""
    settings = {
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    }
    child = subprocess.run(
        [sys.executable, "-c", "import test_loop; print(test_loop.two_steps())"],
        cwd=Path(__file__).parent,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert child.stdout.strip() == str(two_steps())
