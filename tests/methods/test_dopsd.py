"""D-OPSD's gradient against plain one-graph code, on a denoiser anyone can read, in float64."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from dopsd.batch import Batch, Context
from dopsd.flow import Schedule
from dopsd.methods import DOPSD, Roles

TIMES = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64)


class Plain(nn.Module):
    """A small smooth denoiser: two linear layers over the flattened latent, the time, and the mean context."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2 * 4 * 4 + 1 + 3, 24), nn.Linear(24, 2 * 4 * 4)
        self.double()

    def forward(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        told = torch.cat([z.flatten(1), t[:, None].to(z), context.tokens.mean(1)], 1)
        return self.second(torch.tanh(self.first(told))).view_as(z)


def context(seed: int, rows: int = 3) -> Context:
    tokens = torch.randn(rows, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Context(tokens, (5,) * rows)


def batch(same_contexts: bool = False) -> Batch:
    clean = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    text = context(2)
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    return Batch(clean, text, ("a", "b", "c"), weight, privileged=text if same_contexts else context(3))


def roles(student: nn.Module, teacher: nn.Module) -> Roles:
    return Roles(student, teacher, teacher, lambda nfe, h, w: Schedule(TIMES, (0.0,) * 4))


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters()]


def one_graph_loss(student: nn.Module, teacher: nn.Module, data: Batch, noise: Tensor, weight_of) -> Tensor:
    """The paper's algorithm written flat, one summed loss, all K graphs alive."""
    z, total = noise, torch.zeros((), dtype=torch.float64)
    for now, after in pairwise(TIMES):
        t = now.expand(3)
        mine = student(z, t, data.context)
        target = teacher(z, t, data.privileged).detach()
        rows = ((mine - target) ** 2).mean((1, 2, 3)) * data.weight * weight_of(now)
        total = total + rows.mean() / 4
        z = (z + (after - now) * mine).detach()
    return total


def accumulate(method: DOPSD, parts: Roles, data: Batch) -> float:
    total = 0.0
    for piece in method.losses(parts, data, torch.Generator().manual_seed(7)):
        piece.surrogate.backward()
        total += piece.log["loss"]
    return total


def check_space(space, weight_of):
    torch.manual_seed(0)
    student, teacher, data = Plain(), Plain(), batch()
    total = accumulate(DOPSD(space=space), roles(student, teacher), data)
    mine = gradients(student)
    student.zero_grad()
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = one_graph_loss(student, teacher, data, noise, weight_of)
    expected.backward()
    assert abs(total - expected.item()) < 1e-12
    for left, right in zip(mine, gradients(student), strict=True):
        torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-10)


def test_accumulated_gradient_equals_the_one_graph_gradient_in_velocity_space():
    check_space("velocity", lambda t: 1.0)


def test_accumulated_gradient_equals_the_one_graph_gradient_in_clean_space():
    check_space("clean", lambda t: t**2)


def test_gradient_is_exactly_zero_when_contexts_agree_and_the_teacher_is_the_student():
    torch.manual_seed(0)
    student = Plain()
    total = accumulate(DOPSD(), roles(student, student), batch(same_contexts=True))
    assert total == 0
    assert all(not gradient.any() for gradient in gradients(student))


def test_teacher_never_gets_gradient():
    torch.manual_seed(0)
    student, teacher = Plain(), Plain()
    accumulate(DOPSD(), roles(student, teacher), batch())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_last_piece_and_only_the_last_closes_the_batch():
    student = Plain()
    pieces = list(DOPSD().losses(roles(student, Plain()), batch(), torch.Generator().manual_seed(7)))
    assert [piece.last for piece in pieces] == [False, False, False, True]
