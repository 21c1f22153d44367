"""The student's adapter as a LoRA file that opens elsewhere, and back: what a run writes, and what
it starts from.

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
    """Write the adapter, reopen the file, and compare every module's delta with the live one.

    scale: alpha / rank. Raises ValueError when the file does not hold what was trained.
    """
    pairs = {
        module: (a.detach().cpu().float(), b.detach().cpu().float() * scale)
        for module, (a, b) in lora_pairs(dict(student)).items()
    }
    write_tensors(path, family.lora_in_public_form(pairs), {"format": "pt", **metadata})
    saved = read_lora(path, family)
    for module, (a, b) in lora_pairs(dict(student)).items():
        if module not in saved:
            raise ValueError(
                f"{path}: {module} is not found in it again; the file is not to be trusted."
            )
        delta = (b.detach().cpu().double() @ a.detach().cpu().double()) * scale
        again = saved[module][1].double() @ saved[module][0].double()
        if not torch.allclose(again, delta, rtol=1e-5, atol=1e-8):
            raise ValueError(
                f"{path}: {module} does not read back as trained; the file is not to be trusted."
            )


def refuse_unfit(path: Path, pairs: Pairs, own: Mapping[str, tuple[Size, Size]]) -> None:
    """Raise ValueError when a LoRA to start from has other modules or shapes than the run's own
    adapters, by the sizes of A and B: training on with half of a file would lose the other half in
    silence."""
    if differing := sorted(pairs.keys() ^ own.keys()):
        raise ValueError(
            f"{path} adapts other modules than lora.targets (first: {differing[0]}): set lora.targets to those."
        )
    for module, (a, b) in pairs.items():
        wanted, found = own[module], (tuple(a.shape), tuple(b.shape))
        if len(a) != wanted[0][0]:
            raise ValueError(
                f"{path} has rank {len(a)}, this recipe {wanted[0][0]}: set lora.rank: {len(a)}."
            )
        if found != wanted:
            raise ValueError(
                f"{path} adapts {module} by A and B of {found}; here they are {wanted}: another model?"
            )


@torch.no_grad()
def start_from_lora(
    student: Mapping[str, Tensor], path: Path, family: Family, scale: float
) -> None:
    """Put a LoRA file's weights into the student's adapters, whose own scale is alpha / rank.
    Raises ValueError when they do not fit."""
    pairs, own = read_lora(path, family), lora_pairs(dict(student))
    refuse_unfit(
        path, pairs, {module: (tuple(a.shape), tuple(b.shape)) for module, (a, b) in own.items()}
    )
    for module, (a, b) in pairs.items():
        own[module][0].copy_(a)
        own[module][1].copy_(b / scale)
