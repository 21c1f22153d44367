"""Blocks that borrow their weights: the same numbers, one block's copy at a time, and a run with
them."""

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


def test_a_run_with_borrowed_weights_is_bitwise_the_run_without(concept, tmp_path):
    files = []
    for name, offload in (("resident", False), ("borrowed", True)):
        recipe = recipe_for(concept, tmp_path, name, offload)
        for _ in train(recipe):
            pass
        files.append(load_file(recipe.run_folder / f"{name}.safetensors"))
    left, right = files
    assert left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@torch.no_grad()
def test_no_more_than_one_block_is_lent_at_a_time_and_nothing_is_left_lent(
    pocket, pocket_text_encoder
):
    context = pocket_text_encoder.context(["a big red star"])
    z, t = torch.randn(1, pocket.channels, 16, 16), torch.full((1,), 0.7)
    denoiser = pocket.load_denoiser(CPU, torch.float32)
    denoiser.requires_grad_(False)
    with LiveBytes() as plain:
        wanted = denoiser(z, t, context)
    blocks = [sum(p.nbytes for p in block.parameters()) for block in denoiser.network.layers]
    away = offload_blocks(denoiser.network, CPU)
    with LiveBytes() as borrowed:
        found = denoiser(z, t, context)
    assert torch.equal(found, wanted)
    assert away > sum(blocks) and 0 < borrowed.peak - plain.peak <= 1.05 * max(blocks)
    assert borrowed.now <= plain.now


def test_the_forecast_leaves_out_what_stays_away_and_counts_what_is_lent(concept, tmp_path, pocket):
    resident, borrowed = (
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
    assert borrowed.resident < resident.resident and borrowed.peak < resident.peak


def test_a_quantized_base_is_not_offloaded_as_well():
    with pytest.raises(ValueError, match="offload and quantize exclude one another"):
        parse_recipe({"model": {"name_or_path": "pocket", "offload": True, "quantize": "nf4"}})
