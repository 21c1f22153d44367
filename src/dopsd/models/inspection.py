"""What a LoRA file or a model's folder is: family, form, rank, what it says of itself, which
loaders take it and how.

The loaders' column is what was measured and read in their sources (docs/lora_files.md), not
guessed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dopsd.files import read_metadata, read_tensors
from dopsd.models import load_family
from dopsd.models.folder import tuning_metadata
from dopsd.models.lora import refuse_other_kinds

# Module paths that only one family has.
FAMILY_MARKS = {
    "zimage": r"(noise_refiner|context_refiner)[._]\d|layers[._]\d+[._](attention|feed_forward)",
    "flux2": r"single_transformer_blocks[._]\d|(double|single)_blocks[._]\d",
    "sdxl": r"(down_blocks|input_blocks)[._]\d",
}
PARTNERS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
UNKNOWN = "not known here"
BAKED, ALPHA, SAID = (
    "scale multiplied in, or alpha = rank",
    "alpha tensors",
    "alpha in the metadata",
)
# By family: (form, how the scale is given) -> what loaders make of it: diffusers, ComfyUI.
ZIMAGE_LOADERS = {
    ("transformer.", BAKED): ("strength 1", "strength 1"),
    ("transformer.", SAID): ("strength 1", "off by alpha / rank: it does not read the metadata"),
    ("transformer.", ALPHA): ("error", "strength 1"),
    ("diffusion_model.", BAKED): ("strength 1", "strength 1"),
    ("diffusion_model.", ALPHA): ("strength 1", "strength 1"),
    ("bare names", BAKED): ("nothing is loaded, in silence", "strength 1"),
    ("base_model.model.", BAKED): ("nothing is loaded, in silence", "no"),
    ("kohya", ALPHA): ("strength 1", "only with the original model's names"),
}
SDXL_LOADERS = {
    ("kohya", ALPHA): ("strength 1", "strength 1"),
    ("unet.", BAKED): ("strength 1", UNKNOWN),
    ("unet.", ALPHA): ("error", UNKNOWN),
    ("diffusion_model.", BAKED): ("nothing is loaded, in silence", UNKNOWN),
    ("base_model.model.", BAKED): ("nothing is loaded, in silence", UNKNOWN),
    ("bare names", BAKED): ("nothing is loaded, in silence", UNKNOWN),
}
FLUX2_LOADERS = {
    ("transformer.", BAKED): ("strength 1", "strength 1"),
    ("transformer.", SAID): ("strength 1", "off by alpha / rank: it does not read the metadata"),
    ("transformer.", ALPHA): (
        "off by alpha / rank: it passes over alpha, in silence",
        "strength 1",
    ),
    ("bare names", BAKED): ("nothing is loaded, in silence", "strength 1"),
    ("base_model.model.", BAKED): ("strength 1", "no"),
    ("kohya", ALPHA): (
        "strength 1, with the original model's names",
        "only with the original model's names",
    ),
}
LOADERS = {"zimage": ZIMAGE_LOADERS, "flux2": FLUX2_LOADERS, "sdxl": SDXL_LOADERS}

OWN = (
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
    """A LoRA file or a model's folder in words, label by label."""

    lines: tuple[tuple[str, str], ...]


def inspect_lora(path: Path) -> Inspected:
    """Read a file's keys and metadata. Raises ValueError for what is no readable safetensors file
    or holds no LoRA."""
    tensors, metadata = read_tensors(path), read_metadata(path)
    downs = {
        n: t
        for n, t in tensors.items()
        if re.search(r"(lora_A|lora_down|lora\.down)(\.default)?\.weight$", n)
    }
    if not downs:
        raise ValueError(
            f"{path} holds no LoRA: of its {len(tensors)} tensors none is a lora_A or lora_down weight."
        )
    refuse_other_kinds(path, tensors)
    if alone := [
        n
        for n in downs
        if not any(down in n and n.replace(down, up) in tensors for down, up in PARTNERS)
    ]:
        raise ValueError(f"{path} holds half a LoRA: {alone[0]} has no partner.")
    if flat := [n for n, t in downs.items() if t.ndim < 2]:
        raise ValueError(f"{path} is no LoRA: {flat[0]} has {downs[flat[0]].ndim} dimensions.")
    form, scale = _form(tensors), _scale(tensors, metadata)
    families = [
        name for name, mark in FAMILY_MARKS.items() if any(re.search(mark, key) for key in downs)
    ]
    family = metadata.get("ss_base_model_version") or " or ".join(families) or UNKNOWN
    loaders = LOADERS.get(families[0], {}) if len(families) == 1 else {}
    diffusers, comfy = loaders.get((form, scale), (UNKNOWN, UNKNOWN))
    ranks = Counter(str(min(t.shape[:2])) for t in downs.values())
    return Inspected(
        (
            ("family", family),
            ("keys", f"{form}, e.g. {next(iter(downs))}"),
            ("modules", str(len(downs))),
            ("rank", ", ".join(ranks)),
            (
                "dtype",
                ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
            ),
            ("scale", scale),
            ("diffusers", diffusers),
            ("ComfyUI", comfy),
            *_own(metadata),
        )
    )


def inspect_model(folder: Path) -> Inspected:
    """Read a diffusers folder's configs, the weights of its network, and what dopsd wrote of its
    tuning. Raises ValueError for what is no whole model of a known family."""
    family = load_family(str(folder))
    part = family.checkpoint.part(family.export_prefix)
    tensors = {
        name: tensor
        for file in part.glob("*.safetensors")
        for name, tensor in read_tensors(file).items()
    }
    told = tuning_metadata(folder)
    return Inspected(
        (
            ("family", family.name),
            (
                "network",
                f"{sum(t.numel() for t in tensors.values()) / 1e6:.2f} M weights in {len(tensors)} tensors",
            ),
            (
                "dtype",
                ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
            ),
            ("diffusers", "from_pretrained"),
            ("tuned by dopsd", "every weight" if told else "no, or it does not say"),
            *_own(told),
        )
    )


def _own(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(key, metadata[key]) for key in OWN if key in metadata]


def _form(names: Iterable[str]) -> str:
    first = next(iter(names))
    for prefix in ("transformer.", "unet.", "diffusion_model.", "base_model.model."):
        if first.startswith(prefix):
            return prefix
    return "kohya" if first.startswith(("lora_unet_", "lora_te")) else "bare names"


def _scale(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    if any(name.endswith(".alpha") for name in tensors):
        return ALPHA
    return SAID if "lora_adapter_metadata" in metadata else BAKED
