"""A folder of images and captions as Examples; everything that cannot be used is named in one
sentence.

Captions come from a metadata file, else from a text beside each image, else from one instance
prompt. Sizes are left to `buckets`, tensors to `cache`.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from PIL import features

from dopsd.files import parse_json_row, read_bytes, read_lines, sha256_of, shorten
from dopsd.images import FORMATS, open_image

if features.check("avif"):
    FORMATS[".avif"] = "AVIF"
# Images that dopsd does not read; refused by name, so that a folder of them does not shrink in
# silence.
FOREIGN = {".avif", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff"} - FORMATS.keys()
METADATA = ("metadata.jsonl", "metadata.csv")
IMAGE_COLUMNS = ("file_name", "image", "image_path", "target", "chosen")
REFERENCE_COLUMN = "references"  # images that the caption edits, one or a list
REJECTED_COLUMN = "rejected"  # worse images for the same caption, one or a list
CAPTION_COLUMNS = ("text", "prompt", "caption")
CAPTION_EXTENSIONS = (".txt", ".caption")
SHOWN = 5  # refused items that an error lists


@dataclass(frozen=True)
class Example:
    """One image and its caption. also: further captions, of which an epoch draws one; weight: of
    its loss; references: the images that the caption turns into this one, in order; rejected: worse
    images for the same caption, of which an epoch draws one; shown: what the teacher sees, if it is
    not the image itself."""

    path: Path
    caption: str
    also: tuple[str, ...] = ()
    weight: float = 1.0
    references: tuple[Path, ...] = ()
    rejected: tuple[Path, ...] = ()
    shown: Path | None = None


@dataclass(frozen=True)
class Listing:
    """What a folder holds, sorted by path. refused: (file, why) of what was skipped; source: where
    captions came from, in words ("metadata.jsonl", ".txt files", "instance prompt")."""

    examples: tuple[Example, ...]
    refused: tuple[tuple[Path, str], ...]
    source: str

    def fingerprint(self) -> str:
        """SHA-256 of the images' bytes and their captions, in any order and wherever they lie."""
        each = sorted(
            [*map(sha256_of, (e.path, *e.references, *e.rejected)), e.caption, *e.also]
            for e in self.examples
        )
        return hashlib.sha256(json.dumps(each).encode()).hexdigest()


Finding = tuple[Path, Example | str]  # a file, and the example it makes or why it makes none


