"""What SDXL's UNet (2.57 B parameters) would take in training, by shapes alone: no weight, no GPU, no network.

    python benchmarks/forecast_sdxl.py FOLDER recipes/sdxl-*.yaml

FOLDER: an SDXL, of which only configs and tokenizers are needed. About a minute and a half a row on one CPU core.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from dopsd.checking import resolutions_of
from dopsd.families import load_family
from dopsd.forecast import forecast
from dopsd.recipe import load_recipe


def main(
    folder: Annotated[Path, typer.Argument(help="An SDXL folder.")],
    recipes: Annotated[list[Path], typer.Argument(help="Recipes for an SDXL.")],
) -> None:
    """Print a row for each recipe and level of memory: what stays, and the peak of a step."""
    torch.set_num_threads(1)
    family = load_family(str(folder))
    for path in recipes:
        recipe = load_recipe(path)
        side = max(resolutions_of(recipe, family))
        for level in ("low", "high"):
            found = forecast(recipe, family, (side, side), ["x"], torch.bfloat16, lean=level == "low")
            print(f"{path.stem} {level} {found.resident / 2**30:.1f} {found.peak / 2**30:.1f} GiB", flush=True)


if __name__ == "__main__":
    typer.run(main)
