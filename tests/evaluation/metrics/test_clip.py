"""CLIP metrics on a tiny random CLIP, against the library's own cosine and logit."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.evaluation.metrics.clip import HEAD
from dopsd.evaluation.rewards import load_reward
from dopsd.pocket import CHECKPOINT as POCKET
from dopsd.runs.resolve import resolve
from dopsd.runs.train import train

CPU = torch.device("cpu")
SCALE = 3.0  # of the logits, as its logarithm


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    words = len(AutoTokenizer.from_pretrained(POCKET / "tokenizer"))
    text = small | {"vocab_size": words, "max_position_embeddings": 32, "eos_token_id": words - 1}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config=small | {"image_size": 32, "patch_size": 8},
            projection_dim=16,
            logit_scale_init_value=SCALE,
        )
    ).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / "tokenizer" / name, folder)
    return folder


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))


PROMPTS = ("a red star", "a big blue tree at the left on night in inked style")


@torch.no_grad()
def asked_directly(clip: Path, image: torch.Tensor, prompt: str) -> tuple[float, torch.Tensor]:
    """(logit, image embedding) by one call of the library for one image and one prompt."""
    model, tokenizer = (
        CLIPModel.from_pretrained(clip, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(clip),
    )
    image = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    pixels = CLIPImageProcessorPil.from_pretrained(clip)([image], return_tensors="pt")[
        "pixel_values"
    ]
    words = tokenizer([prompt], return_tensors="pt")
    answer = model(
        input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=pixels
    )
    return answer.logits_per_image.item(), answer.image_embeds[0]


def test_clip_s_is_the_librarys_cosine_and_pickscore_its_logit(clip, images):
    wanted = [
        asked_directly(clip, image, prompt)[0]
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    cosines, logits = (
        load_reward(f"{name}={clip}", CPU)(images, PROMPTS) for name in ("clip", "pickscore")
    )
    assert logits.tolist() == pytest.approx(wanted, abs=1e-4)
    assert cosines.tolist() == pytest.approx([logit / np.exp(SCALE) for logit in wanted], abs=1e-5)
    assert abs(wanted[0] - wanted[1]) > 1e-3


def test_a_prompt_over_clips_limit_is_scored_by_its_beginning(clip, images):
    reward = load_reward(f"clip={clip}", CPU)
    long = " ".join(["star"] * 100)
    assert torch.equal(reward(images[:1], [long]), reward(images[:1], [long + " at the left"]))


@pytest.mark.parametrize("widths", [(16, 1), (16, 8, 4, 1)], ids=["one linear", "three"])
def test_the_aesthetic_head_is_a_product_of_matrices(widths, clip, images, tmp_path):
    folder = tmp_path / "aesthetic"
    shutil.copytree(clip, folder)
    rng = np.random.default_rng(0)
    layers = {
        f"layers.{2 * k}": rng.normal(size=(after, before))
        for k, (before, after) in enumerate(pairwise(widths))
    }
    tensors = {f"{name}.weight": torch.tensor(w, dtype=torch.float32) for name, w in layers.items()}
    tensors |= {f"{name}.bias": torch.full((len(w),), 0.5) for name, w in layers.items()}
    save_file(tensors, folder / HEAD)
    scores = load_reward(f"aesthetic={folder}", CPU)(images, PROMPTS)
    for image, value in zip(images, scores, strict=True):
        answer = asked_directly(clip, image, "a")[1].double().numpy()
        for weight in layers.values():
            answer = weight @ answer + 0.5
        assert value.item() == pytest.approx(answer.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        (None, "aesthetic.safetensors is missing"),
        ({"layers.0.weight": (1, 12), "layers.0.bias": (1,)}, r"not a head from 16 numbers to one"),
        ({"layers.0.weight": (2, 16), "layers.0.bias": (2,)}, r"not a head from 16 numbers to one"),
        ({"layers.0.weight": (1, 16)}, r"no layers.0.bias"),
        ({}, r"not a head from 16 numbers to one"),
    ],
)
def test_an_aesthetic_folder_without_a_fitting_head_is_refused(head, sentence, clip, tmp_path):
    folder = tmp_path / "aesthetic"
    shutil.copytree(clip, folder)
    if head is not None:
        save_file({name: torch.zeros(shape) for name, shape in head.items()}, folder / HEAD)
    with pytest.raises(ValueError, match=sentence):
        load_reward(f"aesthetic={folder}", CPU)


def recipe_for(concept: Path, output: Path, text_model: Path) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(concept)},
            "method": {"name": "sft"},
            "lora": {"rank": 2},
            "train": {"max_steps": 1, "learning_rate": 1e-9},
            "sample": {"every": 1, "prompts": "a star"},
            "health": {"text_model": str(text_model)},
            "output_dir": str(output),
            "run_name": "judged",
        }
    )


def test_a_run_measures_health_with_it(clip, concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, clip)
    for _ in train(recipe):
        pass
    row = json.loads((recipe.run_folder / "health.jsonl").read_text())
    assert row["text"]["value"] == pytest.approx(1, abs=0.01) and row["text"]["limit"] == 0.95


def test_a_missing_model_is_refused_before_anything_starts(concept, tmp_path):
    with pytest.raises(ValueError, match=r"health\.text_model .*gone does not exist"):
        resolve(recipe_for(concept, tmp_path, tmp_path / "gone"))
