"""Preflight generates what sampling generates, encodes what training encodes, and says one
sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import parse_recipe
from dopsd.evaluation.metrics.dino import DinoDistance
from dopsd.evaluation.statistics import Interval
from dopsd.models.pipeline import sample
from dopsd.pocket.demo import demo_recipe
from dopsd.pocket.world.datasets import write_concept
from dopsd.runs.preflight import Preflight, preflight, verdict_of
from dopsd.runs.train import train


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture()
def concept(tmp_path: Path) -> Path:
    """Of the thing that D-OPSD learned most of in benchmarks/results/claim.json."""
    write_concept(tmp_path / "lesson", 1_000_203)
    return tmp_path / "lesson"


@pytest.fixture()
def looked(concept: Path, tmp_path: Path) -> Preflight:
    return preflight(
        demo_recipe("dopsd", concept, tmp_path / "runs"), tmp_path / "page.html", silent
    )


def test_the_student_is_the_deployed_model_and_the_teacher_is_nearer_on_a_new_thing(
    looked, tmp_path
):
    first = looked.comparisons[0]
    generated = sample("pocket", [first.caption] * 4, seed=0)
    np.testing.assert_array_equal(
        first.student.numpy(), np.stack([np.asarray(image) for image in generated])
    )
    assert looked.verdict == "can" and looked.nearer.low > 0
    assert looked.sentence.startswith("dopsd can learn this set with this teacher")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4 * (1 + 4 + 4) and looked.sentence[:40] in page


def test_preflight_fills_the_cache_that_training_reads(looked, concept, tmp_path):
    tree = demo_recipe("dopsd", concept, tmp_path / "runs").model_dump()
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
    ("found", "verdict"),
    [
        (Interval(0.2, 0.1, 0.3), "can"),
        (Interval(0.1, 0.05, 0.3), "little"),
        (Interval(0.2, -0.01, 0.4), "cannot"),
        (Interval(-0.1, -0.2, -0.05), "cannot"),
    ],
)
def test_the_verdict_follows_from_the_interval_and_the_threshold(found, verdict):
    assert verdict_of(found) == verdict


def test_images_that_the_student_generates_already_are_not_worth_training_on(concept, tmp_path):
    """Images that the base model generates from these very captions."""
    captions = [
        f"a big red {noun} in the middle on night in flat style" for noun in ("star", "heart")
    ]
    folder = tmp_path / "known"
    folder.mkdir()
    for index, (caption, image) in enumerate(
        zip(captions, sample("pocket", captions, seed=50), strict=True)
    ):
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)
    found = preflight(
        demo_recipe("dopsd", folder, tmp_path / "runs"), tmp_path / "page.html", silent
    )
    assert found.verdict != "can" and "Try another model.vlm" in found.sentence


def test_the_command_prints_the_sentence_and_writes_the_numbers(concept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo_recipe("dopsd", concept, tmp_path / "runs").save_as(tmp_path / "recipe.yaml")
    result = CliRunner().invoke(
        app, ["preflight", "recipe.yaml", "--images", "2", "--json", "numbers.json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["sentence"] in result.output.replace("\n", "")
    assert [len(p["student_distance"]) for p in found["images"]] == [4, 4] and found[
        "images_in_the_set"
    ] == 4


def test_check_with_preflight_compares_too(concept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for image in ("2.png", "3.png"):
        (concept / image).unlink()
        (concept / image).with_suffix(".txt").unlink()
    demo_recipe("dopsd", concept, tmp_path / "runs").save_as(tmp_path / "recipe.yaml")
    result = CliRunner().invoke(app, ["check", "recipe.yaml", "--preflight"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert (
        "images 2" in said
        and "the teacher comes nearer to it" in said
        and (tmp_path / "preflight.html").is_file()
    )


def test_another_distance_is_chosen_by_its_name(concept, tmp_path):
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 64,
    }
    Dinov2Model(Dinov2Config(**small)).save_pretrained(tmp_path / "dino")
    recipe = demo_recipe("dopsd", concept, tmp_path / "runs")
    found = preflight(
        recipe, tmp_path / "page.html", silent, max_images=1, metric=f"dino={tmp_path / 'dino'}"
    )
    look, dino = found.comparisons[0], DinoDistance(str(tmp_path / "dino"), torch.device("cpu"))
    target = torch.from_numpy(np.array(look.target)).permute(2, 0, 1) / 255
    wanted = dino(look.teacher.permute(0, 3, 1, 2) / 255, target)
    np.testing.assert_allclose(look.teacher_distance, wanted, atol=1e-6)
    with pytest.raises(ValueError, match="red is no distance to a target image"):
        preflight(recipe, tmp_path / "page.html", silent, metric="red")


def test_a_method_without_a_teacher_that_sees_images_is_refused(concept, tmp_path):
    with pytest.raises(ValueError, match="sft learns from the images themselves"):
        preflight(demo_recipe("sft", concept, tmp_path / "runs"), tmp_path / "page.html", silent)
    assert not (tmp_path / "runs").exists()


def test_an_unreadable_image_is_named_and_no_page_is_written(concept, tmp_path):
    (concept / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png"):
        preflight(demo_recipe("dopsd", concept, tmp_path / "runs"), tmp_path / "page.html", silent)
    assert not (tmp_path / "page.html").exists()