def read_folder(
    folder: Path,
    instance_prompt: str | None = None,
    caption_extension: str | None = None,
    skip_bad: bool = False,
    decode: bool = True,
) -> Listing:
    """Every image of the folder with its caption; with `decode` each is decoded once to know that
    it can be.

    A metadata file may name images in subfolders; without one, only the folder itself is looked at.
    Raises ValueError when there is nothing to read, and, unless `skip_bad`, when anything in the
    folder is refused.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a folder of pictures.")
    present = [folder / name for name in METADATA if os.path.lexists(folder / name)]
    if len(present) > 1:
        raise ValueError(
            f"{folder} holds both {' and '.join(METADATA)}: keep one, so that captions have one source."
        )
    if present:
        findings, source = _listed_in(present[0]), present[0].name
    else:
        prompt = (
            None if instance_prompt is None else as_caption(instance_prompt, "the instance prompt")
        )
        findings, source = _beside_images(folder, prompt, caption_extension)
    findings = sorted(
        map(_decoded, findings) if decode else findings, key=lambda finding: finding[0].as_posix()
    )
    examples = tuple(result for _, result in findings if isinstance(result, Example))
    refused = tuple((path, result) for path, result in findings if isinstance(result, str))
    if refused and not (skip_bad and examples):
        raise ValueError(_complaint(folder, [why for _, why in refused], len(findings), skip_bad))
    return Listing(examples, refused, source)


def _listed_in(metadata: Path) -> list[Finding]:
    """One finding per row of a metadata file, and one per image beside it that no row names."""
    findings: list[Finding] = []
    named: set[Path] = set()
    for line, row in _csv_rows(metadata) if metadata.suffix == ".csv" else _json_rows(metadata):
        where, path = f"{metadata.name} line {line}", metadata
        try:
            if isinstance(row, ValueError):
                raise row
            named |= _mentioned(row, metadata.parent)
            edited, rejected = (
                _references(row, metadata.parent, where),
                _rejected(row, metadata.parent, where),
            )
            path = _image_of(row, metadata.parent, where, bool(edited))
            if path in rejected:
                raise ValueError(
                    f"{where} names {path.name} as chosen and as rejected: a pair is of two pictures."
                )
            texts = _first(row, CAPTION_COLUMNS, where)
            if texts == [] or not isinstance(texts, list):
                texts = [texts]
            caption, *also = (as_caption(text, f"the caption of {where}") for text in texts)
            findings.append(
                (path, Example(path, caption, tuple(also), references=edited, rejected=rejected))
            )
        except ValueError as error:
            findings.append((path, str(error)))
    if not findings:
        raise ValueError(f"no pictures in {metadata.parent}: {metadata.name} has no rows.")
    unnamed = f"has no caption: no row of {metadata.name} names it."
    return findings + [
        (p, f"{p.name} {unnamed}") for p in images_in(metadata.parent) if p not in named
    ]


def _mentioned(row: Mapping[str, object], folder: Path) -> set[Path]:
    """The files of the folder that a row names, whatever else is wrong with it."""
    values = (
        each for value in row.values() for each in (value if isinstance(value, list) else [value])
    )
    return {folder / name for name in values if isinstance(name, str)}


def _json_rows(metadata: Path) -> Iterator[tuple[int, Mapping[str, object] | ValueError]]:
    """(line number, row) of every line that is not blank; where there is no row, what is wrong with
    the line."""
    for number, line in read_lines(metadata):
        try:
            yield number, parse_json_row(line, f"{metadata.name} line {number}")
        except ValueError as error:
            yield number, error


def _csv_rows(metadata: Path) -> Iterator[tuple[int, Mapping[str, object] | ValueError]]:
    """(line number, row), like `_json_rows`. A file that is no UTF-8 or no CSV is a ValueError as a
    whole."""
    try:
        reader = csv.DictReader(io.StringIO(read_bytes(metadata).decode("utf-8-sig"), newline=""))
        rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise ValueError(f"{metadata} is not UTF-8 ({error}): save it again as UTF-8.") from error
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


def _image_of(row: Mapping[str, object], folder: Path, where: str, edits: bool) -> Path:
    if edits and not row.keys() & set(IMAGE_COLUMNS):
        raise ValueError(
            f"{where} has {REFERENCE_COLUMN} and no target: name the picture that they are to become."
        )
    return _image_named(_first(row, IMAGE_COLUMNS, where), folder, where)


def _rejected(row: Mapping[str, object], folder: Path, where: str) -> tuple[Path, ...]:
    names = row.get(REJECTED_COLUMN)
    if not names and row.keys() & {"chosen", REJECTED_COLUMN}:
        raise ValueError(f"{where} is half a pair: it names no picture in {REJECTED_COLUMN}.")
    return _images_named(names, folder, where)


def _references(row: Mapping[str, object], folder: Path, where: str) -> tuple[Path, ...]:
    return _images_named(row.get(REFERENCE_COLUMN), folder, where)


def _images_named(names: object, folder: Path, where: str) -> tuple[Path, ...]:
    """The images of a column that holds none, one or a list."""
    names = names or []
    return tuple(
        _image_named(name, folder, where)
        for name in (names if isinstance(names, list) else [names])
    )


def _image_named(name: object, folder: Path, where: str) -> Path:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where} names its picture with {name!r}, which is not a file name.")
    inside = Path(os.path.normpath(name))
    if inside.is_absolute() or PureWindowsPath(name).drive or ".." in inside.parts:
        raise ValueError(
            f"{where} names {name}, which is outside the folder: give a path relative to {folder}."
        )
    if not os.path.isfile(folder / inside):
        raise ValueError(f"{where} names {name}, and there is no such file in {folder}.")
    return folder / inside


def _first(row: Mapping[str, object], columns: tuple[str, ...], where: str) -> object:
    for column in columns:
        if column in row:
            return row[column]
    raise ValueError(
        f"{where} has none of {', '.join(columns)} (it has {', '.join(map(str, row)) or 'nothing'})."
    )


def as_caption(text: object, what: str) -> str:
    """The text without blanks around it. Raises ValueError for what cannot be read as a caption."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {shorten(text)}, which is not text.")
    try:
        # JSON can spell half a surrogate pair, which no tokenizer and no file would take
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode ({error}).") from error
    if not text.strip():
        raise ValueError(f"{what} is empty.")
    return text.strip()


