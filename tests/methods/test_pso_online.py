"""Online PSO: ranks by the reward, shares what it must, and its gradient is that of GRPO.

The numbers in test names are those of the list of invariants in docs/methods/preference.md.
"""

import math
from dataclasses import replace
from random import Random

import pytest
import torch

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Schedule, clean_of, noise_of, transition
from dopsd.methods import PSOOnline
from dopsd.methods.preference import Term, pairwise_losses

from .plain import TIMES, Plain, batch, context, latents, redness, roles, run, same


def online(score, seed=7, student=None):
    student = student or Plain(0)
    method = PSOOnline(reward="red", beta=2)
    return run(method, roles(student, base=Plain(1), score=score), batch(), student, seed)


def test_invariant_19_any_increasing_transform_of_the_score_gives_the_same_gradient():
    plain = online(redness)
    increasing = online(lambda images, prompts: redness(images, prompts).mul(3).exp() - 7)
    assert same(plain.gradients, increasing.gradients)
    decreasing = online(lambda images, prompts: -redness(images, prompts))
    assert not same(plain.gradients, decreasing.gradients)


def test_invariant_19_the_higher_score_is_the_winner_for_every_step(monkeypatch):
    """The winner's states of each row are those of the rollout whose image scored higher, at every
    trained step."""
    student, states, ends, terms = Plain(0), [], [], []

    def watched(z, t, text):
        states.append(z)
        return student(z, t, text)

    def score(images, prompts):
        ends.append(images)
        return redness(images, prompts)

    def recorded(of_roles, text, of_terms, *_, **__):
        terms.extend(of_terms)
        return ()

    monkeypatch.setattr("dopsd.methods.pso_online.pairwise_losses", recorded)
    method = PSOOnline(reward="red", stochastic_steps=(0, 1, 2))
    data = Batch(latents(1, 8), context(2, 8), ("a",) * 8, torch.ones(8))
    list(method.losses(roles(watched, score=score), data, torch.Generator().manual_seed(3)))
    one, two = states[:4] + ends[:1], states[4:8] + ends[1:]
    won = redness(ends[0], None) > redness(ends[1], None)
    assert 0 < won.sum() < len(won) and [(term.branch, term.step) for term in terms] == [
        (branch, k) for k in range(3) for branch in ("winner", "loser")
    ]
    for term in terms:
        from_one = (won if term.branch == "winner" else ~won).view(-1, 1, 1, 1)
        assert torch.equal(term.z, torch.where(from_one, one[term.step], two[term.step]))
        step = list(Schedule(TIMES, (0.0,) * 4).stochastic(0.5, [0, 1, 2]).steps())[term.step]
        reached = transition(step).share * term.z - transition(step).slope * term.wanted
        z_next = torch.where(from_one, one[term.step + 1], two[term.step + 1])
        torch.testing.assert_close(reached, z_next, rtol=0, atol=1e-12)


def test_training_raises_the_score_on_rollouts_that_were_not_trained_on():
    student, rows = Plain(0), 64
    data = Batch(
        latents(1, rows), context(2, rows), ("a",) * rows, torch.ones(rows, dtype=torch.float64)
    )
    method, parts = PSOOnline(reward="red", beta=2), roles(student, base=Plain(0), score=redness)

    def score() -> float:
        return (
            sum(
                run(method, parts, data, student, seed=seed).log["score"]
                for seed in range(900, 908)
            )
            / 8
        )

    before, optimizer = score(), torch.optim.SGD(student.parameters(), lr=0.05)
    for seed in range(20):
        optimizer.zero_grad()
        for piece in method.losses(parts, data, torch.Generator().manual_seed(seed)):
            piece.surrogate.backward()
        optimizer.step()
    assert score() > before + 0.02


