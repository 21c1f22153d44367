"""Few-step health: unchanged models are healthy; blur, artefacts, lost diversity, drift and a need
for more steps are detected; and runs use it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import parse_recipe
from dopsd.diffusion.batch import Context
from dopsd.diffusion.flow import Schedule
from dopsd.evaluation.health import FIRST_SEED, OTHER_SEED, PROMPTS, SEEDS, Health, HealthCheck
from dopsd.pocket.metrics.pixels import blurred
from dopsd.pocket.world.scenes import draw_scene, render
from dopsd.runs.train import train

LATENT_SHAPE = (8, 16, 16)  # of pocket
IMAGE_SHAPE = (3, 64, 64)
COUNT = SEEDS * len(PROMPTS)
Pictures = np.ndarray  # float64 [COUNT, 64, 64, 3] in [0, 1]


class PixelVAE:
    """Latents are pixels."""

    fingerprint, vae_scale_factor = "pixels", 1

    def latents(self, pixels: Tensor) -> Tensor:
        return pixels

    def pixels(self, latents: Tensor) -> Tensor:
        return latents


@dataclass
class Drawn:
    """A denoiser whose images are given: by_seed: first seed of the noise -> (images of a sampler
    with one step, images of a sampler with two)."""

    by_seed: dict[int, tuple[Pictures, Pictures]]

    def __call__(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        if t.max() == 1:  # z is the noise itself, which tells the seed
            self.images = self.by_seed[self._first_seed(z)]
        images = self.images[0 if t.max() == 1 else 1]
        pixels = torch.from_numpy(images * 2 - 1).float().permute(0, 3, 1, 2)
        return (z - pixels) / t.view(-1, 1, 1, 1)  # straight to the image from wherever z is

    def _first_seed(self, z: Tensor) -> int:
        for seed in self.by_seed:
            noise = torch.randn(1, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(seed))
            if torch.equal(noise[0], z[0]):
                return seed
        raise AssertionError("noise of an unexpected seed")


def even_schedule(nfe: int) -> Schedule:
    return Schedule(torch.linspace(1, 0, nfe + 1), (0.0,) * nfe)


@pytest.fixture(scope="module")
def images() -> tuple[Pictures, Pictures]:
    """What a healthy model might generate, on two draws of noise: scenes of the pocket world."""
    rng = np.random.default_rng(0)
    own, other = (np.stack([render(draw_scene(rng)) for _ in range(COUNT)]) / 255 for _ in range(2))
    return own, other


def examine(
    images: tuple[Pictures, Pictures],
    change: Callable[[Pictures], Pictures],
    twice: Callable[[Pictures], Pictures] | None = None,
) -> Health:
    """The health of a student whose images are the base model's after `change`. twice: what more
    steps make of them; the default differs a little, as the base model's."""
    rng = np.random.default_rng(1)

    def nearly(images: Pictures) -> Pictures:
        return np.clip(images + rng.normal(0, 0.02, images.shape), 0, 1)

    own, other = images
    base = Drawn({FIRST_SEED: (own, nearly(own)), OTHER_SEED + FIRST_SEED: (other, nearly(other))})
    changed = change(own)
    student = Drawn({FIRST_SEED: (changed, (twice or nearly)(changed))})
    context = Context(torch.zeros(len(PROMPTS), 1, 1), (1,) * len(PROMPTS))
    check = HealthCheck(base, PixelVAE(), even_schedule, 1, context, IMAGE_SHAPE)
    return check.examine(student, PixelVAE())


def unhealthy(health: Health) -> set[str]:
    return {name for name, metric in health.metrics.items() if not metric.healthy}


def test_a_student_that_did_not_change_is_healthy(images):
    health = examine(images, lambda own: own)
    assert health.healthy and str(health) == "healthy"
    assert health.metrics["sharpness"].value == 1 and health.metrics["drift"].value == 0


def test_sharpness_detects_blur(images):
    health = examine(images, lambda own: blurred(own.astype(np.float32), 1.0).astype(float))
    assert "sharpness" in unhealthy(health)
    assert "sharpness" in str(health) and "(limit 0.90)" in str(health)


def test_roughness_detects_artefacts_which_do_not_pass_for_sharpness(images):
    rng = np.random.default_rng(2)
    health = examine(images, lambda own: np.clip(own + rng.normal(0, 0.05, own.shape), 0, 1))
    assert "roughness" in unhealthy(health) and not health.healthy


