"""Files that are whole or absent: atomic writes, safetensors, and optimizer states as safetensors.

Every file that dopsd writes goes through here. A writer that is killed leaves the old file or none,
never half of one.
"""

import errno
import hashlib
import json
import os
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`: a full disk or a forbidden folder becomes a ValueError that says
    so."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"{path} cannot be written ({reason}). Everything finished before is whole."
        ) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` (file or folder) that takes its name when the block ends
    without error.

    Raises ValueError, with the system's reason, where it cannot be written; then folders made on
    the way go too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if path.is_dir():
                if not temporary.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "it is a folder, and this is a file")
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def brief(value: object, most: int = 200) -> str:
    """A value as it goes into a sentence, however large it is."""
    text = value if isinstance(value, str) else _REPR.repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as one safetensors file, atomically. Views are made contiguous and
    independent."""
    with atomic_path(path) as temporary:
        whole = torch.contiguous_format
        copies = {
            name: t.detach().to("cpu", copy=True, memory_format=whole)
            for name, t in tensors.items()
        }
        try:
            save_file(copies, temporary, metadata=dict(metadata or {}))
        except (
            SafetensorError
        ) as error:  # how safetensors says "no space left", "permission denied", ...
            raise OSError(str(error)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. A file that cannot be read is a ValueError
    that names it."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}).") from error


def tensor_names(path: Path) -> list[str]:
    """What a safetensors file holds, by its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}).") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}).") from error


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `<parameter index>.<name>`, with more dots where it
    is nested. Numbers become 0-d float64 tensors."""
    named: dict[str, Tensor] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                put(f"{name}.{key}", inner)
        else:
            named[name] = (
                value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            )

    for index, state in optimizer.state_dict()["state"].items():
        put(str(index), state)
    return named


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` named. Learning rates are not touched: they are a function
    of the step."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, *path, name = key.split(".")
        if not index.isdigit():
            raise ValueError(f"{brief(key)} is no name of an optimizer's state.")
        inner = state.setdefault(int(index), {})
        for part in path:
            inner = inner.setdefault(part, {})
        is_number = value.ndim == 0 and value.dtype == torch.float64
        inner[name] = int(value) if is_number and value == value.round() else value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
