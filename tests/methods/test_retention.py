"""Retention beside every method: nothing at weight 0, and each form's gradient against a plain
script, on a small denoiser in float64."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dopsd.diffusion.batch import Batch, Replay
from dopsd.methods import (
    DOPSD,
    DPO,
    METHODS,
    PSO,
    SFT,
    DreamBooth,
    Method,
    Objective,
    PSOOnline,
    Retention,
    WithRetention,
)

from .plain import TIMES, Outcome, Plain, batch, context, latents, redness, roles, run, same

EVERY_METHOD = [
    DOPSD(),
    SFT(),
    DreamBooth(class_prompt="a toy"),
    PSO(),
    PSOOnline(reward="red"),
    DPO(beta=1.0),
]
FORMS = [
    Retention(weight=0.7),
    Retention(weight=0.7, space="clean"),
    Retention(weight=0.7, target="data"),
    Retention(weight=0.7, states="walk"),
    Retention(weight=0.7, states="step"),
]
BASE, ROWS = Plain(1), 2


def form_name(form: Retention) -> str:
    return f"{form.states}-{form.target}-{form.space}"


def complete(with_replay: bool = True) -> Batch:
    """A batch with every part that any method may need."""
    prior = Batch(latents(5), context(6), ("p",) * 3, torch.ones(3, dtype=torch.float64))
    replay = Replay(context(8, ROWS), latents(9, ROWS)) if with_replay else None
    return batch(privileged=context(3), rejected=latents(4), prior=prior, replay=replay)


def outcome_of(objective: Objective, data: Batch, student: Plain) -> Outcome:
    return run(objective, roles(student, teacher=Plain(2), base=BASE, score=redness), data, student)


def retention_alone(form: Retention, method: Method, student: Plain) -> Outcome:
    """What retention adds to a method's log and gradient."""
    plain = outcome_of(method, complete(), student)
    both = outcome_of(WithRetention(method, form), complete(), student)
    gradients = [b - a for a, b in zip(plain.gradients, both.gradients, strict=True)]
    log = {name: value - plain.log.get(name, 0.0) for name, value in both.log.items()}
    return Outcome(log, gradients, both.pieces - plain.pieces)


def test_every_method_is_tried():
    assert {method.name for method in EVERY_METHOD} == set(METHODS)


@pytest.mark.parametrize("method", EVERY_METHOD, ids=lambda method: method.name)
@pytest.mark.parametrize("off", ["weight 0", "a batch without replayed prompts"])
def test_without_retention_a_method_is_the_same_bit_for_bit(method, off):
    student, data = Plain(0), complete(with_replay=off == "weight 0")
    objective = WithRetention(method, Retention(weight=0.0 if off == "weight 0" else 1.0))
    plain, other = outcome_of(method, data, student), outcome_of(objective, data, student)
    assert other.log == plain.log and other.pieces == plain.pieces
    assert same(plain.gradients, other.gradients, tolerance=0)


@pytest.mark.parametrize("method", EVERY_METHOD, ids=lambda method: method.name)
@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_a_methods_pieces_keep_their_values_and_only_the_last_of_all_is_marked_last(method, form):
    student = Plain(0)
    parts = roles(student, teacher=Plain(2), base=BASE, score=redness)
    objective = WithRetention(method, form)
    own, all_pieces = (
        list(each.losses(parts, complete(), torch.Generator().manual_seed(7)))
        for each in (method, objective)
    )
    assert [p.surrogate.item() for p in all_pieces[: len(own)]] == [p.surrogate.item() for p in own]
    assert [piece.last for piece in all_pieces] == [False] * (len(all_pieces) - 1) + [True]
    assert {piece.over for piece in all_pieces[len(own) :]} == {"replay"}


@pytest.mark.parametrize("drawn_before", [0, 5])
def test_the_noise_of_retention_depends_on_the_micro_batch_and_not_on_what_the_method_draws(
    drawn_before,
):
    class DrawsMore(SFT):
        def losses(self, roles, batch, rng):
            torch.rand(drawn_before, generator=rng)
            yield from super().losses(roles, batch, rng)

    student = Plain(0)
    expected = retention_alone(FORMS[0], SFT(), student)
    assert same(
        retention_alone(FORMS[0], DrawsMore(), student).gradients, expected.gradients, 1.0, 1e-15
    )


def states_of(form: Retention, student: Plain) -> list[tuple[Tensor, Tensor]]:
    """The z and t at which a form reaches the student, in order."""
    reached = []

    def watched(z, t, c):
        reached.append((z.detach(), t))
        return student(z, t, c)

    parts = roles(watched, base=BASE)
    replay = Replay(context(8, ROWS), latents(9, ROWS))
    rng = torch.Generator().manual_seed(7)
    list(form.losses(parts, replay, latents(1), None, rng))
    return reached


