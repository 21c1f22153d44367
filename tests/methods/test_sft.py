"""SFT in closed form: no loss at the true velocity, and distributions of the times."""

import math

import pytest
import torch

from dopsd.diffusion.batch import Batch, Context
from dopsd.diffusion.flow import Schedule
from dopsd.methods import SFT, Roles

TIMES = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])


def batch(rows: int, clean: torch.Tensor | None = None) -> Batch:
    clean = torch.randn(rows, 2, 4, 4) if clean is None else clean
    return Batch(
        clean, Context(torch.zeros(rows, 1, 1), (1,) * rows), ("",) * rows, torch.ones(rows)
    )


def roles(student) -> Roles:
    return Roles(student, student, student, lambda nfe, h, w: Schedule(TIMES, (0.0,) * 4))


@pytest.mark.parametrize("times", ["uniform", "logit_normal", "shift", "own_steps"])
def test_the_true_velocity_has_zero_loss(times):
    clean = torch.zeros(5, 2, 4, 4)  # then noise - clean = z / t at every t > 0

    def true(z, t, context):
        return z / t.view(-1, 1, 1, 1)

    (piece,) = SFT(times=times).losses(
        roles(true), batch(5, clean), torch.Generator().manual_seed(0)
    )
    assert piece.log["loss"] < 1e-10 and piece.last


def drawn_times(method: SFT, rows: int = 20_000) -> torch.Tensor:
    seen = []

    def student(z, t, context):
        return (seen.append(t), z)[1]

    data = batch(rows, torch.zeros(rows, 1, 1, 1))
    list(method.losses(roles(student), data, torch.Generator().manual_seed(0)))
    return seen[0]


def kolmogorov_smirnov(sample: torch.Tensor, cdf) -> float:
    ordered = sample.double().sort().values
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    return (cdf(ordered) - steps).abs().max().item()


def test_times_follow_their_distributions():
    critical = 1.63 / math.sqrt(20_000)  # Kolmogorov-Smirnov, 1%
    normal = torch.distributions.Normal(0.0, 1.0)
    assert kolmogorov_smirnov(drawn_times(SFT(times="uniform")), lambda t: t) < critical
    assert (
        kolmogorov_smirnov(drawn_times(SFT(times="logit_normal")), lambda t: normal.cdf(t.logit()))
        < critical
    )
    assert (
        kolmogorov_smirnov(drawn_times(SFT(times="shift", shift=3.0)), lambda t: t / (3 - 2 * t))
        < critical
    )


def test_own_steps_draws_the_samplers_times_and_no_others():
    drawn = drawn_times(SFT(times="own_steps"))
    assert sorted(set(drawn.tolist())) == sorted(TIMES[:-1].tolist())


def test_shift_of_one_is_uniform():
    torch.testing.assert_close(
        drawn_times(SFT(times="shift", shift=1.0)), drawn_times(SFT(times="uniform"))
    )
