"""Rows of metadata.jsonl and metadata.csv: the image that a row names, captions, pairs, edits."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from dopsd.data.captions import as_caption
from dopsd.data.examples import Example
from dopsd.data.folder_files import file_in, is_outside
from dopsd.files import parse_json_row, read_bytes, read_lines

METADATA = ("metadata.jsonl", "metadata.csv")
IMAGE_COLUMNS = ("file_name", "image", "image_path", "target", "chosen")
REFERENCE_COLUMN = "references"  # images that the caption edits, one or a list
MASK_COLUMN = "mask"  # grey image, white where the row's image is trained on
REJECTED_COLUMN = "rejected"  # worse images for the same caption, one or a list
FILE_COLUMNS = (*IMAGE_COLUMNS, REFERENCE_COLUMN, REJECTED_COLUMN, MASK_COLUMN)
CAPTION_COLUMNS = ("text", "prompt", "caption")
TEACHER_COLUMN = "teacher_text"  # what the teacher reads in place of the captions

Finding = tuple[Path, Example | str]  # a file, and its example or the reason why it has none
Row = Mapping[str, object]


def read_metadata_file(metadata: Path) -> tuple[list[Finding], set[Path]]:
    """One finding per row, and all files that rows name, whatever else is wrong with the rows.
    Raises ValueError for a file without rows, or one that cannot be read at all."""
    findings: list[Finding] = []
    named: set[Path] = set()
    rows = _csv_rows(metadata) if metadata.suffix == ".csv" else _json_rows(metadata)
    for line, row in rows:
        if isinstance(row, ValueError):
            findings.append((metadata, str(row)))
            continue
        named |= _files_named(row, metadata.parent)
        findings.append(_finding_of(row, metadata, f"{metadata.name} line {line}"))
    if not findings:
        raise ValueError(f"no images in {metadata.parent}: {metadata.name} has no rows.")
    return findings, named


def _finding_of(row: Row, metadata: Path, where: str) -> Finding:
    path, folder = metadata, metadata.parent
    try:
        references = _images_named(row.get(REFERENCE_COLUMN), folder, where)
        rejected = _rejected(row, folder, where)
        masks = _images_named(row.get(MASK_COLUMN), folder, where)
        if len(masks) > 1:
            raise ValueError(f"{where} names {len(masks)} masks: an image has one.")
        path = _image_of(row, folder, where, is_edit=bool(references))
        if path in rejected:
            raise ValueError(
                f"{where} names {path.name} as chosen and as rejected: a pair needs two images."
            )
        texts = _first_column(row, CAPTION_COLUMNS, where)
        if texts == [] or not isinstance(texts, list):
            texts = [texts]
        caption, *also = (as_caption(text, f"the caption of {where}") for text in texts)
        teacher_text = row.get(TEACHER_COLUMN) or None
        if teacher_text is not None:
            teacher_text = as_caption(teacher_text, f"{TEACHER_COLUMN} of {where}")
    except ValueError as error:
        return path, str(error)
    return path, Example(
        path,
        caption,
        tuple(also),
        mask=masks[0] if masks else None,
        references=references,
        rejected=rejected,
        teacher_text=teacher_text,
    )


def _files_named(row: Row, folder: Path) -> set[Path]:
    columns = [row.get(column) for column in FILE_COLUMNS]
    lists = [value if isinstance(value, list) else [value] for value in columns]
    names = [name for each in lists for name in each if isinstance(name, str)]
    return {path for name in names if (path := file_in(folder, name))}


def _json_rows(metadata: Path) -> Iterator[tuple[int, Row | ValueError]]:
    """(line number, row or what is wrong with the line) of every line that is not blank."""
    for number, line in read_lines(metadata):
        try:
            yield number, parse_json_row(line, f"{metadata.name} line {number}")
        except ValueError as error:
            yield number, error


def _csv_rows(metadata: Path) -> Iterator[tuple[int, Row | ValueError]]:
    """Like `_json_rows`. A file that is not UTF-8 or not CSV is a ValueError as a whole."""
    try:
        reader = csv.DictReader(io.StringIO(read_bytes(metadata).decode("utf-8-sig"), newline=""))
        rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise ValueError(f"{metadata} is not UTF-8 ({error}): save it as UTF-8.") from error
    except csv.Error as error:
        raise ValueError(
            f"{metadata} is not readable CSV ({error}); metadata.jsonl has no such limits."
        ) from error
    for number, row in rows:
        # DictReader collects surplus fields under None: a caption with an unquoted comma would be
        # cut there.
        surplus = ValueError(
            f"{metadata.name} line {number} has more fields than the header: quote captions that "
            "contain a comma."
        )
        yield number, surplus if None in row else row


def _image_of(row: Row, folder: Path, where: str, is_edit: bool) -> Path:
    if is_edit and not row.keys() & set(IMAGE_COLUMNS):
        raise ValueError(
            f"{where} has {REFERENCE_COLUMN} and no target: name the image that they become."
        )
    return _image_named(_first_column(row, IMAGE_COLUMNS, where), folder, where)


def _rejected(row: Row, folder: Path, where: str) -> tuple[Path, ...]:
    names = row.get(REJECTED_COLUMN)
    if not names and row.keys() & {"chosen", REJECTED_COLUMN}:
        raise ValueError(f"{where} is half a pair: it names no image in {REJECTED_COLUMN}.")
    return _images_named(names, folder, where)


def _images_named(names: object, folder: Path, where: str) -> tuple[Path, ...]:
    """The images of a column that holds none, one or a list."""
    names = names or []
    return tuple(
        _image_named(name, folder, where)
        for name in (names if isinstance(names, list) else [names])
    )


def _image_named(name: object, folder: Path, where: str) -> Path:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where} names its image with {name!r}, which is not a file name.")
    if path := file_in(folder, name):
        return path
    if is_outside(folder, name):
        raise ValueError(
            f"{where} names {name}, which is outside the folder: give a path relative to {folder}."
        )
    raise ValueError(f"{where} names {name}, and there is no such file in {folder}.")


def _first_column(row: Row, columns: tuple[str, ...], where: str) -> object:
    for column in columns:
        if column in row:
            return row[column]
    present = ", ".join(map(str, row)) or "nothing"
    raise ValueError(f"{where} has none of {', '.join(columns)} (it has {present}).")
