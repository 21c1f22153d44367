"""Preflight generates what sampling generates, fills the cache of training, and ends with one
sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Qwen3VLModel
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import Recipe, load_recipe, parse_recipe
from dopsd.evaluation.metrics.dino import DinoDistance
from dopsd.evaluation.statistics import Interval
from dopsd.models import load_family
from dopsd.models.pipeline import sample
from dopsd.pocket.world.datasets import write_concept
from dopsd.runs.preflight import Preflight, preflight, verdict_of
from dopsd.runs.train import train

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe_of(method: str, data: Path, folder: Path, *changes: str) -> Recipe:
    """recipes/pocket-identity-<method>.yaml on this data."""
    file = RECIPES / f"pocket-identity-{method}.yaml"
    return load_recipe(file, (f"data.folder={data}", f"output_dir={folder}", *changes))


def no_progress(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture()
def concept(tmp_path: Path) -> Path:
    write_concept(tmp_path / "concept", 1_000_203)
    return tmp_path / "concept"


@pytest.fixture()
def result(concept: Path, tmp_path: Path) -> Preflight:
    return preflight(
        recipe_of("dopsd", concept, tmp_path / "runs"), tmp_path / "page.html", no_progress
    )


def test_the_student_samples_like_the_deployed_model_and_the_teacher_is_nearer(result, tmp_path):
    first = result.comparisons[0]
    generated = sample("pocket", [first.caption] * 4, seed=0)
    np.testing.assert_array_equal(
        first.student.numpy(), np.stack([np.asarray(image) for image in generated])
    )
    assert result.verdict == "can" and result.nearer.low > 0
    assert result.sentence.startswith("dopsd can learn this set with this teacher")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4 * (1 + 4 + 4) and result.sentence[:40] in page


def test_preflight_fills_the_cache_that_training_reads(result, concept, tmp_path):
    tree = recipe_of("dopsd", concept, tmp_path / "runs").model_dump()
    cached = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "runs" / "cache").rglob("*.safetensors")
    }
    list(
        train(parse_recipe(tree | {"train": tree["train"] | {"max_steps": 1}, "lora": {"rank": 2}}))
    )
    after = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "runs" / "cache").rglob("*.safetensors")
    }
    assert cached and after == cached


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (Interval(0.2, 0.1, 0.3), "can"),
        (Interval(0.1, 0.05, 0.3), "little"),
        (Interval(0.2, -0.01, 0.4), "cannot"),
        (Interval(-0.1, -0.2, -0.05), "cannot"),
    ],
)
def test_the_verdict_follows_from_the_interval_and_the_threshold(interval, verdict):
    assert verdict_of(interval) == verdict


def test_preflight_advises_against_a_teacher_that_does_not_see(concept, tmp_path):
    """The VLM's vision tower is untrained."""
    folder = load_family("pocket").checkpoint.folder / "vlm"
    shutil.copytree(folder, tmp_path / "vlm")
    vlm = Qwen3VLModel.from_pretrained(folder)
    untrained = Qwen3VLModel(vlm.config)
    untrained.language_model.load_state_dict(vlm.language_model.state_dict())
    untrained.save_pretrained(tmp_path / "vlm")
    recipe = recipe_of("dopsd", concept, tmp_path / "runs", f"model.vlm={tmp_path / 'vlm'}")
    result = preflight(recipe, tmp_path / "page.html", no_progress)
    assert result.verdict != "can" and "Try another model.vlm" in result.sentence


def test_the_command_prints_the_conclusion_and_writes_the_numbers(concept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe_of("dopsd", concept, tmp_path / "runs").save_as(tmp_path / "recipe.yaml")
    result = CliRunner().invoke(
        app, ["preflight", "recipe.yaml", "--images", "2", "--json", "numbers.json"]
    )
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["sentence"] in result.output.replace("\n", "")
    assert [len(row["student_distance"]) for row in numbers["images"]] == [4, 4]
    assert numbers["images_in_the_set"] == 4


def test_check_with_the_preflight_option_runs_preflight(concept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for image in ("2.png", "3.png"):
        (concept / image).unlink()
        (concept / image).with_suffix(".txt").unlink()
    recipe_of("dopsd", concept, tmp_path / "runs").save_as(tmp_path / "recipe.yaml")
    result = CliRunner().invoke(app, ["check", "recipe.yaml", "--preflight"])
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    assert "images 2" in printed and "the teacher comes nearer to it" in printed
    assert (tmp_path / "preflight.html").is_file()


def test_the_distance_is_chosen_by_the_name_of_a_metric(concept, tmp_path):
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 64,
    }
    Dinov2Model(Dinov2Config(**small)).save_pretrained(tmp_path / "dino")
    recipe = recipe_of("dopsd", concept, tmp_path / "runs")
    result = preflight(
        recipe,
        tmp_path / "page.html",
        no_progress,
        max_images=1,
        metric=f"dino={tmp_path / 'dino'}",
    )
    comparison = result.comparisons[0]
    dino = DinoDistance(str(tmp_path / "dino"), torch.device("cpu"))
    target = torch.from_numpy(np.array(comparison.target)).permute(2, 0, 1) / 255
    expected = dino(comparison.teacher.permute(0, 3, 1, 2) / 255, target)
    np.testing.assert_allclose(comparison.teacher_distance, expected, atol=1e-6)
    with pytest.raises(ValueError, match="red is no distance to a target image"):
        preflight(recipe, tmp_path / "page.html", no_progress, metric="red")


def test_a_method_without_a_teacher_that_sees_images_is_refused(concept, tmp_path):
    with pytest.raises(ValueError, match="sft learns from the images themselves"):
        preflight(recipe_of("sft", concept, tmp_path / "runs"), tmp_path / "page.html", no_progress)
    assert not (tmp_path / "runs").exists()


def test_an_unreadable_image_is_named_and_no_page_is_written(concept, tmp_path):
    (concept / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png"):
        preflight(
            recipe_of("dopsd", concept, tmp_path / "runs"), tmp_path / "page.html", no_progress
        )
    assert not (tmp_path / "page.html").exists()
