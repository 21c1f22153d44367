"""Folders of images as users have them: every source of captions, every way to be broken."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dopsd.data.folder import Example, read_folder
from dopsd.images import image_size, open_image


def image(
    path: Path, colour: tuple[int, ...] = (200, 30, 30), size: tuple[int, int] = (12, 8)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def json_lines(folder: Path, *rows: object) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def refusals(folder: Path, **settings) -> str:
    """The sentences of what was skipped, after checking that without skip_bad they are an error
    that says so."""
    with pytest.raises(ValueError, match="skip_bad: true"):
        read_folder(folder, **settings)
    return "\n".join(why for _, why in read_folder(folder, skip_bad=True, **settings).refused)


def test_text_files_beside_pictures_are_captions_without_blanks_around(tmp_path):
    for name in ("b.png", "a.jpg", "c.v2.webp", "d.JPEG", "e.bmp"):
        image(tmp_path / name).with_suffix(".txt").write_text(
            f" caption of {name}\n", encoding="utf-8-sig"
        )
    (tmp_path / "notes.md").write_text("not a picture")
    (tmp_path / "._a.jpg").write_bytes(b"what macOS leaves behind")
    listing = read_folder(tmp_path)
    names = ("a.jpg", "b.png", "c.v2.webp", "d.JPEG", "e.bmp")
    assert listing.examples == tuple(Example(tmp_path / n, f"caption of {n}") for n in names)
    assert (listing.source, listing.refused) == (".txt files", ())


def test_txt_goes_before_caption_and_a_given_extension_before_both(tmp_path):
    for name, suffixes in {"a": (".txt", ".caption", ".tags"), "b": (".caption", ".tags")}.items():
        image(tmp_path / f"{name}.png")
        for suffix in suffixes:
            (tmp_path / f"{name}{suffix}").write_text(suffix)
    assert [e.caption for e in read_folder(tmp_path).examples] == [".txt", ".caption"]
    assert read_folder(tmp_path).source == ".txt files and .caption files"
    for given in ("tags", ".tags"):
        listing = read_folder(tmp_path, caption_extension=given)
        assert ([e.caption for e in listing.examples], listing.source) == (
            [".tags", ".tags"],
            ".tags files",
        )


def test_the_instance_prompt_captions_every_picture_that_has_no_text(tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    assert read_folder(tmp_path, "a sks cat").source == "instance prompt"
    (tmp_path / "b.txt").write_text("its own")
    listing = read_folder(tmp_path, "a sks cat")
    assert [e.caption for e in listing.examples] == ["a sks cat", "its own"]
    assert listing.source == ".txt files and instance prompt"
    with pytest.raises(ValueError, match="instance prompt is empty"):
        read_folder(tmp_path, " ")


def test_a_metadata_file_goes_before_text_files_and_the_instance_prompt(tmp_path):
    image(tmp_path / "a.png").with_suffix(".txt").write_text("from a.txt")
    image(tmp_path / "deep" / "b.png")
    json_lines(
        tmp_path,
        {"file_name": "deep/b.png", "text": "b"},
        "",
        {"file_name": "./a.png", "text": "a"},
    )
    listing = read_folder(tmp_path, "a sks cat")
    assert listing.examples == (
        Example(tmp_path / "a.png", "a"),
        Example(tmp_path / "deep" / "b.png", "b"),
    )
    assert listing.source == "metadata.jsonl"


@pytest.mark.parametrize("file", ["file_name", "image", "image_path"])
@pytest.mark.parametrize("text", ["text", "prompt", "caption"])
def test_metadata_columns_have_the_names_that_people_use(tmp_path, file, text):
    image(tmp_path / "a.png")
    json_lines(tmp_path, {file: "a.png", text: "a cat", "other": 1})
    assert read_folder(tmp_path).examples[0].caption == "a cat"


def test_csv_metadata_is_read_and_a_caption_cut_by_a_comma_is_refused(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        image(tmp_path / name)
    rows = 'file_name,text\na.png,"a cat, sitting"\nb.png,a dog, running\nc.png\n'
    (tmp_path / "metadata.csv").write_text(rows, encoding="utf-8-sig")
    assert read_folder(tmp_path, skip_bad=True).source == "metadata.csv"
    assert [e.caption for e in read_folder(tmp_path, skip_bad=True).examples] == ["a cat, sitting"]
    said = refusals(tmp_path)
    assert (
        "line 3 has more fields than the header" in said
        and "caption of metadata.csv line 4 is None" in said
    )


def test_csv_that_is_not_utf8_or_not_csv_is_one_clear_error(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,une forêt\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_folder(tmp_path, skip_bad=True)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png," + "x" * 200_000)
    with pytest.raises(ValueError, match="not readable CSV"):
        read_folder(tmp_path, skip_bad=True)


def test_two_metadata_files_are_refused(tmp_path):
    image(tmp_path / "a.png")
    json_lines(tmp_path, {"file_name": "a.png", "text": "a"})
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a\n")
    with pytest.raises(ValueError, match=r"both metadata\.jsonl and metadata\.csv"):
        read_folder(tmp_path)


def test_every_bad_metadata_line_is_named_with_its_number(tmp_path):
    image(tmp_path / "good.png")
    (tmp_path.parent / "outside.png").write_bytes((tmp_path / "good.png").read_bytes())
    json_lines(
        tmp_path,
        {"file_name": "good.png", "text": "good"},
        '{"file_name": "good.png", "text": ',
        "[1, 2]",
        {"file_name": "gone.png", "text": "missing"},
        {"file_name": "../outside.png", "text": "escapes"},
        {"file_name": "x/../../outside.png", "text": "escapes"},
        {"file_name": str(tmp_path / "good.png"), "text": "absolute"},
        {"file_name": "C:\\good.png", "text": "absolute"},
        {"file_name": 7, "text": "wrong type"},
        {"file_name": "good.png", "text": {"wrong": "type"}},
        {"file_name": "good.png", "text": "  "},
        {"file_name": "good.png"},
        {"file_name": "good.png", "text": "\ud800"},
    )
    said = refusals(tmp_path)
    expected = {
        2: "is not JSON",
        3: "is not a JSON object",
        4: "no such file",
        5: "outside the folder",
        6: "outside the folder",
        7: "outside the folder",
        8: "outside the folder",
        9: "is not a file name",
        10: "is not text",
        11: "is empty",
        12: "has none of text, prompt, caption",
        13: "not valid Unicode",
    }
    lines = said.splitlines()
    assert len(lines) == len(expected)
    for number, words in expected.items():
        assert any(f"metadata.jsonl line {number} " in line and words in line for line in lines), (
            number,
            said,
        )
    assert len(read_folder(tmp_path, skip_bad=True).examples) == 1


def test_a_metadata_line_that_is_not_utf8_is_named(tmp_path):
    image(tmp_path / "a.png")
    good = b'{"file_name": "a.png", "text": "a"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(good + b'{"file_name": "a.png", "text": "\xff"}\n')
    assert "line 2 is not UTF-8" in refusals(tmp_path)


def test_a_picture_that_the_metadata_does_not_name_is_not_dropped_in_silence(tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    json_lines(tmp_path, {"file_name": "a.png", "text": "a"})
    assert "b.png has no caption: no row of metadata.jsonl" in refusals(tmp_path)


def test_a_truncated_picture_is_found_by_decoding_it(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in (".png", ".jpg", ".webp"):
        path = tmp_path / f"cut{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    image(tmp_path / "good.png")
    listing = read_folder(tmp_path, "a cat", skip_bad=True)
    assert [e.path.name for e in listing.examples] == ["good.png"]
    assert {path.name for path, _ in listing.refused} == {
        "cut.png",
        "cut.jpg",
        "cut.webp",
        "empty.png",
        "text.jpg",
    }
    assert all(path.name in why for path, why in listing.refused)
    assert "cannot be decoded" in refusals(tmp_path, instance_prompt="a cat")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    image(tmp_path / "bomb.png", size=(300, 300))
    image(tmp_path / "good.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    assert "decompression bomb" in refusals(tmp_path, instance_prompt="a cat")


def test_captions_that_are_missing_empty_or_not_utf8_are_refused(tmp_path):
    for name in ("a", "b", "c", "d"):
        image(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_text("\n")
    said = refusals(tmp_path)
    assert "b.txt is not UTF-8" in said and "c.txt is empty" in said
    assert "d.png has no caption: there is no d.txt or d.caption" in said


def test_a_huge_caption_is_untouched(tmp_path):
    caption = "ein großer Wald, 森 🌲\n" * 20_000 + "end"
    image(tmp_path / "a.png").with_suffix(".txt").write_text(caption, encoding="utf-8")
    assert read_folder(tmp_path).examples[0].caption == caption


def test_pictures_of_a_kind_that_is_not_read_are_named_rather_than_overlooked(tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "b.gif")
    (tmp_path / "c.HEIC").write_bytes(b"from a phone")
    said = refusals(tmp_path, instance_prompt="a cat")
    assert "b.gif is not one of" in said and "c.HEIC is not one of" in said


def test_a_folder_with_nothing_to_read_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no pictures in .*looked for \.jpg"):
        read_folder(tmp_path, "a cat")
    image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.txt beside a\.png.*instance_prompt"):
        read_folder(tmp_path, skip_bad=True)
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match="has no rows"):
        read_folder(tmp_path)


def test_an_error_lists_the_first_few_and_the_count(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").touch()
    with pytest.raises(ValueError, match="9 of 9 items") as raised:
        read_folder(tmp_path, "a cat")
    assert (
        "0.png" in str(raised.value)
        and "8.png" not in str(raised.value)
        and "and 4 more" in str(raised.value)
    )
    with pytest.raises(ValueError, match="Nothing is left"):
        read_folder(tmp_path, "a cat", skip_bad=True)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_the_picture_and_to_its_size(tmp_path, suffix, orientation):
    image = Image.new("RGB", (32, 16), "black")
    image.paste((255, 255, 255), (0, 0, 16, 16))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a{suffix}", exif=exif)
    seen = open_image(tmp_path / f"a{suffix}")
    assert (
        image_size(tmp_path / f"a{suffix}")
        == seen.size
        == ((16, 32) if orientation >= 5 else (32, 16))
    )
    if orientation == 6:  # a quarter turn clockwise: left goes up
        assert np.asarray(seen)[:12].min() > 200 and np.asarray(seen)[20:].max() < 50


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_transparency_is_flattened_on_white(tmp_path, mode):
    """The left half opaque black, the right half transparent; P, RGB and L by a transparent colour."""
    alpha = np.zeros((8, 16), dtype=np.uint8)
    alpha[:, :8] = 255
    options = {}
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (16, 8))
        image.putalpha(Image.fromarray(alpha))
    elif mode in ("P", "PA"):
        image = Image.fromarray((alpha == 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 255, 0, 0])
        options = {"transparency": 1}
    else:
        image = Image.fromarray(np.where(alpha, 0, 128).astype(np.uint8)).convert(mode)
        options = {"transparency": 128 if mode == "L" else (128, 128, 128)}
    image.save(tmp_path / "a.png", **options)
    seen = open_image(tmp_path / "a.png")
    assert seen.mode == "RGB"
    assert (np.asarray(seen)[:, :8] == 0).all() and (np.asarray(seen)[:, 8:] == 255).all()


def test_half_transparency_is_a_blend_with_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    assert open_image(tmp_path / "a.webp").getpixel((0, 0)) == (255, 127, 127)


def test_cmyk_has_the_right_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    red, green, blue = open_image(tmp_path / "red.jpg").getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


def test_sixteen_bit_grey_is_scaled_rather_than_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert [open_image(tmp_path / "a.png").getpixel((x, 0)) for x in range(4)] == [
        (v,) * 3 for v in (0, 1, 128, 255)
    ]


def test_other_kinds_of_picture_become_rgb(tmp_path):
    Image.new("1", (8, 8), 1).save(tmp_path / "bits.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.bmp")
    second = Image.new("RGB", (8, 8), "blue")  # a phone's JPEG with a second image inside (MPO)
    Image.new("RGB", (8, 8), "white").save(
        tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[second]
    )
    for name, value in {"bits.png": 255, "grey.bmp": 77, "phone.jpg": 255}.items():
        assert open_image(tmp_path / name).getpixel((0, 0)) == (value,) * 3


def test_a_renamed_postscript_file_is_not_run(tmp_path):
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    )
    with pytest.raises(ValueError, match="holds no JPEG"):
        open_image(tmp_path / "a.png")


def test_pairs_bring_one_or_several_rejected_pictures(tmp_path):
    for name in "abcd":
        image(tmp_path / f"{name}.png")
    json_lines(
        tmp_path,
        {"chosen": "a.png", "rejected": "b.png", "prompt": "a cat"},
        {"file_name": "c.png", "rejected": ["d.png", "b.png"], "text": "a dog"},
    )
    pairs = {e.path.name: [p.name for p in e.rejected] for e in read_folder(tmp_path).examples}
    assert pairs == {"a.png": ["b.png"], "c.png": ["d.png", "b.png"]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a.png", "text": "x"}, "is half a pair: it names no picture in rejected"),
        ({"file_name": "a.png", "rejected": "", "text": "x"}, "is half a pair"),
        (
            {"chosen": "a.png", "rejected": "gone.png", "text": "x"},
            "names gone.png, and there is no such file",
        ),
        ({"chosen": "a.png", "rejected": 7, "text": "x"}, "names its picture with 7"),
        (
            {"rejected": "a.png", "text": "x"},
            "has none of file_name, image, image_path, target, chosen",
        ),
        ({"chosen": "a.png", "rejected": "../a.png", "text": "x"}, "outside the folder"),
        (
            {"chosen": "a.png", "rejected": ["a.png"], "text": "x"},
            "names a.png as chosen and as rejected",
        ),
    ],
)
def test_a_pair_missing_a_side_is_named(row, said, tmp_path):
    image(tmp_path / "a.png")
    json_lines(tmp_path, row)
    with pytest.raises(ValueError, match=said) as refused:
        read_folder(tmp_path)
    assert "no row of metadata.jsonl names it" not in str(refused.value)


def test_a_rejected_picture_that_cannot_be_decoded_refuses_the_pair(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not a picture")
    json_lines(tmp_path, {"chosen": "a.png", "rejected": "b.png", "text": "x"})
    with pytest.raises(ValueError, match=r"b\.png holds no .* picture"):
        read_folder(tmp_path)
