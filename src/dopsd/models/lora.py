"""LoRA files: reading every public form, and adding a LoRA to a network's weights.

Inside the package a LoRA is a delta by diffusers module path (`lora_deltas`), with the scale in it.
Names are the matter of `lora_names` and `lora_keys`, scales of `lora_scale`. Runs write theirs in
`runs/outputs/lora_export.py`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from dopsd.files import read_metadata, read_tensors, shorten, tensor_names
from dopsd.models import BUILT_IN, FAMILIES, family_class
from dopsd.models.base import AnyFamily, Family
from dopsd.models.hub import is_hub_file, is_hub_id
from dopsd.models.lora_deltas import Delta, LowRank, delta_of, rows_of, swap_halves
from dopsd.models.lora_keys import SortedKeys, sort_keys
from dopsd.models.lora_scale import AdapterConfig, config_beside, read_config
from dopsd.models.lora_source import LoraFile, find_lora

log = logging.getLogger(__name__)

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def read_lora(path: Path, family: AnyFamily) -> dict[str, Delta]:
    """A LoRA's deltas by module path, scale included, whichever tool wrote it.

    path: a file, a folder or a name on the hub (`find_lora`). Keys of text encoders and other parts
    are left out, with a warning. Raises ValueError for a file that is not a LoRA of this
    family, or holds what is not read.
    """
    path = find_lora(path)
    tensors = read_tensors(path)
    keys = sort_keys(tensors, family.module_names)
    _refuse(path, keys, family.name)
    for part, names in keys.left_out.items():
        _tell_left_out(path, part, len(names))
    config = read_config(path, family.export_prefix)
    deltas: dict[str, Delta] = {}
    for module, slots in keys.modules.items():
        place = keys.places[module]
        try:
            held = {slot: _readable(tensors[key]) for slot, key in slots.items()}
            delta = delta_of(held, _scale(held.get("alpha"), config, (module, *place.parts)))
            if place.swapped:
                delta = swap_halves(delta)
            if delta.size[0] % len(place.parts):
                raise ValueError(f"has {delta.size[0]} rows for {len(place.parts)} modules")
            for index, part in enumerate(place.parts):
                _add(deltas, part, rows_of(delta, index, len(place.parts)))
        except ValueError as error:
            raise ValueError(f"{path}: {shorten(module)} {error}.") from error
    return deltas


@cache  # a file is read more than once
def _tell_left_out(path: Path, part: str, tensors: int) -> None:
    log.warning("%s also adapts a %s (%d tensors), which is left out.", path, part, tensors)


def low_rank(path: Path, family: AnyFamily) -> dict[str, LowRank]:
    """Like `read_lora`, for what needs A and B. Raises ValueError for a module whose delta is not
    their product."""
    pairs = {}
    for module, delta in read_lora(path, family).items():
        if not isinstance(delta, LowRank):
            raise ValueError(
                f"{path} holds {module} as {delta.kind}, and plain LoRA is needed here."
            )
        pairs[module] = delta
    return pairs


def _readable(tensor: Tensor) -> Tensor:
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"is stored as {tensor.dtype}; float32, float16, bfloat16 and float8 are read"
        )
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError("holds NaN or infinite values: its training diverged")
    return tensor


def _scale(
    alpha: Tensor | None, config: AdapterConfig | None, names: Sequence[str]
) -> Callable[[int | None], float]:
    """The scale from the rank. An alpha tensor and settings must agree; without either the scale is
    1, as every loader takes it."""

    def scale(rank: int | None) -> float:
        stated = config.scale(names, rank) if config else None
        if alpha is None:
            return 1.0 if stated is None else stated
        if alpha.numel() != 1:
            raise ValueError(f"has an alpha of {alpha.numel()} numbers")
        own = alpha.item() / rank if rank else 1.0
        if config and stated is not None and abs(stated - own) > 1e-6 * abs(own):
            raise ValueError(
                f"has the scale {own:g} by its alpha and {stated:g} by {config.source}"
            )
        return own

    return scale


def _add(deltas: dict[str, Delta], part: str, delta: Delta) -> None:
    """Some files hold a fused module and its parts: the same delta twice."""
    before = deltas.setdefault(part, delta)
    if before is delta:
        return
    if before.size != delta.size or not torch.allclose(before.dense(), delta.dense(), atol=1e-6):
        raise ValueError(f"adapts {part}, which another key adapts differently")


def _refuse(path: Path, keys: SortedKeys, family: str) -> None:
    """Raise ValueError where not every key of a file can be used, or has a reason to be left
    out."""
    if keys.not_read:
        kind, names = next(iter(keys.not_read.items()))
        raise ValueError(
            f"{path} holds {kind} ({names[0]}), which is not read: LoRA, LoCon, LoKr and LoHa are."
        )
    if keys.misplaced:
        raise ValueError(f"{path} {why_misplaced(keys.misplaced[0], family)}")
    if keys.twice:
        raise ValueError(f"{path} holds two adapters of one module (second: {keys.twice[0]}).")
    if keys.unknown or not keys.modules:
        others = [key for names in keys.left_out.values() for key in names]
        example = next(iter(keys.unknown or others), "nothing")
        raise ValueError(f"{path} is no LoRA of {family}: it holds {shorten(example)}.")


def family_of(path: Path) -> type[Family]:
    """The family whose modules a LoRA file names, most of them where there are several. Raises
    ValueError for a file that holds no adapter of a known one."""
    names = tensor_names(path)
    by_family = {
        family: sort_keys(names, family.module_names) for family in map(family_class, FAMILIES)
    }
    family = max(by_family, key=lambda each: len(by_family[each].places))
    keys = by_family[family]
    if keys.modules:
        return family
    if keys.not_read:
        kind, examples = next(iter(keys.not_read.items()))
        raise ValueError(f"{path} holds {kind} ({shorten(examples[0])}), which is not read.")
    if keys.misplaced:
        raise ValueError(f"{path} {why_misplaced(keys.misplaced[0], family.name)}")
    raise ValueError(
        f"{path} holds no LoRA: of its {len(names)} tensors none belongs to an adapter of a model "
        "that is known here."
    )


def why_misplaced(key: str, family: str) -> str:
    """Why the module of a key is not one of the family's, as the end of a sentence that begins with
    the file's name."""
    key = shorten(key)
    for other in FAMILIES:
        names = family_class(other).module_names
        if other != family and not sort_keys([key], names).misplaced:
            return f"adapts {key}, which {family} does not have: it is a LoRA of {other}."
        if other == family and (prefix := names.unknown_prefix(key.rpartition(".lora")[0])):
            return (
                f"adapts {key}, whose module is known behind other prefixes than {prefix!r}: "
                "rename its keys."
            )
    return f"adapts {key}, which {family} does not have: another family?"


