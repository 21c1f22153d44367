"""What SDXL's UNet (2.57 B parameters) would take in training, by shapes alone: no weight, no GPU, no network.

    python benchmarks/forecast_sdxl.py FOLDER        # an SDXL, of which only configs and tokenizers are needed

LoRA rank 16, bfloat16, batch 1, SDXL-Turbo's 512 x 512 and DMD2's 1024 x 1024; every method at its own settings.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from dopsd.families import load_family
from dopsd.forecast import forecast
from dopsd.recipe import parse_recipe

METHODS = {"sft": {}, "dreambooth": {"class_prompt": "x"}, "pso": {}, "pso_online": {"judge": "sharpness"}}


def main(folder: Annotated[Path, typer.Argument(help="An SDXL folder.")]) -> None:
    """Print a row for each method, size and level of memory."""
    torch.set_num_threads(1)
    family = load_family(str(folder))
    for side in (512, 1024):
        for method, told in METHODS.items():
            for level in ("low", "high"):
                tree = {"model": {"name_or_path": "x"}, "data": {"folder": "x"}, "run_name": "x",
                        "method": {"name": method} | told, "lora": {"rank": 16}}  # fmt: skip
                found = forecast(parse_recipe(tree), family, (side, side), ["x"], torch.bfloat16, lean=level == "low")
                print(f"{side} {method} {level} {found.resident / 2**30:.1f} {found.peak / 2**30:.1f} GiB", flush=True)


if __name__ == "__main__":
    typer.run(main)
