"""D-OPSD's gradient against the algorithm as one graph, on a small denoiser in float64."""

import math
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Schedule
from dopsd.methods import DOPSD
from dopsd.methods.pull import lengthened

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
@pytest.mark.parametrize("loss_steps", ["all", "last", 1, 2, (0, 2)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"teacher_guidance": 2.0}, {"anchor": 1.0}, {"anchor": 1.0, "correction": "split"}],
)
def test_the_announced_cost_is_the_calls_and_their_mean_where_steps_are_drawn(
    states, loss_steps, settings
):
    method = DOPSD(states=states, loss_steps=loss_steps, **settings)
    costs = {}
    for seed in range(40):
        drawn = method._loss_steps(4, seed)
        if drawn not in costs:
            student, teacher, base = (Counted(Plain(index)) for index in range(3))
            parts = roles(student, torch.no_grad()(teacher), base)
            list(method.losses(parts, with_teacher(), torch.Generator().manual_seed(seed)))
            costs[drawn] = student.forwards + teacher.forwards + base.forwards
    assert len(costs) == ({1: 4, 2: 6}.get(loss_steps, 1))  # every subset is as likely
    assert fmean(costs.values()) == pytest.approx(method.forwards(4), abs=1e-12)


def test_costs_of_the_cheaper_forms():
    assert DOPSD().forwards(4) == 16 and DOPSD().forwards(8) == 32
    assert DOPSD(loss_steps="last").forwards(4) == 4 + 3
    assert DOPSD(loss_steps=1).forwards(4) == 5.5
    assert DOPSD(loss_steps=1, states="data").forwards(4) == 4
    assert DOPSD(anchor=1).forwards(4) == 20


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


