"""Student, teacher and base on the pocket network: who moves, who gets gradient, what they are at
the start."""

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
    """A pocket denoiser with LoRA, and one batch of a red and a blue image's contexts."""

    def __init__(self, pocket, text_encoder, decay=0.5, checkpointing=False):
        self.denoiser = pocket.load_denoiser(CPU, torch.float32)
        if checkpointing:
            self.denoiser.network.enable_gradient_checkpointing()
        self.student = add_lora(self.denoiser.network, pocket.lora_targets, rank=4, alpha=8, seed=0)
        self.teacher = Teacher(self.student, decay)
        schedule = lambda nfe, h, w: pocket.schedule(nfe or 4, h, w)
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

    def shake(self):
        """Move the student away from the base."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.student.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    def gradients(self, method=None):
        for piece in (method or DOPSD()).losses(self.roles, self.batch, generator_at(0, 0)):
            piece.surrogate.backward()
        found = {name: p.grad.clone() for name, p in self.student.items()}
        for parameter in self.student.values():
            parameter.grad = None
        return found


def call(velocity, setup):
    return velocity(setup.batch.latents, torch.tensor([0.9, 0.5]), setup.batch.context)


def test_all_three_are_the_untouched_model_at_the_start(pocket, pocket_text_encoder):
    setup = Setup(pocket, pocket_text_encoder)
    plain = call(pocket.load_denoiser(CPU, torch.float32), setup)
    for role in (setup.roles.student, setup.roles.teacher, setup.roles.base):
        assert torch.equal(call(role, setup), plain)


def test_the_base_stays_the_untouched_model_when_the_student_moves(pocket, pocket_text_encoder):
    setup = Setup(pocket, pocket_text_encoder)
    plain = call(setup.roles.student, setup)
    setup.shake()
    assert torch.equal(call(setup.roles.base, setup), plain.detach())
    assert (call(setup.roles.student, setup) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
def test_the_teacher_is_the_hand_written_average(pocket, pocket_text_encoder, decay):
    setup = Setup(pocket, pocket_text_encoder, decay)
    expected = {name: p.detach().double().clone() for name, p in setup.student.items()}
    for _ in range(3):
        setup.shake()
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
    setup.shake()
    setup.batch = Batch(
        setup.batch.latents,
        setup.batch.context,
        setup.batch.prompts,
        setup.batch.weight,
        setup.batch.context,
    )
    assert all(not gradient.any() for gradient in setup.gradients().values())


def test_gradient_on_pocket_equals_one_graph_code(pocket, pocket_text_encoder):
    setup = Setup(pocket, pocket_text_encoder)
    setup.shake()
    mine = setup.gradients()
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
        assert (mine[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


def test_gradient_checkpointing_changes_nothing(pocket, pocket_text_encoder):
    plain, saving = (
        Setup(pocket, pocket_text_encoder),
        Setup(pocket, pocket_text_encoder, checkpointing=True),
    )
    plain.shake(), saving.shake()
    for left, right in zip(plain.gradients().values(), saving.gradients().values(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-7, rtol=1e-5)


def test_lora_reaches_every_attention_and_feed_forward_linear_of_layers_and_refiners(pocket):
    network = pocket.load_denoiser(CPU, torch.float32).network
    found = coverage(network, pocket.lora_targets, 4)
    blocks = len(network.layers) + len(network.noise_refiner) + len(network.context_refiner)
    assert found.adapted == 7 * blocks
    student = add_lora(network, pocket.lora_targets, 4, 8, seed=0)
    assert len(lora_pairs(student)) == found.adapted
    assert sum(p.numel() for p in student.values()) == found.parameters
    assert not any("adaLN" in name for name in student)


def test_targets_that_match_nothing_are_refused(pocket):
    with pytest.raises(ValueError, match="match no linear layer; try one like"):
        add_lora(
            pocket.load_denoiser(CPU, torch.float32).network, r"layers\.\d+\.ff\.net", 4, 4, seed=0
        )


def test_untouched_tensors_have_zero_deltas(pocket):
    student = add_lora(
        pocket.load_denoiser(CPU, torch.float32).network, pocket.lora_targets, 4, 4, seed=0
    )
    assert all(not b.any() for _, b in lora_pairs(base_tensors(student)).values())
