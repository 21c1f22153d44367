"""Tiny random checkpoints in the folder layout of the real ones, one function a family. Nothing is
downloaded."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
SDXL_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "sample_max_value": 1.0,
    "skip_prk_steps": True,
    "trained_betas": None,
}
SDXL_SCHEDULERS = {
    "base": {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "leading",
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    },
    "lightning": {
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "trailing",
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    },
    "turbo": {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "timestep_spacing": "trailing",
        "interpolation_type": "linear",
    },
    "dmd2": {
        "_class_name": "LCMScheduler",
        "timestep_spacing": "leading",
        "original_inference_steps": 50,
    },
}
SDXL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# Config of SDXL's UNet whatever its size; the sizes of the tiny and of the real one follow.
SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 16, 32),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 2, 4),
    "cross_attention_dim": 48,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "norm_num_groups": 8,
}
REAL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}


def write_sdxl(folder: Path, kind: str) -> Path:
    """An SDXL whose scheduler is that of `kind`: base, turbo, lightning or dmd2. They have the same
    weights."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    scheduler = SDXL_SCHEDULERS[kind] | SDXL_BETAS
    _write_json(
        folder / "model_index.json",
        SDXL_INDEX | {"scheduler": ["diffusers", scheduler["_class_name"]]},
    )
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    encoders = (
        ("", CLIPTextModel, 16, "quick_gelu"),
        ("_2", CLIPTextModelWithProjection, 32, "gelu"),
    )
    for end, model, width, act in encoders:
        size = write_clip_tokenizer(folder / f"tokenizer{end}", CLIP_END if not end else "!")
        config = CLIPTextConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=32,
            hidden_act=act,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
        model(config).save_pretrained(folder / f"text_encoder{end}")
    UNet2DConditionModel(**SDXL_UNET, **TINY_UNET).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.13025,
        force_upcast=True,
    ).save_pretrained(folder / "vae")
    return folder


def write_dmd2_lora(path: Path, base: Path) -> Path:
    """A LoRA in kohya's form on linear layers and convolutions, as DMD2's; alpha unlike rank."""
    network, generator = (
        UNet2DConditionModel.from_pretrained(base / "unet"),
        torch.Generator().manual_seed(1),
    )
    tensors = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and (
            "attentions" in name or "resnets" in name
        ):
            shape = module.weight.shape
            down, up = (4, *shape[1:]), (shape[0], 4, *(1 for _ in shape[2:]))
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.1
            tensors[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.1
            tensors[f"{key}.alpha"] = torch.tensor(8.0)
    save_file(tensors, path)
    return path


def write_clip_tokenizer(folder: Path, pad: str) -> int:
    """Write a byte-level CLIP tokenizer of single letters; returns the size of its vocabulary."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + index) for index in range(256 - len(letters))]
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "ca",
        "cat</w>",
        CLIP_START,
        CLIP_END,
    ]
    _write_json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n", encoding="utf-8")
    marks = {
        "bos_token": CLIP_START,
        "eos_token": CLIP_END,
        "unk_token": CLIP_END,
        "pad_token": pad,
    }
    _write_json(folder / "special_tokens_map.json", marks)
    _write_json(
        folder / "tokenizer_config.json",
        marks | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77},
    )
    return len(words)


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
