"""Student, teacher and base on the pocket network: their weights at the start and later, and which
of them gets gradients."""

from itertools import pairwise

import pytest
import torch

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.sampling import noise_for
from dopsd.methods import DOPSD
from dopsd.training.adapters import ADAPTER, add_lora, base_tensors, coverage, lora_pairs
from dopsd.training.loop import generator_at
from dopsd.training.roles import Teacher, make_roles

CPU = torch.device("cpu")


class Setup:
    """A pocket denoiser with LoRA, its roles, and a batch whose teacher sees two images."""

    def __init__(self, pocket, text_encoder, decay=0.5, checkpointing=False):
        self.denoiser = pocket.load_denoiser(CPU, torch.float32)
        if checkpointing:
            self.denoiser.network.enable_gradient_checkpointing()
        self.student = add_lora(self.denoiser.network, pocket.lora_targets, rank=4, alpha=8, seed=0)
        self.teacher = Teacher(self.student, decay)

        def schedule(nfe, h, w):
            return pocket.schedule(nfe or 4, h, w)

        self.roles = make_roles(self.denoiser, self.student, self.teacher, schedule)
        from PIL import Image

        prompts = ("a star", "a big toy at the left")
        images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
        self.batch = Batch(
            noise_for([5, 6], pocket.channels, 16, 16).start,
            text_encoder.context(prompts),
            prompts,
            torch.ones(2),
            privileged=text_encoder.context(prompts, images),
        )

    def move_student(self):
        """Away from the base model."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.student.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    def gradients(self, method=None):
        for piece in (method or DOPSD()).losses(self.roles, self.batch, generator_at(0, 0)):
            piece.surrogate.backward()
        gradients = {name: p.grad.clone() for name, p in self.student.items()}
        for parameter in self.student.values():
            parameter.grad = None
        return gradients


def call(velocity, setup):
    return velocity(setup.batch.latents, torch.tensor([0.9, 0.5]), setup.batch.context)


def test_all_three_roles_are_the_base_model_at_the_start(pocket, pocket_text_encoder):
    setup = Setup(pocket, pocket_text_encoder)
    plain = call(pocket.load_denoiser(CPU, torch.float32), setup)
    for role in (setup.roles.student, setup.roles.teacher, setup.roles.base):
        assert torch.equal(call(role, setup), plain)


def test_the_base_role_does_not_change_when_the_student_does(pocket, pocket_text_encoder):
    setup = Setup(pocket, pocket_text_encoder)
    plain = call(setup.roles.student, setup)
    setup.move_student()
    assert torch.equal(call(setup.roles.base, setup), plain.detach())
    assert (call(setup.roles.student, setup) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
def test_the_teacher_is_the_moving_average_computed_by_hand(pocket, pocket_text_encoder, decay):
    setup = Setup(pocket, pocket_text_encoder, decay)
    expected = {name: p.detach().double().clone() for name, p in setup.student.items()}
    for _ in range(3):
        setup.move_student()
        setup.teacher.follow()
        for name, parameter in setup.student.items():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, tensor in setup.teacher.tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=1e-6)


def test_only_the_student_gets_gradient(pocket, pocket_text_encoder):
    setup = Setup(pocket, pocket_text_encoder)
    before = {n: p.detach().clone() for n, p in setup.denoiser.network.named_parameters()}
    gradients = setup.gradients()
    assert all(ADAPTER in name for name in gradients)
    assert all(not t.requires_grad for t in setup.teacher.tensors.values())
    for name, parameter in setup.denoiser.network.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_gradient_is_exactly_zero_when_contexts_agree_and_the_teacher_is_the_student(
    pocket, pocket_text_encoder
):
    setup = Setup(pocket, pocket_text_encoder, decay=0.0)
    setup.move_student()
    setup.batch = Batch(
        setup.batch.latents,
        setup.batch.context,
        setup.batch.prompts,
        setup.batch.weight,
        setup.batch.context,
    )
    assert all(not gradient.any() for gradient in setup.gradients().values())


def test_the_gradient_on_pocket_is_that_of_one_summed_loss(pocket, pocket_text_encoder):
    setup = Setup(pocket, pocket_text_encoder)
    setup.move_student()
    gradients = setup.gradients()
    times = pocket.schedule(4, 16, 16).times
    z = torch.randn(setup.batch.latents.shape, generator=generator_at(0, 0))
    total = torch.zeros(())
    for now, after in pairwise(times):
        u = setup.denoiser(z, now.expand(2), setup.batch.context)
        with torch.no_grad():
            target = setup.roles.teacher(z, now.expand(2), setup.batch.privileged)
        total = total + (u - target).square().mean() / 4
        z = (z + (after - now) * u).detach()
    total.backward()
    for name, parameter in setup.student.items():
        assert (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


def test_gradient_checkpointing_changes_nothing(pocket, pocket_text_encoder):
    plain, saving = (
        Setup(pocket, pocket_text_encoder),
        Setup(pocket, pocket_text_encoder, checkpointing=True),
    )
    plain.move_student(), saving.move_student()
    for left, right in zip(plain.gradients().values(), saving.gradients().values(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-7, rtol=1e-5)


def test_lora_reaches_every_attention_and_feed_forward_linear_of_layers_and_refiners(pocket):
    network = pocket.load_denoiser(CPU, torch.float32).network
    reached = coverage(network, pocket.lora_targets, 4)
    blocks = len(network.layers) + len(network.noise_refiner) + len(network.context_refiner)
    assert reached.adapted == 7 * blocks
    student = add_lora(network, pocket.lora_targets, 4, 8, seed=0)
    assert len(lora_pairs(student)) == reached.adapted
    assert sum(p.numel() for p in student.values()) == reached.parameters
    assert not any("adaLN" in name for name in student)


def test_targets_that_match_nothing_are_refused(pocket):
    with pytest.raises(ValueError, match="match no linear layer; try one like"):
        add_lora(
            pocket.load_denoiser(CPU, torch.float32).network, r"layers\.\d+\.ff\.net", 4, 4, seed=0
        )


def test_the_base_tensors_of_lora_have_zero_b(pocket):
    student = add_lora(
        pocket.load_denoiser(CPU, torch.float32).network, pocket.lora_targets, 4, 4, seed=0
    )
    assert all(not b.any() for _, b in lora_pairs(base_tensors(student)).values())
