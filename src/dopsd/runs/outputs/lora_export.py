"""The student's adapter as a LoRA file that other tools open, and a LoRA file as a start.

The names in the file are the family's (`Family.lora_in_public_form`), with the scale multiplied in:
strength 1 is what the previews showed.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dopsd.files import write_tensors
from dopsd.models.base import Family
from dopsd.models.lora import Pairs, read_lora
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
        module: (a.detach().cpu().float(), b.detach().cpu().float() * scale)
        for module, (a, b) in trained.items()
    }
    write_tensors(path, family.lora_in_public_form(pairs), {"format": "pt", **metadata})
    saved = read_lora(path, family)
    for module, (a, b) in trained.items():
        if module not in saved:
            raise ValueError(f"{path} was written without {module}: do not use this file.")
        wanted = (b.detach().cpu().double() @ a.detach().cpu().double()) * scale
        delta = saved[module][1].double() @ saved[module][0].double()
        if not torch.allclose(delta, wanted, rtol=1e-5, atol=1e-8):
            raise ValueError(
                f"{path}: {module} differs from what was trained: do not use this file."
            )


def refuse_unfit(path: Path, pairs: Pairs, own: Mapping[str, tuple[Size, Size]]) -> None:
    """Raise ValueError where a LoRA to start from has other modules or shapes than the run's own
    adapters; training on with a part of a file would lose the rest silently.

    own: the shapes of A and B by module."""
    if differing := sorted(pairs.keys() ^ own.keys()):
        raise ValueError(
            f"{path} adapts other modules than lora.targets (first: {differing[0]}): set "
            "lora.targets to those."
        )
    for module, (a, b) in pairs.items():
        wanted, shapes = own[module], (tuple(a.shape), tuple(b.shape))
        if len(a) != wanted[0][0]:
            raise ValueError(
                f"{path} has rank {len(a)}, this recipe {wanted[0][0]}: set lora.rank: {len(a)}."
            )
        if shapes != wanted:
            raise ValueError(
                f"{path} adapts {module} with A and B of shapes {shapes}, and this model needs "
                f"{wanted}: it was made for another model."
            )


@torch.no_grad()
def start_from_lora(
    student: Mapping[str, Tensor], path: Path, family: Family, scale: float
) -> None:
    """Copy a LoRA file's weights into the student's adapters. scale: of those, alpha / rank. Raises
    ValueError where they do not fit."""
    pairs, own = read_lora(path, family), lora_pairs(dict(student))
    refuse_unfit(
        path, pairs, {name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in own.items()}
    )
    for module, (a, b) in pairs.items():
        own[module][0].copy_(a)
        own[module][1].copy_(b / scale)
