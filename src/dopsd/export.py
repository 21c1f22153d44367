"""The student's adapter as a LoRA file that opens elsewhere, and back.

Keys are `<prefix>.<diffusers module path>.lora_A.weight` / `.lora_B.weight` with the scale baked into B and no alpha:
the one form that diffusers and ComfyUI both read at strength 1 for what the previews showed.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dopsd.families.base import Family
from dopsd.files import read_metadata, read_tensors, write_tensors
from dopsd.training.adapters import lora_pairs

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Size = tuple[int, ...]
Pairs = Mapping[str, tuple[Tensor, Tensor]]  # A [r, in] and B [out, r] by module path


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
    refuse_other_kinds(path, tensors)
    try:
        own = family.lora_in_own_form(tensors)
    except (ValueError, KeyError, RuntimeError, TypeError, IndexError) as error:  # of diffusers, on any content
        raise ValueError(f"{path} is no LoRA that {family.name} can read ({error}).") from error
    pairs = _pairs(path, own, family.export_prefix)
    for module, (a, b) in pairs.items():
        if a.dtype not in DTYPES or b.dtype not in DTYPES:
            raise ValueError(f"{path} holds {module} as {a.dtype}; dopsd reads float32, float16 and bfloat16.")
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise ValueError(f"{path}: A {tuple(a.shape)} and B {tuple(b.shape)} of {module} do not make a LoRA.")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{path}: {module} holds numbers that are not finite; the training broke down.")
    return {module: (a, b * scale) for module, (a, b) in pairs.items()}


def refuse_other_kinds(path: Path, names: Iterable[str]) -> None:
    """Raise ValueError for adapters whose deltas are not B @ A."""
    names = list(names)
    for mark, kind in (("dora_scale", "DoRA"), (".lokr_", "LoKr"), (".hada_", "LoHa")):
        if any(mark in name for name in names):
            raise ValueError(f"{path} is a {kind} file; dopsd reads plain LoRA only.")


def _scale_in_metadata(path: Path) -> float:
    """alpha / rank where the file says it the way peft through diffusers does; else 1."""
    try:
        said = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
        rank, alpha = said.get("transformer.r"), said.get("transformer.lora_alpha")
        return alpha / rank if rank and alpha else 1.0
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: its lora_adapter_metadata cannot be read ({error}).") from error


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


def refuse_strength(strength: float) -> None:
    """Raise ValueError for what is no strength."""
    if not math.isfinite(strength):
        raise ValueError(f"the strength is {strength}; it must be a number, 1 is what was trained.")


@torch.no_grad()
def merge_lora(network: nn.Module, path: Path, family: Family, strength: float = 1.0) -> None:
    """Add a LoRA file's deltas to the network's weights. Raises ValueError when a module or shape does not fit."""
    refuse_strength(strength)
    for module, (a, b) in read_lora(path, family).items():
        try:
            weight = network.get_parameter(f"{module}.weight")
        except AttributeError as error:
            raise ValueError(f"{path} adapts {module}, which this model does not have: another family?") from error
        if weight.shape != (len(b), a.shape[1]):
            raise ValueError(f"{path} adapts {module} as {len(b)} x {a.shape[1]}; here it is {tuple(weight.shape)}.")
        delta = b.double() @ a.double() * strength
        weight.copy_((weight.double().cpu() + delta).to(weight))


def refuse_unfit(path: Path, pairs: Pairs, own: Mapping[str, tuple[Size, Size]]) -> None:
    """Raise ValueError when a LoRA to start from has other modules or shapes than the run's own adapters, by the sizes
    of A and B: training on with half of a file would lose the other half in silence."""
    if differing := sorted(pairs.keys() ^ own.keys()):
        raise ValueError(
            f"{path} adapts other modules than lora.targets (first: {differing[0]}): set lora.targets to those."
        )
    for module, (a, b) in pairs.items():
        wanted, found = own[module], (tuple(a.shape), tuple(b.shape))
        if len(a) != wanted[0][0]:
            raise ValueError(f"{path} has rank {len(a)}, this recipe {wanted[0][0]}: set lora.rank: {len(a)}.")
        if found != wanted:
            raise ValueError(f"{path} adapts {module} by A and B of {found}; here they are {wanted}: another model?")


@torch.no_grad()
def start_from_lora(student: Mapping[str, Tensor], path: Path, family: Family, scale: float) -> None:
    """Put a LoRA file's weights into the student's adapters, whose own scale is alpha / rank. Raises ValueError when
    they do not fit."""
    pairs, own = read_lora(path, family), lora_pairs(dict(student))
    refuse_unfit(path, pairs, {module: (tuple(a.shape), tuple(b.shape)) for module, (a, b) in own.items()})
    for module, (a, b) in pairs.items():
        own[module][0].copy_(a)
        own[module][1].copy_(b / scale)