@pytest.mark.parametrize("form", FORMS[:3], ids=form_name)
def test_at_samples_the_gradient_is_that_of_a_plain_script(form):
    """z lies between the image and noise, at a time between 0 and 1; there the student is pulled to
    the base model's velocity, or to noise - image."""
    student, clean, c = Plain(0), latents(9, ROWS), context(8, ROWS)
    ((z, t),) = states_of(form, student)
    assert t.min() > 0 and t.max() < 1 and t[0] != t[1]
    at = t.view(-1, 1, 1, 1).double()
    noise = (z - (1 - at) * clean) / at
    wanted = (noise - clean) if form.target == "data" else BASE(z, t, c).detach()
    weight = t.double() ** 2 if form.space == "clean" else torch.ones(ROWS)
    expected = 0.7 * (weight * ((student(z, t, c) - wanted) ** 2).mean((1, 2, 3))).mean()
    gradients = torch.autograd.grad(expected, list(student.parameters()))
    student.zero_grad()
    parts, replay = roles(student, base=BASE), Replay(c, clean)
    (piece,) = form.losses(parts, replay, latents(1), None, torch.Generator().manual_seed(7))
    piece.surrogate.backward()
    assert piece.log["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(p.grad is None for p in BASE.parameters())
    assert same([p.grad for p in student.parameters()], list(gradients), tolerance=1e-8)


@pytest.mark.parametrize("form", FORMS[3:], ids=form_name)
def test_on_the_rollout_the_gradient_is_that_of_a_plain_script(form):
    """The student's own Euler steps from its first state, the state detached after each."""
    student, c = Plain(0), context(8, ROWS)
    reached = states_of(form, student)
    z, count = reached[0][0], len(reached)
    steps = list(pairwise(TIMES))[:count]
    assert count == 4 or form.states == "step"
    student.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for k, (now, after) in enumerate(steps):
        t = now.expand(ROWS)
        torch.testing.assert_close(reached[k][0], z)
        u = student(z, t, c)
        if form.states == "walk" or k == count - 1:
            share = 4 if form.states == "walk" else 1
            total = total + 0.7 * ((u - BASE(z, t, c).detach()) ** 2).mean() / share
        z = (z + (after - now) * u).detach()
    total.backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    pieces = form.losses(
        roles(student, base=BASE),
        Replay(c),
        latents(1),
        None,
        torch.Generator().manual_seed(7),
    )
    for piece in pieces:
        piece.surrogate.backward()
    assert same([p.grad for p in student.parameters()], expected, tolerance=1e-10)


def test_the_data_target_is_the_prior_piece_of_dreambooth():
    """The same image, noise and time: both are the plain regression on noise - image."""
    student, clean, c = Plain(0), latents(9, ROWS), context(8, ROWS)
    method = DreamBooth(class_prompt="a toy", times="uniform")
    images = Batch(clean, c, ("p",) * ROWS, torch.ones(ROWS, dtype=torch.float64))
    prior = method.matching_error(roles(student), images, clean, torch.Generator().manual_seed(7))
    (piece,) = Retention(weight=1.0, target="data").losses(
        roles(student), Replay(c, clean), clean, None, torch.Generator().manual_seed(7)
    )
    assert piece.surrogate.item() == prior.item()


def test_the_base_target_of_dreambooth_is_retention_on_class_images():
    student, data = Plain(0), complete()
    settings = {"class_prompt": "a toy", "times": "uniform"}
    both, subject_alone = (
        outcome_of(DreamBooth(prior_target="base", prior_weight=weight, **settings), data, student)
        for weight in (1.0, 0.0)
    )
    prior = [b - a for a, b in zip(subject_alone.gradients, both.gradients, strict=True)]
    rng = torch.Generator().manual_seed(7)
    for each in (data.latents, data.prior.latents):  # the subject's noise and time come first
        noise = torch.randn(each.shape, generator=rng, dtype=torch.float64)
        t = torch.rand(3, generator=rng)
    z = (1 - t).view(-1, 1, 1, 1) * data.prior.latents + t.view(-1, 1, 1, 1) * noise
    c = data.prior.context
    loss = ((student(z, t, c) - BASE(z, t, c).detach()) ** 2).mean()
    expected = torch.autograd.grad(loss, list(student.parameters()))
    assert same(prior, list(expected), tolerance=1e-6)
    assert both.log["prior"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_retention_is_0_where_the_student_is_the_base_unless_the_data_is_the_target(form):
    student = Plain(0)
    parts = roles(student, base=student)
    pieces = form.losses(
        parts,
        Replay(context(8, ROWS), latents(9, ROWS)),
        latents(1),
        None,
        torch.Generator().manual_seed(7),
    )
    assert (sum(piece.log["retention"].item() for piece in pieces) == 0) == (form.target == "base")


class Counted:
    """A velocity that counts forwards, and two more where a graph is asked for (its backward)."""

    def __init__(self, module):
        self.module, self.forwards = module, 0

    def __call__(self, z, t, context):
        self.forwards += 3 if torch.is_grad_enabled() else 1
        return self.module(z, t, context)


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_the_announced_cost_is_what_is_computed(form):
    """Of each replayed prompt; where a step is drawn, the mean over the draws of every step."""
    costs = {}
    for seed in range(40):
        student, base = Counted(Plain(0)), Counted(Plain(1))
        rng = torch.Generator().manual_seed(seed)
        list(
            form.losses(
                roles(student, base=base),
                Replay(context(8, ROWS), latents(9, ROWS)),
                latents(1),
                None,
                rng,
            )
        )
        costs[student.forwards + base.forwards] = student
    assert len(costs) == (4 if form.states == "step" else 1)
    assert sum(costs) / len(costs) == form.forwards(4)


def test_the_cost_of_a_step_has_the_replayed_prompts_once_whatever_the_batch():
    on = WithRetention(SFT(), Retention(weight=1.0, per_step=2))
    assert on.forwards_per_step(4, images=1) == 3 + 8
    assert on.forwards_per_step(4, images=16) == 48 + 8
    assert replace(on, retention=Retention(per_step=2)).forwards_per_step(4, images=16) == 48


@pytest.mark.parametrize("states", ["walk", "step"])
def test_the_data_target_is_refused_without_images(states):
    with pytest.raises(ValueError, match="needs states: samples"):
        Retention(weight=1.0, states=states, target="data")
