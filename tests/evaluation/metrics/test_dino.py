"""DINO-D against direct calls of transformers on tiny random models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from dopsd.evaluation.metrics.dino import DinoDistance

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
}
MODELS = {
    "dinov3": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**SMALL, image_size=64, num_register_tokens=4)
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL, image_size=64)),
    "dinov2 with registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SMALL, image_size=64, num_register_tokens=4)
    ),
}
BEFORE = {"dinov3": 5, "dinov2": 1, "dinov2 with registers": 5}  # class and register tokens


def saved(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_it_is_one_minus_the_cosine_of_mean_patch_tokens(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    distance = DinoDistance(saved(model, tmp_path), CPU)
    rng = torch.Generator().manual_seed(1)
    images, target = torch.rand(3, 3, 64, 48, generator=rng), torch.rand(3, 40, 56, generator=rng)

    def tokens(image: torch.Tensor) -> np.ndarray:
        array = image.permute(1, 2, 0).numpy()
        pixels = (array - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        answer = model(
            pixel_values=torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
        )
        return answer.last_hidden_state[0, BEFORE[name] :].mean(0).double().numpy()

    for image, value in zip(images, distance(images, target), strict=True):
        one, other = tokens(image), tokens(target)
        wanted = 1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert value.item() == pytest.approx(wanted, abs=1e-5)
        assert wanted > 1e-4
    assert distance(target[None], target).item() == pytest.approx(0, abs=1e-6)


def test_sides_that_are_no_multiples_of_a_patch_are_scaled(tmp_path):
    torch.manual_seed(0)
    distance = DinoDistance(saved(MODELS["dinov3"](), tmp_path), CPU)
    plain = torch.full((1, 3, 67, 61), 0.3)
    assert distance(plain, plain[0, :, :64, :56]).item() == pytest.approx(0, abs=1e-5)


def test_another_kind_of_model_is_refused(tmp_path):
    small = {key: value for key, value in SMALL.items() if key != "patch_size"}
    with pytest.raises(ValueError, match="is a bert; dino needs one of dinov2"):
        DinoDistance(saved(BertModel(BertConfig(**small, vocab_size=10)), tmp_path), CPU)
