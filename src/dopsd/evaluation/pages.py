"""Pages that tell what happened: one of a run, one of a comparison. Self-contained HTML, no script,
no network.

A page is a list of sections (words, table, panels of images, curves, text); page.html.jinja lays
them out.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dopsd.evaluation.plots import Curve
from dopsd.files import write_text

# Pixels; a larger image is embedded as a JPEG copy of at most COPY_SIDE, or pages grow to 100 MB
EXACT_SIDE = 256
COPY_SIDE = 640
ENLARGED_SIDE = 128  # pixels; images up to here are enlarged without smoothing
SHARED = "In a column every model got the same prompt and the same noise."


@dataclass(frozen=True)
class Panel:
    """A grid of images: a caption for each column, and rows of (label, images)."""

    title: str
    captions: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Image.Image, ...]], ...]


def write_comparison(
    path: Path,
    title: str,
    intro: str,
    header: Sequence[str],
    table: Sequence[Sequence[str]],
    panels: Sequence[Panel],
    notes: Sequence[str] = (),
) -> Path:
    """Write the page of a comparison. table: a row for each model, its name first and numbers
    after."""
    sections = [
        _Section("HealthMetrics", header=header, rows=table),
        _Section("Pictures", words=[SHARED] if panels else [], panels=panels),
        _Section("Notes", words=notes),
    ]
    return _write_page(path, title, intro, sections, {})


@dataclass(frozen=True)
class _Section:
    """A part of a page, left out when it has nothing to show. With a header, the cells after the
    first are numbers."""

    title: str
    words: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    panels: Sequence[Panel] = ()
    curves: Sequence[Curve] = ()
    text: str = ""


def _write_page(
    path: Path, title: str, intro: str, sections: Sequence[_Section], headline: Mapping[str, object]
) -> Path:
    loader = PackageLoader("dopsd.evaluation", "")
    pages = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["data_uri"] = _data_uri
    page = pages.get_template("page.html.jinja")
    write_text(
        path,
        page.render(
            title=title,
            intro=intro,
            sections=sections,
            headline=headline,
            exact_side=EXACT_SIDE,
            enlarged_side=ENLARGED_SIDE,
        ),
    )
    return path


def _data_uri(image: Image.Image) -> str:
    """The image as PNG, or a copy of a large one as JPEG."""
    buffer, kind = io.BytesIO(), "png"
    if max(image.size) > EXACT_SIDE:
        image, kind = image.convert("RGB"), "jpeg"
        image.thumbnail((COPY_SIDE, COPY_SIDE))
    image.save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
