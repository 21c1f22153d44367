"""Convert a pickled weights file (.bin) to safetensors. No code in it is run: torch's weights-only
reader takes nothing but tensors."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from dopsd.files import shorten, write_tensors


def convert_pickle(source: Path, target: Path) -> int:
    """Write the tensors of `source` to `target` under their names and return their number. Raises
    ValueError, and writes nothing, where the target exists or the file holds anything but tensors
    by name."""
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors: choose another file with --out.")
    if target.exists():
        raise ValueError(f"{target} exists and is not overwritten: choose another file with --out.")
    try:
        tensors = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {shorten((str(error).splitlines() or [''])[0])}"
        raise ValueError(
            f"{source} cannot be read as plain weights ({reason}); code in a file is never run."
        ) from error
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{source} holds a {type(tensors).__name__}, not tensors by name.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.is_sparse:
            kind = type(tensor).__name__
            raise ValueError(
                f"{source} holds {shorten(name)} of type {kind}, not only tensors by name."
            )
    write_tensors(target, tensors, {"format": "pt"})
    return len(tensors)
