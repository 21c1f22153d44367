"""Fixtures for all tests: the pocket checkpoint and tiny random checkpoints."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import write_dmd2_lora, write_sdxl

from dopsd.models import load_family
from dopsd.models.base import Family
from dopsd.pocket import CHECKPOINT as POCKET
from dopsd.pocket.world.datasets import write_concept

CPU = torch.device("cpu")
THING = 1_000_100


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from a second thread, and busy threads slow each other down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pocket() -> Family:
    return load_family("pocket")


@pytest.fixture(scope="session")
def pocket_text_encoder(pocket: Family):
    return pocket.load_text_encoder(CPU, torch.float32, images=True)


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-VL that generates text, with pocket's tokenizer, in the hub's layout."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("vlm")
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(POCKET / "vlm")).save_pretrained(
        folder
    )
    for name in ("preprocessor_config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copy(POCKET / "vlm" / name, folder)
    shutil.copy(POCKET / "tokenizer" / "tokenizer_config.json", folder)
    return folder


@pytest.fixture()
def concept(tmp_path: Path) -> Path:
    """A pocket concept: four captioned images of a thing."""
    folder = tmp_path / "concept"
    write_concept(folder, THING)
    return folder


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny SDXL of a kind: base, turbo, lightning or dmd2."""
    return cache(lambda kind: write_sdxl(tmp_path_factory.mktemp("sdxl") / kind, kind))


@pytest.fixture(scope="session")
def dmd2_lora(sdxl: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file like DMD2's for the tiny base."""
    return write_dmd2_lora(tmp_path_factory.mktemp("dmd2") / "dmd2_lora.safetensors", sdxl("base"))
