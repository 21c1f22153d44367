"""Which software loads how much of our LoRA files: the table in docs/lora_files.md, from full-size
networks on meta tensors.

    python benchmarks/lora_loaders.py

diffusers is asked by loading each file; the others by the names that they know
(`dopsd.models.lora_loaders`).
"""

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from full_size import KLEIN_4B, KLEIN_9B, SDXL_UNET
from torch import nn

from dopsd.files import write_tensors, write_text
from dopsd.models import family_class
from dopsd.models.lora_deltas import LowRank
from dopsd.models.lora_forms import FORMS, Form, lora_tensors
from dopsd.models.lora_in_diffusers import loaded_by_diffusers
from dopsd.models.lora_keys import sort_keys
from dopsd.models.lora_loaders import PROGRAMS, loaded_by

PAGE = Path(__file__).parents[1] / "docs" / "lora_files.md"
BEGIN, END = "<!-- by benchmarks/lora_loaders.py -->\n", "<!-- end -->\n"
# Label -> family, its network's class and config.
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "Z-Image": ("zimage", ZImageTransformer2DModel, {}),
    "klein-4B": ("flux2_klein", Flux2Transformer2DModel, KLEIN_4B | {"guidance_embeds": False}),
    "klein-9B": ("flux2_klein", Flux2Transformer2DModel, KLEIN_9B | {"guidance_embeds": False}),
    "SDXL": ("sdxl", UNet2DConditionModel, SDXL_UNET),
}


@cache
def pairs_of(label: str) -> dict[str, LowRank]:
    """A LoRA of rank 1 on the family's targets, at full size."""
    family, kind, config = MODELS[label]
    with torch.device("meta"):
        network = kind(**config)
    generator = torch.Generator().manual_seed(0)
    return {
        name: LowRank(
            torch.randn(1, module.in_features, generator=generator),
            torch.randn(module.out_features, 1, generator=generator),
        )
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(family_class(family).lora_targets, name)
    }


def row_of(label: str, form: Form) -> dict[str, str]:
    """What each program makes of a file of this form, in a few words."""
    family, pairs = family_class(MODELS[label][0]), pairs_of(label)
    tensors = lora_tensors(pairs, family, form)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        write_tensors(path, tensors)
        by_diffusers = loaded_by_diffusers(path, family, pairs)
    keys = sort_keys(tensors, family.module_names)
    return {"diffusers": by_diffusers} | {
        name: loaded_by(program, family.name, family.module_names, keys)
        for name, program in PROGRAMS.items()
    }


def line_of(label: str, form: Form) -> str:
    """A row of the table."""
    family = family_class(MODELS[label][0])
    default = " (default)" if form == "comfyui" else ""
    example = next(iter(lora_tensors(pairs_of(label), family, form))).split(".lora")[0]
    short = {"strength 1": "all", "nothing is loaded, without a message": "nothing"}
    cells = [
        short.get(text, text.removesuffix(", strength 1")) for text in row_of(label, form).values()
    ]
    return f"| {label} | {form}{default} | `{example}` | {' | '.join(cells)} |"


def table() -> str:
    """The table in Markdown."""
    header = ["model", "format", "first key", "diffusers", *PROGRAMS]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [line_of(label, form) for label in MODELS for form in FORMS]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table into the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    write_text(PAGE, f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
