"""What a LoRA file or a model's folder is: family, form, rank, metadata, and which loaders read it
and how (docs/lora_files.md)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dopsd.files import read_metadata, read_tensors, shorten
from dopsd.models import load_family
from dopsd.models.folder import tuning_metadata
from dopsd.models.lora import family_of, read_lora, reads_without_scale
from dopsd.models.lora_deltas import Delta, LowRank
from dopsd.models.lora_in_diffusers import loaded_by_diffusers
from dopsd.models.lora_keys import SortedKeys, sort_keys
from dopsd.models.lora_loaders import PROGRAMS, loaded_by
from dopsd.models.lora_scale import config_beside
from dopsd.models.lora_source import find_lora

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
    as safetensors or holds no adapter of a known family."""
    path = find_lora(path)
    tensors, metadata = read_tensors(path), read_metadata(path)
    family = family_of(path)
    keys = sort_keys(tensors, family.module_names)
    try:
        deltas, fault = read_lora(path, family), None
    except ValueError as error:
        deltas, fault = {}, str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
    first = next(iter(keys.modules))
    config = metadata.get("ss_base_model_version")
    return Inspected(
        (
            ("family", config or family.name),
            ("keys", f"{keys.places[first].prefix or 'no prefix'}, e.g. {_example(keys, first)}"),
            ("modules", _modules(keys)),
            ("kind", _kinds(keys)),
            ("rank", _ranks(deltas)),
            ("dtype", _dtypes(tensors.values())),
            ("scale", _scale(path, tensors, metadata)),
            ("dopsd", f"refuses it: {fault}" if fault else "strength 1"),
            ("diffusers", loaded_by_diffusers(path, family, deltas) if deltas else "not tried"),
            *(
                (name, loaded_by(program, family.name, family.module_names, keys))
                for name, program in PROGRAMS.items()
            ),
            *_unused(keys),
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


def _example(keys: SortedKeys, module: str) -> str:
    return shorten(next(iter(keys.modules[module].values())))


def _modules(keys: SortedKeys) -> str:
    parts = sum(len(place.parts) for place in keys.places.values())
    fused = f", which are {parts} in diffusers" if parts != len(keys.places) else ""
    return f"{len(keys.modules)}{fused}"


def _kinds(keys: SortedKeys) -> str:
    words = {"a": "LoRA", "lokr": "LoKr", "hada": "LoHa", "diff": "whole differences"}
    kinds = Counter(
        word
        for slots in keys.modules.values()
        for start, word in words.items()
        if any(slot == start or slot.startswith(f"{start}_") for slot in slots)
    )
    return ", ".join(kinds) or "incomplete"


def _ranks(deltas: Mapping[str, Delta]) -> str:
    ranks = Counter(
        len(delta.a) if isinstance(delta, LowRank) else delta.kind for delta in deltas.values()
    )
    return ", ".join(str(rank) for rank, _ in ranks.most_common(8)) or "not known"


def _scale(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Where a file states its scale."""
    if any(name.endswith(".alpha") for name in tensors):
        return "alpha tensors"
    if config := config_beside(path):
        return f"{config.name} beside it"
    if "lora_adapter_metadata" in metadata:
        return "lora_adapter_metadata"
    if reads_without_scale(path, list(tensors)):
        return "not stated: PEFT's adapter_config.json is missing; taken as alpha = rank"
    return "multiplied in, or alpha = rank"


def _unused(keys: SortedKeys) -> list[tuple[str, str]]:
    """Every kind of key that does not take part, for the reader here and what it means."""
    groups = [
        *((f"not read: {kind}", names) for kind, names in keys.not_read.items()),
        *((f"left out: {part}", names) for part, names in keys.left_out.items()),
        ("unknown module", keys.misplaced),
        ("second adapter", keys.twice),
        ("unknown key", keys.unknown),
    ]
    return [
        (label, f"{len(names)} tensors, e.g. {shorten(names[0])}")
        for label, names in groups
        if names
    ]


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _shown(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(key, metadata[key]) for key in SHOWN_METADATA if key in metadata]
