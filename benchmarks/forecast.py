"""What a step of a recipe would take of a GPU's memory, by shapes alone: no weight, no GPU, no
network.

    python benchmarks/forecast.py recipes/{zimage,klein,sdxl}-*.yaml \\
        --json benchmarks/results/forecast.json
    python benchmarks/forecast.py recipes/zimage-turbo-identity-dopsd.yaml --set model.quantize=nf4

As `dopsd check --card` says, without the checkpoints: each is a folder of configs written down
here, in bfloat16. A caption is of about 100 tokens (SDXL's of 77), rows that are edited have one
reference of the target's size. Half a minute to three minutes a row on one CPU core.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
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
from transformers import AutoTokenizer, CLIPTextConfig, Qwen3Config, Qwen3VLConfig

from dopsd.cli.options import Changes
from dopsd.config.recipe import Recipe, load_recipe
from dopsd.models import load_family
from dopsd.models.base import Family, TeacherVision
from dopsd.pocket import CHECKPOINT as POCKET
from dopsd.runs.memory import forecast

QWEN_4B: dict[str, Any] = {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728}
QWEN_8B: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288}
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
SDXL_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def zimage(folder: Path) -> None:
    """Z-Image-Turbo: diffusers' default config of the transformer is the 6 B one."""
    _index(folder, "ZImagePipeline", ("text_encoder", "tokenizer", "transformer"))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    ZImageTransformer2DModel().save_config(folder / "transformer")
    AutoencoderKL(**VAE, latent_channels=16, sample_size=1024).save_config(folder / "vae")
    _qwen(folder, QWEN_4B)


def klein(transformer: dict[str, Any], text: dict[str, Any], folder: Path) -> None:
    """FLUX.2-klein."""
    _index(
        folder,
        "Flux2KleinPipeline",
        ("text_encoder", "tokenizer", "transformer"),
        is_distilled=True,
    )
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    Flux2Transformer2DModel(**transformer, guidance_embeds=False).save_config(
        folder / "transformer"
    )
    AutoencoderKLFlux2(**VAE, sample_size=1024).save_config(folder / "vae")
    _qwen(folder, text)


def sdxl(scheduler: Any, folder: Path) -> None:
    """SDXL for the sampler of its few-step kind; DMD2's is merged, so the base's shapes are its
    own."""
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    _index(folder, "StableDiffusionXLPipeline", encoders)
    scheduler.save_pretrained(folder / "scheduler")
    UNet2DConditionModel(**SDXL_UNET).save_config(folder / "unet")
    AutoencoderKL(**VAE, latent_channels=4, sample_size=1024).save_config(folder / "vae")
    for end, width in (("", 768), ("_2", 1280)):
        CLIPTextConfig(hidden_size=width, projection_dim=width).save_pretrained(
            folder / f"text_encoder{end}"
        )
        tokenizer = AutoTokenizer.from_pretrained(POCKET / "tokenizer")
        tokenizer.model_max_length = 77
        tokenizer.save_pretrained(folder / f"tokenizer{end}")


def _index(folder: Path, pipeline: str, parts: tuple[str, ...], **more: bool) -> None:
    index = {
        "_class_name": pipeline,
        **dict.fromkeys((*parts, "vae", "scheduler"), ("", "")),
        **more,
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def _qwen(folder: Path, text: dict[str, Any]) -> None:
    """Text encoder and the teacher's VLM, with pocket's tokenizer and Qwen3-VL's image sizes."""
    shutil.copytree(POCKET / "tokenizer", folder / "tokenizer")
    own = Qwen3Config(**text)
    own.save_pretrained(folder / "text_encoder")
    text_config = {
        key: value
        for key, value in own.to_dict().items()
        if key not in ("model_type", "architectures")
    }
    Qwen3VLConfig(text_config=text_config).save_pretrained(folder / "vlm")
    images = json.loads((POCKET / "vlm" / "preprocessor_config.json").read_text())
    images |= {
        "patch_size": 16,
        "merge_size": 2,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    }
    (folder / "vlm" / "preprocessor_config.json").write_text(json.dumps(images))


FOLDERS = {
    "Tongyi-MAI/Z-Image-Turbo": zimage,
    "black-forest-labs/FLUX.2-klein-4B": partial(klein, KLEIN_4B, QWEN_4B),
    "black-forest-labs/FLUX.2-klein-9B": partial(klein, KLEIN_9B, QWEN_8B),
    "stabilityai/sdxl-turbo": partial(
        sdxl, EulerAncestralDiscreteScheduler(**SDXL_BETAS, timestep_spacing="trailing")
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": partial(sdxl, LCMScheduler(**SDXL_BETAS)),
}


def family_of(recipe: Recipe, folder: Path) -> Family:
    """The recipe's checkpoint by its shapes, written into an empty folder."""
    with torch.device("meta"):
        FOLDERS[recipe.model.name_or_path](folder)
    return load_family(
        str(folder),
        teacher_vision=TeacherVision(
            recipe.model.teacher_context, None, recipe.model.teacher_suffix
        ),
    )


def main(
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipes for checkpoints that are known here.")
    ],
    change: Changes = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the rows go.")] = None,
) -> None:
    """Print a row for each recipe and `model.memory`: resident and peak of a step, in GiB."""
    torch.set_num_threads(1)
    rows = []
    for path in recipes:
        recipe = load_recipe(path, change or ())
        with TemporaryDirectory() as folder:
            family = family_of(recipe, Path(folder))
            side = max(recipe.data.resolution, default=family.resolution)
            references = [(side, side)] * ("editing" in path.stem)
            for level in ("low",) if recipe.model.offload else ("low", "high"):
                caption = "star " * (60 if family.name == "sdxl" else 90)
                found = forecast(
                    recipe,
                    family,
                    (side, side),
                    [caption],
                    torch.bfloat16,
                    level == "low",
                    references,
                )
                resident, peak = found.resident / 2**30, found.peak / 2**30
                print(f"{path.stem}  {level}  resident {resident:.1f}  peak {peak:.1f}", flush=True)
                rows.append(
                    {
                        "recipe": path.stem,
                        "memory": level,
                        "resident_gib": resident,
                        "peak_gib": peak,
                    }
                )
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