def test_diversity_detects_one_image_for_all_seeds(images):
    health = examine(images, lambda own: np.repeat(own[::SEEDS], SEEDS, axis=0))
    assert "diversity" in unhealthy(health)


def test_drift_detects_entirely_different_images(images):
    assert "drift" in unhealthy(examine(images, lambda own: own[::-1]))


def test_nfe_gap_detects_a_model_that_needs_more_steps(images):
    def unfinished(images: Pictures) -> Pictures:
        return np.clip(images + np.random.default_rng(3).normal(0, 0.06, images.shape), 0, 1)

    assert "nfe_gap" in unhealthy(examine(images, lambda own: own, twice=unfinished))


def test_text_is_measured_where_a_model_for_it_is_given(images):
    own, other = images
    base = Drawn({FIRST_SEED: (own, own / 1.1), OTHER_SEED + FIRST_SEED: (other, other / 1.1)})
    student = Drawn({FIRST_SEED: (own / 2, own / 2)})
    context = Context(torch.zeros(len(PROMPTS), 1, 1), (1,) * len(PROMPTS))

    def brightness(images: Pictures, seeds: int) -> np.ndarray:
        assert seeds == SEEDS
        return images.mean((1, 2, 3))

    vae = PixelVAE()
    check = HealthCheck(base, vae, even_schedule, 1, context, IMAGE_SHAPE, agreement=brightness)
    text = check.examine(student, vae).metrics["text"]
    assert text.value == pytest.approx(0.5, abs=0.05) and not text.healthy


@pytest.fixture(scope="module")
def health_check(pocket, pocket_text_encoder) -> tuple:
    """A health check of the pocket model, with its denoiser and VAE."""
    cpu = torch.device("cpu")
    denoiser, vae = pocket.load_denoiser(cpu, torch.float32), pocket.load_vae(cpu, torch.float32)

    def schedule(nfe: int) -> Schedule:
        return pocket.schedule(nfe, *LATENT_SHAPE[1:])

    context = pocket_text_encoder.context(list(pocket.unrelated_prompts))
    check = HealthCheck(denoiser, vae, schedule, pocket.default_nfe, context, LATENT_SHAPE)
    return check, denoiser, vae


def test_the_base_model_is_healthy_and_a_random_change_of_its_weights_is_not(health_check):
    check, denoiser, vae = health_check
    assert check.examine(denoiser, vae).healthy
    weights = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter += (
                parameter.std().nan_to_num()
                * 0.3
                * torch.randn(parameter.shape, generator=generator)
            )
    health = check.examine(denoiser, vae)
    denoiser.load_state_dict(weights)
    assert not health.healthy


def recipe_for(concept: Path, output: Path, **changes: dict):
    tree: dict = {
        "model": {"name_or_path": "pocket", "memory": "high"},
        "data": {"folder": str(concept)},
        "method": {"name": "sft"},
        "lora": {"rank": 4},
        "train": {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-6},
        "sample": {"every": 2, "prompts": "a star"},
        "output_dir": str(output),
        "run_name": "watched",
    }
    return parse_recipe(
        {
            key: tree.get(key, {}) | changes.get(key, {}) if key in changes else value
            for key, value in (tree | {k: {} for k in changes if k not in tree}).items()
        }
    )


def test_a_run_is_examined_and_its_last_healthy_lora_is_kept(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path)
    for _ in train(recipe):
        pass
    rows = [
        json.loads(line) for line in (recipe.run_folder / "health.jsonl").read_text().splitlines()
    ]
    assert [(row["step"], row["healthy"]) for row in rows] == [(2, True), (4, True)]
    assert recipe.result("-healthy").exists()
    assert "Few-step health" in (recipe.run_folder / "report.html").read_text()


def test_a_run_with_stop_unhealthy_ends_with_exit_code_3(concept, tmp_path, monkeypatch):
    recipe = recipe_for(
        concept, tmp_path, train={"max_steps": 40, "learning_rate": 0.3}, stop={"unhealthy": True}
    )
    recipe.save_as(tmp_path / "recipe.yaml")
    ended = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert ended.exit_code == 3, ended.output
    assert "unhealthy:" in ended.output and not (recipe.run_folder / "watched.safetensors").exists()
    assert (recipe.run_folder / "checkpoints" / "step-000002").is_dir()


def test_health_can_be_turned_off(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, train={"max_steps": 1}, health={"every": 0})
    for _ in train(recipe):
        pass
    assert not (recipe.run_folder / "health.jsonl").exists()
