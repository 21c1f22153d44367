"""Data sets in other layouts become a folder that `folder` reads: the same images and captions.

Read are the JSONL of the D-OPSD reference code and whatever the `datasets` library opens (hub ids,
Parquet, folders).
"""

import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from dopsd.data.captions import as_caption
from dopsd.files import (
    atomic_path,
    parse_json_row,
    read_lines,
    shorten,
    write_json,
    write_jsonl,
)
from dopsd.images import FORMAT_NAMES

log = logging.getLogger(__name__)

PATH_KEYS = (
    "local_path_list",
    "local_paths",
    "image_path_list",
    "image_paths",
    "image_path",
    "path",
)
REFERENCE_CAPTIONS = ("short_en", "medium_en", "detailed_en", "user_prompt_en")
EXTENSIONS = {
    "JPEG": ".jpg",
    "MPO": ".jpg",  # JPEG of a phone, with further images inside
    "PNG": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "AVIF": ".avif",
    "HEIF": ".heic",
}

ORIGIN = "origin.json"  # says where an imported folder came from

# An image's bytes, its captions, and further images by column: `rejected` of a pair, `references`
# of an editing row.
Item = tuple[bytes, list[str], dict[str, list[bytes]]]
ReadItem = Callable[[], Item]  # raises ValueError for a row that cannot be used
MAX_LISTED = 5  # rows that were left out, in a warning


def import_data(
    source: str,
    target: Path,
    image_column: str = "image",
    caption_columns: Sequence[str] = (),
    split: str = "train",
    rejected_column: str | None = None,
    skip_bad: bool = False,
) -> int:
    """Write the folder `target` from a .jsonl file of the reference code, or from a data set that
    `datasets` opens. All captions of an image are kept, and the worse image where `rejected_column`
    holds it. skip_bad: leave out rows that cannot be used, with a warning. Returns the number of
    images.

    Raises ValueError, with nothing left behind, when `target` exists, no row can be used, or
    without `skip_bad` any row cannot.
    """
    if target.exists():
        raise ValueError(
            f"{target} exists and is not overwritten: choose another folder with --out."
        )
    if source.endswith(".jsonl"):
        caption_columns = caption_columns or REFERENCE_CAPTIONS
        if rejected_column:
            raise ValueError(
                f"{source} has no pairs: a rejected column is read from data sets only."
            )
        items = _reference_rows(Path(source), caption_columns)
    else:
        caption_columns = caption_columns or ("text",)
        items = _dataset_rows(source, image_column, caption_columns, split, rejected_column)
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for number, read_item in enumerate(items, start=1):
            try:
                row, files = _row_and_files(read_item(), len(rows), f"row {number} of {source}")
            except ValueError as error:
                if not skip_bad:
                    raise
                refused.append(str(error))
                continue
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            rows.append(row)
        if not rows:
            reason = f" that can be used (first: {refused[0]})" if refused else "."
            raise ValueError(f"{source} has no rows{reason}")
        write_jsonl(temporary / "metadata.jsonl", rows)
        write_json(
            temporary / ORIGIN,
            _origin(source, image_column, caption_columns, split, rejected_column),
        )
    if refused:
        listed = "\n  ".join(refused[:MAX_LISTED])
        total = len(refused) + len(rows)
        log.warning("%d of %d rows were left out:\n  %s", len(refused), total, listed)
    return len(rows)


