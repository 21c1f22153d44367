"""The optimizer loop: gradient of a step, learning rate, clipping, reports, and what it refuses."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dopsd.diffusion.batch import Batch, Context
from dopsd.diffusion.flow import Schedule
from dopsd.methods import DOPSD, DPO, PSO, SFT, DreamBooth, Loss, Method, Roles
from dopsd.training.loop import Plan, accumulate_gradient, generator_at, train_steps
from dopsd.training.roles import Teacher

CPU = torch.device("cpu")


class Batches:
    """Micro-batches from a list; the same index gives the same batch."""

    def __init__(self, *batches: Batch):
        self.batches = batches

    def batch(self, index: int) -> Batch:
        return self.batches[index % len(self.batches)]


class MeanOutput(Method):
    """Mean of the student's output over images, plus the same over class images if there are any.

    With the network below its gradient is the mean of the latents, whatever the weights are.
    """

    def losses(self, roles, batch, rng):
        loss = self.mean_output(roles, batch)
        counts = {"examples": torch.tensor(float(batch.weight.sum()))}
        yield Loss(loss, {"loss": loss.detach()}, last=batch.prior is None, counts=counts)
        if batch.prior is not None:
            prior = self.mean_output(roles, batch.prior)
            yield Loss(prior, {"loss": prior.detach()}, last=True, over="prior")

    def mean_output(self, roles, batch):
        output = roles.student(batch.latents, torch.ones(len(batch)), batch.context)
        return (batch.weight * output.flatten(1).sum(1)).mean()


def network(*scales: float) -> tuple[dict[str, nn.Parameter], Roles]:
    """A network that multiplies each of two channels by a number, in float64."""
    scale = nn.Parameter(torch.tensor(scales, dtype=torch.float64))
    schedule = Schedule(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), (0.0, 0.0))

    def velocity(z, t, context):
        return scale.view(-1, 1, 1) * z

    @torch.no_grad()
    def frozen_velocity(z, t, context):
        return torch.tensor([0.5, 2.0]).view(-1, 1, 1) * z

    def schedule_of(nfe, height, width):
        return schedule

    return {"scale": scale}, Roles(velocity, frozen_velocity, frozen_velocity, schedule_of)


def images(*values: tuple[float, float], weight: float = 1.0) -> Batch:
    """One image of one latent cell with two channels for each pair of values."""
    count = len(values)
    context = Context(torch.zeros(count, 1, 1), (1,) * count)
    latents = torch.tensor(values, dtype=torch.float64).view(-1, 2, 1, 1)
    return Batch(latents, context, ("",) * count, torch.full((count,), weight))


def gradient(method: Method, *micro_batches: Batch) -> torch.Tensor:
    """Of one optimizer step over these micro-batches."""
    weights, roles = network(1.0, 1.0)
    plan = Plan(max_steps=1, learning_rate=1.0, accumulation_steps=len(micro_batches))
    accumulate_gradient(roles, method, Batches(*micro_batches), CPU, plan, step=0)
    return weights["scale"].grad


FIVE = [(1.0, 2.0), (3.0, -4.0), (5.0, 6.0), (-7.0, 8.0), (9.0, 10.0)]


@pytest.mark.parametrize("cuts", [(5,), (4, 1), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1)])
def test_each_image_of_a_step_weighs_the_same_however_the_step_is_cut(cuts):
    starts = [sum(cuts[:index]) for index in range(len(cuts))]
    parts = [images(*FIVE[start : start + cut]) for start, cut in zip(starts, cuts, strict=True)]
    expected = torch.tensor(FIVE, dtype=torch.float64).sum(0) * 0.2
    torch.testing.assert_close(gradient(MeanOutput(), *parts), expected)


def test_class_images_weigh_the_same_where_micro_batches_bring_different_numbers_of_them():
    first = replace(images(*FIVE[:4]), prior=images((1.0, 0.0)))
    second = replace(images(FIVE[4]), prior=images((2.0, 0.0), (3.0, 0.0), (6.0, 0.0)))
    expected = torch.tensor(FIVE, dtype=torch.float64).sum(0) * 0.2 + torch.tensor([12.0 / 4, 0.0])
    torch.testing.assert_close(gradient(MeanOutput(), first, second), expected)


@pytest.mark.parametrize(
    "method",
    [SFT(), DOPSD(), DPO(beta=1.0), PSO(beta=0.01), DreamBooth(class_prompt="a toy")],
    ids=lambda method: method.name,
)
def test_a_step_of_every_method_is_the_mean_of_its_micro_batches_weighted_by_their_images(method):
    def complete(batch: Batch) -> Batch:
        rejected, context = 2 * batch.latents, batch.context
        parts = {"privileged": context, "rejected": rejected, "prior": batch}
        return replace(batch, **parts)

    micro_batches = [complete(images(*FIVE[:4])), complete(images(FIVE[4]))]
    expected = torch.zeros(2, dtype=torch.float64)
    for index, (batch, share) in enumerate(zip(micro_batches, (0.8, 0.2), strict=True)):
        weights, roles = network(1.0, 1.0)
        for piece in method.losses(roles, batch, generator_at(0, index)):
            piece.surrogate.backward()
        expected += share * weights["scale"].grad
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(gradient(method, *micro_batches), expected)


@pytest.mark.parametrize(
    ("lr_schedule", "expected"),
    [
        ("constant", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 7: 1.0, 9: 1.0}),
        (
            "cosine",
            {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 7: 0.5, 9: (1 - math.sqrt(3) / 2) / 2},
        ),
    ],
)
def test_the_learning_rate_warms_up_linearly_and_then_stays_or_falls_as_a_cosine(
    lr_schedule, expected
):
    plan = Plan(max_steps=10, learning_rate=3e-4, warmup_steps=4, lr_schedule=lr_schedule)
    rates = {step: plan.learning_rate_at(step) / 3e-4 for step in expected}
    assert rates == pytest.approx(expected, rel=1e-12)


def train(weights, roles, batches, plan, method=None, start=0):
    optimizer, teacher = torch.optim.SGD(weights.values(), lr=123.0), Teacher(weights, 1.0)
    method = method or MeanOutput()
    return train_steps(roles, method, batches, weights, optimizer, teacher, CPU, plan, start)


def test_each_update_is_that_of_sgd_at_the_rate_of_its_step_with_the_gradient_clipped():
    """The gradient is (3, 4), of norm 5, and is scaled to norm 2; torch divides by norm + 1e-6."""
    weights, roles = network(10.0, 20.0)
    plan = Plan(
        max_steps=4, learning_rate=0.5, warmup_steps=2, lr_schedule="cosine", max_grad_norm=2.0
    )
    expected = torch.tensor([10.0, 20.0], dtype=torch.float64)
    for report in train(weights, roles, Batches(images((3.0, 4.0))), plan):
        rate = {1: 0.25, 2: 0.5, 3: 0.5, 4: 0.25}[report.step]
        expected -= rate * 2.0 * torch.tensor([0.6, 0.8])
        assert report.learning_rate == pytest.approx(rate, rel=1e-12)
        assert report.grad_norm == pytest.approx(5.0, rel=1e-12)
        torch.testing.assert_close(weights["scale"].detach(), expected, rtol=1e-6, atol=0)


def test_a_gradient_below_the_limit_is_not_scaled():
    weights, roles = network(10.0, 20.0)
    plan = Plan(max_steps=1, learning_rate=0.5, max_grad_norm=5.1)
    list(train(weights, roles, Batches(images((3.0, 4.0))), plan))
    assert weights["scale"].tolist() == [10 - 1.5, 20 - 2.0]


def test_log_entries_are_averaged_over_images_and_counts_are_summed():
    weights, roles = network(1.0, 1.0)
    plan = Plan(max_steps=1, learning_rate=0.0, accumulation_steps=2)
    batches = Batches(images(*FIVE[:4]), images(FIVE[4]))
    with pytest.raises(ValueError, match="no weight has moved"):
        list(train(weights, roles, Batches(images((0.0, 0.0))), plan))
    (report,) = train(weights, roles, batches, plan)
    assert report.images == 5
    assert report.log["examples"] == 5
    assert report.log["loss"] == pytest.approx(sum(map(sum, FIVE)) / 5)


class OneOfTwo(MeanOutput):
    """Reports the loss under a name that depends on the draw, as methods that draw steps do."""

    def losses(self, roles, batch, rng):
        (piece,) = super().losses(roles, batch, rng)
        name = "large" if batch.latents.sum() > 5 else "small"
        yield replace(piece, log={**piece.log, name: piece.log["loss"]})


def test_a_log_entry_is_averaged_over_the_micro_batches_that_report_it():
    """Latents 1 and 2 report `small`, the images of 10 and 20 `large`."""
    weights, roles = network(1.0, 1.0)
    batches = Batches(
        images((1.0, 0.0)),
        images((10.0, 0.0), (20.0, 0.0)),
        images((2.0, 0.0)),
        images((40.0, 0.0)),
    )
    plan = Plan(max_steps=1, learning_rate=0.1, accumulation_steps=4)
    (report,) = train(weights, roles, batches, plan, OneOfTwo())
    assert report.log["small"] == pytest.approx(1.5)
    assert report.log["large"] == pytest.approx((10 + 20 + 40) / 3)
    assert report.log["loss"] == pytest.approx((1 + 10 + 20 + 2 + 40) / 5)


def test_a_first_step_that_used_no_example_is_not_refused_and_the_next_one_is_checked():
    weights, roles = network(1.0, 1.0)
    plan = Plan(max_steps=2, learning_rate=1.0)
    nothing, zero = images((1.0, 1.0), weight=0.0), images((0.0, 0.0))
    reports = train(weights, roles, Batches(nothing, zero), plan)
    assert next(reports).log["examples"] == 0
    with pytest.raises(ValueError, match="no weight has moved"):
        next(reports)


def two_steps() -> list[tuple[float, float, list[float]]]:
    """Loss, gradient norm and weights after each of two steps."""
    weights, roles = network(1.0, 1.0)
    batches, plan = Batches(images((0.5, 0.25))), Plan(max_steps=2, learning_rate=0.1)
    return [
        (report.log["loss"], report.grad_norm, weights["scale"].tolist())
        for report in train(weights, roles, batches, plan, SFT())
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
