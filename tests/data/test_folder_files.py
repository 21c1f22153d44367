"""No file of a folder is left out in silence, and names are found as people write them."""

import os
import unicodedata

import pytest
from image_folders import refusals, write_image, write_metadata
from PIL import Image

from dopsd.data.folder import read_folder
from dopsd.data.folder_files import file_in, images_in

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("extension", [".jfif", ".jpe", ".JIF", ".pjpeg", ".pjp", ".dib"])
def test_rarer_extensions_of_formats_that_are_read_are_read(extension, tmp_path):
    Image.new("RGB", (8, 8), "red").save(
        tmp_path / f"a{extension}", "BMP" if extension == ".dib" else "JPEG"
    )
    (example,) = read_folder(tmp_path, "a cat").examples
    assert example.path.name == f"a{extension}"


@pytest.mark.parametrize(
    "extension", [".jp2", ".tga", ".ppm", ".apng", ".gif", ".TIFF", ".psd", ".svg", ".cr2", ".exr"]
)
def test_images_of_other_formats_are_named(extension, tmp_path):
    write_image(tmp_path / "good.png")
    (tmp_path / f"other{extension}").write_bytes(b"of some software")
    assert f"other{extension} is not read: convert it" in refusals(
        tmp_path, instance_prompt="a cat"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("photo", "JPEG"), ("photo.JPG_large", "JPEG"), ("photo.png~", "PNG"), ("1.5", "WEBP")],
)
def test_a_file_that_begins_like_an_image_is_named_whatever_its_name(name, kind, tmp_path):
    write_image(tmp_path / "good.png")
    Image.new("RGB", (8, 8)).save(tmp_path / name, kind)
    assert f"{name} is not read: it begins like a ." in refusals(tmp_path, instance_prompt="a cat")


def test_files_that_are_no_images_are_left_alone(tmp_path):
    write_image(tmp_path / "good.png").with_suffix(".txt").write_text("a cat")
    for name in ("notes", "a.npz", "list.json", "empty", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"something else")
    os.mkfifo(tmp_path / "pipe")
    assert [path.name for path in images_in(tmp_path)] == ["good.png"]
    assert read_folder(tmp_path).notes == ()


@pytest.mark.parametrize(
    ("on_disk", "named"), [(DECOMPOSED, COMPOSED), (COMPOSED, DECOMPOSED)], ids=["NFD", "NFC"]
)
def test_names_are_equal_in_either_form_of_unicode(on_disk, named, tmp_path):
    beside, in_rows = tmp_path / "beside", tmp_path / on_disk / "rows"
    write_image(beside / f"{on_disk}.png")
    (beside / f"{named}.txt").write_text("a cup")
    assert read_folder(beside, "an instance").examples[0].caption == "a cup"
    write_image(in_rows / on_disk / f"{on_disk}.png")
    write_metadata(in_rows, {"file_name": f"{named}/{named}.png", "text": "a cup"})
    (example,) = read_folder(in_rows).examples
    assert example.path == in_rows / on_disk / f"{on_disk}.png"


@pytest.mark.parametrize("extension", [".TXT", ".Txt", ".CAPTION"])
def test_captions_are_found_whatever_the_case_of_their_extension(extension, tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / f"a{extension}").write_text("its own")
    assert read_folder(tmp_path, "a cat").examples[0].caption == "its own"


def test_rows_may_name_images_by_absolute_paths_into_the_folder_and_with_backslashes(tmp_path):
    path = write_image(tmp_path / "set" / "img" / "0.png")
    os.symlink(tmp_path / "set", tmp_path / "link")
    for folder in (tmp_path / "set", tmp_path / "link"):
        for name in (str(path), "img\\0.png", ".\\img\\0.png", "./img//0.png"):
            assert file_in(folder, name) == folder / "img" / "0.png"
        for name in ("..\\x.png", "img/../../x.png", str(tmp_path / "x.png"), "img", "C:\\0.png"):
            assert file_in(folder, name) is None
    write_metadata(tmp_path / "set", {"file_name": "img\\0.png", "text": "a cat"})
    assert len(read_folder(tmp_path / "set").examples) == 1


def test_a_name_with_a_backslash_in_it_is_found_as_it_is(tmp_path):
    path = write_image(tmp_path / "a\\b.png")
    assert file_in(tmp_path, "a\\b.png") == path
