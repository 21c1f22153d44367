"""HTML pages of results: one file each, without script and network.

A page opens with a verdict. Below it stand sections (sentences, a table, panels of images, curves,
text), laid out by page.html.jinja; each names its terms where they are used.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dopsd.evaluation.plots import Curve
from dopsd.files import write_text

# Pixels; a larger image is embedded as a JPEG copy of at most COPY_SIDE, or pages grow to 100 MB
EXACT_SIDE = 256
COPY_SIDE = 640
ENLARGED_SIDE = 128  # pixels; images up to here are enlarged without smoothing
SAME_NOISE = "The generated images of one group start from the same noise."


@dataclass(frozen=True)
class Panel:
    """A grid of images: a caption for each column, and rows of (label, images).

    A page shows it column by column, so that a group wraps on a narrow screen and images to be
    compared stay neighbours."""

    title: str
    captions: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Image.Image, ...]], ...]

    @property
    def groups(self) -> list[tuple[str, list[tuple[str, Image.Image]]]]:
        """(caption, its labelled images) for each column; a short row has no image in the last."""
        return [
            (caption, [(label, row[index]) for label, row in self.rows if index < len(row)])
            for index, caption in enumerate(self.captions)
        ]


@dataclass(frozen=True)
class Section:
    """A part of a page, left out when it has nothing to show.

    rows: cells of a table; with a header, those after the first are numbers. definitions: what the
    terms of the table or the images mean, written below them."""

    title: str
    sentences: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    definitions: Mapping[str, str] = field(default_factory=dict)
    panels: Sequence[Panel] = ()
    curves: Sequence[Curve] = ()
    text: str = ""


def write_comparison(
    path: Path,
    title: str,
    intro: str,
    header: Sequence[str],
    table: Sequence[Sequence[str]],
    panels: Sequence[Panel],
    notes: Sequence[str] = (),
    verdict: str = "",
    definitions: Mapping[str, str] | None = None,
) -> Path:
    """Write the page of a comparison.

    verdict: what the numbers say, in one or two sentences. table: a row for each model, its name
    first and numbers after. definitions: what the names in the header mean."""
    sections = [
        Section("Metrics", header=header, rows=table, definitions=definitions or {}),
        Section("Images", sentences=[SAME_NOISE] if panels else [], panels=panels),
        Section("Notes", sentences=notes),
    ]
    return write_page(path, title, verdict, intro, sections)


def write_page(
    path: Path,
    title: str,
    verdict: str,
    intro: str,
    sections: Sequence[Section],
    files: Sequence[tuple[str, str]] = (),
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write a page. files: (name, how to use it) of what a run left, above the facts."""
    environment = Environment(
        loader=PackageLoader("dopsd.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    html = environment.get_template("page.html.jinja").render(
        title=title,
        verdict=verdict,
        intro=intro,
        files=files,
        facts=facts or {},
        sections=sections,
        exact_side=EXACT_SIDE,
        enlarged_side=ENLARGED_SIDE,
    )
    write_text(path, html)
    return path


def _data_uri(image: Image.Image) -> str:
    """The image as PNG, or a copy of a large one as JPEG."""
    buffer, kind = io.BytesIO(), "png"
    if max(image.size) > EXACT_SIDE:
        image, kind = image.convert("RGB"), "jpeg"
        image.thumbnail((COPY_SIDE, COPY_SIDE))
    image.save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
