"""A tiny random FLUX.2-klein in the folder layout of the real one, with a matching Qwen3-VL in
`vlm`."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig, Qwen3VLModel

from dopsd.pocket import CHECKPOINT as POCKET

# FLUX.2-klein-4B's configs except sizes.
INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "is_distilled": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
SCHEDULER = {
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 28,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 524,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}
LATENTS = 4  # channels of the autoencoder


def write_klein(folder: Path, distilled: bool = True, layers: int = 28) -> Path:
    """layers: of the text encoder. Weights are drawn from a fixed seed, larger than the libraries'
    own, so that prompts matter."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    write_json(folder / "model_index.json", INDEX | {"is_distilled": distilled})
    shutil.copytree(POCKET / "tokenizer", folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    network = Flux2Transformer2DModel(
        in_channels=4 * LATENTS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT["hidden_size"],
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    enlarged(network, 3.0).save_pretrained(folder / "transformer")
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=LATENTS,
        sample_size=64,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    vae.save_pretrained(folder / "vae")
    text = TEXT | {"num_hidden_layers": layers}
    enlarged(Qwen3ForCausalLM(Qwen3Config(**text)), 3.0).save_pretrained(folder / "text_encoder")
    write_vlm(folder / "vlm", text)
    return folder


def write_vlm(folder: Path, text: dict[str, Any]) -> Path:
    """A Qwen3-VL of the text encoder's shape."""
    rope = {
        "rope_type": "default",
        "rope_theta": 50000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    config = Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=VISION,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    enlarged(Qwen3VLModel(config), 3.0).save_pretrained(folder)
    for name in (
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        shutil.copy(POCKET / "vlm" / name, folder / name)
    processor = folder / "preprocessor_config.json"
    merge = {"merge_size": VISION["spatial_merge_size"]}
    processor.write_text(json.dumps(json.loads(processor.read_text()) | merge))
    return folder


@torch.no_grad()
def enlarged(module: Any, factor: float) -> Any:
    """Scale the module's matrices in place."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.mul_(factor)
    return module


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
