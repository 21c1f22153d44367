"""SFT and DreamBooth: times, error spaces, weights and prior preservation.

The numbers in test names are those of the list of invariants in docs/methods/preference.md.
"""

from itertools import pairwise

import pytest
import torch

from dopsd.diffusion.flow import noisy
from dopsd.methods import SFT, DreamBooth

from .plain import TIMES, Plain, batch, context, latents, roles, run, same


def class_batch():
    data = batch()
    return type(data)(latents(8), context(9), ("p",) * 3, data.weight)


def test_invariant_21_the_shift_map_keeps_its_ends_and_1_is_the_identity():
    ends = torch.tensor([0.0, 1.0])
    for s in (1.0, 3.0, 9.9):
        assert torch.equal(s * ends / (1 + (s - 1) * ends), ends)
    draws = [
        SFT(times=times, shift=1).draw_times(
            roles(Plain()), latents(1, 3), torch.Generator().manual_seed(3)
        )
        for times in ("shift", "uniform")
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("space", ["velocity", "clean", "noise"])
def test_invariant_21_each_space_measures_the_error_of_its_own_estimate(space):
    student, data = Plain(0), batch()
    result = run(SFT(space=space, times="uniform"), roles(student), data, student)
    rng = torch.Generator().manual_seed(7)
    noise = torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
    t = torch.rand(3, generator=rng)
    rows = t.double().view(-1, 1, 1, 1)
    z = noisy(data.latents, noise, t)
    u = student(z, t, data.context)
    error = {
        "velocity": u - (noise - data.latents),
        "clean": (z - rows * u) - data.latents,
        "noise": (z + (1 - rows) * u) - noise,
    }[space]
    loss = (data.weight * error.square().mean((1, 2, 3))).mean()
    assert result.log["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_min_snr_is_the_noise_error_times_the_papers_weight():
    """min(SNR, gamma) / SNR, SNR = ((1-t)/t)^2; with a huge gamma it is the noise space."""
    t = torch.linspace(0.05, 0.999, 50, dtype=torch.float64)
    snr = ((1 - t) / t) ** 2
    weight = SFT(space="noise", min_snr_gamma=5).time_weight(t)
    torch.testing.assert_close(weight, (1 - t) ** 2 * snr.clamp(max=5) / snr)
    torch.testing.assert_close(SFT(space="noise", min_snr_gamma=1e9).time_weight(t), (1 - t) ** 2)
    assert SFT(space="noise", min_snr_gamma=5).time_weight(torch.ones(1)).isfinite().all()
    with pytest.raises(ValueError, match="set space: noise"):
        SFT(min_snr_gamma=5)


def test_invariant_22_with_prior_weight_0_dreambooth_is_sft():
    student, data = Plain(0), batch(prior=class_batch())
    dreambooth = run(DreamBooth(class_prompt="p", prior_weight=0), roles(student), data, student)
    sft = run(SFT(), roles(student), data, student)
    assert (
        same(dreambooth.gradients, sft.gradients, tolerance=0)
        and dreambooth.log["loss"] == sft.log["loss"]
    )


def test_invariant_22_with_the_subject_as_its_own_class_dreambooth_is_twice_sft_in_the_mean():
    """Same images and prompts, weight 1, the sampler's own times: over many draws the gradient is
    doubled."""
    student, data = Plain(0), batch()
    doubled, single = [], []
    for seed in range(400):
        dreambooth = DreamBooth(class_prompt="p", times="own_steps")
        doubled.append(
            run(dreambooth, roles(student), batch(prior=data), student, seed).gradients[-1]
        )
        single.append(
            run(SFT(times="own_steps"), roles(student), data, student, seed).gradients[-1]
        )
    mean, twice = torch.stack(doubled).mean(0), 2 * torch.stack(single).mean(0)
    assert (mean - twice).norm() < 0.05 * twice.norm()


def test_invariant_22_class_images_are_trained_with_their_own_prompt_only():
    seen = []
    student = Plain(0)

    def watched(z, t, c):
        return (seen.append((z, c)), student(z, t, c))[1]

    data = batch(prior=class_batch())
    pieces = list(DreamBooth(class_prompt="p").losses(roles(watched), data, torch.Generator()))
    assert [
        c is expected
        for (_, c), expected in zip(seen, (data.context, data.prior.context), strict=True)
    ] == [True] * 2
    assert [piece.last for piece in pieces] == [False, True]


def test_sft_on_the_teachers_samples_learns_what_the_teacher_generates():
    student, teacher = Plain(0), Plain(1)
    data = batch(privileged=context(3))
    result = run(SFT(samples="teacher", times="uniform"), roles(student, teacher), data, student)
    rng = torch.Generator().manual_seed(7)
    z = torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
    for now, after in pairwise(TIMES):
        with torch.no_grad():
            z = z + (after - now) * teacher(z, now.expand(3), data.privileged)
    noise = torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
    t = torch.rand(3, generator=rng)
    error = student(noisy(z, noise, t), t, data.context) - noise + z
    assert result.log["loss"] == pytest.approx(
        (data.weight * error.square().mean((1, 2, 3))).mean().item(), rel=1e-6
    )
