"""What is read in another way than someone may expect is said."""

import pytest
from image_folders import write_image, write_metadata
from PIL import Image

from dopsd.data.folder import read_folder
from dopsd.data.sources import Source, read_sources


def test_images_in_subfolders_are_counted(tmp_path):
    write_image(tmp_path / "a.png")
    for name in ("sub/b.png", "sub/deep/c.jpg", "other/d.gif", ".hidden/e.png", "sub/.f.png"):
        write_image(tmp_path / name)
    (note,) = read_sources([Source(tmp_path, "a cat")]).notes
    assert note.startswith("3 images in subfolders of") and "(first: other/d.gif)" in note
    both = [Source(tmp_path, "a cat"), Source(tmp_path / "sub", "a dog")]
    first, second = read_sources(both).notes
    assert "1 images" in first and "other/d.gif" in first, "the other source is read"
    assert "1 images" in second and "deep/c.jpg" in second


def test_images_in_subfolders_that_rows_name_are_read_and_not_counted(tmp_path):
    write_image(tmp_path / "sub" / "a.png")
    write_image(tmp_path / "sub" / "b.png")
    write_metadata(tmp_path, {"file_name": "sub/a.png", "text": "a"})
    (note,) = read_sources([Source(tmp_path)]).notes
    assert note.startswith("1 images") and "sub/b.png" in note


def test_a_folder_whose_images_are_all_in_subfolders_is_refused_with_their_number(tmp_path):
    write_image(tmp_path / "10_zib" / "a.png")
    with pytest.raises(ValueError, match=r"not in its subfolders \(1 lie there, first: 10_zib/a"):
        read_folder(tmp_path, "a cat")


def test_a_caption_file_of_several_lines_is_one_caption_and_that_is_said(tmp_path):
    write_image(tmp_path / "a.png").with_suffix(".txt").write_text("a cat\n\na sitting cat\r\n")
    write_image(tmp_path / "b.png").with_suffix(".txt").write_text("a dog\n")
    listing = read_folder(tmp_path)
    assert listing.examples[0].caption == "a cat\n\na sitting cat"
    (note,) = listing.notes
    assert "1 caption files hold several lines (first: a.txt)" in note and "caption_lines" in note


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\u2028"])
def test_with_caption_lines_each_a_line_is_a_caption(end, tmp_path):
    text = end.join(["a cat", " a sitting cat ", "", "[trigger] sits"])
    write_image(tmp_path / "a.png").with_suffix(".txt").write_text(text, newline="")
    (example,) = read_sources([Source(tmp_path, trigger="zib", caption_lines="each")]).examples
    assert (example.caption, *example.also) == ("zib, a cat", "zib, a sitting cat", "zib sits")
    assert read_folder(tmp_path, caption_lines="each").notes == ()


def test_text_files_that_belong_to_no_image_are_counted(tmp_path):
    write_image(tmp_path / "a.png")
    for name in ("a.txt", "a.png.txt", "A.txt"):
        (tmp_path / name).write_text("a cat")
    (note,) = read_folder(tmp_path, "an instance").notes
    assert note == "2 text files belong to no image (first: A.txt)."


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_of_an_animation_the_first_frame_is_read_and_that_is_said(suffix, tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    write_image(tmp_path / f"still{suffix}")
    (note,) = read_folder(tmp_path, "a cat").notes
    assert f"1 images hold several frames (first: a{suffix}, 3)" in note
