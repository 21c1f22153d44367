"""Offline PSO against the paper's equations as one graph, and its invariants.

The numbers in test names are those of the list of invariants in docs/methods/preference.md.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Schedule
from dopsd.methods import PSO, PSOOnline
from dopsd.methods.preference import Term, pairwise_losses

from .plain import TIMES, Plain, context, latents, pairs, roles, run, run_pairs, same


def errors_of(student, base, z, t, text, wanted):
    error = ((student(z, t, text) - wanted) ** 2).mean((1, 2, 3))
    base_error = ((base(z, t, text) - wanted) ** 2).mean((1, 2, 3)).detach()
    return error - base_error


R = math.sin(0.25 * math.pi)  # eta 0.5
EULER = Schedule(TIMES, (0.0,) * 4)


def flat_pso(
    student,
    base,
    data: Batch,
    beta: float,
    form: str,
    normalise: bool,
    trained: Sequence[int] = range(4),
    shares: Sequence[float] = (R, R, R),
) -> Tensor:
    """The loss of PSO as one graph. Rollout and densities are written with (clean, noise) instead
    of `flow.transition`. shares: r of each step; trained: steps in the margin."""
    rng = torch.Generator().manual_seed(7)

    def draw():
        return torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)

    rollout_steps, generated = [], data.rejected
    if form == "rollout":
        z = draw()
        for k in range(4):
            with torch.no_grad():
                u = student(z, TIMES[k].expand(3), data.context)
            now, after, r = TIMES[k], TIMES[k + 1], (*shares, 0.0)[k]
            if k == 3:
                generated = z - now * u
                break
            fresh = draw()
            std = after * r

            def mean_at(v, z=z, now=now, after=after, r=r):
                return (1 - after) * (z - now * v) + after * math.sqrt(1 - r * r) * (
                    z + (1 - now) * v
                )

            z_next = mean_at(u) + std * fresh
            rollout_steps.append((z, z_next, mean_at, std))
            z = z_next
    slopes = [
        TIMES[k] * (1 - TIMES[k + 1]) - (1 - TIMES[k]) * TIMES[k + 1] * math.sqrt(1 - r * r)
        for k, r in enumerate(shares)
    ]
    w = [
        (c**2 / (2 * (TIMES[k + 1] * r) ** 2)).item()
        for k, (c, r) in enumerate(zip(slopes, shares, strict=True))
    ]
    exact = w
    w = [x * 3 / sum(w) for x in w] if normalise else w
    w = [*w, w[-1]]
    margin = torch.zeros(3, dtype=torch.float64)
    for k in trained:
        t, noise = TIMES[k].expand(3), draw()
        state = (1 - TIMES[k]) * data.latents + TIMES[k] * noise
        margin = margin - beta * w[k] * errors_of(
            student, base, state, t, data.context, noise - data.latents
        )
        if form == "rollout" and k < 3:
            z, z_next, mean_at, std = rollout_steps[k]
            # the log-density ratio itself, rescaled by the weight
            u, v = student(z, t, data.context), base(z, t, data.context).detach()
            ratio = (-((z_next - mean_at(u)) ** 2) + (z_next - mean_at(v)) ** 2).mean((1, 2, 3)) / (
                2 * std**2
            )
            margin = margin - beta * (w[k] / exact[k]) * ratio
        else:
            state = (1 - TIMES[k]) * generated + TIMES[k] * noise
            margin = margin + beta * w[k] * errors_of(
                student, base, state, t, data.context, noise - generated
            )
    return -(data.weight * logsigmoid(margin)).mean()


@pytest.mark.parametrize("form", ["rollout", "forward"])
@pytest.mark.parametrize("weights", ["normalised", "exact"])
@pytest.mark.parametrize("last", ["noised", "left_out"])
def test_invariant_7_the_pieces_gradient_is_that_of_one_graph(form, weights, last):
    student, base, data = Plain(0), Plain(1), pairs()
    result = run(
        PSO(beta=2, form=form, weights=weights, last_step=last),
        roles(student, base=base),
        data,
        student,
    )
    student.zero_grad()
    trained = range(4 if last == "noised" else 3)
    loss = flat_pso(student, base, data, 2, form, weights == "normalised", trained)
    loss.backward()
    assert result.log["loss"] == pytest.approx(loss.item(), abs=1e-12)
    assert same(result.gradients, [p.grad for p in student.parameters()])


@pytest.mark.parametrize("form", ["rollout", "forward"])
def test_eta_own_trains_the_samplers_own_transitions(form):
    """SDXL-Turbo's sampler re-noises by these shares, which no one eta gives."""
    student, base, data, shares = Plain(0), Plain(1), pairs(), (0.960, 0.919, 0.903)
    parts = roles(student, base=base, renoise=(*shares, 0.0))
    result = run(PSO(beta=2, form=form, eta="own", weights="exact"), parts, data, student)
    student.zero_grad()
    loss = flat_pso(student, base, data, 2, form, normalise=False, shares=shares)
    loss.backward()
    assert result.log["loss"] == pytest.approx(loss.item(), abs=1e-12)
    assert same(result.gradients, [p.grad for p in student.parameters()])


