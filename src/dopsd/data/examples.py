"""What a data set is made of: examples (an image with its captions) and listings of them."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dopsd.files import sha256_of


@dataclass(frozen=True)
class Example:
    """One image and its caption.

    also: further captions; an epoch draws one of all. weight: of its loss. mask: a grey image,
    white where this one is trained on; `path` itself: its own transparency. references: images that
    the caption turns into this one, in order. rejected: worse images for the same caption, of which
    an epoch draws one. shown: the image that the teacher sees, if it is not `path`. teacher_text:
    what the teacher reads in place of every caption, if it is another text.
    """

    path: Path
    caption: str
    also: tuple[str, ...] = ()
    weight: float = 1.0
    mask: Path | None = None
    references: tuple[Path, ...] = ()
    rejected: tuple[Path, ...] = ()
    shown: Path | None = None
    teacher_text: str | None = None

    def read_by_teacher(self, caption: str) -> str:
        """What the teacher reads where the student reads this caption of the image, or the empty
        one, which both read."""
        return self.teacher_text if caption and self.teacher_text else caption


@dataclass(frozen=True)
class Listing:
    """The examples of a folder or of several, sorted by path within a folder.

    refused: (file, reason) of what was skipped. source: where the captions came from, in words
    ("metadata.jsonl", ".txt files", "instance prompt"). notes: sentences on what is read in another
    way than someone may expect, or not read at all.
    """

    examples: tuple[Example, ...]
    refused: tuple[tuple[Path, str], ...]
    source: str
    notes: tuple[str, ...] = ()

    def fingerprint(self, in_order: bool = False) -> str:
        """SHA-256 of the images' bytes, those of their masks, and their captions and teacher's
        texts, wherever they lie. in_order: whether their order counts."""
        contents = self._contents if in_order else sorted(self._contents)
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    @cached_property
    def _contents(self) -> list[list[str]]:
        return [
            [
                *map(sha256_of, (e.path, *e.references, *e.rejected)),
                *([f"mask {sha256_of(e.mask)}"] if e.mask else []),
                e.caption,
                *e.also,
                *([f"teacher {e.teacher_text}"] if e.teacher_text else []),
            ]
            for e in self.examples
        ]