def reads_without_scale(path: Path, names: Sequence[str]) -> bool:
    """Whether a file has PEFT's own key names and nothing that states its alpha: PEFT keeps it in
    an adapter_config.json, which is not there."""
    is_peft = all(name.startswith("base_model.model.") for name in names)
    stated = "lora_adapter_metadata" in read_metadata(path) or config_beside(path)
    return is_peft and not stated and not any(name.endswith(".alpha") for name in names)


@dataclass(frozen=True)
class ModelReference:
    """What `load_family` opens a model with: name or path, and the file that distils it, if any."""

    name_or_path: str
    distilled_by: str | None = None


def model_for(
    loras: Sequence[LoraFile],
    name_or_path: str | None = None,
    distilled_by: str | None = None,
) -> ModelReference:
    """The model to use with LoRA files: the given one, else the one in the metadata of the first
    that names one (`base_model`, `distilled_by`).

    Raises ValueError where no model is given and the files name none, or only the name of a local
    folder or file, whose path is not recorded.
    """
    if name_or_path is not None:
        return ModelReference(name_or_path, distilled_by)
    how = "give it with --model (name_or_path in Python): a diffusers folder or a hub id"
    if not loras:
        raise ValueError(f"no model and no LoRA file that could name one: {how}.")
    files = [find_lora(lora.path) for lora in loras]
    naming = [(file, read_metadata(file)) for file in files]
    lora, metadata = next((each for each in naming if each[1].get("base_model")), naming[0])
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


@torch.no_grad()
def merge_loras(network: nn.Module, loras: Sequence[LoraFile], family: AnyFamily) -> None:
    """Add LoRA files' deltas, each times its strength, to the network's weights.

    The sum is computed in float64 and rounded once, to the weight's dtype. Raises ValueError where
    a module or shape does not fit, or the sum is not finite there."""
    # All are read before the first weight is changed.
    read = [(lora, read_lora(lora.path, family)) for lora in loras]
    for lora, deltas in read:
        for module, delta in deltas.items():
            refuse_misfit(lora.path, module, network, delta)
    for module in dict.fromkeys(module for _, deltas in read for module in deltas):
        weight = network.get_parameter(f"{module}.weight")
        total = weight.double().cpu()
        for lora, deltas in read:
            if module in deltas:
                total += (deltas[module].dense() * lora.strength).reshape(weight.shape)
        weight.copy_(total.to(weight))
        if not weight.isfinite().all():
            raise ValueError(
                f"{', '.join(str(lora) for lora in loras)}: the weight {module} is no longer "
                f"finite in {weight.dtype}: the LoRA diverged, or its strength is too large."
            )


def refuse_misfit(path: Path, module: str, network: nn.Module, delta: Delta) -> None:
    """Raise ValueError where the network has no weight that a delta belongs to."""
    try:
        weight = network.get_parameter(f"{module}.weight")
    except AttributeError as error:
        raise ValueError(
            f"{path} adapts {module}, which this model does not have: another family?"
        ) from error
    if weight.flatten(1).shape != delta.size:
        raise ValueError(
            f"{path} adapts {module} as {delta.size[0]} x {delta.size[1]}; here it is "
            f"{tuple(weight.shape)}."
        )
