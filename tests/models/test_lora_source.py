"""Where a LoRA is: files, PEFT folders and names on the hub, with strengths."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dopsd.models import hub
from dopsd.models.lora_source import (
    LoraFile,
    as_loras,
    find_lora,
    is_lora,
    parse_lora,
    parse_sum,
)


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(1)}, path)
    return path


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a.safetensors", LoraFile(Path("a.safetensors"))),
        ("a.safetensors@0.5", LoraFile(Path("a.safetensors"), 0.5)),
        ("owner/name@-1", LoraFile(Path("owner/name"), -1.0)),
        ("folder@2e-1", LoraFile(Path("folder"), 0.2)),
    ],
)
def test_a_strength_stands_behind_the_name(text, lora):
    assert parse_lora(text) == lora
    assert parse_lora(str(lora)) == lora


def test_a_file_whose_own_name_has_a_strength_is_that_file(tmp_path):
    path = write(tmp_path / "a@0.5")
    assert parse_lora(path) == LoraFile(path)


@pytest.mark.parametrize("text", ["a.safetensors@x", "a.safetensors@nan", "a.safetensors@inf"])
def test_what_is_no_strength_is_refused(text):
    with pytest.raises(ValueError, match="strength"):
        parse_lora(text)


def test_strengths_multiply_and_files_are_given_once():
    assert as_loras(["a@0.5", Path("b")], 2.0) == (
        LoraFile(Path("a"), 1.0),
        LoraFile(Path("b"), 2.0),
    )
    assert as_loras(None) == () == as_loras(())
    assert parse_sum("a@0.5+b") == (LoraFile(Path("a"), 0.5), LoraFile(Path("b")))
    with pytest.raises(ValueError, match="a is given twice"):
        as_loras(["a@0.5", "a@2"])


@pytest.mark.parametrize("name", ["adapter_model", "pytorch_lora_weights", "anything"])
def test_a_folder_is_its_lora_file(name, tmp_path):
    path = write(tmp_path / f"{name}.safetensors")
    if name == "adapter_model":
        write(tmp_path / "other.safetensors")
    assert find_lora(tmp_path) == path


def test_a_folder_without_one_or_with_several_is_refused(tmp_path):
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match=r"without a LoRA file.*dopsd import .*adapter_model\.bin"):
        find_lora(tmp_path)
    for name in "ab":
        write(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 \.safetensors files \(a\.safetensors, b\."):
        find_lora(tmp_path)


@pytest.mark.parametrize("name", ["a.bin", "a.gguf", "gone.pt", "a.ckpt"])
def test_other_formats_are_refused(name):
    with pytest.raises(ValueError, match=r"is not a \.safetensors file"):
        find_lora(Path(name))


def test_a_name_on_the_hub_is_fetched_with_its_settings(tmp_path, monkeypatch):
    fetched = []

    def fetch(repo, revision, patterns, without=()):
        fetched.append((repo, tuple(patterns)))
        return tmp_path

    monkeypatch.setattr(hub, "_fetch", fetch)
    path = write(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4}))
    assert find_lora(Path("owner/name")) == path
    assert fetched[0][0] == "owner/name" and "adapter_config.json" in fetched[0][1]
    assert find_lora(Path("owner/name/adapter_model.safetensors")) == path


def test_a_recipe_is_no_lora(tmp_path):
    write(tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").touch()
    assert is_lora(tmp_path / "peft") and is_lora(Path("a.safetensors@0.5+b.safetensors"))
    assert not is_lora(Path("recipe.yaml")) and not is_lora(tmp_path)