def test_eta_own_is_refused_where_the_sampler_draws_no_noise():
    for form in ("rollout", "forward"):
        with pytest.raises(ValueError, match="this model's sampler draws none"):
            PSO(eta="own", form=form).refuse_schedule(EULER)
        PSO(eta="own", form=form).refuse_schedule(Schedule(TIMES, (0.9, 0.9, 0.9, 0.0)))


@pytest.mark.parametrize("form", ["rollout", "forward"])
def test_a_drawn_number_of_steps_is_the_margin_of_these_steps_alone(form):
    student, base, data = Plain(0), Plain(1), pairs()
    method = PSO(beta=2, form=form, loss_steps=1)
    (drawn,) = method._loss_steps(4, 7)
    result = run(method, roles(student, base=base), data, student)
    assert result.pieces == 2 and f"margin_at_{drawn}" in result.log
    if form == "forward":  # the rollout form's noise of later steps depends on the ones before
        student.zero_grad()
        flat_pso(student, base, data, 2, form, True, [drawn]).backward()
        assert same(result.gradients, [p.grad for p in student.parameters()])
    assert {method._loss_steps(4, seed) for seed in range(40)} == {(0,), (1,), (2,), (3,)}


def test_forwards_are_the_calls_with_a_backward_as_two_for_every_number_of_steps():
    for method in (
        PSO(),
        PSO(loss_steps=1),
        PSO(form="forward", loss_steps=2),
        PSO(form="forward", loss_steps=1, reference=False),
        PSO(last_step="left_out"),
    ):
        calls = []

        def counted(z, t, text, calls=calls):
            calls.append(len(z))
            return Plain()(z, t, text)

        pieces = list(method.losses(roles(counted), pairs(), torch.Generator().manual_seed(0)))
        assert len(calls) + 2 * len(pieces) == method.forwards(4)


def test_more_steps_than_the_sampler_has_are_refused():
    with pytest.raises(ValueError, match="5 of the 4 steps that can have a loss"):
        PSO(loss_steps=5).refuse_schedule(EULER)
    with pytest.raises(ValueError, match="4 of the 3 steps that can have a loss"):
        PSO(loss_steps=4, last_step="left_out").refuse_schedule(EULER)


def test_invariant_13_rollouts_without_noise_are_refused_because_losers_would_have_no_gradient():
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.01"):
        PSO(eta=0)
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.01"):
        PSOOnline(reward="red", eta=0)
    student, z, t = Plain(), latents(3), TIMES[1].expand(3)
    own = student(z, t, context(2)).detach()  # what a deterministic rollout implies
    pair = [Term("loser", 0, z, t, own), Term("winner", 0, z, t, latents(5))]
    loser, _ = pairwise_losses(
        roles(student), context(2), pair, 2.0, torch.ones(3, dtype=torch.float64)
    )
    loser.surrogate.backward()
    assert all(p.grad.abs().max() < 1e-12 for p in student.parameters())


def test_invariant_14_every_state_with_a_likelihood_is_of_a_step_that_draws_noise():
    student = Plain()
    for last, pieces in (("noised", 8), ("left_out", 6)):
        result = run_pairs(PSO(last_step=last), student, Plain(1))
        assert result.pieces == pieces
        assert all(math.isfinite(value) for value in result.log.values())
    with pytest.raises(ValueError, match="only the last"):
        PSO(last_step="left_out").refuse_schedule(Schedule(TIMES[-2:], (0.0,)))


def test_invariant_15_exactly_the_times_of_the_sampler_are_trained():
    seen = []

    def watched(z, t, c):
        return (seen.append(t), Plain()(z, t, c))[1]

    for method in (PSO(), PSO(form="forward")):
        seen.clear()
        for piece in method.losses(roles(watched), pairs(), torch.Generator().manual_seed(0)):
            assert piece
        assert {time.item() for t in seen for time in t} == set(TIMES[:-1].tolist())


def test_invariant_18_only_the_forward_form_has_no_drift_on_images_of_the_model_itself():
    """Data drawn from the model itself: expected first gradient 0 for the forward form, within 3
    standard errors."""
    student = Plain()
    rng = torch.Generator().manual_seed(0)
    rows = 64
    weight = torch.ones(rows, dtype=torch.float64)
    text = replace(context(2), tokens=context(2).tokens[:1].expand(rows, 5, 3), lengths=(5,) * rows)

    def generated():
        z = torch.randn(rows, 2, 4, 4, dtype=torch.float64, generator=rng)
        for now, after in pairwise(TIMES):
            with torch.no_grad():
                z = z + (after - now) * student(z, now.expand(rows), text)
        return z

    def drift(method):
        """Squared length of the mean gradient of 40 batches over what chance gives it; about 1
        where the mean is 0."""
        values = []
        for seed in range(40):
            data = Batch(generated(), text, ("",) * rows, weight, rejected=generated())
            student.zero_grad()
            for piece in method.losses(roles(student), data, torch.Generator().manual_seed(seed)):
                piece.surrogate.backward()
            values.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
        values = torch.stack(values)
        return (values.mean(0).square().sum() / (values.var(0).sum() / len(values))).item()

    assert drift(PSO(form="forward", beta=1)) < 2
    assert drift(PSO(form="rollout", beta=1)) > 3
