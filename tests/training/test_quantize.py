"""A quantized base: 8 bits are closer than 4, adapters train over it, and an interrupted run
resumes bit-equal."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.models import load_family
from dopsd.models.inspection import inspect_lora
from dopsd.models.lora import merge_loras
from dopsd.models.lora_source import LoraFile
from dopsd.runs.memory import forecast
from dopsd.runs.train import train
from dopsd.training.quantize import quantize, saved_bytes

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")


def recipe_for(concept, output, name: str, kind: str | None, steps: int = 2) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high", "quantize": kind},
            "data": {"folder": str(concept)},
            "method": {"name": "dopsd", "nfe": 1},
            "lora": {"rank": 2},
            "train": {"max_steps": steps},
            "sample": {"every": 0, "prompts": "a toy", "unrelated": 0},
            "save": {"every": 1},
            "output_dir": str(output),
            "run_name": name,
        }
    )


def run_both(straight: Recipe, interrupted: Recipe) -> None:
    for _ in train(straight):
        pass
    run = train(interrupted)
    next(run)
    run.close()
    for _ in train(interrupted, resume="latest"):
        pass


def test_eight_bits_are_closer_than_four_and_only_the_main_blocks_are_quantized(
    pocket, pocket_text_encoder
):
    context, gaps = pocket_text_encoder.context(["a big red star"]), {}
    for kind in ("nf4", "int8"):
        whole = pocket.load_denoiser(CPU, torch.float32)
        bytes_before = sum(p.nbytes for p in whole.network.parameters())
        announced = saved_bytes(whole.network, pocket.quantizable, kind)
        gaps[kind] = quantize(
            whole, pocket.quantizable, kind, CPU, context, pocket.channels, torch.ones(1)
        )
        small = [
            n for n, p in whole.network.named_parameters() if p.dtype in (torch.uint8, torch.int8)
        ]
        assert small and all(name.startswith("layers.") for name in small)
        saved = bytes_before - sum(p.nbytes for p in whole.network.parameters())
        assert saved == pytest.approx(announced, rel=0.1)  # the scales of nf4 are no parameters
    assert 0 < gaps["int8"] < 0.02 < gaps["nf4"] < 0.3


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_resumed_run_over_a_quantized_base_is_bitwise_the_straight_one(kind, concept, tmp_path):
    straight, interrupted = (
        recipe_for(concept, tmp_path, name, kind) for name in ("straight", "interrupted")
    )
    run_both(straight, interrupted)
    left, right = (
        load_file(r.run_folder / f"{r.run_name}.safetensors") for r in (straight, interrupted)
    )
    assert left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )
    description = json.loads((straight.run_folder / "env.json").read_text())["quantized"]
    assert description.startswith(f"{kind}; the base's first velocity moved by ")
    file = straight.run_folder / "straight.safetensors"
    assert dict(inspect_lora(file).lines)["base_while_training"] == kind
    network = load_family("pocket").load_denoiser(CPU, torch.float32).network
    merge_loras(network, [LoraFile(file)], load_family("pocket"))


def test_a_resumed_run_with_moments_in_8_bits_is_bitwise_the_straight_one(concept, tmp_path):
    def recipe(name: str) -> Recipe:
        tree = recipe_for(concept, tmp_path, name, None, steps=3).model_dump()
        return parse_recipe(
            tree | {"lora": {"rank": 32}, "train": tree["train"] | {"optimizer": "adamw_8bit"}}
        )

    straight, interrupted = recipe("straight"), recipe("interrupted")
    run_both(straight, interrupted)
    for file in ("student", "optimizer"):
        left, right = (
            load_file(r.run_folder / f"checkpoints/step-000003/{file}.safetensors")
            for r in (straight, interrupted)
        )
        assert left.keys() == right.keys() and all(
            torch.equal(left[name], right[name]) for name in left
        )
    moments = [tensor for name, tensor in left.items() if name.endswith("state1")]
    assert {tensor.dtype for tensor in moments if tensor.numel() >= 4096} == {torch.uint8}


def test_the_memory_forecast_counts_what_quantizing_saves(concept, tmp_path, pocket):
    whole, small = (
        forecast(
            recipe_for(concept, tmp_path, "x", kind),
            pocket,
            (64, 64),
            ["a toy"],
            torch.float32,
            low_memory=False,
        )
        for kind in (None, "nf4")
    )
    network = pocket.empty_denoiser().network
    assert whole.peak - small.peak == saved_bytes(network, pocket.quantizable, "nf4") > 0
