"""Noise path, sampler step and densities against diffusers' schedulers and closed forms."""

import math

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from dopsd.diffusion.flow import (
    Schedule,
    Step,
    clean_of,
    loss_weight,
    noise_of,
    noisy,
    step,
    transition,
)


def test_the_true_velocity_gives_back_clean_and_noise():
    clean, noise, t = (
        torch.randn(3, 2, 4, 4),
        torch.randn(3, 2, 4, 4),
        torch.tensor([0.1, 0.5, 1.0]),
    )
    z = noisy(clean, noise, t)
    torch.testing.assert_close(clean_of(z, noise - clean, t), clean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(noise_of(z, noise - clean, t), noise, atol=1e-6, rtol=1e-5)


def test_a_step_without_renoising_is_bitwise_the_flow_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    z = torch.randn(2, 4, 8, 8)
    own = z.clone()
    for s, t in zip(
        Schedule(scheduler.sigmas, (0.0,) * 4).steps(), scheduler.timesteps, strict=True
    ):
        velocity = torch.randn_like(z)
        z = scheduler.step(velocity, t, z, return_dict=False)[0]
        own = step(own, velocity, s)
        assert torch.equal(z, own)


def test_full_renoising_is_bitwise_the_flow_scheduler_with_stochastic_sampling():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    z = torch.randn(2, 4, 8, 8)
    own = z.clone()
    for s, t in zip(
        Schedule(scheduler.sigmas, (1.0,) * 4).steps(), scheduler.timesteps, strict=True
    ):
        velocity = torch.randn_like(z)
        torch.manual_seed(s.index)
        z = scheduler.step(velocity, t, z, return_dict=False)[0]
        own = step(own, velocity, s, torch.Generator().manual_seed(s.index))
        torch.testing.assert_close(own, z, atol=1e-6, rtol=1e-6)


def test_ancestral_euler_is_renoising_by_a_known_share():
    """SDXL-Turbo: r = sigma_up / sigma' on the straight path; 0.960, 0.919, 0.903, 0 on its four
    steps."""
    scheduler = EulerAncestralDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
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
        scheduler.is_scale_input_called = (
            True  # the input is already in the space of clean and noise
        )
        x = scheduler.step(
            noise_guess, t, x, generator=torch.Generator().manual_seed(index), return_dict=False
        )[0]
        times = sigmas / (1 + sigmas)
        s = Step(index, times[index], times[index + 1], shares[index])
        z = step(z, noise_guess - clean_guess, s, torch.Generator().manual_seed(index))
        torch.testing.assert_close(z, x / (1 + sigmas[index + 1]), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("space", ["velocity", "clean", "noise"])
def test_loss_weights_turn_velocity_errors_into_errors_of_each_space(space):
    z, t = (
        torch.randn(3, 2, 4, 4, dtype=torch.float64),
        torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64),
    )
    u, v = torch.randn_like(z), torch.randn_like(z)
    read = {
        "velocity": lambda w: w,
        "clean": lambda w: clean_of(z, w, t),
        "noise": lambda w: noise_of(z, w, t),
    }[space]
    direct = (read(u) - read(v)).square().mean((1, 2, 3))
    torch.testing.assert_close(loss_weight(t, space) * (u - v).square().mean((1, 2, 3)), direct)


GRID = Schedule(
    torch.tensor([1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0.0], dtype=torch.float64),
    (0.0,) * 8,
)


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_invariant_9_the_log_ratio_of_two_velocities_is_that_of_the_gaussian_densities(eta):
    z, u, v = (torch.randn(2, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    for s in GRID.stochastic(eta, range(7)).steps():
        if s.index == 7:
            continue
        # The step's own formula with its fresh noise left out, not the expanded one under test
        mean_of = {
            name: (1 - s.after) * clean_of(z, w, s.now)
            + s.after * math.sqrt(1 - s.renoise**2) * noise_of(z, w, s.now)
            for name, w in (("u", u), ("v", v))
        }
        z_next = step(z, u, s, torch.Generator().manual_seed(s.index))
        std = s.after * s.renoise
        densities = [Normal(mean_of[name], std).log_prob(z_next).sum() for name in ("u", "v")]
        move = transition(s)
        implied = move.implied(z, z_next)
        ratio = -move.weight * ((u - implied).square().sum() - (v - implied).square().sum())
        torch.testing.assert_close(ratio, densities[0] - densities[1], rtol=1e-10, atol=1e-10)


def test_invariant_9_the_weights_are_those_of_the_published_grids():
    """c^2 / 2 s^2 on Z-Image-Turbo's eight times, eta 1 and 0.5."""
    noisy_steps = {eta: list(GRID.stochastic(eta, range(7)).steps())[:7] for eta in (1, 0.5)}
    weights = {eta: [transition(s).weight for s in steps] for eta, steps in noisy_steps.items()}
    assert weights[1] == pytest.approx(
        [0.0011, 0.0056, 0.0162, 0.0386, 0.0868, 0.2066, 0.6806], abs=1e-4
    )
    assert weights[0.5] == pytest.approx(
        [0.0023, 0.0055, 0.0119, 0.0256, 0.0576, 0.1524, 0.6612], abs=1e-4
    )


def test_invariant_10_eta_near_0_is_euler_and_eta_1_is_renoising():
    z, u = (
        torch.randn(1, 4, 8, 8, dtype=torch.float64),
        torch.randn(1, 4, 8, 8, dtype=torch.float64),
    )
    plain, faint, full = (list(GRID.stochastic(eta, [3]).steps())[3] for eta in (0.0, 1e-9, 1.0))
    assert plain.renoise == 0 and full.renoise == 1
    nearly = step(z, u, faint, torch.Generator().manual_seed(0))
    torch.testing.assert_close(nearly, step(z, u, plain), atol=1e-8, rtol=0)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_invariant_11_a_point_mass_keeps_its_marginal_at_every_step(eta):
    """With the exact velocity of data at the point 0, each state has standard deviation t."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 1, dtype=torch.float64, generator=rng)
    for s in GRID.stochastic(eta, range(7)).steps():
        z = step(z, z / s.now, s, rng)
        if s.after > 0:
            assert (z.std() / s.after).item() == pytest.approx(1, abs=0.01)


def test_invariant_14_a_deterministic_step_has_no_density():
    with pytest.raises(ValueError, match="draws no noise"):
        transition(next(GRID.steps()))
    with pytest.raises(AssertionError):
        GRID.stochastic(0.5, [7])


def test_invariant_12_the_mean_log_ratio_over_transitions_of_an_image_has_a_closed_form():
    """For z' drawn with the true velocity the mean is -w (|u - true|^2 - |v - true|^2)."""
    rng = torch.Generator().manual_seed(1)
    clean, noise, u, v = (
        torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=rng) for _ in range(4)
    )
    s = list(GRID.stochastic(0.5, [4]).steps())[4]
    z, move = noisy(clean, noise, s.now), transition(s)
    many = 40_000
    z_next = step(z.expand(many, 1, 4, 4), (noise - clean).expand(many, 1, 4, 4), s, rng)
    implied = move.implied(z, z_next)
    ratios = -move.weight * ((u - implied).square() - (v - implied).square()).sum((1, 2, 3))
    closed = -move.weight * ((u - noise + clean).square() - (v - noise + clean).square()).sum()
    assert abs(ratios.mean() - closed) < 4 * ratios.std() / math.sqrt(many)


@pytest.mark.parametrize("renoise", [0.0, 0.7, 1.0])
def test_a_step_takes_its_times_from_the_cpu_whatever_device_the_states_are_on(renoise):
    """torch's meta device refuses tensors of two devices as CUDA does, and needs no GPU."""
    z, s = (
        torch.zeros(2, 4, 8, 8, device="meta"),
        Step(0, torch.tensor(0.9), torch.tensor(0.5), renoise),
    )
    assert step(z, z, s, torch.Generator()).device.type == "meta"
    assert noisy(z, z, s.now).device.type == "meta"