def _beside_images(
    folder: Path, prompt: str | None, extension: str | None
) -> tuple[list[Finding], str]:
    """One finding per image, captioned by the file beside it or else by `prompt`; and where
    captions came from."""
    images = images_in(folder)
    if not images:
        raise ValueError(
            f"no pictures in {folder}: looked for {', '.join(FORMATS)} in it, not in its subfolders."
        )
    extensions = CAPTION_EXTENSIONS if extension is None else (f".{extension.lstrip('.')}",)
    texts = {
        path: [text for e in extensions if os.path.lexists(text := path.with_suffix(e))]
        for path in images
    }
    used = [
        f"{e} files"
        for e in extensions
        if any(found and found[0].suffix == e for found in texts.values())
    ]
    if not used and prompt is None:
        raise ValueError(
            f"{folder} holds {len(images)} pictures and no captions. Write {' or '.join(METADATA)} "
            f"(file_name, text), or put {images[0].stem}{extensions[0]} beside {images[0].name} and so on, "
            "or set data.instance_prompt to one caption for all."
        )
    if not all(texts.values()) and prompt is not None:
        used.append("instance prompt")
    findings = [
        (path, _captioned(path, found, prompt, extensions)) for path, found in texts.items()
    ]
    return findings, " and ".join(used)


def _captioned(
    path: Path, texts: list[Path], prompt: str | None, extensions: tuple[str, ...]
) -> Example | str:
    """The image with the first of its texts, or with `prompt`; or why not."""
    try:
        if texts:
            return Example(
                path,
                as_caption(
                    texts[0].read_text(encoding="utf-8-sig"), f"the caption {texts[0].name}"
                ),
            )
    except UnicodeDecodeError as error:
        return f"the caption {texts[0].name} is not UTF-8 ({error})."
    except OSError as error:
        return f"the caption {texts[0].name} cannot be read ({error.strerror})."
    except ValueError as error:
        return str(error)
    if prompt is None:
        return f"{path.name} has no caption: there is no {' or '.join(path.stem + e for e in extensions)}."
    return Example(path, prompt)


def images_in(folder: Path) -> list[Path]:
    """Files that look like images, sorted; files that begin with a dot are the system's, not the
    user's."""
    seen = (
        path
        for path in folder.iterdir()
        if path.name[0] != "." and (path.is_symlink() or path.is_file())
    )
    return sorted(path for path in seen if path.suffix.lower() in FORMATS.keys() | FOREIGN)


def _decoded(finding: Finding) -> Finding:
    """The same finding, or a refusal where the image cannot be decoded."""
    path, result = finding
    if isinstance(result, str):
        return finding
    for image in (path, *result.references, *result.rejected):
        if image.suffix.lower() not in FORMATS:
            return path, f"{image.name} is not one of {', '.join(FORMATS)}: convert it."
        try:
            open_image(image)
        except ValueError as error:
            return path, str(error)
    return finding


def _complaint(folder: Path, refused: list[str], found: int, skip_bad: bool) -> str:
    shown = "\n  ".join(refused[:SHOWN])
    more = f"\n  and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    advice = (
        "Nothing is left to train on."
        if skip_bad
        else "Repair them, or skip them in a recipe by data.skip_bad: true."
    )
    return f"{len(refused)} of {found} items in {folder} cannot be used:\n  {shown}{more}\n{advice}"
