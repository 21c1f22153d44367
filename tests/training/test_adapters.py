"""How LoRA starts, against peft itself."""

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dopsd.training.adapters import add_lora, lora_pairs
from dopsd.training.seeds import adapter_seed

RANK, TARGETS = 8, r"blocks\.\d\.linear"


def network() -> nn.Module:
    """Two blocks of one wide linear layer each."""
    sizes = ((300, 500), (500, 200))
    blocks = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(*size)}) for size in sizes)
    return nn.ModuleDict({"blocks": blocks})


def start_of_peft(seed: int, init_lora_weights) -> dict[str, torch.Tensor]:
    """The adapters' tensors as peft draws them."""
    wrapped = network()
    config = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=init_lora_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapter_seed(seed))
        inject_adapter_in_model(config, wrapped, adapter_name="student")
    return {name: p.detach() for name, p in wrapped.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(("init", "peft_value"), [("gaussian", "gaussian"), ("kaiming", True)])
def test_lora_starts_as_in_peft_under_both_starts(init, peft_value):
    student = add_lora(network(), TARGETS, RANK, RANK, seed=3, init=init)
    expected = start_of_peft(3, peft_value)
    assert student.keys() == expected.keys() and len(expected) == 4
    for name, tensor in expected.items():
        assert torch.equal(student[name], tensor), name


def test_by_default_a_is_normal_with_deviation_one_over_rank_and_b_is_zero():
    pairs = lora_pairs(add_lora(network(), TARGETS, RANK, RANK, seed=0))
    for a, b in pairs.values():
        assert a.std().item() == pytest.approx(1 / RANK, rel=0.05)
        assert a.abs().max() > 3 / RANK, "a uniform start would end at sqrt(3) deviations"
        assert not b.any()
    kaiming = lora_pairs(add_lora(network(), TARGETS, RANK, RANK, seed=0, init="kaiming"))
    assert kaiming["blocks.0.linear"][0].abs().max() <= 1 / math.sqrt(300)
