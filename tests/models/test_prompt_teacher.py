"""A teacher whose privilege is a better prompt, against the plain text encoder."""

import pytest
import torch
from PIL import Image

from dopsd.diffusion.batch import Batch
from dopsd.methods import DOPSD, Roles
from dopsd.models import load_family
from dopsd.models.base import TeacherVision

CPU = torch.device("cpu")
PROMPTS = ["a red star", "a blue ring at the left"]
IMAGES = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]


def encoder_of(suffix: str | None, images: bool = True):
    family = load_family("pocket", teacher_vision=TeacherVision("prompt", suffix=suffix))
    return family, family.load_text_encoder(CPU, torch.float32, images=images)


@pytest.mark.parametrize("suffix", [None, "on night in inked style"])
def test_the_teachers_context_is_that_of_its_prompt_alone(pocket_text_encoder, suffix):
    family, encoder = encoder_of(suffix)
    assert family.teacher_context == "prompt"
    read = [f"{prompt} {suffix}" if suffix else prompt for prompt in PROMPTS]
    for prompts, images in ((PROMPTS, None), (read, IMAGES)):
        expected = pocket_text_encoder.context(prompts)
        context = encoder.context(PROMPTS, images)
        assert torch.equal(context.tokens, expected.tokens)
        assert context.lengths == expected.lengths
    sizes = [image.size for image in IMAGES]
    assert family.count_tokens(PROMPTS, sizes) == family.count_tokens(read)
    assert family.blank_context(PROMPTS, sizes).lengths == expected.lengths


def test_caches_of_other_teachers_are_not_taken_for_its_own(pocket_text_encoder):
    fingerprints = {encoder_of(suffix)[1].fingerprint for suffix in (None, "bright")}
    assert len(fingerprints | {pocket_text_encoder.fingerprint}) == 3


def test_the_same_prompt_gives_a_loss_of_exactly_0(pocket):
    """At the start of a run, where the teacher is the student."""
    _, encoder = encoder_of(None)
    denoiser = pocket.load_denoiser(CPU, torch.float32)
    latents = torch.randn(2, pocket.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    context, privileged = encoder.context(PROMPTS), encoder.context(PROMPTS, IMAGES)
    batch = Batch(latents, context, tuple(PROMPTS), torch.ones(2), privileged)
    roles = Roles(denoiser, denoiser, denoiser, lambda nfe, h, w: pocket.schedule(2, h, w))
    for piece in DOPSD().losses(roles, batch, torch.Generator().manual_seed(0)):
        assert piece.log["loss"].item() == 0
