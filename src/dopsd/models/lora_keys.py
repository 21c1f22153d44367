"""Keys of LoRA files: which tensor of which module a key holds, whatever tool wrote it.

One table says how a key ends for each tensor that is read (SLOTS), one which kinds of adapter are
known and not read (NOT_READ). Module names are the matter of `lora_names`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from dopsd.models.lora_names import ModuleNames, Place, other_part

_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"  # of an adapter, as PEFT adds it: `.default`
# Slot -> how keys of it end.
SLOTS = {
    "a": rf"\.lora_A{_NAME}(?:\.weight)?|\.lora_down(?:\.weight)?|[._]lora\.down\.weight"
    r"|\.lora_linear_layer\.down\.weight",
    "b": rf"\.lora_B{_NAME}(?:\.weight)?|\.lora_up(?:\.weight)?|[._]lora\.up\.weight"
    r"|\.lora_linear_layer\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "diff": r"\.diff",
    **{
        name: rf"\.{name}{_NAME}"
        for name in (
            *(f"lokr_w{i}{end}" for i in "12" for end in ("", "_a", "_b")),
            "lokr_t2",
            *(f"hada_w{i}_{end}" for i in "12" for end in "ab"),
            "hada_t1",
            "hada_t2",
        )
    },
}
# Adapters that are not read -> how their keys end.
NOT_READ = {
    "DoRA": r"[._](?:dora_scale|lora_magnitude_vector)(?:\..*)?",
    "a bias": r"\.(?:lora_[AB](?:\.[^.]+)?\.bias|lora_(?:up|down)\.bias|diff_b|b_norm|bias)",
    "a norm": r"\.w_norm",
    "GLoRA": r"\.[ab][12]\.weight",
    "OFT or BOFT": r"\.(?:b?oft_\w+|oft_R|rescale)(?:\..*)?",
    "IA3": r"\.(?:on_input|ia3_l(?:\..*)?)",
    "VeRA": r"\.vera_\w+(?:\..*)?",
    "HRA": r"\.hra_\w+(?:\..*)?",
    "an embedding": r"\.lora_embedding_[AB](?:\..*)?",
}
_SLOT = re.compile("|".join(f"(?P<{slot}>(?:{end})$)" for slot, end in SLOTS.items()))
_NOT_READ = [(kind, re.compile(f"(?:{end})$")) for kind, end in NOT_READ.items()]


@dataclass
class SortedKeys:
    """The keys of a file.

    modules: slot -> key, by the module's name in the file. places: where those modules lie.
    twice: keys of a slot that is filled already. not_read, left_out: keys by the kind of adapter,
    or by the part of the pipeline, that is not read. misplaced: keys of slots whose module is not
    known. unknown: all others.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    not_read: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    misplaced: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def split_key(key: str) -> tuple[str, str] | None:
    """A key as (the module's name in the file, slot); None where it ends in no slot."""
    match = _SLOT.search(key)
    return (key[: match.start()], match.lastgroup or "") if match else None


def sort_keys(keys: Iterable[str], names: ModuleNames) -> SortedKeys:
    """Sort the keys of a file for a family with these module names."""
    sorted_keys = SortedKeys()
    for key in keys:
        _sort(key, names, sorted_keys)
    return sorted_keys


def _sort(key: str, names: ModuleNames, into: SortedKeys) -> None:
    for kind, pattern in _NOT_READ:
        if pattern.search(key):
            into.not_read.setdefault(kind, []).append(key)
            return
    if part := other_part(key):
        into.left_out.setdefault(part, []).append(key)
        return
    if (split := split_key(key)) is None:
        into.unknown.append(key)
        return
    module, slot = split
    place = into.places.get(module) or names.find(module)
    if place is None:
        into.misplaced.append(key)
    elif slot in into.modules.setdefault(module, {}):
        into.twice.append(key)
    else:
        into.places[module] = place
        into.modules[module][slot] = key
