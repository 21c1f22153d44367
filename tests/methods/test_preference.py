"""PSO and Diffusion-DPO against plain one-graph code and the invariants that any pairwise method
must keep.

Numbers in test names are those of the invariants listed in docs/methods/preference.md.
"""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dopsd.config.recipe import load_recipe
from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Schedule, clean_of, noise_of, noisy, transition
from dopsd.methods import DPO, PSO, PSOOnline
from dopsd.methods.preference import Term, pairwise_losses

from .plain import TIMES, Plain, batch, context, latents, roles, run, same

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = [
    pytest.param(method, id=path.stem)
    for path in sorted(RECIPES.rglob("*.yaml"))
    if isinstance(method := load_recipe(path).method, DPO | PSO | PSOOnline)
]


def offline() -> Batch:
    return batch(rejected=latents(4))


def redness(images: Tensor, prompts) -> Tensor:
    return images[:, 0].mean((1, 2)).float()


def every_method():
    return [
        pytest.param(PSO(beta=2), id="pso-rollout"),
        pytest.param(PSO(beta=2, last_step="left_out"), id="pso-rollout-without-last"),
        pytest.param(PSO(beta=2, form="forward"), id="pso-forward"),
        pytest.param(PSO(beta=2, form="forward", weights="exact"), id="pso-forward-exact"),
        pytest.param(DPO(beta=2), id="dpo"),
        pytest.param(DPO(beta=2, times="own_steps", space="noise"), id="dpo-own-steps-noise"),
        pytest.param(PSOOnline(beta=2, reward="red"), id="pso-online"),
    ]


def outcome(method, student, base, data=None, seed=7):
    return run(method, roles(student, base=base, score=redness), data or offline(), student, seed)


# --- one graph, written flat, from the equations
# ------------------------------------------------------------------


def errors_of(student, base, z, t, text, wanted):
    mine = ((student(z, t, text) - wanted) ** 2).mean((1, 2, 3))
    theirs = ((base(z, t, text) - wanted) ** 2).mean((1, 2, 3)).detach()
    return mine - theirs


def flat_pso(
    student, base, data: Batch, beta: float, eta: float, form: str, normalise: bool, last: bool
) -> Tensor:
    """PSO as one graph. The walk and its densities are spelled out with (clean, noise) instead of
    `flow.transition`."""
    rng = torch.Generator().manual_seed(7)
    r = math.sin(eta * math.pi / 2)
    draw = lambda: torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
    sample_in_chunks, generated = [], data.rejected
    if form == "rollout":
        z = draw()
        for k in range(4):
            with torch.no_grad():
                u = student(z, TIMES[k].expand(3), data.context)
            now, after = TIMES[k], TIMES[k + 1]
            if k == 3:
                generated = z - now * u
                break
            fresh = draw()
            std = after * r
            mean_at = lambda v, z=z, now=now, after=after: (
                (1 - after) * (z - now * v) + after * math.sqrt(1 - r * r) * (z + (1 - now) * v)
            )
            z_next = mean_at(u) + std * fresh
            sample_in_chunks.append((z, z_next, mean_at, std))
            z = z_next
    slopes = [
        TIMES[k] * (1 - TIMES[k + 1]) - (1 - TIMES[k]) * TIMES[k + 1] * math.sqrt(1 - r * r)
        for k in range(3)
    ]
    w = [(c**2 / (2 * (TIMES[k + 1] * r) ** 2)).item() for k, c in enumerate(slopes)]
    w = [x * 3 / sum(w) for x in w] if normalise else w
    w = [*w, w[-1]]
    margin = torch.zeros(3, dtype=torch.float64)
    for k in range(4 if last else 3):
        t, noise = TIMES[k].expand(3), draw()
        state = (1 - TIMES[k]) * data.latents + TIMES[k] * noise
        margin = margin - beta * w[k] * errors_of(
            student, base, state, t, data.context, noise - data.latents
        )
        if form == "rollout" and k < 3:
            z, z_next, mean_at, std = sample_in_chunks[k]
            # the log-density ratio itself, with the weight's own scale put back
            u, v = student(z, t, data.context), base(z, t, data.context).detach()
            ratio = (-((z_next - mean_at(u)) ** 2) + (z_next - mean_at(v)) ** 2).mean((1, 2, 3)) / (
                2 * std**2
            )
            own = (slopes[k] ** 2 / (2 * (TIMES[k + 1] * r) ** 2)).item()
            margin = margin - beta * (w[k] / own) * ratio
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
    student, base, data = Plain(0), Plain(1), offline()
    mine = run(
        PSO(beta=2, form=form, weights=weights, last_step=last),
        roles(student, base=base),
        data,
        student,
    )
    student.zero_grad()
    loss = flat_pso(student, base, data, 2, 0.5, form, weights == "normalised", last == "noised")
    loss.backward()
    assert mine.log["loss"] == pytest.approx(loss.item(), abs=1e-12)
    assert same(mine.gradients, [p.grad for p in student.parameters()])


