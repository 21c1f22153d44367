"""What Z-Image-Turbo's 6 B transformer would take in training, by shapes alone: no weight, no GPU, no network.

    python benchmarks/forecast.py --json forecast.json        # about three minutes on one CPU core

LoRA rank 32, bfloat16, batch 1, 1024 x 1024 (a caption of 100 tokens, 676 with the teacher's picture).
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import ZImageTransformer2DModel

from dopsd.batch import Context
from dopsd.families import POCKET
from dopsd.families.base import Size
from dopsd.families.checkpoint import Checkpoint
from dopsd.families.zimage import ZImage, ZImageDenoiser
from dopsd.forecast import forecast
from dopsd.recipe import parse_recipe

WIDTH = 2560  # of Qwen3-4B, Z-Image's text encoder
TOKENS, SEEING = 100, 676


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


def main(json_file: Annotated[Path | None, typer.Option("--json", help="Where the rows go.")] = None) -> None:
    """Print a row for each method, quantization and level of memory."""
    torch.set_num_threads(1)
    family, rows = FullSize(), []
    for method in ("dopsd", "sft"):
        for kind in (None, "int8", "nf4", "offload") if method == "dopsd" else (None,):
            for level in ("low",) if kind == "offload" else ("low", "high"):
                base = {"offload": True} if kind == "offload" else {"quantize": kind}
                tree = {"model": {"name_or_path": "x"} | base, "data": {"folder": "x"}, "run_name": "x",
                        "method": {"name": method}, "lora": {"rank": 32}}  # fmt: skip
                began = time.perf_counter()
                found = forecast(parse_recipe(tree), family, (1024, 1024), ["x"], torch.bfloat16, lean=level == "low")
                seconds = time.perf_counter() - began
                row = {"method": method, "base": kind, "memory": level, "resident_gib": found.resident / 2**30,
                       "peak_gib": found.peak / 2**30, "seconds_of_the_forecast": seconds}  # fmt: skip
                rows.append(row)
                print(
                    "  ".join(f"{k}={v:.1f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()),
                    flush=True,
                )
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
