"""Agreement of picture and prompt by a tiny random CLIP: the library's own cosine, and a measure of a run's health."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from dopsd.checking import check
from dopsd.families import POCKET
from dopsd.families.clip import TextAgreement
from dopsd.recipe import Recipe, parse_recipe
from dopsd.run import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = len(AutoTokenizer.from_pretrained(POCKET / "tokenizer"))
    text = small | {"vocab_size": words, "max_position_embeddings": 32, "eos_token_id": words - 1}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    ).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / "tokenizer" / name, folder)
    return folder


@torch.no_grad()
def test_it_is_the_librarys_cosine_one_by_one(clip):
    prompts = ["a red star", "a big blue tree at the left on night in inked style"]
    pictures = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    found = TextAgreement(str(clip), CPU)(pictures, prompts)
    model, tokenizer = CLIPModel.from_pretrained(clip, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    for prompt, picture, value in zip(prompts, pictures, found, strict=True):
        words = tokenizer([prompt], return_tensors="pt")
        pixels = processor([Image.fromarray(picture)], return_tensors="pt")["pixel_values"]
        answer = model(input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=pixels)
        assert value == pytest.approx((answer.logits_per_image / model.logit_scale.exp()).item(), abs=1e-5)
    assert found[0] != found[1]


def recipe_for(lesson: Path, output: Path, text_model: Path) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(lesson)},
            "method": {"name": "sft"},
            "lora": {"rank": 2},
            "train": {"max_steps": 1, "learning_rate": 1e-9},
            "sample": {"every": 1, "prompts": "a star"},
            "health": {"text_model": str(text_model)},
            "output_dir": str(output),
            "run_name": "judged",
        }
    )


def test_a_run_is_judged_by_it_too(clip, lesson, tmp_path):
    recipe = recipe_for(lesson, tmp_path, clip)
    for _ in train(recipe):
        pass
    row = json.loads((recipe.run_folder / "health.jsonl").read_text())
    assert row["text"]["value"] == pytest.approx(1, abs=0.01) and row["text"]["limit"] == 0.95


def test_one_that_is_not_there_is_refused_before_anything_starts(lesson, tmp_path):
    with pytest.raises(ValueError, match=r"health\.text_model .*gone does not exist"):
        check(recipe_for(lesson, tmp_path, tmp_path / "gone"))
