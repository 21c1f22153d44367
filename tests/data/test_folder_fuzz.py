"""Random folders: each file is an example, a mask or refused, and nothing raises but ValueError."""

import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dopsd.data.sources import Source, read_sources


def encoded(mode: str, kind: str, size: tuple[int, int], **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1 if mode == "1" else "white").save(file, kind, **options)
    return file.getvalue()


IMAGES = [
    encoded("RGB", "PNG", (8, 8)),
    encoded("RGBA", "PNG", (8, 6)),
    encoded("L", "JPEG", (6, 8)),
    encoded("RGB", "WEBP", (8, 8)),
    encoded("1", "PNG", (8, 8)),
    encoded("RGB", "GIF", (8, 8)),
    encoded("RGB", "PNG", (8, 8), icc_profile=b"no profile"),
]
STEMS = ["a", "b", "a_mask", "a-masklabel", "mask_b", "a-condlabel", "cafe\u0301", "caf\u00e9", "A"]
ENDINGS = [".png", ".PNG", ".jpg", ".jfif", ".webp", ".gif", ".tga", "", ".txt", ".TXT", ".caption"]
IMAGE_ENDINGS = (".png", ".jpg", ".jfif", ".webp", ".gif", ".tga")
names = st.builds(str.__add__, st.sampled_from(STEMS), st.sampled_from(ENDINGS))
paths = st.one_of(names, st.builds("{}/{}".format, st.sampled_from(["sub", ".hidden"]), names))
contents = st.one_of(
    st.sampled_from(IMAGES),
    st.sampled_from(IMAGES).map(lambda content: content[: len(content) // 2]),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=20),
)
values = st.one_of(
    names, names.map(".\\{}".format), st.lists(names, max_size=2), st.text(max_size=5), st.none()
)
rows = st.dictionaries(
    st.sampled_from(["file_name", "text", "mask", "references", "rejected", "chosen", "target"]),
    values,
    max_size=4,
)
folders = st.fixed_dictionaries(
    {
        "files": st.dictionaries(paths, contents, max_size=6),
        "rows": st.one_of(st.none(), st.lists(rows, max_size=3)),
        "masks": st.sampled_from(["files", "alpha", "ignore"]),
        "lines": st.sampled_from(["joined", "each"]),
        "prompt": st.sampled_from([None, "a cat"]),
    }
)


def examine(case: dict) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, content in case["files"].items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        if case["rows"] is not None:
            lines = "\n".join(json.dumps(row) for row in case["rows"])
            (folder / "metadata.jsonl").write_text(lines)
        source = Source(folder, case["prompt"], caption_lines=case["lines"], masks=case["masks"])
        try:
            listing = read_sources([source], skip_bad=True)
        except ValueError:
            return
        kept = {e.path for e in listing.examples}
        masks = {e.mask for e in listing.examples if e.mask != e.path}
        assert not kept & masks, "a mask is no image to train on"
        if case["rows"] is None:
            images = {p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS}
            unnamed = images - kept - masks - {path for path, _ in listing.refused}
            assert all("mask" in path.stem.lower() for path in unnamed), f"{unnamed} vanished"


SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@given(folders)
@settings(max_examples=60, **SETTINGS)
def test_no_file_vanishes_and_nothing_but_a_sentence_is_raised(case):
    examine(case)


@pytest.mark.slow
@given(folders)
@settings(max_examples=20_000, **SETTINGS)
def test_no_file_vanishes_in_twenty_thousand_folders(case):
    examine(case)
