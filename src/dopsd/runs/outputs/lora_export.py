"""The student's adapter as a LoRA file that other tools open, and LoRA files as a start.

The names in the file are those that most software reads (`models.lora_forms`), with the scale
multiplied in: strength 1 is what the previews showed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dopsd.files import (
    atomic_path,
    read_metadata,
    tensors_sha256,
    write_json,
    write_tensors,
)
from dopsd.models.base import AnyFamily, Family
from dopsd.models.lora import family_of, low_rank, read_lora
from dopsd.models.lora_deltas import LowRank
from dopsd.models.lora_forms import Form, lora_tensors, peft_config
from dopsd.models.lora_scale import CONFIG_NAME, WEIGHTS_NAME
from dopsd.models.lora_source import LoraFile, find_lora
from dopsd.training.adapters import lora_pairs

Size = tuple[int, ...]


def export_lora(
    path: Path,
    student: Mapping[str, Tensor],
    scale: float,
    family: Family,
    metadata: Mapping[str, str],
) -> None:
    """Write the adapter, reopen the file, and compare every module's delta with the trained one.

    student: A [r, in] and B [out, r] by name, as peft names them. scale: alpha / rank. Raises
    ValueError where the file does not hold what was trained."""
    trained = lora_pairs(dict(student))
    pairs = {
        module: LowRank(a.detach().cpu().float(), b.detach().cpu().float() * scale)
        for module, (a, b) in trained.items()
    }
    write_lora(path, pairs, family, "comfyui", metadata)


def write_lora(
    path: Path,
    pairs: Mapping[str, LowRank],
    family: AnyFamily,
    form: Form,
    metadata: Mapping[str, str],
) -> None:
    """Write a LoRA in this form, reopen the file and compare every module's delta. Raises
    ValueError where the file does not hold it."""
    tensors = lora_tensors(pairs, family, form)
    digest = tensors_sha256(tensors)
    hashes = {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    write_tensors(path, tensors, {"format": "pt", **metadata, **hashes})
    saved = read_lora(path, family)
    for module, pair in pairs.items():
        if module not in saved:
            raise ValueError(f"{path} was written without {module}: do not use this file.")
        if not torch.allclose(saved[module].dense(), pair.dense(), rtol=1e-5, atol=1e-8):
            raise ValueError(
                f"{path}: {module} differs from what was trained: do not use this file."
            )


def convert_lora(source: Path, form: Form, out: Path) -> None:
    """Write a LoRA of any form in another: a file, or for `peft` a folder. Metadata stay.

    Raises ValueError where the target exists, or for an adapter that is not plain LoRA."""
    if out.exists():
        raise ValueError(f"{out} exists and is not overwritten: choose another with --out.")
    path = find_lora(source)
    family = family_of(path)
    pairs, metadata = low_rank(path, family), read_metadata(path)
    metadata.pop("lora_adapter_metadata", None)  # its scale is in B now
    if form != "peft":
        write_lora(out, pairs, family, form, metadata)
        return
    with atomic_path(out) as temporary:
        temporary.mkdir()
        write_json(temporary / CONFIG_NAME, peft_config(pairs, metadata.get("base_model")))
        write_lora(temporary / WEIGHTS_NAME, pairs, family, form, metadata)


def summed(loras: Sequence[LoraFile], family: Family) -> dict[str, LowRank]:
    """The sum of LoRAs, each times its strength, by module: their A stacked, their B side by side.
    Raises ValueError for adapters that are not plain LoRA."""
    pairs: dict[str, LowRank] = {}
    for lora in loras:
        for module, (a, b) in low_rank(lora.path, family).items():
            scaled = LowRank(a, b * lora.strength)
            before = pairs.get(module)
            pairs[module] = (
                LowRank(torch.cat([before.a, scaled.a]), torch.cat([before.b, scaled.b], dim=1))
                if before
                else scaled
            )
    return pairs


def refuse_unfit(pairs: Mapping[str, LowRank], own: Mapping[str, tuple[Size, Size]]) -> None:
    """Raise ValueError where a LoRA to start from has modules, ranks or shapes that the run's own
    adapters do not take; training on with a part of a file would lose the rest silently.

    own: the shapes of A and B by module."""
    if foreign := sorted(pairs.keys() - own.keys()):
        raise ValueError(
            f"lora.init_from adapts other modules than lora.targets (first: {foreign[0]}): set "
            "lora.targets to those."
        )
    for module, (a, b) in pairs.items():
        (_, inner), (outer, _) = own[module]
        if (len(b), a.shape[1]) != (outer, inner):
            raise ValueError(
                f"lora.init_from adapts {module} as {len(b)} x {a.shape[1]}, and here it is "
                f"{outer} x {inner}: it was made for another model."
            )
    largest = max(len(a) for a, _ in pairs.values())
    rank = next(iter(own.values()))[0][0]
    if largest > rank:
        raise ValueError(
            f"lora.init_from has rank {largest} and lora.rank is {rank}: set lora.rank: {largest}."
        )


@torch.no_grad()
def start_from_loras(
    student: Mapping[str, Tensor], loras: Sequence[LoraFile], family: Family, scale: float
) -> None:
    """Copy the sum of LoRAs into the student's adapters. Ranks that it does not fill keep their
    random A and a B of zero, and train along. scale: of the adapters, alpha / rank. Raises
    ValueError where it does not fit."""
    pairs, own = summed(loras, family), lora_pairs(dict(student))
    refuse_unfit(pairs, {name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in own.items()})
    for module, (a, b) in pairs.items():
        own[module][0][: len(a)].copy_(a)
        own[module][1][:, : len(a)].copy_(b / scale)
