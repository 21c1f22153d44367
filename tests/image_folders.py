"""Small folders of images and metadata for tests."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dopsd.data.folder import read_folder


def write_image(
    path: Path, colour: tuple[int, ...] = (200, 30, 30), size: tuple[int, int] = (12, 8)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write_metadata(folder: Path, *rows: object) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def refusals(folder: Path, **settings) -> str:
    """The reasons of what `skip_bad` leaves out; without it they are an error."""
    with pytest.raises(ValueError, match="skip_bad: true"):
        read_folder(folder, **settings)
    return "\n".join(reason for _, reason in read_folder(folder, skip_bad=True, **settings).refused)
