"""Masked loss of SFT, DreamBooth and D-OPSD: a weight at each latent position."""

import pytest
import torch

from dopsd.diffusion.batch import Batch
from dopsd.methods import DOPSD, DPO, SFT, DreamBooth

from .plain import TIMES, Plain, batch, context, latents, roles, run, same

MASKED = [
    SFT(),
    SFT(samples="teacher"),
    DreamBooth(class_prompt="a dog"),
    DOPSD(),
]


def data(mask: torch.Tensor | None) -> Batch:
    prior = Batch(latents(8), context(9), ("p",) * 3, torch.ones(3, dtype=torch.float64))
    return batch(mask=mask, prior=prior, privileged=context(3))


@pytest.mark.parametrize("method", MASKED, ids=str)
def test_a_mask_of_ones_gives_the_very_bits_of_no_mask(method):
    student, teacher = Plain(0), Plain(1)
    with_ones = run(method, roles(student, teacher), data(torch.ones(3, 1, 4, 4)), student)
    without = run(method, roles(student, teacher), data(None), student)
    assert with_ones.log == without.log
    assert same(with_ones.gradients, without.gradients, tolerance=0)


@pytest.mark.parametrize("method", MASKED, ids=str)
def test_the_error_where_the_mask_is_zero_reaches_no_weight(method):
    """A student that is one free velocity per position gets gradient inside the mask alone, from
    the images; class images are not masked."""
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    mask[:, :, 1:3, 1:3] = 0.5
    free = torch.nn.Parameter(torch.zeros(1, 2, 4, 4, dtype=torch.float64))

    def student(z, t, given):
        return free.expand_as(z)

    def gradient(of_mask):
        free.grad = None
        for piece in method.losses(
            roles(student, Plain(1), Plain(2)), data(of_mask), torch.Generator().manual_seed(7)
        ):
            if piece.over == "latents":
                piece.surrogate.backward()
        return free.grad

    assert torch.allclose(gradient(mask), gradient(None) * mask[:1], rtol=1e-12, atol=0)


def test_masked_sft_is_the_mean_over_all_positions_of_mask_times_error():
    """As kohya's trainer weighs it: the mean is not divided by the area of the mask."""
    student, mask = Plain(0), torch.rand(3, 1, 4, 4, dtype=torch.float64)
    method = SFT(times="uniform")
    masked = data(mask)
    rng = torch.Generator().manual_seed(7)
    noise = torch.randn(masked.latents.shape, generator=rng, dtype=torch.float64)
    t = torch.rand(3, generator=rng)
    at = t.double().view(-1, 1, 1, 1)
    velocity = student((1 - at) * masked.latents + at * noise, t, masked.context)
    error = (velocity - (noise - masked.latents)) ** 2
    expected = (masked.weight * (mask * error).mean((1, 2, 3))).mean()
    result = run(method, roles(student), masked, student)
    assert result.log["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_masked_distillation_is_masked_at_every_step_of_the_rollout():
    student, teacher, mask = Plain(0), Plain(1), torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    mask[..., 2:] = 1
    logs = [
        run(DOPSD(), roles(student, teacher), data(each), student).log
        for each in (mask, 1 - mask, None)
    ]
    for key in ("loss", *(f"loss_at_{k}" for k in range(len(TIMES) - 1))):
        assert 0 < logs[0][key] < logs[2][key]
        assert logs[0][key] + logs[1][key] == pytest.approx(logs[2][key])


def test_methods_say_whether_they_take_masks():
    assert all(method.takes_masks for method in MASKED)
    assert not DPO().takes_masks
    assert not DOPSD(teacher_sees="another").takes_masks, "a mask is of the image that is shown"