def walk(student, data, seed=7, times=TIMES):
    """(index, z, t [B]) at each step of the student's Euler walk from the noise of this seed."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(data.latents.shape, generator=rng, dtype=torch.float64)
    for k, (now, after) in enumerate(pairwise(times)):
        t = now.expand(len(z))
        yield k, z, t
        with torch.no_grad():
            z = z + (after - now) * student(z, t, data.context)


def check_against(expected_loss: Tensor, result, student, tolerance=1e-10):
    """The loss and gradients of a run against a loss written out as one graph."""
    student.zero_grad()
    expected_loss.backward()
    assert result.log["loss"] == pytest.approx(expected_loss.item(), abs=tolerance)
    assert same(result.gradients, [p.grad for p in student.parameters()], tolerance=tolerance)


@pytest.mark.parametrize("space", ["velocity", "clean"])
def test_the_anchor_is_the_distance_of_one_step_estimates_to_the_base_written_out(space):
    """SelfLift: both clean estimates from the same state, base without the image."""
    student, teacher, base, data = Plain(0), Plain(1), Plain(2), with_teacher()
    method = DOPSD(anchor=80.0, space=space)
    result = run(method, roles(student, teacher, base), data, student)
    total, moved = torch.zeros((), dtype=torch.float64), 0.0
    for (
        _,
        z,
        t,
    ) in walk(student, data):
        own, per_image = student(z, t, data.context), t.view(-1, 1, 1, 1)
        wanted = teacher(z, t, data.privileged).detach()
        scale = t**2 if space == "clean" else torch.ones_like(t)
        pull = ((own - wanted) ** 2).mean((1, 2, 3)) * scale
        picture = z - per_image * own
        base_picture = (z - per_image * base(z, t, data.context)).detach()
        stay = ((picture - base_picture) ** 2).mean((1, 2, 3))
        moved += (stay * data.weight).mean().item() / 4
        total = total + ((pull + 80.0 * stay) * data.weight).mean() / 4
    check_against(total, result, student)
    assert result.log["anchor"] == pytest.approx(moved, abs=1e-10)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_step_weights_weigh_the_steps_and_only_their_ratios_matter():
    student, teacher, data = Plain(0), Plain(1), with_teacher()
    parts = roles(student, teacher)
    result = run(DOPSD(step_weights=(8, 4, 2, 1)), parts, data, student)
    total = torch.zeros((), dtype=torch.float64)
    for k, z, t in walk(student, data):
        wanted = teacher(z, t, data.privileged).detach()
        rows = ((student(z, t, data.context) - wanted) ** 2).mean((1, 2, 3)) * data.weight
        total = total + (8, 4, 2, 1)[k] / 3.75 * rows.mean() / 4
    check_against(total, result, student)
    scaled = run(DOPSD(step_weights=(80, 40, 20, 10)), parts, data, student)
    assert same(scaled.gradients, result.gradients)


def test_a_split_correction_has_the_gradient_of_direction_and_length_apart():
    """By autograd on both terms as they are written, the length in the first one a constant."""
    student, teacher, base, data = Plain(0), Plain(1), Plain(2), with_teacher()
    result = run(DOPSD(correction="split"), roles(student, teacher, base), data, student)
    student.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for _, z, t in walk(student, data):
        reference = base(z, t, data.context).detach()
        own = (student(z, t, data.context) - reference).flatten(1)
        pull = (teacher(z, t, data.privileged).detach() - reference).flatten(1)
        cosine = (own * pull).sum(1) / (own.norm(dim=1) * pull.norm(dim=1))
        direction = 2 * own.norm(dim=1).detach() * pull.norm(dim=1) * (1 - cosine)
        length = (own.norm(dim=1) - pull.norm(dim=1)) ** 2
        total = total + ((direction + length) / own.shape[1] * data.weight).mean() / 4
    total.backward()
    assert same(result.gradients, [p.grad for p in student.parameters()], tolerance=1e-10)


def test_a_split_correction_reaches_the_full_length_in_a_direction_that_stays_wrong():
    """A student that can only scale a fixed direction at 60 degrees from the pull: the squared
    error stops at half the length, the split one at all of it."""
    pull, direction = torch.tensor([1.0, 0.0]), torch.tensor([0.5, math.sqrt(0.75)])
    shape = (1, 2, 1, 1)
    for correction, best in (("whole", 0.5), ("split", 1.0)):
        scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        for _ in range(300):
            own = (scale * direction).view(shape)
            wanted = pull.double().view(shape)
            if correction == "split":
                wanted = lengthened(own, wanted, torch.zeros(shape, dtype=torch.float64))
            (gradient,) = torch.autograd.grad(((own - wanted) ** 2).sum(), scale)
            scale = (scale - 0.05 * gradient).detach().requires_grad_()
        assert scale.item() == pytest.approx(best, abs=1e-4)


PLAIN_IN_DISGUISE = [
    {"anchor": 0.0},
    {"step_weights": (3.0, 3.0, 3.0, 3.0)},
    {"loss_steps": 4},
    {"loss_steps": (0, 1, 2, 3)},
]


@pytest.mark.parametrize("settings", PLAIN_IN_DISGUISE, ids=str)
def test_settings_without_effect_are_bit_equal_to_plain(settings):
    student, data = Plain(0), with_teacher()
    parts = roles(student, Plain(1), Plain(2))
    plain, other = (run(DOPSD(**each), parts, data, student) for each in ({}, settings))
    assert all(map(torch.equal, plain.gradients, other.gradients))
    assert plain.log == other.log


def test_one_low_noise_query_is_the_last_step_and_with_one_step_it_is_plain():
    student, data = Plain(0), with_teacher()
    parts = roles(student, Plain(1))
    last, listed = (run(DOPSD(loss_steps=s), parts, data, student) for s in ("last", (3,)))
    assert all(map(torch.equal, last.gradients, listed.gradients)) and last.pieces == 1
    one_step = roles(student, Plain(1), times=TIMES[[0, -1]])
    last, plain = (run(DOPSD(loss_steps=s), one_step, data, student) for s in ("last", "all"))
    assert all(map(torch.equal, last.gradients, plain.gradients)) and last.log == plain.log
    assert DOPSD(loss_steps="last").forwards(1) == DOPSD().forwards(1) == 4


def test_a_split_correction_starts_as_plain_where_the_student_is_the_base():
    student, data = Plain(0), with_teacher()
    parts = roles(student, Plain(1), base=Plain(0))
    plain, split = (run(DOPSD(correction=c), parts, data, student) for c in ("whole", "split"))
    assert same(split.gradients, plain.gradients)


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


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"loss_steps": 5}, "at most 4"),
        ({"loss_steps": (0, 4)}, "0 to 3"),
        ({"step_weights": (1, 2, 3)}, "has 3 weights, and the sampler takes 4 steps"),
    ],
)
def test_steps_that_the_sampler_does_not_have_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        DOPSD(**settings).refuse_schedule(Schedule(TIMES, (0.0,) * 4))
    with pytest.raises(ValueError, match="at least one step must have a weight"):
        DOPSD(step_weights=(0, 0, 0, 0))