# --- any pairwise method
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", every_method())
def test_invariant_1_an_untouched_student_starts_at_log_2(method):
    student = Plain()
    found = outcome(method, student, student)
    assert found.log["loss"] == pytest.approx(
        math.log(2) * offline().weight.mean().item(), abs=1e-12
    )
    assert found.log["margin"] == 0


def test_invariant_1_the_hinge_starts_at_1_relative_to_the_base():
    student = Plain()
    data = replace(offline(), weight=torch.ones(3, dtype=torch.float64))
    found = outcome(PSO(form="forward", link="hinge"), student, student, data)
    assert found.log["loss"] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("method", [DPO(beta=2), PSO(beta=2, form="forward")])
def test_invariant_2_equal_pictures_teach_nothing_whatever_the_weights(method):
    student, data = Plain(0), offline()
    found = outcome(method, student, Plain(1), replace(data, rejected=data.latents))
    assert found.log["margin"] == 0
    assert all(gradient.abs().max() < 1e-12 for gradient in found.gradients)


@pytest.mark.parametrize("method", [DPO(beta=2), PSO(beta=2, form="forward")])
def test_invariant_3_swapping_the_pair_changes_the_loss_by_the_margin(method):
    student, base = Plain(0), Plain(1)
    data = replace(offline(), weight=torch.ones(3, dtype=torch.float64))
    swapped = replace(data, latents=data.rejected, rejected=data.latents)
    one, other = (outcome(method, student, base, each).log for each in (data, swapped))
    assert other["loss"] - one["loss"] == pytest.approx(one["margin"], abs=1e-10)
    assert other["margin"] == pytest.approx(-one["margin"], abs=1e-12)


@pytest.mark.parametrize("method", [DPO(beta=2), PSO(beta=2, form="forward")])
def test_invariant_3_swapping_the_pair_turns_the_first_gradient_round(method):
    student, data = Plain(0), offline()
    swapped = replace(data, latents=data.rejected, rejected=data.latents)
    one, other = (outcome(method, student, student, each).gradients for each in (data, swapped))
    assert same(one, other, -1)


def terms_of(student_like: Plain) -> list[Term]:
    t = torch.tensor([0.9, 0.75, 0.5], dtype=torch.float64)
    return [
        Term("winner", 0, latents(10), t, latents(11), 0.7),
        Term("loser", 0, latents(12), t, latents(13), 0.7),
        Term("winner", 1, latents(14), t, latents(15), 1.3),
        Term("loser", 1, latents(16), t, latents(17), 1.3),
    ]


def test_invariant_4_the_first_gradient_on_a_velocity_has_a_closed_form():
    """(beta / 2) 2 w (u_ref - wanted) / (D B), minus that for the loser."""
    free = {
        index: Plain()(term.z, term.t, context(2)).detach().requires_grad_()
        for index, term in enumerate(terms_of(Plain()))
    }
    terms = terms_of(Plain())
    fixed = [velocity.detach().clone() for velocity in free.values()]
    at = {id(term.z): index for index, term in enumerate(terms)}
    parts = roles(lambda z, t, c: free[at[id(z)]], base=lambda z, t, c: fixed[at[id(z)]])
    for piece in pairwise_losses(
        parts, context(2), terms, beta=2.0, weight=torch.ones(3, dtype=torch.float64)
    ):
        piece.surrogate.backward()
    for index, term in enumerate(terms):
        sign = 1 if term.branch == "winner" else -1
        expected = (
            sign * (2.0 / 2) * 2 * term.weight * (fixed[index] - term.wanted) / (2 * 4 * 4 * 3)
        )
        torch.testing.assert_close(free[index].grad, expected, atol=1e-14, rtol=1e-10)


def test_invariant_5_a_small_beta_leaves_the_difference_of_two_fine_tunings():
    student, base, data = Plain(0), Plain(1), offline()
    found = outcome(DPO(beta=1e-7), student, base, data)
    assert found.log["loss"] == pytest.approx(math.log(2) * data.weight.mean().item(), abs=1e-6)
    student.zero_grad()
    rng = torch.Generator().manual_seed(7)
    noise = torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
    t = DPO().draw_times(roles(student), data.latents, rng)
    error = lambda clean: (
        (student(noisy(clean, noise, t), t, data.context) - noise + clean) ** 2
    ).mean((1, 2, 3))
    (data.weight * (error(data.latents) - error(data.rejected))).mean().backward()
    assert same(found.gradients, [p.grad for p in student.parameters()], 1e-7 / 2, tolerance=1e-13)


