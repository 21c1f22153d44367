"""The student's adapter as a LoRA file that opens elsewhere, and back.

Keys are `<prefix>.<diffusers module path>.lora_A.weight` / `.lora_B.weight` with the scale baked into B and no alpha:
the one form that diffusers and ComfyUI both read at strength 1 for what the previews showed.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dopsd.families.base import Family
from dopsd.files import read_metadata, read_tensors, write_tensors
from dopsd.training.adapters import lora_pairs


def export_lora(
    path: Path, student: Mapping[str, Tensor], scale: float, prefix: str, metadata: Mapping[str, str]
) -> None:
    """Write the adapter, reopen the file, and compare every module's delta with the live one.

    scale: alpha / rank. Raises ValueError when the file does not hold what was trained.
    """
    pairs = lora_pairs(dict(student))
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{prefix}.{module}.lora_A.weight"] = a.detach().float()
        tensors[f"{prefix}.{module}.lora_B.weight"] = b.detach().float() * scale
    write_tensors(path, tensors, {"format": "pt", **metadata})
    saved = _pairs(path, read_tensors(path), prefix)
    for module, (a, b) in pairs.items():
        delta = (b.detach().cpu().double() @ a.detach().cpu().double()) * scale
        again = saved[module][1].double() @ saved[module][0].double()
        if not torch.allclose(again, delta, rtol=1e-5, atol=1e-8):
            raise ValueError(f"{path}: {module} does not read back as trained; the file is not to be trusted.")


def read_lora(path: Path, family: Family) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA file's (A [r, in], B [out, r], scale in it) by module path, whichever tool wrote it. Raises ValueError
    for a file that is no LoRA of this family, or of a kind whose deltas are not B @ A."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; dopsd reads no other form of weights.")
    tensors, scale = read_tensors(path), _scale_in_metadata(path)
    for mark, kind in (("dora_scale", "DoRA"), (".lokr_", "LoKr"), (".hada_", "LoHa")):
        if any(mark in name for name in tensors):
            raise ValueError(f"{path} is a {kind} file; dopsd reads plain LoRA only.")
    try:
        own = family.lora_in_own_form(tensors)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is no LoRA that {family.name} can read ({error}).") from error
    return {module: (a, b * scale) for module, (a, b) in _pairs(path, own, family.export_prefix).items()}


def _scale_in_metadata(path: Path) -> float:
    """alpha / rank where the file says it the way peft through diffusers does; else 1."""
    said = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    rank, alpha = said.get("transformer.r"), said.get("transformer.lora_alpha")
    return alpha / rank if rank and alpha else 1.0


def _pairs(path: Path, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
    left, pairs = dict(tensors), {}
    for name in tensors:
        partner = name.replace(".lora_A.weight", ".lora_B.weight")
        if name.startswith(f"{prefix}.") and name != partner and partner in left:
            module = name.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight")
            pairs[module] = (left.pop(name), left.pop(partner))
    if left or not pairs:
        example = next(iter(left), "nothing")
        raise ValueError(f"{path} is no LoRA of the form {prefix}.<module>.lora_A/B.weight (found {example}).")
    return pairs


@torch.no_grad()
def merge_lora(network: nn.Module, path: Path, family: Family, strength: float = 1.0) -> None:
    """Add a LoRA file's deltas to the network's weights. Raises ValueError when a module or shape does not fit."""
    for module, (a, b) in read_lora(path, family).items():
        try:
            weight = network.get_parameter(f"{module}.weight")
        except AttributeError as error:
            raise ValueError(f"{path} adapts {module}, which this model does not have: another family?") from error
        if weight.shape != (len(b), a.shape[1]):
            raise ValueError(f"{path} adapts {module} as {len(b)} x {a.shape[1]}; here it is {tuple(weight.shape)}.")
        delta = b.double() @ a.double() * strength
        weight.copy_((weight.double().cpu() + delta).to(weight))


@torch.no_grad()
def start_from_lora(student: Mapping[str, Tensor], path: Path, family: Family, scale: float) -> None:
    """Put a LoRA file's weights into the student's adapters, whose own scale is alpha / rank. Raises ValueError when
    modules or ranks differ: training on with half of a file would lose the other half in silence."""
    pairs, own = read_lora(path, family), lora_pairs(dict(student))
    if differing := sorted(pairs.keys() ^ own.keys()):
        raise ValueError(
            f"{path} adapts other modules than lora.targets (first: {differing[0]}): set lora.targets to those."
        )
    for module, (a, b) in pairs.items():
        if a.shape != own[module][0].shape:
            raise ValueError(f"{path} has rank {len(a)}, this recipe {len(own[module][0])}: set lora.rank: {len(a)}.")
        own[module][0].copy_(a)
        own[module][1].copy_(b / scale)
