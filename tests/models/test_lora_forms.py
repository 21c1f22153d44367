"""LoRA files that we write: every form reads back exactly, here, in diffusers and in peft; no
module of a full-size network is lost in the software that the form is for."""

import re

import pytest
import torch
from lora_layouts import SHAPES, factors
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from dopsd.files import read_metadata, tensors_sha256
from dopsd.models import family_class
from dopsd.models.lora import read_lora
from dopsd.models.lora_deltas import LowRank
from dopsd.models.lora_forms import FORMS, lora_tensors, native_pairs, peft_config
from dopsd.models.lora_in_diffusers import EXACT, NOTHING, loaded_by_diffusers
from dopsd.runs.outputs.lora_export import convert_lora, write_lora


def pairs_of(family: str) -> dict[str, LowRank]:
    return {name: LowRank(a, b) for name, (a, b) in factors(family).items()}


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_back_as_what_was_written_and_says_its_hash(family, form, tmp_path):
    kind, pairs, path = family_class(family), pairs_of(family), tmp_path / "lora.safetensors"
    write_lora(path, pairs, kind, form, {"base_model": "owner/name"})
    deltas = read_lora(path, kind)
    assert deltas.keys() == pairs.keys()
    for module, pair in pairs.items():
        torch.testing.assert_close(deltas[module].dense(), pair.dense(), atol=1e-6, rtol=1e-6)
        assert len(deltas[module].a) == len(pair.a), "the rank of parts that were fused"
    digest = tensors_sha256(load_file(path))
    metadata = read_metadata(path)
    assert metadata["sshs_model_hash"] == digest
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}"


# Forms that diffusers' load_lora_weights does not take, with what it says.
NOT_IN_DIFFUSERS = {("zimage", "peft"): NOTHING, ("sdxl", "peft"): NOTHING}


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_diffusers_loads_every_form_that_it_knows_at_strength_1(family, form, tmp_path):
    kind, pairs, path = family_class(family), pairs_of(family), tmp_path / "lora.safetensors"
    save_file(lora_tensors(pairs, kind, form), path)
    outcome = loaded_by_diffusers(path, kind, pairs)
    assert outcome == NOT_IN_DIFFUSERS.get((family, form), EXACT)


@pytest.mark.parametrize("family", SHAPES)
def test_a_peft_folder_opens_in_peft(family, tmp_path):
    pairs = pairs_of(family)
    save_file(lora_tensors(pairs, family_class(family), "diffusers"), tmp_path / "a.safetensors")
    convert_lora(tmp_path / "a.safetensors", "peft", tmp_path / "folder")
    network = nn.Module()
    for name, pair in pairs.items():
        *parents, last = name.split(".")
        place = network
        for parent in parents:
            if parent not in dict(place.named_children()):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(last, nn.Linear(pair.size[1], pair.size[0], bias=False))
    config = LoraConfig.from_pretrained(tmp_path / "folder")
    inject_adapter_in_model(config, network, "default")
    tensors = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    bare = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    outcome = set_peft_model_state_dict(network, bare)
    assert not outcome.unexpected_keys
    for name, pair in pairs.items():
        delta = network.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(delta.double(), pair.dense(), atol=1e-5, rtol=1e-5)


def test_peft_settings_state_every_rank():
    pairs = {name: LowRank(torch.ones(r, 8), torch.ones(8, r)) for name, r in (("a", 2), ("b", 4))}
    pairs["c"] = pairs["b"]
    config = peft_config(pairs, None)
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"a": 2}


def test_fused_modules_of_one_a_keep_it_and_missing_parts_are_zero():
    names = family_class("zimage").module_names
    a, b = torch.randn(2, 8), torch.randn(12, 2)
    parts = {f"layers.0.attention.to_{each}": LowRank(a, b) for each in "qv"}
    ((name, fused),) = native_pairs(parts, names).items()
    assert name == "layers.0.attention.qkv" and fused.a.equal(a)
    assert fused.b.equal(torch.cat([b, torch.zeros(12, 2), b]))


def test_a_lora_is_not_written_over_a_file(tmp_path):
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ValueError, match="is not overwritten"):
        convert_lora(tmp_path / "a.safetensors", "kohya", tmp_path / "a.safetensors")


def test_every_name_of_the_original_models_is_one_of_lora_targets_or_not_a_target():
    for family in SHAPES:
        kind = family_class(family)
        for name in pairs_of(family):
            assert re.fullmatch(kind.lora_targets, name)