def test_invariant_5_beta_times_c_with_weights_over_c_is_the_same():
    student, base = Plain(0), Plain(1)
    weight = torch.ones(3, dtype=torch.float64)

    def gradients(beta, scale):
        student.zero_grad()
        scaled = [replace(term, weight=term.weight * scale) for term in terms_of(student)]
        for piece in pairwise_losses(roles(student, base=base), context(2), scaled, beta, weight):
            piece.surrogate.backward()
        return [p.grad.clone() for p in student.parameters()]

    assert same(gradients(2.0, 1.0), gradients(20.0, 0.1))


def test_invariant_6_tiling_the_latents_leaves_the_loss_alone():
    """Errors are means: a velocity that works pixel by pixel gives the same margin on four copies
    side by side."""
    pixelwise = lambda z, t, c: 0.3 * z
    other = lambda z, t, c: 0.1 * z
    tiled = lambda x: x.repeat(1, 1, 2, 2)
    told = []
    for change in (lambda x: x, tiled):
        terms = [
            replace(term, z=change(term.z), wanted=change(term.wanted))
            for term in terms_of(Plain())
        ]
        *_, piece = pairwise_losses(
            roles(pixelwise, base=other), context(2), terms, 2.0, torch.ones(3, dtype=torch.float64)
        )
        told.append(piece.log["margin"].item())
    assert told[0] == pytest.approx(told[1], rel=1e-12) and abs(told[0]) > 1e-3


@pytest.mark.parametrize("permutation", [[2, 0, 1], [1, 0, 2]])
def test_invariant_7_the_order_of_the_pairs_does_not_matter(permutation):
    student, base, weight = Plain(0), Plain(1), batch().weight
    results = []
    for order in (range(3), permutation):
        index = torch.tensor(list(order))
        terms = [
            replace(t, z=t.z[index], t=t.t[index], wanted=t.wanted[index])
            for t in terms_of(student)
        ]
        text = replace(context(2), tokens=context(2).tokens[index])
        student.zero_grad()
        for piece in pairwise_losses(roles(student, base=base), text, terms, 2.0, weight[index]):
            piece.surrogate.backward()
        results.append([p.grad.clone() for p in student.parameters()])
    assert same(*results)


def test_invariant_7_micro_batches_add_up_to_the_batch():
    student, base, weight = Plain(0), Plain(1), batch().weight
    gradients = []
    for rows in (slice(0, 3), slice(0, 1), slice(1, 3)):
        terms = [
            replace(t, z=t.z[rows], t=t.t[rows], wanted=t.wanted[rows]) for t in terms_of(student)
        ]
        text = replace(context(2), tokens=context(2).tokens[rows], lengths=context(2).lengths[rows])
        student.zero_grad()
        for piece in pairwise_losses(roles(student, base=base), text, terms, 2.0, weight[rows]):
            piece.surrogate.backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    whole, one, two = gradients
    assert same(whole, [(a + 2 * b) / 3 for a, b in zip(one, two, strict=True)])


def test_invariant_7_one_margin_over_all_steps_is_below_the_mean_of_margins_of_each():
    """Jensen: -log sigmoid is convex, so f(mean of z_k) <= mean of f(z_k)."""
    margins = torch.randn(1000, 4, dtype=torch.float64) * 3
    assert (-logsigmoid(margins.mean(1)) <= -logsigmoid(margins).mean(1) + 1e-12).all()
    student, base, text, weight = Plain(0), Plain(1), context(2), torch.ones(3, dtype=torch.float64)
    terms = terms_of(student)
    *_, together = pairwise_losses(roles(student, base=base), text, terms, 1.0, weight)
    alone = []
    for step in (0, 1):
        own = [term for term in terms if term.step == step]
        *_, piece = pairwise_losses(roles(student, base=base), text, own, 2.0, weight)
        alone.append(piece.log["loss"].item())
    assert together.log["loss"].item() <= sum(alone) / 2


@pytest.mark.parametrize(
    "method", [DPO(), PSO(), PSO(form="forward"), PSOOnline(reward="red"), *SHIPPED]
)
def test_invariant_8_the_loser_pushes_in_every_shipped_recipe_and_by_default(method):
    """Gradient through the loser's terms alone, at the start, where the official customisation code
    has exactly 0."""
    student = Plain()
    pieces = list(
        method.losses(roles(student, score=redness), offline(), torch.Generator().manual_seed(7))
    )
    for loser in pieces[1::2]:
        student.zero_grad()
        loser.surrogate.backward()
        assert any(p.grad.abs().max() > 1e-8 for p in student.parameters())


