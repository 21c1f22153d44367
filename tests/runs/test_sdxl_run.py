"""Whole runs on a tiny SDXL: resumed, quantized, offloaded, trained with a reward, and compared."""

from pathlib import Path

import pytest
import torch

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.files import read_tensors
from dopsd.pocket.benchmark import ConceptQuestions
from dopsd.runs.comparison.compare import compare
from dopsd.runs.train import train


def recipe_of(
    model: dict, concept: Path, folder: Path, name: str, method: dict | None = None
) -> Recipe:
    return parse_recipe(
        {
            "model": {"memory": "high"} | model,
            "data": {"folder": str(concept)},
            "method": method or {"name": "sft", "space": "noise"},
            "lora": {"rank": 2},
            "train": {"max_steps": 2, "learning_rate": 0.02},
            "sample": {"every": 0, "prompts": "a star", "unrelated": 0},
            "health": {"every": 0},
            "save": {"every": 1},
            "output_dir": str(folder),
            "run_name": name,
        }
    )


def loras_equal(left: Recipe, right: Recipe) -> bool:
    loras = (
        read_tensors(recipe.run_folder / f"{recipe.run_name}.safetensors")
        for recipe in (left, right)
    )
    one, other = loras
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("quantized", [None, "int8"])
def test_a_resumed_run_on_a_distilled_base_equals_the_uninterrupted_run_bitwise(
    quantized, sdxl, dmd2_lora, concept, tmp_path
):
    if quantized:
        pytest.importorskip("bitsandbytes")
    model = {
        "name_or_path": str(sdxl("base")),
        "distilled_by": str(dmd2_lora),
        "quantize": quantized,
    }
    straight, broken = (
        recipe_of(model, concept, tmp_path, name) for name in ("straight", "broken")
    )
    list(train(straight))
    run = train(broken)
    next(run)
    run.close()
    list(train(broken, resume="latest"))
    assert loras_equal(straight, broken)


def test_offload_trains_the_same_lora_bitwise(sdxl, concept, tmp_path):
    model = {"name_or_path": str(sdxl("turbo"))}
    resident = recipe_of(model | {"memory": "low"}, concept, tmp_path, "resident")
    offloaded = recipe_of(
        model | {"memory": "low", "offload": True}, concept, tmp_path, "offloaded"
    )
    for recipe in (resident, offloaded):
        list(train(recipe))
    assert loras_equal(resident, offloaded)


def test_compare_evaluates_two_methods_on_sdxl_turbo(sdxl, concept, tmp_path, monkeypatch):
    monkeypatch.setattr("dopsd.pocket.benchmark.UNSEEN_SCENES", 4)
    few_unrelated_prompts = (None, 4, "thing", None)
    monkeypatch.setattr(
        ConceptQuestions.encode, "__defaults__", few_unrelated_prompts
    )  # unrelated prompts
    model = {"name_or_path": str(sdxl("turbo"))}
    recipes = [
        recipe_of(model, concept, tmp_path / "runs", "plain"),
        recipe_of(
            model,
            concept,
            tmp_path / "runs",
            "preferred",
            {"name": "pso_online", "reward": "red", "nfe": 2},
        ),
    ]
    comparison = compare(recipes, tmp_path / "page.html", lambda what, done, total: None, nfes=(1,))
    assert list(comparison.numbers) == ["base", "base, other noise", "plain", "preferred"]
    assert comparison.numbers["plain"]["nfe"]["1"]["bleed"]["value"] != 0
    assert "preferred" in (tmp_path / "page.html").read_text(encoding="utf-8")
