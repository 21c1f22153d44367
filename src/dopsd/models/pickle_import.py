"""A pickled weights file (.bin), as older repositories hold them, as safetensors. Nothing in it is
run: only tensors are taken, by torch's weights-only reader."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from dopsd.files import shorten, write_tensors


def convert_pickle(source: Path, target: Path) -> int:
    """Write the tensors of `source` to `target` under their names; how many there are. Raises
    ValueError, with nothing left behind, where the target exists or the file holds anything but
    tensors by name."""
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors: choose another file with --out.")
    if target.exists():
        raise ValueError(f"{target} exists and is not overwritten: choose another file with --out.")
    try:
        held = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {shorten((str(error).splitlines() or [''])[0])}"
        raise ValueError(
            f"{source} cannot be read as weights alone ({reason}); dopsd runs no code of a file."
        ) from error
    if not isinstance(held, dict) or not held:
        raise ValueError(f"{source} holds a {type(held).__name__}, not tensors by name.")
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.is_sparse:
            kind = type(tensor).__name__
            raise ValueError(
                f"{source} holds {shorten(name)} of type {kind}, not tensors by name alone."
            )
    write_tensors(target, held, {"format": "pt"})
    return len(held)
