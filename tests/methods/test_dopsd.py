"""D-OPSD's gradient against the algorithm as one graph, on a small denoiser in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Schedule
from dopsd.methods import DOPSD

from .plain import TIMES, Plain, batch, context, latents, roles, run, same


def with_teacher(same_contexts: bool = False) -> Batch:
    return batch(privileged=context(2) if same_contexts else context(3))


def one_graph_loss(
    student: nn.Module, teacher: nn.Module, data: Batch, noise: Tensor, weight_of
) -> Tensor:
    """The paper's algorithm with one summed loss over all K steps."""
    z, total = noise, torch.zeros((), dtype=torch.float64)
    for now, after in pairwise(TIMES):
        t = now.expand(3)
        velocity = student(z, t, data.context)
        target = teacher(z, t, data.privileged).detach()
        rows = ((velocity - target) ** 2).mean((1, 2, 3)) * data.weight * weight_of(now)
        total = total + rows.mean() / 4
        z = (z + (after - now) * velocity).detach()
    return total


def check_space(space, weight_of):
    student, teacher, data = Plain(0), Plain(1), with_teacher()
    result = run(DOPSD(space=space), roles(student, teacher), data, student)
    student.zero_grad()
    noise = torch.randn(
        data.latents.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    expected = one_graph_loss(student, teacher, data, noise, weight_of)
    expected.backward()
    assert abs(result.log["loss"] - expected.item()) < 1e-12
    assert same(result.gradients, [p.grad for p in student.parameters()], tolerance=1e-10)


def test_accumulated_gradient_equals_the_one_graph_gradient_in_velocity_space():
    check_space("velocity", lambda t: 1.0)


def test_accumulated_gradient_equals_the_one_graph_gradient_in_clean_space():
    check_space("clean", lambda t: t**2)


def test_gradient_is_exactly_zero_when_contexts_agree_and_the_teacher_is_the_student():
    student = Plain()
    result = run(DOPSD(), roles(student), with_teacher(same_contexts=True), student)
    assert result.log["loss"] == 0
    assert all(not gradient.any() for gradient in result.gradients)


def test_teacher_never_gets_gradient():
    student, teacher = Plain(0), Plain(1)
    for states in ("student", "teacher", "data"):
        run(
            DOPSD(states=states, teacher_guidance=2),
            roles(student, teacher),
            with_teacher(),
            student,
        )
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("states", ["student", "teacher", "data"])
@pytest.mark.parametrize("loss_steps", ["all", 2, (1, 3)])
def test_exactly_the_last_piece_is_marked_last(states, loss_steps):
    method, data = DOPSD(states=states, loss_steps=loss_steps), with_teacher()
    pieces = list(method.losses(roles(Plain()), data, torch.Generator().manual_seed(7)))
    carried = 4 if loss_steps == "all" else 2
    assert [piece.last for piece in pieces] == [False] * (carried - 1) + [True]


class Counted:
    """A velocity that counts forwards, and two more where a graph is asked for (its backward)."""

    def __init__(self, module):
        self.module, self.forwards = module, 0

    def __call__(self, z, t, context):
        self.forwards += 3 if torch.is_grad_enabled() else 1
        return self.module(z, t, context)


@pytest.mark.parametrize("states", ["student", "teacher", "data"])
@pytest.mark.parametrize("loss_steps", ["all", 1, 2, (0, 2)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_announced_cost_is_what_every_draw_of_steps_computes(states, loss_steps, guidance):
    method = DOPSD(states=states, loss_steps=loss_steps, teacher_guidance=guidance)
    data = with_teacher()
    for seed in range(8):
        student, teacher, base = (Counted(Plain(index)) for index in range(3))
        parts = roles(student, torch.no_grad()(teacher), torch.no_grad()(base))
        list(method.losses(parts, data, torch.Generator().manual_seed(seed)))
        assert student.forwards + teacher.forwards + base.forwards == method.forwards(4)


def test_a_list_of_steps_is_the_sum_over_those_steps_alone():
    """The gradient of each step's own loss, at states of the whole rollout."""
    student, teacher, data = Plain(0), Plain(1), with_teacher()
    result = run(DOPSD(loss_steps=(1, 3)), roles(student, teacher), data, student)
    student.zero_grad()
    z = torch.randn(
        data.latents.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    total = 0.0
    for k, (now, after) in enumerate(pairwise(TIMES)):
        u = student(z, now.expand(3), data.context)
        if k in (1, 3):
            target = teacher(z, now.expand(3), data.privileged).detach()
            total = total + (((u - target) ** 2).mean((1, 2, 3)) * data.weight).mean() / 2
        z = (z + (after - now) * u).detach()
    total.backward()
    assert same(result.gradients, [p.grad for p in student.parameters()])


def test_random_steps_are_drawn_from_the_seed_and_each_step_comes_up():
    student = Plain()
    parts = roles(student, Plain(1))
    one, again = (run(DOPSD(loss_steps=1), parts, with_teacher(), student) for _ in range(2))
    assert same(one.gradients, again.gradients, tolerance=0)
    drawn = {DOPSD(loss_steps=1)._loss_steps(4, seed) for seed in range(40)}
    assert drawn == {(0,), (1,), (2,), (3,)}


def test_guidance_extrapolates_from_the_text_only_velocity_through_the_one_with_the_image():
    """It changes nothing where the image makes no difference."""
    student, teacher, data = Plain(0), Plain(1), with_teacher()
    z, t = latents(5), TIMES[1].expand(3)
    with_image, text_only = (
        teacher(z, t, each).detach() for each in (data.privileged, data.context)
    )
    target = DOPSD(teacher_guidance=2.5)._target(roles(student, teacher), z, t, data)
    torch.testing.assert_close(target, text_only + 2.5 * (with_image - text_only))
    guided = run(
        DOPSD(teacher_guidance=2.5),
        roles(student, teacher),
        with_teacher(same_contexts=True),
        student,
    )
    plain = run(DOPSD(), roles(student, teacher), with_teacher(same_contexts=True), student)
    assert same(guided.gradients, plain.gradients)


def test_off_policy_states_are_the_noised_images():
    student, teacher, data = Plain(0), Plain(1), with_teacher()
    reached = []

    def watched(z, t, c):
        return (reached.append(z), student(z, t, c))[1]

    list(
        DOPSD(states="data").losses(roles(watched, teacher), data, torch.Generator().manual_seed(7))
    )
    rng = torch.Generator().manual_seed(7)
    torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
    for z, t in zip(reached, TIMES, strict=False):
        noise = torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
        torch.testing.assert_close(z, (1 - t) * data.latents + t * noise)


@pytest.mark.parametrize(("steps", "why"), [(5, "at most 4"), ((0, 4), "0 to 3")])
def test_steps_that_the_sampler_does_not_have_are_refused(steps, why):
    with pytest.raises(ValueError, match=why):
        DOPSD(loss_steps=steps).refuse_schedule(Schedule(TIMES, (0.0,) * 4))
