"""Whole runs on images with masks."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.runs.train import train


def recipe_for(folder: Path, name: str, method: str = "sft", **data) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(folder), "instance_prompt": "a star"} | data,
            "method": {"name": method},
            "lora": {"rank": 2},
            "train": {"max_steps": 1, "batch_size": 2},
            "sample": {"every": 0, "prompts": "a star", "unrelated": 0},
            "health": {"every": 0},
            "output_dir": str(folder.parent / "runs"),
            "run_name": name,
        }
    )


def trained(recipe: Recipe) -> dict[str, torch.Tensor]:
    (report,) = train(recipe)
    assert report.grad_norm > 0
    return load_file(recipe.result())


@pytest.fixture()
def folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("method", ["sft", "dopsd"])
def test_a_white_mask_changes_no_bit_of_a_run_and_a_half_white_one_does(method, folder):
    without = trained(recipe_for(folder, "without", method))
    mask = Image.new("L", (64, 64), "white")
    mask.save(folder / "a-masklabel.png")
    white = trained(recipe_for(folder, "white", method))
    mask.paste(0, (32, 0, 64, 64))
    mask.save(folder / "a-masklabel.png")
    half = trained(recipe_for(folder, "half", method))
    ignored = trained(recipe_for(folder, "ignored", method, masks="ignore"))
    assert all(torch.equal(without[key], white[key]) for key in without)
    assert all(torch.equal(without[key], ignored[key]) for key in without)
    assert any(not torch.equal(without[key], half[key]) for key in without)


def test_check_says_how_many_images_have_masks_and_what_it_noted(folder):
    Image.new("L", (64, 64), "white").save(folder / "a_mask.png")
    (folder / "more").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "more" / "c.png")
    recipe = recipe_for(folder, "checked")
    recipe.save_as(folder.parent / "recipe.yaml")
    shown = CliRunner().invoke(app, ["check", str(folder.parent / "recipe.yaml")]).stdout
    assert "images     2, captions from instance prompt" in shown
    assert "masks      1 images are trained on where their masks are white" in shown
    assert "note       1 images in subfolders" in shown


@pytest.mark.parametrize("method", [{"name": "dpo"}, {"name": "dopsd", "teacher_sees": "another"}])
def test_a_method_without_masked_loss_refuses_masks(method, folder):
    Image.new("L", (64, 64), "white").save(folder / "a_mask.png")
    recipe = recipe_for(folder, "refused").model_dump(mode="json") | {"method": method}
    with pytest.raises(ValueError, match=r"has no masked loss, and 1 images .*data\.masks: ignore"):
        list(train(parse_recipe(recipe)))
