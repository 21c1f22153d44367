"""What a LoRA file or a model's folder is: family, form, rank, metadata, and which loaders read it
and how (docs/lora_files.md)."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dopsd.files import read_metadata, read_tensors
from dopsd.models import FAMILIES, family_class, load_family
from dopsd.models.folder import tuning_metadata
from dopsd.models.lora import refuse_other_kinds
from dopsd.models.lora_forms import UNKNOWN, form_of, scale_of

DOWN_KEY = r"(lora_A|lora_down|lora\.down)(\.default)?\.weight$"
PARTNERS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
# Metadata that is shown, in this order.
SHOWN_METADATA = (
    "base_model",
    "distilled_by",
    "method",
    "nfe",
    "sigmas",
    "teacher_context",
    "ss_steps",
    "modelspec.license",
    "modelspec.trigger_phrase",
    "images",
    "data_sha256",
    "parent_adapter_sha256",
    "base_while_training",
    "trained_on",
    "training_adapter_sha256",
    "dopsd_version",
)


@dataclass(frozen=True)
class Inspected:
    """A LoRA file or a model's folder in words: (label, value) lines."""

    lines: tuple[tuple[str, str], ...]


def inspect_lora(path: Path) -> Inspected:
    """Describe a file by its keys and metadata. Raises ValueError for a file that is not readable
    as safetensors or holds no LoRA."""
    tensors, metadata = read_tensors(path), read_metadata(path)
    downs = {name: tensor for name, tensor in tensors.items() if re.search(DOWN_KEY, name)}
    _refuse_no_lora(path, tensors, downs)
    form, scale = form_of(tensors), scale_of(tensors, metadata)
    families = [
        family
        for family in map(family_class, FAMILIES)
        if any(re.search(family.lora_key_pattern, name) for name in downs)
    ]
    names = " or ".join(family.name for family in families)
    loaders = families[0].lora_loaders if len(families) == 1 else {}
    diffusers, comfy = loaders.get((form, scale), (UNKNOWN, UNKNOWN))
    ranks = Counter(str(min(tensor.shape[:2])) for tensor in downs.values())
    return Inspected(
        (
            ("family", metadata.get("ss_base_model_version") or names or UNKNOWN),
            ("keys", f"{form}, e.g. {next(iter(downs))}"),
            ("modules", str(len(downs))),
            ("rank", ", ".join(ranks)),
            ("dtype", _dtypes(tensors.values())),
            ("scale", scale),
            ("diffusers", diffusers),
            ("ComfyUI", comfy),
            *_shown(metadata),
        )
    )


def inspect_model(folder: Path) -> Inspected:
    """Describe a diffusers folder by its configs, its network's weights and dopsd's metadata.
    Raises ValueError for a folder that is not a complete model of a known family."""
    family = load_family(str(folder))
    part = family.checkpoint.part(family.export_prefix)
    tensors = {
        name: tensor
        for file in part.glob("*.safetensors")
        for name, tensor in read_tensors(file).items()
    }
    millions = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    metadata = tuning_metadata(folder)
    return Inspected(
        (
            ("family", family.name),
            ("network", f"{millions:.2f} M weights in {len(tensors)} tensors"),
            ("dtype", _dtypes(tensors.values())),
            ("diffusers", "from_pretrained"),
            ("tuned by dopsd", "every weight" if metadata else "no, or it is not recorded"),
            *_shown(metadata),
        )
    )


def _refuse_no_lora(path: Path, names: Collection[str], downs: Mapping[str, Tensor]) -> None:
    if not downs:
        raise ValueError(
            f"{path} holds no LoRA: of its {len(names)} tensors none is a lora_A or lora_down "
            "weight."
        )
    refuse_other_kinds(path, names)
    for name, tensor in downs.items():
        if not any(down in name and name.replace(down, up) in names for down, up in PARTNERS):
            raise ValueError(f"{path} holds half a LoRA: {name} has no partner.")
        if tensor.ndim < 2:
            raise ValueError(f"{path} is not a LoRA: {name} has {tensor.ndim} dimensions.")


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _shown(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(key, metadata[key]) for key in SHOWN_METADATA if key in metadata]