def test_invariant_19_pairs_with_equal_or_missing_scores_are_left_out():
    calls = iter(range(2))

    def some(images, prompts):
        first = next(calls) == 0
        return torch.tensor([0.5, float("nan"), 1.0]) if first else torch.tensor([0.5, 1.0, 2.0])

    result = online(some)
    assert result.log["pairs"] == 1
    for empty in (0.0, float("nan")):
        nothing = online(lambda images, prompts, empty=empty: torch.full((3,), empty))
        assert nothing.log["pairs"] == 0 and not any(
            gradient.any() for gradient in nothing.gradients
        )


def test_invariant_23_the_gradient_is_half_beta_times_that_of_grpo_with_two_rollouts():
    """At student = base: advantages +-1, gradient of -mean(advantage * log density), written from
    the densities."""
    student, data, beta = Plain(0), batch(), 3.0
    data = replace(data, weight=torch.ones(3, dtype=torch.float64))
    method = PSOOnline(reward="red", beta=beta, stochastic_steps=(1,))
    result = run(method, roles(student, base=Plain(0), score=redness), data, student)
    student.zero_grad()
    rng = torch.Generator().manual_seed(7)
    rollouts = []
    r = math.sin(0.25 * math.pi)
    start = torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
    bits = Random(7)
    for seeds in [[2**31 + bits.getrandbits(31) for _ in range(4)] for _ in range(2)]:
        z = start
        for k in range(4):
            now, after = TIMES[k], TIMES[k + 1]
            with torch.no_grad():
                u = student(z, now.expand(3), data.context)
            if k == 1:
                drawn = torch.Generator().manual_seed(seeds[k])
                fresh = torch.randn(z.shape, generator=drawn, dtype=torch.float64)
                state = z
                mean = (1 - after) * clean_of(z, u, now) + after * math.sqrt(1 - r * r) * noise_of(
                    z, u, now
                )
                z = went = mean + after * r * fresh
            else:
                z = z + (after - now) * u
        rollouts.append((state, went, redness(z, None).double()))
    scores = torch.stack([score for *_, score in rollouts])
    advantages = (scores - scores.mean(0)) / scores.std(0, correction=0)
    now, after = TIMES[1], TIMES[2]
    objective = 0.0
    for (state, went, _), advantage in zip(rollouts, advantages, strict=True):
        u = student(state, now.expand(3), data.context)
        mean = (1 - after) * clean_of(state, u, now) + after * math.sqrt(1 - r * r) * noise_of(
            state, u, now
        )
        log_density = -((went - mean) ** 2).mean((1, 2, 3)) / (2 * (after * r) ** 2)
        objective = objective - (advantage * log_density).mean()
    objective.backward()
    step = list(Schedule(TIMES, (0.0,) * 4).stochastic(0.5, [1]).steps())[1]
    scale = transition(step).weight  # ours are normalised to 1
    assert same(
        result.gradients, [p.grad for p in student.parameters()], beta / 2 / scale, tolerance=1e-10
    )


@pytest.mark.parametrize(
    ("start", "alike"), [("shared", [True, True, True, False]), ("own", [False] * 4)]
)
def test_noise_of_steps_that_are_not_trained_is_shared_by_the_two_rollouts(start, alike):
    """DMD2's sampler re-noises at every step. Only step 2 is trained, so the rollouts must not
    differ before it."""
    student, states = Plain(0), []

    def watched(z, t, text):
        states.append(z)
        return student(z, t, text)

    renoising = Schedule(TIMES, (1.0, 1.0, 1.0, 0.0))
    parts = replace(roles(watched, score=redness), schedule=lambda nfe, h, w: renoising)
    method = PSOOnline(reward="red", stochastic_steps=(2,), start=start)
    next(iter(method.losses(parts, batch(), torch.Generator().manual_seed(7))))
    assert [
        torch.equal(one, other) for one, other in zip(states[:4], states[4:8], strict=True)
    ] == alike


def published(clip=None) -> PSOOnline:
    """The settings of the published code for SDXL-Turbo."""
    return PSOOnline(
        reward="red",
        beta=50,
        eta="own",
        start="own",
        weights="exact",
        stochastic_steps=(0, 1, 2),
        clip=clip,
    )


