"""Folders of images as users have them: every source of captions, every kind of damage."""

import numpy as np
import pytest
from image_folders import refusals, write_image, write_metadata
from PIL import Image

from dopsd.data.examples import Example
from dopsd.data.folder import read_folder


def test_text_files_beside_images_are_captions_without_blanks_around(tmp_path):
    for name in ("b.png", "a.jpg", "c.v2.webp", "d.JPEG", "e.bmp"):
        write_image(tmp_path / name).with_suffix(".txt").write_text(
            f" caption of {name}\n", encoding="utf-8-sig"
        )
    (tmp_path / "notes.md").write_text("not an image")
    (tmp_path / "._a.jpg").write_bytes(b"what macOS leaves behind")
    listing = read_folder(tmp_path)
    names = ("a.jpg", "b.png", "c.v2.webp", "d.JPEG", "e.bmp")
    assert listing.examples == tuple(Example(tmp_path / n, f"caption of {n}") for n in names)
    assert (listing.source, listing.refused) == (".txt files", ())


def test_txt_goes_before_caption_and_a_given_extension_before_both(tmp_path):
    for name, suffixes in {"a": (".txt", ".caption", ".tags"), "b": (".caption", ".tags")}.items():
        write_image(tmp_path / f"{name}.png")
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


def test_the_instance_prompt_captions_every_image_that_has_no_text(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    assert read_folder(tmp_path, "a sks cat").source == "instance prompt"
    (tmp_path / "b.txt").write_text("its own")
    listing = read_folder(tmp_path, "a sks cat")
    assert [e.caption for e in listing.examples] == ["a sks cat", "its own"]
    assert listing.source == ".txt files and instance prompt"
    with pytest.raises(ValueError, match="instance prompt is empty"):
        read_folder(tmp_path, " ")


def test_a_metadata_file_goes_before_text_files_and_the_instance_prompt(tmp_path):
    write_image(tmp_path / "a.png").with_suffix(".txt").write_text("from a.txt")
    write_image(tmp_path / "deep" / "b.png")
    write_metadata(
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


def test_a_truncated_image_is_detected_by_decoding_it(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in (".png", ".jpg", ".webp"):
        path = tmp_path / f"cut{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    write_image(tmp_path / "good.png")
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
    write_image(tmp_path / "bomb.png", size=(300, 300))
    write_image(tmp_path / "good.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    assert "decompression bomb" in refusals(tmp_path, instance_prompt="a cat")


def test_captions_that_are_missing_empty_or_not_utf8_are_refused(tmp_path):
    for name in ("a", "b", "c", "d"):
        write_image(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_text("\n")
    message = refusals(tmp_path)
    assert "b.txt is not UTF-8" in message and "c.txt is empty" in message
    assert "d.png has no caption: there is no d.txt or d.caption" in message


def test_a_huge_caption_is_not_changed(tmp_path):
    caption = "ein großer Wald, 森 🌲\n" * 20_000 + "end"
    write_image(tmp_path / "a.png").with_suffix(".txt").write_text(caption, encoding="utf-8")
    assert read_folder(tmp_path).examples[0].caption == caption


def test_images_of_a_kind_that_is_not_read_arenamed(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.gif")
    (tmp_path / "c.HEIC").write_bytes(b"from a phone")
    message = refusals(tmp_path, instance_prompt="a cat")
    assert "b.gif is not read" in message and ("c.HEIC" in message)


def test_a_folder_with_nothing_to_read_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no images in .*looked for \.jpg"):
        read_folder(tmp_path, "a cat")
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"1 images and no captions\. Set data\.instance_prompt"):
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


@pytest.mark.parametrize("captions", [0, 1])
def test_missing_captions_lead_to_the_ways_to_write_them(captions, tmp_path):
    """The usual remedy comes first: one caption for all, or captions written by a model."""
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.png")
    for name in "abc"[:captions]:
        (tmp_path / f"{name}.txt").write_text("a cat")
    with pytest.raises(ValueError) as refused:
        read_folder(tmp_path)
    message = str(refused.value)
    remedies = [message.index("data.instance_prompt"), message.index(f"dopsd caption {tmp_path}")]
    assert remedies == sorted(remedies)
    if captions:
        assert message.index("skip_bad") > remedies[1] and "Repair" not in message
    else:
        assert "skip_bad" not in message and "a.txt beside a.png" in message


def test_an_image_that_the_metadata_leaves_out_needs_a_row_and_no_captioner(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "a"})
    with pytest.raises(ValueError, match=r"add a row for each\. Or leave them out") as refused:
        read_folder(tmp_path)
    assert "dopsd caption" not in str(refused.value)
