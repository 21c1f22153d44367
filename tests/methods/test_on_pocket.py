"""Every method improves its own objective on the pocket model within a few steps.

The objective is measured on the images of a concept and on noise that training did not draw. The
required improvements are larger than differences between seeds.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from dopsd.diffusion.batch import Batch, Replay
from dopsd.diffusion.rollout import sample
from dopsd.evaluation.health import HealthCheck
from dopsd.evaluation.rewards import load_reward
from dopsd.images import to_pixels
from dopsd.methods import (
    DOPSD,
    DPO,
    PSO,
    SFT,
    DreamBooth,
    Method,
    Objective,
    PSOOnline,
    Retention,
    Roles,
    WithRetention,
)
from dopsd.models.base import Family
from dopsd.pocket.benchmark import unrelated_statements
from dopsd.pocket.world.captions import caption_of
from dopsd.pocket.world.datasets import write_concept
from dopsd.training.adapters import add_lora
from dopsd.training.loop import generator_at
from dopsd.training.roles import Teacher, make_roles

CPU = torch.device("cpu")
UNSEEN = 10_000  # first index of noise that training does not draw


@pytest.fixture(scope="module")
def concept_batch(pocket: Family, pocket_text_encoder, tmp_path_factory) -> Batch:
    """Two images of a thing, two of another thing as rejected and as class images, and two other
    prompts."""
    folder = tmp_path_factory.mktemp("concepts")
    vae = pocket.load_vae(CPU, torch.float32)

    def concept(seed: int):
        write_concept(folder / str(seed), seed, images=2)
        images = [Image.open(folder / str(seed) / f"{i}.png").convert("RGB") for i in range(2)]
        texts = [(folder / str(seed) / f"{i}.txt").read_text().strip() for i in range(2)]
        with torch.no_grad():
            return images, texts, vae.latents(torch.stack([to_pixels(image) for image in images]))

    images, texts, latents = concept(1_000_200)
    _, _, rejected = concept(1_000_201)
    context = pocket_text_encoder.context(texts)
    prior = Batch(
        rejected, pocket_text_encoder.context(["a toy", "a toy"]), ("a toy",) * 2, torch.ones(2)
    )
    return Batch(
        latents,
        context,
        tuple(texts),
        torch.ones(2),
        privileged=pocket_text_encoder.context(texts, images),
        rejected=rejected,
        prior=prior,
        replay=Replay(
            pocket_text_encoder.context(["a green tree on beach", "a cyan tower"]), rejected
        ),
    )


def student_of(pocket: Family, method: Method, seed: int):
    denoiser = pocket.load_denoiser(CPU, torch.float32)
    student = add_lora(denoiser.network, pocket.lora_targets, rank=8, alpha=8, seed=seed)
    teacher = Teacher(student, method.decay)
    vae = pocket.load_vae(CPU, torch.float32)
    reward = load_reward("red", CPU)

    @torch.no_grad()
    def score(clean, prompts):
        return reward((vae.pixels(clean) / 2 + 0.5).clamp(0, 1), prompts)

    parts = make_roles(
        denoiser,
        student,
        teacher,
        lambda nfe, h, w: pocket.schedule(nfe or pocket.default_nfe, h, w),
        score,
    )
    return student, teacher, parts


def logged(method: Objective, parts: Roles, batch: Batch, name: str, draws: int = 2) -> float:
    """An entry of the method's log, mean over unseen noise."""
    total = 0.0
    for draw in range(draws):
        for piece in method.losses(parts, batch, generator_at(0, UNSEEN + draw)):
            total += piece.log[name].item() if name in piece.log else 0.0
    return total / draws


