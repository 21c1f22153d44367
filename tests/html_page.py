"""A parsed HTML page, for tests of the pages that dopsd writes."""

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

VOID = {"meta", "img", "br", "hr", "link", "input"}


@dataclass
class Page(HTMLParser):
    """A page's tags and text. Fails on a tag that is closed out of order."""

    html: str = field(repr=False)
    open: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list, repr=False)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)
        self.close()
        assert self.open == [], "some tags are never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every tag of this name, in order."""
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self) -> list[Image.Image]:
        sources = [image["src"].partition(";base64,")[2] for image in self.all("img")]
        return [
            Image.open(io.BytesIO(base64.b64decode(source, validate=True))) for source in sources
        ]


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))