def _row_and_files(item: Item, index: int, where: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The row of metadata, and the files that it names. Raises ValueError for an image of another
    format."""
    content, captions, further = item
    name = f"{index:06d}{_extension(content, where)}"
    row: dict[str, Any] = {
        "file_name": name,
        "text": captions[0] if len(captions) == 1 else captions,
    }
    files = {name: content}
    for column, images in further.items():
        names = [
            f"{index:06d}-{column}{i or ''}{_extension(each, where)}"
            for i, each in enumerate(images)
        ]
        files |= zip(names, images, strict=True)
        row[column] = names[0] if len(names) == 1 else names
    return row, files


def fill_folder(
    folder: Path,
    source: str,
    image_column: str = "image",
    caption_columns: Sequence[str] = ("text",),
    split: str = "train",
    rejected_column: str | None = None,
    skip_bad: bool = False,
) -> None:
    """Import a data set into `folder` unless that was done before. Raises ValueError when the
    folder holds something else, and as `import_data` does."""
    origin = _origin(source, image_column, caption_columns, split, rejected_column)
    if not folder.exists():
        import_data(source, folder, image_column, caption_columns, split, rejected_column, skip_bad)
    file = folder / ORIGIN
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")) != origin:
        raise ValueError(
            f"{folder} was not filled from {source} with these columns and this split: remove it, "
            "choose another data.folder, or leave out data.dataset to use the folder as it is."
        )


def _origin(
    source: str,
    image_column: str,
    caption_columns: Sequence[str],
    split: str,
    rejected_column: str | None,
) -> dict[str, Any]:
    origin = {
        "source": source,
        "image": image_column,
        "captions": list(caption_columns),
        "split": split,
    }
    return origin | ({"rejected": rejected_column} if rejected_column else {})


def _extension(content: bytes, where: str) -> str:
    try:
        with Image.open(io.BytesIO(content), formats=FORMAT_NAMES) as image:
            return EXTENSIONS[str(image.format)]
    except UnidentifiedImageError as error:
        raise ValueError(f"{where} is not a {' / '.join(FORMAT_NAMES)} image.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where} holds an image that is too large ({error}).") from error


def _reference_rows(file: Path, columns: Sequence[str]) -> Iterator[ReadItem]:
    for number, line in read_lines(file):
        yield partial(_reference_item, line, file, columns, number)


def _reference_item(line: bytes, file: Path, columns: Sequence[str], number: int) -> Item:
    row = parse_json_row(line, f"{file} line {number}")
    where = f"{file.name} line {number}"
    *references, target = [_bytes_of(path, where) for path in _images_of(row, file.parent, where)]
    captions = _captions_of(row, columns, where)
    return target, captions, {"references": references} if references else {}


def _images_of(row: dict[str, Any], folder: Path, where: str) -> list[Path]:
    """The images of a row; of an editing row the references, then the target."""
    key = next((key for key in PATH_KEYS if row.get(key)), None)
    if key is None:
        raise ValueError(f"{where} names no image: it has none of {', '.join(PATH_KEYS)}.")
    return [
        _existing_file(str(name), folder, where)
        for name in (row[key] if isinstance(row[key], list) else [row[key]])
    ]


def _existing_file(name: str, folder: Path, where: str) -> Path:
    for path in (folder / name, Path(name)):
        if os.path.isfile(path):
            return path
    raise ValueError(
        f"{where} names {shorten(name)}, which is neither in {folder} nor in the working directory."
    )


def _bytes_of(image: Path, where: str) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise ValueError(f"{where}: {image} cannot be read ({error.strerror}).") from error


def _captions_of(row: dict[str, Any], columns: Sequence[str], where: str) -> list[str]:
    values = [row.get(column) for column in columns]
    lists = [value if isinstance(value, list) else [value] for value in values]
    texts = [text for each in lists for text in each if isinstance(text, str) and text.strip()]
    if not texts:
        raise ValueError(
            f"{where} has no caption in {', '.join(columns)} (it has {', '.join(map(str, row))})."
        )
    return list(dict.fromkeys(as_caption(text, f"the caption of {where}") for text in texts))


def _dataset_rows(
    source: str, image_column: str, columns: Sequence[str], split: str, rejected_column: str | None
) -> Iterator[ReadItem]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source} needs the package `datasets`: pip install 'dopsd[data]'."
        ) from error
    try:
        table: Any = datasets.load_dataset(source, split=split)
    except Exception as error:  # the library's own, the hub's, Arrow's and the system's errors
        reason = (str(error).splitlines() or [""])[0]
        pattern = " The library reads [ ] in a path as a pattern: rename the folder."
        raise ValueError(
            f"{source} cannot be opened as a data set ({type(error).__name__}: {reason})."
            f"{pattern if '[' in source else ''}"
        ) from error
    images = [image_column, rejected_column] if rejected_column else [image_column]
    for column in (*images, *columns):
        if column not in table.column_names:
            raise ValueError(
                f"{source} has no column {column}; it has {', '.join(table.column_names)}."
            )
    for column in images:
        table = table.cast_column(column, datasets.Image(decode=False))
    for number, row in enumerate(table, start=1):
        yield partial(_dataset_item, row, images, columns, f"row {number} of {source}")


def _dataset_item(
    row: dict[str, Any], images: Sequence[str], columns: Sequence[str], where: str
) -> Item:
    content, *rejected = (_content_of(row[column] or {}, column, where) for column in images)
    captions = _captions_of(row, columns, where)
    return content, captions, {"rejected": rejected} if rejected else {}


def _content_of(image: dict[str, Any], column: str, where: str) -> bytes:
    content = image.get("bytes") or (
        _bytes_of(Path(image["path"]), where) if image.get("path") else None
    )
    if content is None:
        raise ValueError(f"{where} has no image in {column}.")
    return content
