"""LoRA files: reading every public form, and adding a LoRA to a network's weights.

Inside the package a LoRA is (A [r, in], B [out, r]) by module path, with the scale in B. Each
family maps its public forms to that (`Family.lora_in_own_form`). Runs write theirs in
`runs/outputs/lora_export.py`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dopsd.files import read_metadata, read_tensors
from dopsd.models import BUILT_IN
from dopsd.models.base import Family
from dopsd.models.hub import is_hub_file, is_hub_id

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Pairs = Mapping[str, tuple[Tensor, Tensor]]  # A [r, in] and B [out, r] by module path


def read_lora(path: Path, family: Family) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA file's A [r, in] and B [out, r], scale in B, by module path, whichever tool wrote it;
    for a convolution, `in` is input channels times kernel size. Raises ValueError for a file that
    is not a LoRA of this family, or of a kind whose deltas are not B @ A."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file; no other format is read.")
    tensors, scale = read_tensors(path), _scale_in_metadata(path, family.export_prefix)
    refuse_other_kinds(path, tensors)
    try:
        own = family.lora_in_own_form(tensors)
    except (
        ValueError,
        KeyError,
        RuntimeError,
        TypeError,
        IndexError,
    ) as error:  # raised by diffusers, on any content
        raise ValueError(f"{path} is not a LoRA that {family.name} can read ({error}).") from error
    pairs = _pairs(path, own, family.export_prefix)
    for module, (a, b) in pairs.items():
        if a.dtype not in DTYPES or b.dtype not in DTYPES:
            raise ValueError(
                f"{path} holds {module} as {a.dtype}; dopsd reads float32, float16 and bfloat16."
            )
        fits = (
            a.ndim == b.ndim
            and a.ndim in (2, 4)
            and len(a) == b.shape[1]
            and b.numel() == len(b) * len(a)
        )
        if not fits:
            raise ValueError(
                f"{path}: A {tuple(a.shape)} and B {tuple(b.shape)} of {module} do not make a LoRA."
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(
                f"{path}: {module} holds NaN or infinite values: its training diverged."
            )
    return {module: (a.flatten(1), b.flatten(1) * scale) for module, (a, b) in pairs.items()}


@dataclass(frozen=True)
class ModelReference:
    """What `load_family` opens a model with: name or path, and the file that distils it, if any."""

    name_or_path: str
    distilled_by: str | None = None


def model_for(
    lora: Path | None, name_or_path: str | None = None, distilled_by: str | None = None
) -> ModelReference:
    """The model to use with a LoRA file: the given one, else the one in the file's metadata
    (`base_model`, `distilled_by`).

    Raises ValueError where no model is given and the file names none, or only the name of a local
    folder or file, whose path is not recorded.
    """
    if name_or_path is not None:
        return ModelReference(name_or_path, distilled_by)
    how = "give it with --model (name_or_path in Python): a diffusers folder or a hub id"
    if lora is None:
        raise ValueError(f"no model and no LoRA file that could name one: {how}.")
    metadata = read_metadata(lora)
    base = metadata.get("base_model")
    if not base:
        raise ValueError(f"{lora} does not record which model it was tuned on: {how}.")
    if base not in BUILT_IN and not is_hub_id(base):
        raise ValueError(
            f"{lora} was tuned on a local model called {base}, whose path it does not record: "
            f"{how}."
        )
    recorded = metadata.get("distilled_by")
    if distilled_by is None and recorded and not is_hub_file(recorded):
        raise ValueError(
            f"{lora} was tuned on {base} distilled by a local file {recorded}, whose path it does "
            "not record: give it with --distilled-by (distilled_by in Python)."
        )
    return ModelReference(base, distilled_by or recorded)


def diffusers_form(prefix: str, pairs: Pairs) -> dict[str, Tensor]:
    """`<prefix>.<diffusers module path>.lora_A.weight` and `.lora_B.weight`, no alpha: for
    transformers the one form that both diffusers and ComfyUI read at strength 1."""
    a = {f"{prefix}.{module}.lora_A.weight": pair[0] for module, pair in pairs.items()}
    return a | {f"{prefix}.{module}.lora_B.weight": pair[1] for module, pair in pairs.items()}


def refuse_other_kinds(path: Path, names: Iterable[str]) -> None:
    """Raise ValueError for adapters whose deltas are not B @ A."""
    names = list(names)
    for mark, kind in (("dora_scale", "DoRA"), (".lokr_", "LoKr"), (".hada_", "LoHa")):
        if any(mark in name for name in names):
            raise ValueError(f"{path} is a {kind} file; dopsd reads plain LoRA only.")


def _scale_in_metadata(path: Path, prefix: str) -> float:
    """alpha / rank where the metadata give them as diffusers writes peft's config; else 1."""
    try:
        config = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
        rank, alpha = config.get(f"{prefix}.r"), config.get(f"{prefix}.lora_alpha")
        return alpha / rank if rank and alpha else 1.0
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: its lora_adapter_metadata cannot be read ({error}).") from error


def _pairs(
    path: Path, tensors: Mapping[str, Tensor], prefix: str
) -> dict[str, tuple[Tensor, Tensor]]:
    unpaired, pairs = dict(tensors), {}
    for name in tensors:
        partner = name.replace(".lora_A.weight", ".lora_B.weight")
        if name.startswith(f"{prefix}.") and name != partner and partner in unpaired:
            module = name.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight")
            pairs[module] = (unpaired.pop(name), unpaired.pop(partner))
    if unpaired or not pairs:
        example = next(iter(unpaired), "nothing")
        raise ValueError(
            f"{path} is no LoRA of the form {prefix}.<module>.lora_A/B.weight: it holds {example}."
        )
    return pairs


def refuse_strength(strength: float) -> None:
    """Raise ValueError for a strength that is not finite."""
    if not math.isfinite(strength):
        raise ValueError(f"the strength is {strength}; it must be a finite number (1: as trained).")


@torch.no_grad()
def merge_lora(network: nn.Module, path: Path, family: Family, strength: float = 1.0) -> None:
    """Add a LoRA file's deltas to the network's weights. Raises ValueError when a module or shape
    does not fit."""
    refuse_strength(strength)
    for module, (a, b) in read_lora(path, family).items():
        weight = refuse_misfit(path, module, network, (len(b), a.shape[1]))
        delta = (b.double() @ a.double() * strength).reshape(weight.shape)
        weight.copy_((weight.double().cpu() + delta).to(weight))


def refuse_misfit(
    path: Path, module: str, network: nn.Module, size: tuple[int, int]
) -> nn.Parameter:
    """The weight that a delta of this size (out, in) belongs to. Raises ValueError where the
    network has no such weight."""
    try:
        weight = network.get_parameter(f"{module}.weight")
    except AttributeError as error:
        raise ValueError(
            f"{path} adapts {module}, which this model does not have: another family?"
        ) from error
    if weight.flatten(1).shape != size:
        raise ValueError(
            f"{path} adapts {module} as {size[0]} x {size[1]}; here it is {tuple(weight.shape)}."
        )
    return weight
