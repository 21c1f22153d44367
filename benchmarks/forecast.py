"""What full-size transformers would take in training, by shapes alone: no weight, no GPU, no network.

    python benchmarks/forecast.py --json forecast.json              # Z-Image-Turbo, about three minutes on one CPU core
    python benchmarks/forecast.py --model klein-4b                  # or klein-9b

LoRA rank 32, bfloat16, batch 1, 1024 x 1024. Z-Image: a caption of 100 tokens, 676 with the teacher's picture. klein:
the `edit` teacher, and rows that edit one picture of 1024 x 1024.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    ZImageTransformer2DModel,
)
from transformers import Qwen3Config

from dopsd.batch import Context
from dopsd.families import POCKET, load_family
from dopsd.families.base import Family, Size
from dopsd.families.checkpoint import Checkpoint
from dopsd.families.zimage import PARTS, ZImage, ZImageDenoiser
from dopsd.forecast import forecast
from dopsd.recipe import parse_recipe

WIDTH = 2560  # of Qwen3-4B, Z-Image's text encoder
TOKENS, SEEING = 100, 676
SIDES = (1024, 1024)


class FullSize(ZImage):
    """Z-Image-Turbo by its shapes: diffusers' default config of the transformer is the 6 B one."""

    def __init__(self) -> None:
        super().__init__(Checkpoint(str(POCKET)), json.loads((POCKET / "model_index.json").read_text()))
        self.channels, self.cell, self.default_nfe = 16, 8, 8

    def empty_denoiser(self) -> ZImageDenoiser:
        return ZImageDenoiser(ZImageTransformer2DModel())

    def blank_context(
        self,
        prompts: Sequence[str],
        sizes: Sequence[Size] | None = None,
        references: Sequence[Sequence[Size]] | None = None,
    ) -> Context:
        length = TOKENS if sizes is None else SEEING
        return Context(torch.zeros(len(prompts), length, WIDTH), (length,) * len(prompts))


# Of klein: blocks, heads, and what its text encoder's config says beside Qwen3's own.
KLEIN = {
    "klein-4b": ({"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
                 {"hidden_size": 2560, "num_hidden_layers": 36}),
    "klein-9b": ({"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
                 {"hidden_size": 4096, "num_hidden_layers": 36}),
}  # fmt: skip


def klein(name: str, folder: Path) -> Family:
    """A klein by its configs, written into a folder; the tokenizer is pocket's, for klein pads every prompt."""
    transformer, text = KLEIN[name]
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": True, **dict.fromkeys(PARTS, ("", ""))}
    (folder / "model_index.json").write_text(json.dumps(index))
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    shutil.copytree(POCKET / "tokenizer", folder / "tokenizer")
    Qwen3Config(**text).save_pretrained(folder / "text_encoder")
    with torch.device("meta"):
        Flux2Transformer2DModel(**transformer, guidance_embeds=False).save_config(folder / "transformer")
        AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
        ).save_config(folder / "vae")
    return load_family(str(folder))


def main(
    model: Annotated[str, typer.Option(help="zimage, klein-4b or klein-9b.")] = "zimage",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the rows go.")] = None,
) -> None:
    """Print a row for each method, quantization and level of memory; for klein also with a reference."""
    torch.set_num_threads(1)
    rows = []
    with TemporaryDirectory() as folder:
        family = klein(model, Path(folder)) if model in KLEIN else FullSize()
        for method, kind, level, edited in cases(editing=model in KLEIN):
            base = {"offload": True} if kind == "offload" else {"quantize": kind}
            tree = {"model": {"name_or_path": "x"} | base, "data": {"folder": "x"}, "run_name": "x",
                    "method": {"name": method}, "lora": {"rank": 32}}  # fmt: skip
            began = time.perf_counter()
            found = forecast(parse_recipe(tree), family, SIDES, ["x"], torch.bfloat16, level == "low", [SIDES] * edited)
            seconds = time.perf_counter() - began
            row = {"method": method, "base": kind, "memory": level, "references": edited,
                   "resident_gib": found.resident / 2**30, "peak_gib": found.peak / 2**30,
                   "seconds_of_the_forecast": seconds}  # fmt: skip
            rows.append(row)
            print("  ".join(f"{k}={v:.1f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


def cases(editing: bool) -> Iterator[tuple[str, str | None, str, int]]:
    """(method, base, memory, references)."""
    for method in ("dopsd", "sft"):
        for kind in (None, "int8", "nf4", "offload") if method == "dopsd" else (None,):
            for level in ("low",) if kind == "offload" else ("low", "high"):
                for references in (0, 1) if editing and kind is None else (0,):
                    yield method, kind, level, references


if __name__ == "__main__":
    typer.run(main)
