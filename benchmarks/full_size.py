"""Folders of full-size checkpoints without a download: configs written down here as facts, and
random weights where something has to run."""

import json
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    LCMScheduler,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from transformers import AutoConfig, AutoTokenizer, CLIPTextConfig, Qwen3Config, Qwen3VLConfig

from dopsd.pocket import CHECKPOINT as POCKET

# Text encoder and, for the teacher, the vision tower of the Qwen3-VL of the same size.
QWEN: dict[str, Any] = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
QWEN_4B = QWEN | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
QWEN_8B = QWEN | {"hidden_size": 4096, "intermediate_size": 12288}
MROPE: dict[str, Any] = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
VISION_4B: dict[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "out_hidden_size": 2560,
    "deepstack_visual_indexes": [5, 11, 17],
}
VISION_8B: dict[str, Any] = {"out_hidden_size": 4096}  # the rest as transformers' defaults
KLEIN_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
}
KLEIN_9B: dict[str, Any] = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
VAE: dict[str, Any] = BLOCKS | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
SDXL_UNET: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L: dict[str, Any] = {"hidden_size": 768, "projection_dim": 768}
CLIP_L |= {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
CLIP_BIG_G: dict[str, Any] = {"hidden_size": 1280, "projection_dim": 1280}
CLIP_BIG_G |= {"num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120}
SDXL_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}

# Library and class of each part, as in model_index.json; the tokenizers are pocket's.
TOKENIZER = ("transformers", "PreTrainedTokenizerFast")
FLOW_EULER = ("diffusers", "FlowMatchEulerDiscreteScheduler")
ZIMAGE_PARTS = {
    "scheduler": FLOW_EULER,
    "text_encoder": ("transformers", "Qwen3Model"),
    "tokenizer": TOKENIZER,
    "transformer": ("diffusers", "ZImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
KLEIN_PARTS = {
    "scheduler": FLOW_EULER,
    "text_encoder": ("transformers", "Qwen3ForCausalLM"),
    "tokenizer": TOKENIZER,
    "transformer": ("diffusers", "Flux2Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKLFlux2"),
}
SDXL_PARTS = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": TOKENIZER,
    "tokenizer_2": TOKENIZER,
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def zimage(folder: Path) -> None:
    """Z-Image-Turbo: diffusers' default config of the transformer is the 6 B one."""
    _index(folder, "ZImagePipeline", ZIMAGE_PARTS)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    ZImageTransformer2DModel().save_config(folder / "transformer")
    AutoencoderKL(**VAE, latent_channels=16, sample_size=1024).save_config(folder / "vae")
    _qwen(folder, QWEN_4B, VISION_4B)


def klein(
    transformer: dict[str, Any], text: dict[str, Any], vision: dict[str, Any], folder: Path
) -> None:
    """FLUX.2-klein."""
    _index(folder, "Flux2KleinPipeline", KLEIN_PARTS, is_distilled=True)
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    Flux2Transformer2DModel(**transformer, guidance_embeds=False).save_config(
        folder / "transformer"
    )
    AutoencoderKLFlux2(**VAE, sample_size=1024).save_config(folder / "vae")
    _qwen(folder, text, vision)


def sdxl(scheduler: Any, folder: Path) -> None:
    """SDXL for the sampler of its few-step kind; DMD2's is merged, so the base's shapes are its
    own."""
    scheduler_class = {"scheduler": ("diffusers", type(scheduler).__name__)}
    _index(folder, "StableDiffusionXLPipeline", SDXL_PARTS | scheduler_class)
    scheduler.save_pretrained(folder / "scheduler")
    UNet2DConditionModel(**SDXL_UNET).save_config(folder / "unet")
    AutoencoderKL(**VAE, latent_channels=4, sample_size=1024).save_config(folder / "vae")
    for end, shape in (("", CLIP_L), ("_2", CLIP_BIG_G)):
        CLIPTextConfig(**shape).save_pretrained(folder / f"text_encoder{end}")
        tokenizer = AutoTokenizer.from_pretrained(POCKET / "tokenizer")
        tokenizer.model_max_length = 77
        tokenizer.save_pretrained(folder / f"tokenizer{end}")


def _index(folder: Path, pipeline: str, parts: dict[str, tuple[str, str]], **more: bool) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline} | parts | more))


def _qwen(folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> None:
    """Text encoder and the teacher's VLM, with pocket's tokenizer and Qwen3-VL's image sizes."""
    shutil.copytree(POCKET / "tokenizer", folder / "tokenizer")
    own = Qwen3Config(**text)
    own.save_pretrained(folder / "text_encoder")
    text_config = {
        key: value
        for key, value in own.to_dict().items()
        if key not in ("model_type", "architectures")
    }
    text_config["rope_parameters"] = text["rope_parameters"] | MROPE
    pocket = json.loads((POCKET / "vlm" / "config.json").read_text())
    of_the_tokenizer = {key: value for key, value in pocket.items() if key.endswith("_token_id")}
    Qwen3VLConfig(
        text_config=text_config, vision_config=vision, **of_the_tokenizer
    ).save_pretrained(folder / "vlm")
    images = json.loads((POCKET / "vlm" / "preprocessor_config.json").read_text())
    images |= {
        "patch_size": 16,
        "merge_size": 2,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    }
    (folder / "vlm" / "preprocessor_config.json").write_text(json.dumps(images))


FOLDERS = {
    "Tongyi-MAI/Z-Image-Turbo": zimage,
    "black-forest-labs/FLUX.2-klein-4B": partial(klein, KLEIN_4B, QWEN_4B, VISION_4B),
    "black-forest-labs/FLUX.2-klein-9B": partial(klein, KLEIN_9B, QWEN_8B, VISION_8B),
    "stabilityai/sdxl-turbo": partial(
        sdxl, EulerAncestralDiscreteScheduler(**SDXL_BETAS, timestep_spacing="trailing")
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": partial(sdxl, LCMScheduler(**SDXL_BETAS)),
}


def write_configs(name: str, folder: Path) -> None:
    """The configs of the checkpoint of this hub id, into an empty folder. Raises ValueError for one
    that is not known here."""
    if name not in FOLDERS:
        raise ValueError(f"the shapes of {name} are not known: give {', '.join(FOLDERS)}.")
    with torch.device("meta"):
        FOLDERS[name](folder)


def write_random_weights(folder: Path, device: torch.device) -> None:
    """Weights as the libraries initialize them, in bfloat16, for each part of a folder of configs.
    They are drawn on `device`, one part in memory at a time."""
    parts = json.loads((folder / "model_index.json").read_text())
    if (folder / "vlm").is_dir():
        parts["vlm"] = ("transformers", "Qwen3VLModel")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for part, about in parts.items():
            if isinstance(about, list | tuple) and (folder / part / "config.json").is_file():
                library, kind = about
                with device:
                    _initialized(library, kind, folder / part).save_pretrained(folder / part)
    finally:
        torch.set_default_dtype(before)


def _initialized(library: str, kind: str, part: Path) -> Any:
    model_class = getattr(import_module(library), kind)
    if library == "diffusers":
        return model_class.from_config(model_class.load_config(part))
    return model_class(AutoConfig.from_pretrained(part))