def test_invariant_8_the_customisation_form_pushes_too():
    method = PSO(form="forward", link="hinge", reference=False, loser_share=0.1, beta=5)
    student = Plain()
    pieces = list(method.losses(roles(student), offline(), torch.Generator().manual_seed(7)))
    student.zero_grad()
    pieces[1].surrogate.backward()
    assert any(p.grad.abs().max() > 1e-8 for p in student.parameters())


def test_invariant_8_a_larger_error_on_the_loser_lowers_the_loss():
    student, base, text, weight = Plain(0), Plain(1), context(2), torch.ones(3, dtype=torch.float64)
    terms, losses = terms_of(student), []
    away = (
        student(terms[1].z, terms[1].t, text).detach() - terms[1].wanted
    )  # from what the loser wants

    for shift in (0.0, 0.5, 1.0):
        moved = lambda z, t, c, shift=shift: (
            student(z, t, c) + (shift * away if z is terms[1].z else 0)
        )
        *_, piece = pairwise_losses(roles(moved, base=base), text, terms, 1.0, weight)
        losses.append(piece.log["loss"].item())
    assert losses[0] > losses[1] > losses[2]


# --- walks and likelihoods
# ----------------------------------------------------------------------------------------


def test_invariant_13_a_walk_without_noise_is_refused_for_its_loser_would_have_no_gradient():
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.01"):
        PSO(eta=0)
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.01"):
        PSOOnline(reward="red", eta=0)
    student, z, t = Plain(), latents(3), TIMES[1].expand(3)
    own = student(z, t, context(2)).detach()  # what a deterministic walk would want of itself
    pair = [Term("loser", 0, z, t, own), Term("winner", 0, z, t, latents(5))]
    loser, _ = pairwise_losses(
        roles(student), context(2), pair, 2.0, torch.ones(3, dtype=torch.float64)
    )
    loser.surrogate.backward()
    assert all(p.grad.abs().max() < 1e-12 for p in student.parameters())


def test_invariant_14_every_state_in_a_likelihood_drew_noise():
    student = Plain()
    for last, pieces in (("noised", 8), ("left_out", 6)):
        found = outcome(PSO(last_step=last), student, Plain(1))
        assert found.pieces == pieces
        assert all(math.isfinite(value) for value in found.log.values())
    with pytest.raises(ValueError, match="only the last"):
        PSO(last_step="left_out").refuse_nfe(1)


def test_invariant_15_every_time_of_the_sampler_is_trained_and_no_other():
    seen = []
    watched = lambda z, t, c: (seen.append(t), Plain()(z, t, c))[1]
    for method in (PSO(), PSO(form="forward")):
        seen.clear()
        for piece in method.losses(roles(watched), offline(), torch.Generator().manual_seed(0)):
            assert piece
        assert {time.item() for t in seen for time in t} == set(TIMES[:-1].tolist())


def test_invariant_17_an_exception_in_the_base_leaves_the_student_as_it_was():
    student = Plain()

    def broken(z, t, c):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        outcome(DPO(), student, broken)
    assert all(p.requires_grad for p in student.parameters()) and torch.is_grad_enabled()


def test_invariant_18_the_forward_form_is_at_rest_where_the_data_is_the_models_own_and_the_rollout_is_not():
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


# --- online
# -------------------------------------------------------------------------------------------------------


def online(score, seed=7, student=None):
    student = student or Plain(0)
    method = PSOOnline(reward="red", beta=2)
    return run(method, roles(student, base=Plain(1), score=score), batch(), student, seed)


def test_invariant_19_any_rising_transform_of_the_score_gives_the_same_gradient():
    plain = online(redness)
    bent = online(lambda images, prompts: redness(images, prompts).mul(3).exp() - 7)
    assert same(plain.gradients, bent.gradients)
    turned = online(lambda images, prompts: -redness(images, prompts))
    assert not same(plain.gradients, turned.gradients)


