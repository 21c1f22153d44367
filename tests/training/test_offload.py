"""Offload: the same numbers, copies of one block at a time, and a run with it."""

import pytest
import torch
from safetensors.torch import load_file

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.runs.memory import forecast
from dopsd.runs.train import train
from dopsd.training.memory_meter import LiveBytes
from dopsd.training.offload import offload_blocks

CPU = torch.device("cpu")


def recipe_for(concept, output, name: str, offload: bool) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "low", "offload": offload},
            "data": {"folder": str(concept)},
            "method": {"name": "dopsd", "nfe": 2, "teacher_decay": 0.9},
            "lora": {"rank": 2},
            "train": {"max_steps": 3},
            "sample": {"every": 0, "prompts": "a toy", "unrelated": 0},
            "save": {"every": 1},
            "output_dir": str(output),
            "run_name": name,
        }
    )


def test_a_run_with_offload_is_bitwise_the_run_without(concept, tmp_path):
    files = []
    for name, offload in (("resident", False), ("offloaded", True)):
        recipe = recipe_for(concept, tmp_path, name, offload)
        for _ in train(recipe):
            pass
        files.append(load_file(recipe.run_folder / f"{name}.safetensors"))
    left, right = files
    assert left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@torch.no_grad()
def test_only_one_block_is_on_the_device_at_a_time_and_none_stays_there(
    pocket, pocket_text_encoder
):
    context = pocket_text_encoder.context(["a big red star"])
    z, t = torch.randn(1, pocket.channels, 16, 16), torch.full((1,), 0.7)
    denoiser = pocket.load_denoiser(CPU, torch.float32)
    denoiser.requires_grad_(False)
    with LiveBytes() as plain:
        expected = denoiser(z, t, context)
    blocks = [sum(p.nbytes for p in block.parameters()) for block in denoiser.network.layers]
    offloaded_bytes = offload_blocks(denoiser.network, CPU)
    with LiveBytes() as offloaded:
        velocity = denoiser(z, t, context)
    assert torch.equal(velocity, expected)
    assert offloaded_bytes > sum(blocks) and 0 < offloaded.peak - plain.peak <= 1.05 * max(blocks)
    assert offloaded.now <= plain.now


def test_the_memory_forecast_is_smaller_with_offload(concept, tmp_path, pocket):
    resident, offloaded = (
        forecast(
            recipe_for(concept, tmp_path, "x", offload),
            pocket,
            (64, 64),
            ["a toy"],
            torch.float32,
            low_memory=True,
        )
        for offload in (False, True)
    )
    assert offloaded.resident < resident.resident and offloaded.peak < resident.peak


def test_a_quantized_base_is_not_offloaded_as_well():
    with pytest.raises(ValueError, match="offload and quantize exclude one another"):
        parse_recipe({"model": {"name_or_path": "pocket", "offload": True, "quantize": "nf4"}})
