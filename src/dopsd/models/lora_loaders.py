"""Which software that is not installed here reads which names of a LoRA file, as facts read in its
source in November 2026; diffusers is asked itself (`lora_in_diffusers`).

ComfyUI: comfy/lora.py and comfy/weight_adapter. stable-diffusion.cpp (August 2026):
src/name_conversion.cpp and src/model/adapter/lora.hpp. InvokeAI (August 2026):
invokeai/backend/patches/lora_conversions. DiffSynth-Studio (August 2026): diffsynth/utils/lora.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dopsd.models.lora_in_diffusers import EXACT, NOTHING
from dopsd.models.lora_keys import SortedKeys
from dopsd.models.lora_names import ModuleNames, Place

Naming = Literal["native", "diffusers"]


@dataclass(frozen=True)
class Spelling:
    """Names that a program knows: a prefix and the modules of the original model or of diffusers,
    with dots or underscores. without: modules of this spelling that it does not know."""

    prefix: str
    naming: Naming
    joint: str = "."
    without: str | None = None

    def of(self, place: Place, names: ModuleNames) -> str | None:
        """The spelling of a place; None where it has none."""
        name = _name_of(place, names, self.naming)
        if name is None or (self.without and re.search(self.without, name)):
            return None
        return self.prefix + name.replace(".", self.joint)


@dataclass(frozen=True)
class Program:
    """What a program knows, by family. Alpha tensors are read by all of them, PEFT's settings in
    the metadata or beside the file by none. kinds: endings of slots that it reads."""

    spellings: Mapping[str, tuple[Spelling, ...]]
    kinds: tuple[str, ...] = ("a", "b", "mid", "alpha", "lokr", "hada", "diff")


NATIVE = (Spelling("diffusion_model.", "native"), Spelling("lora_unet_", "native", "_"))
_PROCESSORS = r"\.to_(q|k|v|out\.0)$"  # ComfyUI knows these behind `unet.` in their old form only
PROGRAMS = {
    "ComfyUI": Program(
        {
            "zimage": (
                *NATIVE,
                Spelling("diffusion_model.", "diffusers"),
                Spelling("transformer.", "diffusers"),
                Spelling("", "diffusers"),
                Spelling("lycoris_", "diffusers", "_"),
            ),
            "flux2_klein": (
                *NATIVE,
                Spelling("transformer.", "diffusers"),
                Spelling("", "diffusers"),
                Spelling("lycoris_", "diffusers", "_"),
                Spelling("lora_transformer_", "diffusers", "_"),
            ),
            "sdxl": (
                *NATIVE,
                Spelling("lora_unet_", "diffusers", "_"),
                Spelling("lycoris_", "diffusers", "_"),
                Spelling("unet.", "diffusers", without=_PROCESSORS),
                Spelling("", "diffusers", without=_PROCESSORS),
            ),
        }
    ),
    "stable-diffusion.cpp": Program(
        {
            "zimage": (
                Spelling("diffusion_model.", "native"),
                Spelling("diffusion_model.", "diffusers"),
                Spelling("transformer.", "diffusers"),
                Spelling("lora_unet_", "native", "_", without=r"feed_forward|noise_ref|adaLN"),
            ),
            "flux2_klein": (
                *NATIVE,
                Spelling("transformer.", "diffusers", without=r"^single_|\.ff(_context)?\."),
                Spelling("", "diffusers", without=r"^single_|\.ff(_context)?\."),
            ),
            "sdxl": (
                Spelling("lora_unet_", "native", "_"),
                Spelling("lora_unet_", "diffusers", "_"),
                Spelling("unet.", "diffusers"),
            ),
        }
    ),
    "InvokeAI": Program(
        {
            "zimage": (
                Spelling("diffusion_model.", "diffusers"),
                Spelling("transformer.", "diffusers"),
                Spelling("lora_unet__", "diffusers", "_", without=r"to_out|adaLN"),
            ),
            "flux2_klein": (
                Spelling("diffusion_model.", "native"),
                Spelling("base_model.model.", "native"),
            ),
            "sdxl": (
                Spelling("lora_unet_", "native", "_"),
                Spelling("lora_unet_", "diffusers", "_"),
            ),
        }
    ),
    "DiffSynth": Program(
        {
            "zimage": (Spelling("diffusion_model.", "diffusers"), Spelling("", "diffusers")),
            "flux2_klein": (Spelling("diffusion_model.", "diffusers"), Spelling("", "diffusers")),
            "sdxl": (Spelling("lora_unet_", "native", "_"), Spelling("", "diffusers")),
        },
        kinds=("a", "b", "alpha"),
    ),
}


def loaded_by(program: Program, family: str, names: ModuleNames, keys: SortedKeys) -> str:
    """What a program makes of a file's keys, in a few words."""
    known = [
        module
        for module, place in keys.places.items()
        if any(spelling.of(place, names) == module for spelling in program.spellings[family])
        and all(slot.startswith(program.kinds) for slot in keys.modules[module])
    ]
    if not known:
        return NOTHING
    of = f"{len(known)} of {len(keys.modules)} modules, "
    return EXACT if len(known) == len(keys.modules) else f"{of}{EXACT}"


def _name_of(place: Place, names: ModuleNames, naming: Naming) -> str | None:
    """A place's name in the original model or in diffusers; None where it is several modules there,
    or a part of one."""
    if naming == "diffusers":
        return place.parts[0] if len(place.parts) == 1 else None
    (native,) = names.native_rows(place.parts[:1]).items()
    return native[0] if native[1] == place.parts else None