def test_invariant_19_the_higher_score_is_the_winner_for_every_step(monkeypatch):
    """Each row's winner states are those of the walk whose image scored higher, at every trained
    step."""
    student, states, ends, handed = Plain(0), [], [], []

    def watched(z, t, text):
        states.append(z)
        return student(z, t, text)

    def watching(images, prompts):
        ends.append(images)
        return redness(images, prompts)

    def caught(parts, text, terms, *_, **__):
        handed.extend(terms)
        return ()

    monkeypatch.setattr("dopsd.methods.pso_online.pairwise_losses", caught)
    method = PSOOnline(reward="red", stochastic_steps=(0, 1, 2))
    data = Batch(latents(1, 8), context(2, 8), ("a",) * 8, torch.ones(8))
    list(method.losses(roles(watched, score=watching), data, torch.Generator().manual_seed(3)))
    one, two = states[:4] + ends[:1], states[4:8] + ends[1:]
    won = redness(ends[0], None) > redness(ends[1], None)
    assert 0 < won.sum() < len(won) and [(term.branch, term.step) for term in handed] == [
        (branch, k) for k in range(3) for branch in ("winner", "loser")
    ]
    for term in handed:
        from_one = (won if term.branch == "winner" else ~won).view(-1, 1, 1, 1)
        assert torch.equal(term.z, torch.where(from_one, one[term.step], two[term.step]))
        step = list(Schedule(TIMES, (0.0,) * 4).stochastic(0.5, [0, 1, 2]).steps())[term.step]
        reached = transition(step).share * term.z - transition(step).slope * term.wanted
        went = torch.where(from_one, one[term.step + 1], two[term.step + 1])
        torch.testing.assert_close(reached, went, rtol=0, atol=1e-12)


def test_online_steps_raise_the_score_on_walks_that_were_not_trained_on():
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


def test_invariant_19_ties_and_missing_scores_drop_the_pair():
    calls = iter(range(2))

    def some(images, prompts):
        first = next(calls) == 0
        return torch.tensor([0.5, float("nan"), 1.0]) if first else torch.tensor([0.5, 1.0, 2.0])

    found = online(some)
    assert found.log["pairs"] == 1
    for empty in (0.0, float("nan")):
        nothing = online(lambda images, prompts, empty=empty: torch.full((3,), empty))
        assert nothing.log["pairs"] == 0 and not any(
            gradient.any() for gradient in nothing.gradients
        )


def test_invariant_23_the_online_gradient_is_half_beta_times_that_of_grpo_with_two_walks():
    """At student = base: advantages +-1, gradient of -mean(advantage * log density), written from
    the densities."""
    student, data, beta = Plain(0), batch(), 3.0
    data = replace(data, weight=torch.ones(3, dtype=torch.float64))
    method = PSOOnline(reward="red", beta=beta, stochastic_steps=(1,))
    mine = run(method, roles(student, base=Plain(0), score=redness), data, student)
    student.zero_grad()
    rng = torch.Generator().manual_seed(7)
    rollouts = []
    r = math.sin(0.25 * math.pi)
    start = torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
    bits = Random(7)
    for seeds in [[bits.getrandbits(62) for _ in range(4)] for _ in range(2)]:
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
        mine.gradients, [p.grad for p in student.parameters()], beta / 2 / scale, tolerance=1e-10
    )


@pytest.mark.parametrize(
    ("start", "alike"), [("shared", [True, True, True, False]), ("own", [False] * 4)]
)
def test_what_a_sampler_draws_by_itself_is_shared_by_the_two_walks(start, alike):
    """DMD2's sampler renoises at every step; only step 2 is trained, so nothing before it may tell
    the walks apart."""
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


# --- numerics
# -----------------------------------------------------------------------------------------------------


def test_invariant_26_the_loss_is_finite_for_huge_margins():
    student, base, weight = Plain(0), Plain(1), torch.ones(3, dtype=torch.float64)
    for scale in (1e4, 1e8):
        pieces = list(
            pairwise_losses(roles(student, base=base), context(2), terms_of(student), scale, weight)
        )
        assert math.isfinite(pieces[-1].log["loss"].item())
        for piece in pieces:
            piece.surrogate.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_invariant_26_velocities_in_bfloat16_move_the_margin_by_less_than_two_percent():
    rounded = lambda model: lambda z, t, c: model(z, t, c).bfloat16().double()
    student, base, weight = Plain(0), Plain(1), torch.ones(3, dtype=torch.float64)
    exact, rough = (
        list(pairwise_losses(roles(a, base=b), context(2), terms_of(student), 2.0, weight))[-1]
        .log["margin"]
        .item()
        for a, b in ((student, base), (rounded(student), rounded(base)))
    )
    assert rough == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("method", every_method())
def test_invariant_27_the_same_seed_gives_the_same_pairs(method):
    student, base = Plain(0), Plain(1)
    one, again, other = (outcome(method, student, base, seed=seed) for seed in (7, 7, 8))
    assert one.log == again.log and same(one.gradients, again.gradients, tolerance=0)
    assert one.log != other.log
