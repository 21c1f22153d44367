"""Notes on a folder: what is read in another way than someone may expect, or not read at all."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from dopsd.data.examples import Example
from dopsd.data.folder_files import CaptionFiles, images_below
from dopsd.images import frame_count

# What the lines of a caption file are: one caption together, or one each.
CaptionLines = Literal["joined", "each"]


def notes_on_subfolders(
    folder: Path, examples: Sequence[Example], others: Sequence[Path]
) -> list[str]:
    """A sentence on images in subfolders that are no examples. others: folders that are read too,
    which may be among them."""
    read = {path for e in examples for path in (e.path, *e.references, *e.rejected, e.mask)}
    below = images_below(folder, [other.resolve() for other in others])
    if not (unread := [path for path in below if path not in read]):
        return []
    return [
        f"{len(unread)} images in subfolders of {folder} are not read (first: "
        f"{unread[0].relative_to(folder)}): name {unread[0].parent} in data.more to use it."
    ]


def notes_on_texts(
    texts: CaptionFiles, images: Sequence[Path], mask_of: Mapping[Path, Path], lines: CaptionLines
) -> list[str]:
    """Sentences on caption files that belong to no image, and on those of several lines that are
    read as one caption."""
    notes = []
    if unused := texts.without_image([*images, *mask_of.values()]):
        notes.append(f"{len(unused)} text files belong to no image (first: {unused[0].name}).")
    first_texts = [found[0] for path in images if (found := texts.of(path))]
    long = [text for text in first_texts if lines == "joined" and _holds_several_lines(text)]
    if long:
        notes.append(
            f"{len(long)} caption files hold several lines (first: {long[0].name}): they are read "
            "as one caption; data.caption_lines: each makes each line a caption of its own."
        )
    return notes


def _holds_several_lines(text: Path) -> bool:
    """Whether more than one line of a readable file is not blank."""
    if not text.is_file() or not os.access(text, os.R_OK):
        return False
    return sum(bool(line.strip()) for line in text.read_bytes().splitlines()) > 1


def notes_on_frames(findings: Sequence[tuple[Path, Example | str]]) -> list[str]:
    """A sentence on images of several frames."""
    moving = [p for p, result in findings if isinstance(result, Example) and frame_count(p) > 1]
    if not moving:
        return []
    return [
        f"{len(moving)} images hold several frames (first: {moving[0].name}, "
        f"{frame_count(moving[0])}): only the first frame is read."
    ]


def notes_on_transparency(folder: Path, examples: Sequence[Example]) -> list[str]:
    """A sentence on images without transparency, where it is their mask. Raises ValueError where
    none has any."""
    opaque = [example for example in examples if example.mask is None]
    if len(opaque) == len(examples):
        raise ValueError(
            f"no image of {folder} is transparent anywhere, and data.masks: alpha takes "
            "transparency as masks: leave it out, or set data.masks: files."
        )
    if not opaque:
        return []
    return [
        f"{len(opaque)} images have no transparency (first: {opaque[0].path.name}): they are "
        "trained on whole."
    ]
