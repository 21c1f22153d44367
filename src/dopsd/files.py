"""Atomic writes, safetensors, JSON and JSONL: one reader and one writer for each format.

Every file that dopsd writes goes through here. An interrupted write leaves the old file or no file,
never a part of one.
"""

import errno
import hashlib
import json
import os
import reprlib
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`. Raises ValueError with the system's reason (disk full, permission
    denied, ...) where it cannot."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"{path} cannot be written ({reason}). Files that were finished before are intact."
        ) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` (file or folder) that is renamed to it when the block ends
    without error.

    Files get the mode of any new file (0666 without the bits of the umask), whatever their writer
    gave them. Raises ValueError, with the system's reason, where `path` cannot be written; folders
    that were created on the way are then removed again.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _set_default_mode(temporary)
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
        for folder in created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _set_default_mode(path: Path) -> None:
    """Give a file, or every file of a folder, the mode of a newly created file: safetensors writes
    0600, and copies keep the mode of their source."""
    probe = path.with_name(f"{path.name}.mode")  # os.umask() would set it for other threads too
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def shorten(value: object, max_chars: int = 200) -> str:
    """A value as text for a message, at most `max_chars` long however large it is."""
    text = value if isinstance(value, str) else _REPR.repr(value)
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of every line that is not blank. Raises ValueError where the file
    cannot be read."""
    return _numbered_lines(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises ValueError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error


def _numbered_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    lines = enumerate(content.split(b"\n"), start=1)
    return ((number, line) for number, line in lines if line.strip())


def decode_line(line: bytes, where: str) -> str:
    """A line as text, without a byte order mark. Raises ValueError where it is not UTF-8."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error}): save the file as UTF-8.") from error


def parse_json_row(line: bytes, where: str) -> dict[str, Any]:
    """A line of a JSONL file as a dict. where: file and line, for messages. Raises ValueError where
    it is not UTF-8, not JSON, or not an object."""
    text = decode_line(line, where)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5000 digits
        raise ValueError(f"{where} is not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object.")
    return row


def read_jsonl(path: Path, *, is_log: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of every line of a JSONL file that is not blank.

    is_log: the file was written by `append_jsonl`. It does not exist before its first row, and
    lines that were cut short when the process was killed are skipped. Raises ValueError, naming
    file and line, for a line that is not UTF-8, not JSON, or not an object.
    """
    if is_log and not path.exists():
        return
    content = read_bytes(path)
    unfinished = None if content.endswith(b"\n") else content.count(b"\n") + 1
    for number, line in _numbered_lines(content):
        try:
            row = parse_json_row(line, f"{path} line {number}")
        except ValueError:
            if is_log and (number == unfinished or not line.rstrip().endswith(b"}")):
                continue
            raise
        yield number, row


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(map(_json_line, rows)))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line to a log. After a line that a kill cut short, a new line is
    begun."""
    lines = b"".join(map(_json_line, rows))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.write(lines if _ends_with_newline(file) else b"\n" + lines)


def _ends_with_newline(file: BinaryIO) -> bool:
    """Whether a new row can be appended as it is; an empty file counts."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _json_line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, as in file names that are not UTF-8
        return json.dumps(row).encode() + b"\n"


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


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The hash, in hex, of what a safetensors file of these tensors holds after its header, as
    ModelSpec and kohya's tools define a model's hash."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    header = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[header:]).hexdigest()


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


GROUP = "group"  # before the names of what an optimizer keeps for a group of parameters


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `<parameter index>.<name>`, with more dots where it
    is nested, and `group.<index>.<name>` for numbers of a group that have changed since it was
    made, except the learning rate. Numbers become 0-d float64 tensors."""
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
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            is_state = key != "lr" and isinstance(value, bool | int | float)
            if is_state and value != optimizer.defaults.get(key):
                put(f"{GROUP}.{index}.{key}", value)
    return named


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` named. Learning rates are not touched: they are a function
    of the step."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, *path, name = key.split(".")
        if index == GROUP:
            group, number = optimizer.param_groups[int(path[0])], value.item()
            group[name] = type(group.get(name, number))(number)
            continue
        if not index.isdigit():
            raise ValueError(f"{shorten(key)} is no name of an optimizer's state.")
        inner = state.setdefault(int(index), {})
        for part in path:
            inner = inner.setdefault(part, {})
        is_number = value.ndim == 0 and value.dtype == torch.float64
        inner[name] = int(value) if is_number and value == value.round() else value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
