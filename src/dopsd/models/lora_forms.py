"""Forms in which a LoRA is written: how its keys are named, and where its scale is.

Every form has the scale alpha / rank multiplied into B, or an alpha that equals the rank, so that
strength 1 is what was trained. What reads which form: docs/lora_files.md.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dopsd.models.base import AnyFamily
from dopsd.models.lora_deltas import LowRank
from dopsd.models.lora_names import ModuleNames

Form = Literal["diffusers", "comfyui", "kohya", "peft"]
FORMS: dict[Form, str] = {
    "diffusers": "diffusers' names behind `transformer.` or `unet.`",
    "comfyui": "the names that most software reads: `diffusion_model.`, or kohya's for SDXL",
    "kohya": "names with underscores behind `lora_unet_`, and alpha tensors",
    "peft": "a folder with adapter_model.safetensors and adapter_config.json",
}
PEFT_PREFIX = "base_model.model"


def lora_tensors(pairs: Mapping[str, LowRank], family: AnyFamily, form: Form) -> dict[str, Tensor]:
    """The tensors of a file in this form. pairs: by diffusers module path."""
    match form:
        case "diffusers":
            return _dotted(family.export_prefix, pairs)
        case "peft":
            return _dotted(PEFT_PREFIX, pairs)
        case "kohya":
            return _kohya(pairs, family)
    match family.comfyui_names:
        case "kohya":
            return _kohya(pairs, family)
        case "native":
            return _dotted("diffusion_model", native_pairs(pairs, family.module_names))
        case "diffusers":
            return _dotted("diffusion_model", pairs)


def peft_config(pairs: Mapping[str, LowRank], base_model: str | None) -> dict[str, Any]:
    """PEFT's adapter_config.json. The scale is in B: alpha is the rank of every module."""
    ranks = {module: len(pair.a) for module, pair in pairs.items()}
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {module: rank for module, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def native_pairs(pairs: Mapping[str, LowRank], names: ModuleNames) -> dict[str, LowRank]:
    """The same LoRA on the original model's modules. Where one of those consists of several
    diffusers modules, their A are stacked and their B stand on a diagonal of blocks; where they
    have one A in common, it stays one."""
    native = {}
    for name, parts in names.native_rows(pairs).items():
        held = [pairs[part] for part in parts if part in pairs]
        rows = len(held[0].b)
        if all(torch.equal(pair.a, held[0].a) for pair in held):
            a = held[0].a
            blocks = [
                pairs[part].b if part in pairs else a.new_zeros(rows, len(a)) for part in parts
            ]
            b = torch.cat(blocks)
        else:
            a = torch.cat([pair.a for pair in held])
            # A part without an adapter is a block of rows without columns.
            none = a.new_zeros(rows, 0)
            b = torch.block_diag(*(pairs[part].b if part in pairs else none for part in parts))
        if names.swapped(parts[0]):
            b = b.roll(len(b) // 2, dims=0)
        native[name] = LowRank(a, b)
    return native


def _dotted(prefix: str, pairs: Mapping[str, LowRank]) -> dict[str, Tensor]:
    a = {f"{prefix}.{module}.lora_A.weight": pair.a for module, pair in pairs.items()}
    return a | {f"{prefix}.{module}.lora_B.weight": pair.b for module, pair in pairs.items()}


def _kohya(pairs: Mapping[str, LowRank], family: AnyFamily) -> dict[str, Tensor]:
    """Of the original model's modules, as kohya's scripts write them, with alpha = rank."""
    tensors = {}
    for module, (a, b) in native_pairs(pairs, family.module_names).items():
        path = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{path}.lora_down.weight": a, f"{path}.lora_up.weight": b}
        tensors[f"{path}.alpha"] = torch.tensor(float(len(a)))
    return tensors
