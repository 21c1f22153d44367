"""LoRA files in the layouts that tools write: each reads as the delta that it means, or is refused
with a sentence."""

import json
from pathlib import Path

import pytest
import torch
from lora_layouts import ALPHA, LAYOUTS, RANK, Layout, beside, lora, random, with_settings
from safetensors.torch import save_file

from dopsd.models import family_class
from dopsd.models.lora import read_lora


def write(layout: Layout, folder: Path) -> Path:
    name = "adapter_model" if layout.config is not None else "lora"
    path = folder / f"{name}.safetensors"
    save_file(
        {name: t.clone() for name, t in layout.tensors.items()}, path, layout.metadata or None
    )
    if layout.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(layout.config))
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_reads_as_the_delta_that_it_means(name, tmp_path):
    layout = LAYOUTS[name]()
    path = write(layout, tmp_path)
    deltas = read_lora(path, family_class(layout.family))
    assert deltas.keys() == layout.deltas.keys()
    for module, delta in layout.deltas.items():
        torch.testing.assert_close(deltas[module].dense(), delta, atol=1e-6, rtol=1e-6)
        assert deltas[module].size == tuple(delta.shape)
        x = random(delta.shape[1])
        torch.testing.assert_close(
            deltas[module].apply(x), delta @ x.double(), atol=1e-5, rtol=1e-5
        )


def test_there_are_at_least_forty_layouts():
    assert len(LAYOUTS) >= 40


TO_Q = "transformer.layers.0.attention.to_q"
KOHYA = "lora_unet_input_blocks_4_1_proj_in"
GOOD = {f"{TO_Q}.lora_A.weight": random(RANK, 8), f"{TO_Q}.lora_B.weight": random(12, RANK)}


def one(family: str = "zimage", metadata: dict | None = None, **tensors) -> Layout:
    text = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
    return Layout(family, GOOD | tensors if family == "zimage" else tensors, {}, text)


def kohya(**slots) -> Layout:
    """An adapter of SDXL by its slots, with an alpha."""
    named = {f"{KOHYA}.{name.replace('__', '.')}": t for name, t in slots.items()}
    return Layout("sdxl", named | {f"{KOHYA}.alpha": torch.tensor(ALPHA)}, {})


SQUARE = random(8, 8)
SETTINGS = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
REFUSED = {
    "OFT": (kohya(oft_blocks=random(2, 4, 4)), "OFT or BOFT"),
    "BOFT of PEFT": (one(**{f"{TO_Q}.boft_R": random(2, 4, 4)}), "OFT or BOFT"),
    "GLoRA": (kohya(a1__weight=SQUARE, a2__weight=SQUARE), "holds GLoRA"),
    "DoRA of kohya": (
        kohya(lora_down__weight=SQUARE, lora_up__weight=SQUARE, dora_scale=random(8, 1)),
        "holds DoRA",
    ),
    "DoRA of PEFT": (one(**{f"{TO_Q}.lora_magnitude_vector": random(12)}), "holds DoRA"),
    "a bias of PEFT": (one(**{f"{TO_Q}.lora_B.bias": random(12)}), "holds a bias"),
    "a bias of LyCORIS": (one(**{f"{TO_Q}.diff_b": random(12)}), "holds a bias"),
    "a norm": (one(**{"transformer.layers.0.ffn_norm1.w_norm": random(8)}), "holds a norm"),
    "IA3": (one(**{f"{TO_Q}.on_input": torch.tensor(True)}), "holds IA3"),
    "an alpha alone": (kohya(), "has alpha and no weights"),
    "rank 0": (
        kohya(lora_down__weight=torch.zeros(0, 8), lora_up__weight=torch.zeros(8, 0)),
        "has rank 0",
    ),
    "a difference with an alpha": (kohya(diff=SQUARE), "has no meaning there"),
    "LoHa of two sizes": (
        kohya(hada_w1_a=SQUARE, hada_w1_b=SQUARE, hada_w2_a=SQUARE, hada_w2_b=random(8, 4)),
        "its factors are",
    ),
    "LoKr that does not multiply": (
        kohya(lokr_w1=SQUARE, lokr_w2_a=random(4, 3), lokr_w2_b=random(2, 4)),
        "do not fit together",
    ),
    "an infinite alpha": (one(**{f"{TO_Q}.alpha": torch.tensor(torch.inf)}), "NaN or infinite"),
    "an unknown key": (one(**{f"{TO_Q}.gate": random(4)}), "is no LoRA of zimage: it holds"),
    "an unknown prefix": (
        Layout("zimage", {f"student.{TO_Q}.lora_A.weight": SQUARE}, {}),
        "behind other prefixes than 'student.'",
    ),
    "another family": (
        Layout("zimage", lora("sdxl", "unet.").tensors, {}),
        "does not have: it is a LoRA of sdxl",
    ),
    "two adapters": (
        Layout("zimage", {f"{TO_Q}.lora_A.{n}.weight": SQUARE for n in ("one", "two")}, {}),
        "two adapters of one module",
    ),
    "a fused module that differs from its parts": (
        beside(
            lora("zimage", "transformer.", native=True),
            f"{TO_Q}.lora_A.weight",
        ),
        "is half a LoRA",
    ),
    "only text encoders": (
        Layout("sdxl", {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": SQUARE}, {}),
        "is no LoRA of sdxl",
    ),
    "an alpha that contradicts the metadata": (
        one(metadata=SETTINGS, **{f"{TO_Q}.alpha": torch.tensor(1.0)}),
        "has the scale 0.25 by its alpha and 1.5 by its lora_adapter_metadata",
    ),
    "another rank in the metadata": (
        one(metadata=SETTINGS | {"transformer.r": 8}),
        "has rank 4, and its lora_adapter_metadata says 8",
    ),
    "NaN in the metadata": (one(metadata=SETTINGS | {"transformer.r": float("nan")}), "r is nan"),
    "a huge alpha": (one(metadata=SETTINGS | {"transformer.lora_alpha": 10**400}), "too large"),
    "alpha a text": (one(metadata=SETTINGS | {"transformer.lora_alpha": "8"}), "not a number"),
    "a pattern that takes for ever": (
        one(metadata=SETTINGS | {"transformer.alpha_pattern": {"(a+)+$": 1}}),
        "repeats a group",
    ),
    "DoRA in the metadata": (one(metadata=SETTINGS | {"transformer.use_dora": True}), "DoRA"),
    "PiSSA": (
        with_settings("zimage", "base_model.model.", True, init_lora_weights="pissa_niter_4"),
        "changed the base weights as well",
    ),
    "IA3 of PEFT": (with_settings("zimage", "base_model.model.", True, peft_type="IA3"), "is IA3"),
    "transposed weights": (
        with_settings("zimage", "base_model.model.", True, fan_in_fan_out=True),
        "transposed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_in_one_sentence(name, tmp_path):
    layout, sentence = REFUSED[name]
    path = write(layout, tmp_path)
    with pytest.raises(ValueError) as refusal:
        read_lora(path, family_class(layout.family))
    message = str(refusal.value)
    assert sentence in message and message.startswith(str(path)) and "\n" not in message


@pytest.mark.parametrize("name", ["with text encoders", "with text encoders, diffusers"])
def test_what_is_left_out_is_told(name, tmp_path, caplog):
    layout = LAYOUTS[name]()
    with caplog.at_level("INFO", logger="dopsd"):
        read_lora(write(layout, tmp_path), family_class(layout.family))
    assert "also adapts a text encoder" in caplog.text
