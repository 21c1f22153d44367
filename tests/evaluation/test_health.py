"""Health: silent where nothing changed, loud for blur, artefacts and sameness, and a part of every
run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import parse_recipe
from dopsd.diffusion.flow import Schedule
from dopsd.evaluation import health
from dopsd.evaluation.health import HealthCheck
from dopsd.pocket.metrics.pixels import blurred
from dopsd.runs.train import train

CELLS = (8, 16, 16)


@pytest.fixture(scope="module")
def generated():
    """What a healthy model might generate: the pocket world's own images, two of each prompt, on
    two draws of noise."""
    from dopsd.pocket.world.scenes import draw_scene, render

    rng = np.random.default_rng(0)
    mine, other = (np.stack([render(draw_scene(rng)) for _ in range(16)]) / 255 for _ in range(2))
    return mine, other


def examined(generated, spoil, twice=None) -> health.Health:
    """A health check whose images are given: the base's, and the student's as `spoil` makes them of
    the base's."""
    mine, other = generated
    health_check = HealthCheck.__new__(HealthCheck)
    rng = np.random.default_rng(1)

    def nearly(images):  # the image at twice the forwards: a little different
        return np.clip(images + rng.normal(0, 0.02, images.shape), 0, 1)

    health_check._base, health_check._again = (mine, nearly(mine)), (other, nearly(other))
    health_check._noise, health_check._metrics = torch.zeros(1), dict(health.METRICS)
    spoiled = spoil(mine)
    health_check._images = lambda *_: (spoiled, twice(spoiled) if twice else nearly(spoiled))  # type: ignore[method-assign]
    return health_check.examine(None, None)  # type: ignore[arg-type]


def ill(found: health.Health) -> set[str]:
    return {name for name, metric in found.metrics.items() if not metric.healthy}


def test_what_did_not_change_is_healthy(generated):
    found = examined(generated, lambda p: p)
    assert (
        found.healthy
        and found.metrics["sharpness"].value == 1
        and found.metrics["drift"].value == 0
    )


def test_blur_is_found_by_sharpness(generated):
    assert "sharpness" in ill(
        examined(generated, lambda p: blurred(p.astype(np.float32), 1.0).astype(float))
    )


def test_artefacts_are_found_by_roughness_and_do_not_pass_for_sharpness(generated):
    rng = np.random.default_rng(2)
    found = examined(generated, lambda p: np.clip(p + rng.normal(0, 0.05, p.shape), 0, 1))
    assert "roughness" in ill(found) and not found.healthy


def test_one_picture_for_all_seeds_is_found_by_diversity(generated):
    def same(images):
        return np.repeat(images[::2], 2, axis=0)

    assert "diversity" in ill(examined(generated, same))


def test_other_pictures_altogether_are_found_by_drift(generated):
    assert "drift" in ill(examined(generated, lambda p: p[::-1]))


def test_a_model_that_needs_more_steps_is_found_by_the_gap(generated):
    def unfinished(images):
        return np.clip(images + np.random.default_rng(3).normal(0, 0.06, images.shape), 0, 1)

    assert "nfe_gap" in ill(examined(generated, lambda p: p, twice=unfinished))


@pytest.fixture(scope="module")
def health_check(pocket, pocket_text_encoder) -> tuple:
    """A health check of the pocket model, with its denoiser and VAE."""
    cpu = torch.device("cpu")
    denoiser, vae = pocket.load_denoiser(cpu, torch.float32), pocket.load_vae(cpu, torch.float32)

    def schedule(nfe: int) -> Schedule:
        return pocket.schedule(nfe, *CELLS[1:])

    context = pocket_text_encoder.context(list(pocket.unrelated_prompts))
    return HealthCheck(denoiser, vae, schedule, pocket.default_nfe, context, CELLS), denoiser, vae


def test_the_untouched_model_is_healthy_and_a_random_change_of_its_weights_is_not(health_check):
    examination, denoiser, vae = health_check
    assert examination.examine(denoiser, vae).healthy
    shaken = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter += (
                parameter.std().nan_to_num()
                * 0.3
                * torch.randn(parameter.shape, generator=generator)
            )
    found = examination.examine(denoiser, vae)
    denoiser.load_state_dict(shaken)
    assert not found.healthy


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


def test_a_run_is_looked_at_and_its_last_healthy_lora_is_kept(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path)
    for _ in train(recipe):
        pass
    rows = [
        json.loads(line) for line in (recipe.run_folder / "health.jsonl").read_text().splitlines()
    ]
    assert [(row["step"], row["healthy"]) for row in rows] == [(2, True), (4, True)]
    assert (recipe.run_folder / "watched-healthy.safetensors").exists()
    assert "Few-step health" in (recipe.run_folder / "report.html").read_text()


def test_a_run_that_wants_to_stops_when_health_is_lost_with_exit_code_3(
    concept, tmp_path, monkeypatch
):
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