def train(
    pocket: Family, method: Method, batch: Batch, steps: int, rate: float, seed: int, name: str
):
    """An entry of the method's log before and after training, and the roles."""
    student, teacher, parts = student_of(pocket, method, seed)
    before = logged(method, parts, batch, name)
    optimizer = torch.optim.AdamW(student.values(), lr=rate, weight_decay=0.0)
    for index in range(steps):
        for piece in method.losses(parts, batch, generator_at(seed, index)):
            piece.surrogate.backward()
        torch.nn.utils.clip_grad_norm_(student.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        teacher.follow()
    return before, logged(method, parts, batch, name), parts


CASES = [  # method, steps, learning rate, log entry, sign of its change, least change
    pytest.param(SFT(), 20, 2e-3, "loss", -1, 0.05, id="sft"),
    pytest.param(DreamBooth(class_prompt="a toy"), 20, 2e-3, "loss", -1, 0.05, id="dreambooth"),
    pytest.param(DOPSD(nfe=2), 20, 2e-3, "loss", -1, 0.05, id="dopsd"),
    pytest.param(DPO(beta=10), 20, 1e-3, "margin", 1, 0.3, id="dpo"),
    pytest.param(PSO(nfe=2), 20, 3e-4, "margin", 1, 0.3, id="pso-rollout"),
    pytest.param(PSO(nfe=2, form="forward"), 20, 1e-3, "margin", 1, 0.3, id="pso-forward"),
]


@pytest.mark.parametrize(("method", "steps", "rate", "name", "sign", "least"), CASES)
def test_a_method_improves_its_own_objective(
    method, steps, rate, name, sign, least, pocket, concept_batch
):
    before, after, _ = train(pocket, method, concept_batch, steps, rate, 0, name)
    assert sign * (after - before) > least, (before, after)


@pytest.mark.parametrize("states", ["samples", "walk", "step"])
def test_retention_is_exactly_0_before_the_first_step(states, pocket, concept_batch):
    method = SFT(nfe=2)
    _, _, parts = student_of(pocket, method, seed=0)
    objective = WithRetention(method, Retention(weight=1.0, states=states))
    assert logged(objective, parts, concept_batch, "retention") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "steps", "rate", "name", "sign", "least"), CASES)
def test_a_method_improves_its_own_objective_with_three_seeds(
    method, steps, rate, name, sign, least, pocket, concept_batch
):
    for seed in range(3):
        before, after, _ = train(pocket, method, concept_batch, steps, rate, seed, name)
        assert sign * (after - before) > least, (seed, before, after)


@pytest.mark.parametrize(
    ("seed", "steps"),
    [(0, 20), *(pytest.param(seed, 40, marks=pytest.mark.slow) for seed in range(3))],
)
def test_online_pso_generates_redder_images_on_unseen_noise_and_stays_healthy(
    seed, steps, pocket, pocket_text_encoder
):
    """The reward is `red`, on prompts of all colours; health is measured on other prompts."""
    prompts = [caption_of(stated) for stated in unrelated_statements(8, stream=9)]
    side = pocket.resolution // pocket.vae_scale_factor
    batch = Batch(
        torch.zeros(8, pocket.channels, side, side),
        pocket_text_encoder.context(prompts),
        tuple(prompts),
        torch.ones(8),
    )
    method = PSOOnline(reward="red", beta=100)
    *_, parts = train(pocket, method, batch, steps, 2e-3, seed, "score")
    scores = {}
    for name, velocity in (("tuned", parts.student), ("base", parts.base)):
        noises = [
            torch.randn(batch.latents.shape, generator=generator_at(2, index)) for index in range(4)
        ]
        schedule = parts.schedule(None, side, side)
        ends = [sample(velocity, noise, schedule, batch.context) for noise in noises]
        scores[name] = torch.cat([parts.score(end, prompts) for end in ends]).numpy()
    gain = scores["tuned"] - scores["base"]
    assert gain.mean() > 2 * gain.std() / np.sqrt(len(gain)), gain.mean()
    context = pocket_text_encoder.context(list(pocket.unrelated_prompts))
    vae = pocket.load_vae(CPU, torch.float32)
    health_check = HealthCheck(
        parts.base,
        vae,
        lambda nfe: pocket.schedule(nfe, side, side),
        4,
        context,
        (pocket.channels, side, side),
    )
    health = health_check.examine(parts.student, vae)
    assert health.healthy, str(health)
