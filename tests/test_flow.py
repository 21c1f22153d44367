"""The one clock against diffusers' schedulers and closed forms."""

import math

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from dopsd.flow import Schedule, Step, clean_of, loss_weight, noise_of, noisy, step


def test_clean_and_noise_come_back_from_the_true_velocity():
    clean, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 1.0])
    z = noisy(clean, noise, t)
    torch.testing.assert_close(clean_of(z, noise - clean, t), clean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(noise_of(z, noise - clean, t), noise, atol=1e-6, rtol=1e-5)


def test_a_step_without_renoising_is_bitwise_the_flow_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    z = torch.randn(2, 4, 8, 8)
    mine = z.clone()
    for s, t in zip(Schedule(scheduler.sigmas, (0.0,) * 4).steps(), scheduler.timesteps, strict=True):
        velocity = torch.randn_like(z)
        z = scheduler.step(velocity, t, z, return_dict=False)[0]
        mine = step(mine, velocity, s)
        assert torch.equal(z, mine)


def test_full_renoising_is_bitwise_the_flow_scheduler_with_stochastic_sampling():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    z = torch.randn(2, 4, 8, 8)
    mine = z.clone()
    for s, t in zip(Schedule(scheduler.sigmas, (1.0,) * 4).steps(), scheduler.timesteps, strict=True):
        velocity = torch.randn_like(z)
        torch.manual_seed(s.index)
        z = scheduler.step(velocity, t, z, return_dict=False)[0]
        mine = step(mine, velocity, s, torch.Generator().manual_seed(s.index))
        torch.testing.assert_close(mine, z, atol=1e-6, rtol=1e-6)


def test_ancestral_euler_is_renoising_by_a_known_share():
    """SDXL-Turbo: r = sigma_up / sigma' on the straight path; 0.960, 0.919, 0.903, 0 on its four steps."""
    scheduler = EulerAncestralDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas.double()
    shares = [
        math.sqrt(b**2 * (a**2 - b**2) / a**2) / b if b > 0 else 0.0
        for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)
    ]
    assert [round(r, 3) for r in shares] == [0.96, 0.919, 0.903, 0.0]
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64) * scheduler.init_noise_sigma
    z = x / (1 + sigmas[0])
    for index, t in enumerate(scheduler.timesteps):
        noise_guess = torch.randn_like(x)
        clean_guess = x - sigmas[index] * noise_guess
        scheduler.is_scale_input_called = True  # the input is already in the space of clean and noise
        x = scheduler.step(noise_guess, t, x, generator=torch.Generator().manual_seed(index), return_dict=False)[0]
        times = sigmas / (1 + sigmas)
        s = Step(index, times[index], times[index + 1], shares[index])
        z = step(z, noise_guess - clean_guess, s, torch.Generator().manual_seed(index))
        torch.testing.assert_close(z, x / (1 + sigmas[index + 1]), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("space", ["velocity", "clean", "noise"])
def test_loss_weights_turn_velocity_errors_into_errors_of_each_space(space):
    z, t = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)
    u, v = torch.randn_like(z), torch.randn_like(z)
    read = {"velocity": lambda w: w, "clean": lambda w: clean_of(z, w, t), "noise": lambda w: noise_of(z, w, t)}[space]
    direct = (read(u) - read(v)).square().mean((1, 2, 3))
    torch.testing.assert_close(loss_weight(t, space) * (u - v).square().mean((1, 2, 3)), direct)
