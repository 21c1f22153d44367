"""Folders and data sets that cannot be read: each gives one sentence, and no file changes.

Beside them odd images that are good and must not be refused.
"""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dopsd.data.folder import read_folder
from dopsd.data.importing import import_data
from dopsd.images import FORMATS, image_size, open_image

LONGEST = 2000  # characters that still make a sentence


def noise(form: str, **options) -> bytes:
    """An image of random colours, so that no format packs it into a few bytes."""
    values = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(values), form, **options)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def cut(form: str) -> bytes:
    whole = noise(form)
    return whole[: len(whole) * 2 // 3]


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width: int, height: int, *between: bytes, pixels: bytes = b"\0") -> bytes:
    """A PNG of 8-bit grey by hand, whatever its header claims; `between` are further chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(between) + body


BROKEN, NONE = "cannot be decoded", "is not a JPEG"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
IMAGES = {  # name: (file, bytes, sentence)
    "truncated PNG": ("x.png", cut("PNG"), BROKEN),
    "truncated JPEG": ("x.jpg", cut("JPEG"), BROKEN),
    "truncated WEBP": ("x.webp", cut("WEBP"), BROKEN),
    "truncated BMP": ("x.bmp", cut("BMP"), BROKEN),
    "nothing but a signature": ("x.png", noise("PNG")[:8], NONE),
    "empty PNG": ("x.png", b"", NONE),
    "text renamed": ("x.png", b"hello", NONE),
    "web page renamed": ("x.jpg", b"<html>not found</html>", NONE),
    "GIF renamed": ("x.png", noise("GIF"), NONE),
    "TIFF renamed": ("x.png", noise("TIFF"), NONE),
    "PostScript renamed": ("x.png", POSTSCRIPT, NONE),
    "PDF renamed": ("x.png", b"%PDF-1.7\n", NONE),
    "GIF": ("x.gif", noise("GIF"), "x.gif is not read: convert it to JPEG or PNG"),
    "TIFF": ("x.tiff", noise("TIFF"), "x.tiff is not read: convert it to JPEG or PNG"),
    "HEIC": (
        "x.heic",
        b"from a phone",
        "is not a JPEG" if ".heic" in FORMATS else "x.heic is not read: pip install 'dopsd[heif]'",
    ),
    "JPEG XL in capitals": ("x.JXL", b"\xff\x0a", "x.JXL is not read: convert it"),
    "no ending": ("x", noise("PNG"), "x is not read: it begins like a .png file; rename it"),
    "SVG": ("x.svg", b"<svg/>", "x.svg is not read: convert it"),
    "hidden": (".x.png", noise("PNG"), "no images in"),
    "header of 10 gigapixels": ("x.png", png(100_000, 100_000), "decompression bomb"),
    "header of no width": ("x.png", png(0, 10), NONE),
    "fewer pixels than the header says": ("x.png", png(64, 64), BROKEN),
    "chunk with a wrong checksum": ("x.png", noise("PNG").replace(b"IHDR", b"IHDX", 1), NONE),
    "bomb in a text chunk": (
        "x.png",
        png(1, 1, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))), pixels=b"\0\0"),
        "Decompressed data too large",
    ),
}

PLACES: dict[
    str, tuple[Callable[[], object], str]
] = {  # in a folder without images unless the name says otherwise
    "a folder named like an image": (lambda: Path("x.png").mkdir(), "no images in"),
    "a link to itself": (lambda: os.symlink("x.png", "x.png"), "x.png cannot be decoded"),
    "a link to nothing": (lambda: os.symlink("gone", "x.png"), "x.png cannot be decoded"),
    "a queue named like an image": (lambda: os.mkfifo("x.png"), "no images in"),
    "images in a subfolder only": (
        lambda: (Path("deep").mkdir(), good("deep/a.png")),
        "not in its subfolders",
    ),
    "a link to itself beside an image": (
        lambda: (good("a.png"), os.symlink("x.png", "x.png")),
        "x.png",
    ),
    "a link to nothing beside an image": (
        lambda: (good("a.png"), os.symlink("gone", "x.png")),
        "x.png",
    ),
    "a metadata file that is a link to nothing": (
        lambda: (good("a.png"), os.symlink("gone", "metadata.jsonl")),
        "metadata.jsonl",
    ),
    "a caption that is a link to nothing": (
        lambda: (good("a.png"), os.symlink("gone", "a.txt")),
        "a.txt",
    ),
}

CAPTIONS: dict[
    str, tuple[bytes | None, str]
] = {  # name: (a.txt, sentence), without an instance prompt
    "empty": (b"", "the caption a.txt is empty"),
    "blanks only": (b" \t\r\n ", "the caption a.txt is empty"),
    "a byte order mark only": (b"\xef\xbb\xbf", "the caption a.txt is empty"),
    "Latin-1": ("forêt".encode("latin-1"), "the caption a.txt is not UTF-8"),
    "UTF-16": ("a cat".encode("utf-16"), "the caption a.txt is not UTF-8"),
    "half a surrogate pair": (b"a \xed\xa0\x80", "the caption a.txt is not UTF-8"),
    "an image": (noise("PNG"), "the caption a.txt is not UTF-8"),
    "missing": (None, "a.png has no caption: there is no a.txt or a.caption"),
}

ROWS: dict[
    str, tuple[object, str]
] = {  # name: (first line of metadata.jsonl, sentence); strings are lines as they are
    "file a number": (
        {"file_name": 7, "text": "x"},
        "line 1 names its image with 7, which is not a file name",
    ),
    "file null": ({"file_name": None, "text": "x"}, "with None, which is not a file name"),
    "file a list": (
        {"file_name": ["a.png"], "text": "x"},
        "with ['a.png'], which is not a file name",
    ),
    "file nested": ({"file_name": {"path": "a.png"}, "text": "x"}, "which is not a file name"),
    "file empty": ({"file_name": "", "text": "x"}, "with '', which is not a file name"),
    "file absolute": ({"file_name": "/images/a.png", "text": "x"}, "which is outside the folder"),
    "file above": (
        {"file_name": "../a.png", "text": "x"},
        "names ../a.png, which is outside the folder",
    ),
    "file above by a detour": (
        {"file_name": "deep/../../a.png", "text": "x"},
        "which is outside the folder",
    ),
    "file on a drive": ({"file_name": "C:\\a.png", "text": "x"}, "which is outside the folder"),
    "file on a share": (
        {"file_name": "\\\\server\\share\\a.png", "text": "x"},
        "which is outside the folder",
    ),
    "file the folder itself": ({"file_name": ".", "text": "x"}, "and there is no such file"),
    "file missing": (
        {"file_name": "gone.png", "text": "x"},
        "names gone.png, and there is no such file",
    ),
    "file with NUL": ({"file_name": "a.png\0", "text": "x"}, "and there is no such file"),
    "file of half a surrogate": (
        {"file_name": "\ud800.png", "text": "x"},
        "and there is no such file",
    ),
    "file of 300 letters": ({"file_name": "a" * 300, "text": "x"}, "and there is no such file"),
    "file no image": (
        {"file_name": "metadata.jsonl", "text": "x"},
        "metadata.jsonl is not one of .jpg",
    ),
    "no file": (
        {"text": "x"},
        "has none of file_name, image, image_path, target, chosen (it has text)",
    ),
    "columns in capitals": (
        {"File_Name": "a.png", "text": "x"},
        "has none of file_name, image, image_path",
    ),
    "no column": ({}, "(it has nothing)"),
    "no caption": (
        {"file_name": "a.png", "label": "x"},
        "has none of text, prompt, caption (it has file_name, label)",
    ),
    "caption a number": (
        {"file_name": "a.png", "text": 7},
        "the caption of metadata.jsonl line 1 is 7",
    ),
    "caption null": ({"file_name": "a.png", "text": None}, "is None, which is not text"),
    "caption nested": (
        {"file_name": "a.png", "text": {"en": "x"}},
        "is {'en': 'x'}, which is not text",
    ),
    "caption empty": (
        {"file_name": "a.png", "text": ""},
        "the caption of metadata.jsonl line 1 is empty",
    ),
    "caption half a surrogate": (
        {"file_name": "a.png", "text": "\ud800"},
        "line 1 is not valid Unicode",
    ),
    "caption of a million numbers": (
        {"file_name": "a.png", "text": {"ids": [7] * 10**6}},
        "which is not text",
    ),
    "captions none": ({"file_name": "a.png", "text": []}, "is [], which is not text"),
    "captions of wrong types": (
        {"file_name": "a.png", "text": ["x", 7]},
        "is 7, which is not text",
    ),
    "captions with an empty one": ({"file_name": "a.png", "text": ["x", ""]}, "line 1 is empty"),
    "a list": ("[1]", "line 1 is not a JSON object"),
    "no JSON": ("a.png: x", "line 1 is not JSON"),
    "JSON cut off": ('{"file_name": "a.png", "text": "x', "line 1 is not JSON"),
    "two objects in a line": (
        '{"file_name": "a.png", "text": "x"} {}',
        "line 1 is not JSON",
    ),
    "JSON of 100000 lists": ("[" * 100_000, "line 1 is not JSON"),
    "a number of 5000 digits": (
        '{"file_name": "a.png", "text": ' + "9" * 5000 + "}",
        "line 1 is not JSON",
    ),
    "a blank line only": ("", "a.png has no caption: no row of metadata.jsonl names it"),
}

FILES: dict[str, tuple[dict[str, bytes], str]] = {  # name: (metadata files, sentence)
    "both metadata files": (
        {"metadata.jsonl": b"{}", "metadata.csv": b"a"},
        "holds both metadata.jsonl and metadata",
    ),
    "empty metadata.jsonl": ({"metadata.jsonl": b""}, "metadata.jsonl has no rows"),
    "blank metadata.jsonl": ({"metadata.jsonl": b"\n \n"}, "metadata.jsonl has no rows"),
    "metadata.jsonl in UTF-16": (
        {"metadata.jsonl": "{}".encode("utf-16")},
        "line 1 is not UTF-8",
    ),
    "empty metadata.csv": ({"metadata.csv": b""}, "metadata.csv has no rows"),
    "metadata.csv with a header only": (
        {"metadata.csv": b"file_name,text\n"},
        "metadata.csv has no rows",
    ),
    "surplus field": (
        {"metadata.csv": b"file_name,text\na.png,a cat, asleep\n"},
        "has more fields than the header",
    ),
    "missing field": (
        {"metadata.csv": b"file_name,text\na.png\n"},
        "metadata.csv line 2 is None, which is not text",
    ),
    "semicolons": ({"metadata.csv": b"file_name;text\na.png;x\n"}, "(it has file_name;text)"),
    "no header": ({"metadata.csv": b"a.png,x\nb.png,y\n"}, "chosen (it has a.png, x)"),
    "quote never closed": (
        {"metadata.csv": b'file_name,text\na.png,"x\nb.png,y\n'},
        "b.png has no caption: no row",
    ),
    "CSV in Latin-1": (
        {"metadata.csv": "file_name,text\na.png,é\n".encode("latin-1")},
        "metadata.csv is not UTF-8",
    ),
    "endless CSV field": (
        {"metadata.csv": b"file_name,text\na.png," + b"x" * 200_000},
        "is not readable CSV",
    ),
    "CSV row outside": (
        {"metadata.csv": b"file_name,text\n../a.png,x\n"},
        "line 2 names ../a.png, which is outside",
    ),
}

IMPORTS: dict[str, tuple[str | bytes, str]] = {  # name: (d.jsonl of the reference code, sentence)
    "no rows": ("", "d.jsonl has no rows"),
    "no JSON": ("{", "d.jsonl line 1 is not JSON"),
    "not UTF-8": (b"\xff", "d.jsonl line 1 is not UTF-8"),
    "a list": ("[1]", "d.jsonl line 1 is not a JSON object"),
    "100000 lists": ("[" * 100_000, "d.jsonl line 1 is not JSON"),
    "null": ("null", "line 1 is not a JSON object"),
    "no image": ('{"short_en": "a"}', "line 1 names no image"),
    "none": ('{"path": []}', "line 1 names no image"),
    "image missing": (
        '{"path": "gone.png", "short_en": "a"}',
        "line 1 names gone.png, which is neither in",
    ),
    "image a number": ('{"path": 7, "short_en": "a"}', "line 1 names 7, which is neither in"),
    "image of 300 letters": (
        f'{{"path": "{"a" * 300}", "short_en": "a"}}',
        "which is neither in",
    ),
    "image that is text": (
        '{"path": "d.jsonl", "short_en": "a"}',
        "row 1 of d.jsonl is not a JPEG",
    ),
    "image of 10 gigapixels": ('{"path": "bomb.png", "short_en": "a"}', "row 1 of d.jsonl"),
    "a reference missing": (
        '{"path": ["b.png", "a.png"], "short_en": "a"}',
        "line 1 names b.png, which is neither in",
    ),
    "no caption": ('{"path": "a.png"}', "has no caption in"),
    "caption blank": ('{"path": "a.png", "short_en": " "}', "line 1 has no caption in short_en"),
    "caption a number": ('{"path": "a.png", "short_en": 7}', "line 1 has no caption in short_en"),
    "half a surrogate": ('{"path": "a.png", "short_en": "\\ud800"}', "d.jsonl line 1"),
    "into a new folder": ('{"path": "a.png"} ', "line 1 has no caption in short_en"),
    "second row": ('{"path": "a.png", "short_en": "a"}\n{}', "d.jsonl line 2 names no image"),
}


def good(name: str) -> None:
    Image.new("RGB", (12, 8), (200, 30, 30)).save(name)


def write(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)


def captioned(content: bytes | None) -> None:
    for name in ("a", "b"):
        good(f"{name}.png")
        write(f"{name}.txt", b"a cat")
    Path("a.txt").unlink()
    if content is not None:
        write("a.txt", content)


def listed(row: object) -> None:
    good("a.png")
    good("b.png")
    line = row if isinstance(row, str) else json.dumps(row)
    write("metadata.jsonl", f'{line}\n{{"file_name": "b.png", "text": "b"}}\n'.encode())


def imported(rows: str | bytes) -> None:
    good("a.png")
    write("bomb.png", png(100_000, 100_000))
    write("d.jsonl", rows if isinstance(rows, bytes) else rows.encode())


def described(files: dict[str, bytes]) -> None:
    good("a.png")
    good("b.png")
    for name, content in files.items():
        write(name, content)


# name: (what to build, the instance prompt, what the sentence contains)
CASES: dict[str, tuple[Callable[[], object], str | None, str]] = {
    **{
        name: (lambda f=file, c=data: write(f, c), "a cat", message)
        for name, (file, data, message) in IMAGES.items()
    },
    **{name: (build, "a cat", message) for name, (build, message) in PLACES.items()},
    **{
        f"caption: {name}": (lambda c=text: captioned(c), None, message)
        for name, (text, message) in CAPTIONS.items()
    },
    **{name: (lambda r=row: listed(r), None, message) for name, (row, message) in ROWS.items()},
    **{
        name: (lambda f=files: described(f), None, message)
        for name, (files, message) in FILES.items()
    },
    **{
        f"import: {name}": (lambda r=rows: imported(r), None, message)
        for name, (rows, message) in IMPORTS.items()
    },
}


def snapshot(folder: Path) -> dict[Path, object]:
    """Every path under the folder with its bytes, its target (a link) or its mode (others)."""
    return {
        path: os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else path.stat().st_mode
        for path in folder.rglob("*")
    }


def test_the_corpus_has_100_distinct_cases(tmp_path, monkeypatch):
    assert len(CASES) == sum(map(len, (IMAGES, PLACES, CAPTIONS, ROWS, FILES, IMPORTS)))
    contents = set()
    for index, (build, prompt, _) in enumerate(CASES.values()):
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        build()
        seen = {path.relative_to(folder): content for path, content in snapshot(folder).items()}
        contents.add(repr((prompt, sorted(seen.items()))))
    assert len(contents) == len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_read_is_one_sentence_and_stays_as_it_was(name, tmp_path, monkeypatch):
    build, prompt, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    build()
    before = snapshot(tmp_path)
    with pytest.raises(ValueError) as refused:
        if name.startswith("import: "):
            import_data("d.jsonl", Path("new/out" if "new" in name else "out"))
        else:
            read_folder(tmp_path, prompt)
    sentence = " ".join(str(refused.value).split())
    assert message in sentence and sentence.endswith(".") and len(sentence) < LONGEST
    assert snapshot(tmp_path) == before


RED = (220, 40, 30)
RED_IMAGE = Image.new("RGB", (48, 32), RED)
TURNED = Image.Exif()
TURNED[0x0112] = 6
NOTE = PngImagePlugin.PngInfo()
NOTE.add_text("parameters", "steps: 8, ünïcode", zip=True)
PALETTE = RED_IMAGE.convert("P", palette=Image.Palette.ADAPTIVE)
FRAMES = [Image.new("RGB", (48, 32), colour) for colour in ("blue", "green")]
GREY = Image.fromarray(np.full((32, 48), 128 * 257, dtype=np.uint16))
ODD: dict[
    str, tuple[str, bytes, tuple[int, int], tuple[int, int, int]]
] = {  # name: (file, bytes, size, colour)
    "16-bit grey": ("x.png", encoded(GREY, "PNG"), (48, 32), (128, 128, 128)),
    "CMYK JPEG": ("x.jpg", encoded(RED_IMAGE.convert("CMYK"), "JPEG"), (48, 32), RED),
    "palette": ("x.png", encoded(PALETTE, "PNG"), (48, 32), RED),
    "palette BMP": ("x.bmp", encoded(PALETTE, "BMP"), (48, 32), RED),
    "all transparent": (
        "x.png",
        encoded(Image.new("RGBA", (48, 32), (*RED, 0)), "PNG"),
        (48, 32),
        (255, 255, 255),
    ),
    "opaque alpha": ("x.webp", encoded(RED_IMAGE.convert("RGBA"), "WEBP"), (48, 32), RED),
    "grey with alpha": (
        "x.png",
        encoded(Image.new("LA", (48, 32), (9, 255)), "PNG"),
        (48, 32),
        (9, 9, 9),
    ),
    "one bit": ("x.png", encoded(Image.new("1", (48, 32), 1), "PNG"), (48, 32), (255, 255, 255)),
    "turned by EXIF": ("x.jpg", encoded(RED_IMAGE, "JPEG", exif=TURNED), (32, 48), RED),
    "broken EXIF": ("x.jpg", encoded(RED_IMAGE, "JPEG", exif=b"Exif\0\0junkjunk"), (48, 32), RED),
    "animated": (
        "x.webp",
        encoded(RED_IMAGE, "WEBP", save_all=True, append_images=FRAMES),
        (48, 32),
        RED,
    ),
    "progressive": ("x.jpg", encoded(RED_IMAGE, "JPEG", progressive=True), (48, 32), RED),
    "JPEG named PNG": ("x.png", encoded(RED_IMAGE, "JPEG"), (48, 32), RED),
    "text chunk": ("x.png", encoded(RED_IMAGE, "PNG", pnginfo=NOTE), (48, 32), RED),
    "bytes after the end": ("x.jpg", encoded(RED_IMAGE, "JPEG") + b"trailing", (48, 32), RED),
    "one pixel": ("x.png", encoded(Image.new("RGB", (1, 1), RED), "PNG"), (1, 1), RED),
    "20000 pixels wide": (
        "x.png",
        encoded(Image.new("RGB", (20_000, 1), RED), "PNG"),
        (20_000, 1),
        RED,
    ),
    "letters beyond ASCII": ("Bäume 森 🌲.PNG", encoded(RED_IMAGE, "PNG"), (48, 32), RED),
    "blanks and quotes": (" it's (1) [a].v2 .png", encoded(RED_IMAGE, "PNG"), (48, 32), RED),
    "a combining accent": ("e\u0301.png", encoded(RED_IMAGE, "PNG"), (48, 32), RED),
    "a name like an option": ("--help.png", encoded(RED_IMAGE, "PNG"), (48, 32), RED),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_that_is_good_is_read_as_rgb(name, tmp_path):
    file, content, size, colour = ODD[name]
    path = tmp_path / file
    path.write_bytes(content)
    listing = read_folder(tmp_path, "a cat")
    assert [example.path for example in listing.examples] == [path] and listing.refused == ()
    seen = open_image(path)
    assert (seen.mode, seen.size, image_size(path)) == ("RGB", size, size)
    assert np.abs(np.asarray(seen).astype(int) - colour).max() <= 12
