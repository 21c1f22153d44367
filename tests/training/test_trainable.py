"""Full fine-tuning: float32 master copies of a bf16 network, the teacher's average of them, and the
frozen base."""

import copy

import pytest
import torch
from torch import nn

from dopsd.diffusion.batch import Batch, Context
from dopsd.diffusion.components import Denoiser
from dopsd.diffusion.flow import Schedule
from dopsd.methods import DOPSD, SFT
from dopsd.training.loop import Plan, accumulate_gradient, generator_at
from dopsd.training.roles import Teacher, make_roles, velocity_under
from dopsd.training.trainable import full_student

CPU = torch.device("cpu")


class Plain(Denoiser):
    """Two linear layers in any dtype; the mean of the context and the time are added to z."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)

    def forward(self, z, t, context):
        rows = (
            z.permute(0, 2, 3, 1)
            + context.tokens.mean((1, 2))[:, None, None, None]
            + t[:, None, None, None]
        )
        return self.network(rows.to(self.network[0].weight.dtype)).float().permute(0, 3, 1, 2)


class SameBatch:
    """The same batch at every index."""

    def __init__(self):
        g = torch.Generator().manual_seed(1)
        context = Context(torch.randn(2, 3, 4, generator=g), (3, 3))
        privileged = Context(torch.randn(2, 3, 4, generator=g), (3, 3))
        self.one = Batch(
            torch.randn(2, 4, 2, 2, generator=g), context, ("a", "b"), torch.ones(2), privileged
        )

    def batch(self, index):
        return self.one


def train_by_hand(dtype, method, steps, rate=1e-2, decay=None):
    """Training without a session; the last value is a list of the weights after each step."""
    denoiser = Plain(dtype)
    student = full_student(denoiser.network, CPU)
    teacher = Teacher(student.weights, method.decay if decay is None else decay, student.base, CPU)

    def schedule(nfe, h, w):
        return Schedule(torch.tensor([1.0, 0.5, 0.0]), (0.0, 0.0))

    roles = make_roles(denoiser, student.weights, teacher, schedule, base=student.base)
    optimizer = torch.optim.SGD(student.weights.values(), lr=rate)
    history = []
    for step in range(steps):
        accumulate_gradient(
            roles, method, SameBatch(), CPU, Plan(max_steps=steps, learning_rate=rate), step
        )
        optimizer.step()
        student.publish()
        teacher.follow()
        optimizer.zero_grad(set_to_none=True)
        history.append({name: w.detach().clone() for name, w in student.weights.items()})
    return denoiser, student, teacher, roles, history


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
def test_the_teacher_is_the_float32_average_of_the_master_copies_computed_by_hand(dtype, decay):
    start = {name: p.detach().double() for name, p in Plain(dtype).network.named_parameters()}
    _, _, teacher, _, history = train_by_hand(dtype, DOPSD(), 4, decay=decay)
    expected = start
    for weights in history:
        expected = {n: decay * e + (1 - decay) * weights[n].double() for n, e in expected.items()}
    for name, tensor in teacher.tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=1e-6)
        assert decay == 1 or tensor.dtype == torch.float32
    assert bool(teacher.state) == (0 < decay < 1), (
        "other tensors are those of the student or the base"
    )


def test_updates_below_the_spacing_of_bf16_add_up_in_the_master_copy():
    denoiser = Plain(torch.bfloat16)
    student = full_student(denoiser.network, CPU)
    with torch.no_grad():
        for weight in student.weights.values():
            weight.fill_(1.0)
    student.publish()
    optimizer = torch.optim.SGD(student.weights.values(), lr=1.0)
    lost = nn.Parameter(torch.ones((), dtype=torch.bfloat16))  # without a master copy
    for step in range(8):
        for weight in student.weights.values():
            weight.grad = torch.full_like(weight, 2.0**-10)
        lost.grad = torch.full_like(lost, 2.0**-10)
        optimizer.step(), torch.optim.SGD([lost], lr=1.0).step(), student.publish()
        for name, working in denoiser.network.named_parameters():
            master = student.weights[name]
            assert working.dtype == torch.bfloat16 and torch.equal(working, master.bfloat16())
            assert torch.equal(master, torch.full_like(master, 1 - (step + 1) * 2.0**-10))
    assert lost.item() == 1 and all(p.max() < 1 for p in denoiser.network.parameters())


def test_master_copies_get_the_gradients_of_bf16_forwards_summed_in_float32():
    """Two pieces of a loss against autograd on a copy, whose bf16 gradients are added by hand."""
    denoiser = Plain(torch.bfloat16)
    student = full_student(denoiser.network, CPU)
    twin = copy.deepcopy(denoiser)
    batch, times = SameBatch().one, (1.0, 0.5)
    pieces = [
        lambda d, t=t: d(batch.latents, torch.full((2,), t), batch.context).square().mean()
        for t in times
    ]
    for piece in pieces:
        piece(denoiser).backward()
    assert all(p.grad is None for p in denoiser.network.parameters())
    wanted = {name: torch.zeros(p.shape) for name, p in twin.network.named_parameters()}
    for piece in pieces:
        gradients = torch.autograd.grad(piece(twin), list(twin.network.parameters()))
        for name, gradient in zip(wanted, gradients, strict=True):
            assert gradient.dtype == torch.bfloat16
            wanted[name] += gradient.float()
    for name, master in student.weights.items():
        assert master.grad is not None and master.grad.dtype == torch.float32
        assert torch.equal(master.grad, wanted[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_role_does_not_change_while_every_weight_does(dtype):
    _, student, _, roles, _ = train_by_hand(dtype, SFT(), 3)
    batch, t = SameBatch().one, torch.tensor([0.9, 0.4])
    base_velocity = Plain(dtype)(batch.latents, t, batch.context)
    torch.testing.assert_close(
        roles.base(batch.latents, t, batch.context), base_velocity, atol=1e-6, rtol=1e-6
    )
    assert (roles.student(batch.latents, t, batch.context) - base_velocity).abs().max() > 1e-3
    for name, before in Plain(dtype).network.named_parameters():
        assert not torch.equal(student.weights[name], before.float()), name


def test_a_float32_network_has_no_master_copies():
    denoiser = Plain(torch.float32)
    student = full_student(denoiser.network, CPU)
    assert all(student.weights[name] is p for name, p in denoiser.network.named_parameters())


def test_full_gradients_are_the_same_with_gradient_checkpointing(pocket, pocket_text_encoder):
    gradients = []
    for recompute in (False, True):
        denoiser = pocket.load_denoiser(CPU, torch.bfloat16)
        if recompute:
            denoiser.network.enable_gradient_checkpointing()
        student = full_student(denoiser.network, CPU)
        teacher = Teacher(student.weights, 1.0, student.base)
        roles = make_roles(
            denoiser,
            student.weights,
            teacher,
            lambda nfe, h, w: pocket.schedule(nfe or 4, h, w),
            base=student.base,
        )
        latents = torch.randn(1, pocket.channels, 16, 16, generator=generator_at(0, 1))
        batch = Batch(latents, pocket_text_encoder.context(["a star"]), ("a star",), torch.ones(1))
        (piece,) = SFT().losses(roles, batch, generator_at(0, 0))
        piece.surrogate.backward()
        gradients.append(
            {name: w.grad for name, w in student.weights.items() if w.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 90
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_tensors_of_another_dtype_are_cast_to_the_networks():
    denoiser = Plain(torch.bfloat16)
    tensors = {name: p.detach().double() for name, p in denoiser.network.named_parameters()}
    batch, t = SameBatch().one, torch.tensor([0.9, 0.4])
    velocity = velocity_under(denoiser, tensors)(batch.latents, t, batch.context)
    torch.testing.assert_close(
        velocity, denoiser(batch.latents, t, batch.context), atol=1e-6, rtol=1e-6
    )