def test_eta_own_takes_the_samplers_noise_and_its_density(monkeypatch):
    """SDXL-Turbo re-noises by shares of its own, and no eta says all three of them."""
    shares = (0.96, 0.92, 0.9, 0.0)
    parts = roles(Plain(0), base=Plain(1), score=redness, renoise=shares)
    terms = []
    monkeypatch.setattr(
        "dopsd.methods.pso_online.pairwise_losses",
        lambda of_roles, text, of_terms, *_, **__: terms.extend(of_terms) or (),
    )
    list(published().losses(parts, batch(), torch.Generator().manual_seed(3)))
    assert [term.step for term in terms] == [0, 0, 1, 1, 2, 2]
    for term in terms:
        now, after, r = TIMES[term.step], TIMES[term.step + 1], shares[term.step]
        slope = now * (1 - after) - (1 - now) * after * math.sqrt(1 - r * r)
        torch.testing.assert_close(term.weight, slope**2 / (2 * (after * r) ** 2))


def test_eta_own_is_refused_where_the_sampler_draws_no_noise():
    with pytest.raises(ValueError, match="this model's sampler draws none"):
        published().refuse_schedule(Schedule(TIMES, (0.0,) * 4))
    published().refuse_schedule(Schedule(TIMES, (0.9, 0.9, 0.9, 0.0)))
    with pytest.raises(ValueError, match="this model's sampler draws none"):
        published().refuse_schedule(Schedule(TIMES, (0.9, 0.0, 0.9, 0.0)))


@pytest.mark.parametrize("clip", [0.1, 0.4])
def test_invariant_20_a_density_ratio_outside_the_window_has_no_gradient(clip):
    """Against one graph in which the ratio itself is clamped."""
    student, base, data, beta = Plain(0), Plain(1), batch(), 2.0
    terms = [
        Term(branch, step, latents(seed), TIMES[step].expand(3), latents(seed + 1), weight)
        for branch, step, seed, weight in (
            ("winner", 0, 11, torch.tensor(0.5)),
            ("loser", 0, 13, torch.tensor(0.5)),
            ("winner", 1, 15, torch.tensor(2.0)),
            ("loser", 1, 17, torch.tensor(2.0)),
        )
    ]
    pieces = pairwise_losses(
        roles(student, base=base), data.context, terms, beta, data.weight, clip=clip
    )
    log = {}
    for piece in pieces:
        piece.surrogate.backward()
        log |= piece.log
    got = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    margin, outside = torch.zeros(3, dtype=torch.float64), 0
    for term in terms:
        u, v = student(term.z, term.t, data.context), base(term.z, term.t, data.context).detach()
        error = ((u - term.wanted) ** 2 - (v - term.wanted) ** 2).mean((1, 2, 3))
        ratio = torch.exp(-term.weight * error)
        clipped = ratio.clamp(1 - clip, 1 + clip)
        outside += (clipped != ratio).sum().item()
        margin = margin + beta * clipped.log() * (1 if term.branch == "winner" else -1)
    loss = -(data.weight * torch.nn.functional.logsigmoid(margin)).mean()
    loss.backward()
    assert log["loss"].item() == pytest.approx(loss.item(), abs=1e-12)
    assert same(got, [p.grad for p in student.parameters()])
    assert 0 < outside < 12


def test_a_window_that_no_ratio_leaves_changes_nothing():
    """A student next to the base, whose ratios are all near 1."""
    student, base = Plain(0), Plain(0)
    with torch.no_grad():
        student.second.bias += 1e-4
    parts = roles(student, base=base, score=redness, renoise=(0.9, 0.9, 0.9, 0.0))
    clipped, plain = (run(published(clip), parts, batch(), student) for clip in (0.1, None))
    assert all(map(torch.equal, clipped.gradients, plain.gradients))
    assert clipped.log == plain.log
