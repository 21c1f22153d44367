"""Public forms of LoRA files: how their keys are named, and where their scale is stored.

Which loaders read a form differs by family (`Family.lora_loaders`); the tables hold what was
measured or read in the loaders' source (docs/lora_files.md).
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

PREFIXES = ("transformer.", "unet.", "diffusion_model.", "base_model.model.")
KOHYA, BARE = "kohya", "bare names"

# Where the scale alpha / rank is.
BAKED = "scale multiplied in, or alpha = rank"
ALPHA = "alpha tensors"
IN_METADATA = "alpha in the metadata"

# (form of the keys, place of the scale) -> what diffusers and ComfyUI make of such a file.
Loaders = Mapping[tuple[str, str], tuple[str, str]]
UNKNOWN = "not known here"
AT_STRENGTH_1 = "strength 1"
IGNORED = "nothing is loaded, without a message"


def form_of(names: Iterable[str]) -> str:
    """The form of a file's keys: one of PREFIXES, KOHYA or BARE."""
    first = next(iter(names))
    for prefix in PREFIXES:
        if first.startswith(prefix):
            return prefix
    return KOHYA if first.startswith(("lora_unet_", "lora_te")) else BARE


def scale_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Where a file stores its scale: BAKED, ALPHA or IN_METADATA."""
    if any(name.endswith(".alpha") for name in tensors):
        return ALPHA
    return IN_METADATA if "lora_adapter_metadata" in metadata else BAKED
