"""Loss on pairs: invariants of any pairwise method, checked on PSO, online PSO and Diffusion-DPO.

The numbers in test names are those of the list of invariants in docs/methods/preference.md.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from dopsd.config.recipe import load_recipe
from dopsd.diffusion.flow import noisy
from dopsd.methods import DPO, PSO, PSOOnline
from dopsd.methods.preference import Term, pairwise_losses

from .plain import Plain, batch, context, latents, pairs, redness, roles, run_pairs, same

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = [
    pytest.param(method, id=path.stem)
    for path in sorted(RECIPES.rglob("*.yaml"))
    if isinstance(method := load_recipe(path).method, DPO | PSO | PSOOnline)
]


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


@pytest.mark.parametrize("method", every_method())
def test_invariant_1_a_student_equal_to_the_base_starts_at_log_2(method):
    student = Plain()
    result = run_pairs(method, student, student)
    assert result.log["loss"] == pytest.approx(
        math.log(2) * pairs().weight.mean().item(), abs=1e-12
    )
    assert result.log["margin"] == 0


def test_invariant_1_the_hinge_starts_at_1_relative_to_the_base():
    student = Plain()
    data = replace(pairs(), weight=torch.ones(3, dtype=torch.float64))
    result = run_pairs(PSO(form="forward", link="hinge"), student, student, data)
    assert result.log["loss"] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("method", [DPO(beta=2), PSO(beta=2, form="forward")])
def test_invariant_2_equal_images_teach_nothing_whatever_the_weights(method):
    student, data = Plain(0), pairs()
    result = run_pairs(method, student, Plain(1), replace(data, rejected=data.latents))
    assert result.log["margin"] == 0
    assert all(gradient.abs().max() < 1e-12 for gradient in result.gradients)


@pytest.mark.parametrize("method", [DPO(beta=2), PSO(beta=2, form="forward")])
def test_invariant_3_swapping_the_pair_changes_the_loss_by_the_margin(method):
    student, base = Plain(0), Plain(1)
    data = replace(pairs(), weight=torch.ones(3, dtype=torch.float64))
    swapped = replace(data, latents=data.rejected, rejected=data.latents)
    one, other = (run_pairs(method, student, base, each).log for each in (data, swapped))
    assert other["loss"] - one["loss"] == pytest.approx(one["margin"], abs=1e-10)
    assert other["margin"] == pytest.approx(-one["margin"], abs=1e-12)


@pytest.mark.parametrize("method", [DPO(beta=2), PSO(beta=2, form="forward")])
def test_invariant_3_swapping_the_pair_flips_the_first_gradient(method):
    student, data = Plain(0), pairs()
    swapped = replace(data, latents=data.rejected, rejected=data.latents)
    one, other = (run_pairs(method, student, student, each).gradients for each in (data, swapped))
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


def test_invariant_5_a_small_beta_gives_the_difference_of_two_sft_gradients():
    student, base, data = Plain(0), Plain(1), pairs()
    result = run_pairs(DPO(beta=1e-7), student, base, data)
    assert result.log["loss"] == pytest.approx(math.log(2) * data.weight.mean().item(), abs=1e-6)
    student.zero_grad()
    rng = torch.Generator().manual_seed(7)
    noise = torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
    t = DPO().draw_times(roles(student), data.latents, rng)

    def error(clean):
        return ((student(noisy(clean, noise, t), t, data.context) - noise + clean) ** 2).mean(
            (1, 2, 3)
        )

    (data.weight * (error(data.latents) - error(data.rejected))).mean().backward()
    assert same(result.gradients, [p.grad for p in student.parameters()], 1e-7 / 2, tolerance=1e-13)


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


def test_invariant_6_tiling_the_latents_does_not_change_the_margin():
    """Errors are means: a velocity that works pixel by pixel gives the same margin on four copies
    side by side."""

    def pixelwise(z, t, c):
        return 0.3 * z

    def other(z, t, c):
        return 0.1 * z

    def tiled(x):
        return x.repeat(1, 1, 2, 2)

    margins = []
    for change in (lambda x: x, tiled):
        terms = [
            replace(term, z=change(term.z), wanted=change(term.wanted))
            for term in terms_of(Plain())
        ]
        *_, piece = pairwise_losses(
            roles(pixelwise, base=other), context(2), terms, 2.0, torch.ones(3, dtype=torch.float64)
        )
        margins.append(piece.log["margin"].item())
    assert margins[0] == pytest.approx(margins[1], rel=1e-12) and abs(margins[0]) > 1e-3


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
    of_roles = roles(student, score=redness, renoise=(0.9, 0.9, 0.9, 0.0))  # for eta: own
    pieces = list(method.losses(of_roles, pairs(), torch.Generator().manual_seed(7)))
    for loser in pieces[1::2]:
        student.zero_grad()
        loser.surrogate.backward()
        assert any(p.grad.abs().max() > 1e-8 for p in student.parameters())


def test_invariant_8_the_customisation_form_pushes_too():
    method = PSO(form="forward", link="hinge", reference=False, loser_share=0.1, beta=5)
    student = Plain()
    pieces = list(method.losses(roles(student), pairs(), torch.Generator().manual_seed(7)))
    student.zero_grad()
    pieces[1].surrogate.backward()
    assert any(p.grad.abs().max() > 1e-8 for p in student.parameters())


def test_invariant_8_a_larger_error_on_the_loser_lowers_the_loss():
    student, base, text, weight = Plain(0), Plain(1), context(2), torch.ones(3, dtype=torch.float64)
    terms, losses = terms_of(student), []
    away = (
        student(terms[1].z, terms[1].t, text).detach() - terms[1].wanted
    )  # from the loser's wanted velocity

    for shift in (0.0, 0.5, 1.0):

        def moved(z, t, c, shift=shift):
            return student(z, t, c) + (shift * away if z is terms[1].z else 0)

        *_, piece = pairwise_losses(roles(moved, base=base), text, terms, 1.0, weight)
        losses.append(piece.log["loss"].item())
    assert losses[0] > losses[1] > losses[2]


def test_invariant_17_an_exception_in_the_base_leaves_the_student_as_it_was():
    student = Plain()

    def broken(z, t, c):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        run_pairs(DPO(), student, broken)
    assert all(p.requires_grad for p in student.parameters()) and torch.is_grad_enabled()


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
    def rounded(model):
        return lambda z, t, c: model(z, t, c).bfloat16().double()

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
    one, again, other = (run_pairs(method, student, base, seed=seed) for seed in (7, 7, 8))
    assert one.log == again.log and same(one.gradients, again.gradients, tolerance=0)
    assert one.log != other.log
