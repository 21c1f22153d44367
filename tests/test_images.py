"""Images open as they are displayed, whatever their format, rotation and transparency."""

import struct
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from dopsd.images import FORMATS, NOT_READ, cover_crop, image_size, open_image


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_the_image_and_to_its_size(tmp_path, suffix, orientation):
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
    """The left half is opaque black, the right half transparent (P, RGB, L: by a colour)."""
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


def test_other_kinds_of_image_become_rgb(tmp_path):
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
    with pytest.raises(ValueError, match="is not a JPEG"):
        open_image(tmp_path / "a.png")


def test_avif_and_heic_are_read_where_pillow_can(tmp_path):
    formats = {".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF"}
    readable = [name for name in formats if name in FORMATS]
    assert (".avif" in readable) == features.check("avif")
    assert (".heic" in readable) == (find_spec("pillow_heif") is not None)
    for suffix in readable:
        path = tmp_path / f"a{suffix}"
        Image.new("RGB", (48, 32), (220, 40, 30)).save(path, formats[suffix])
        image = open_image(path)
        assert image.size == image_size(path) == (48, 32)
        assert np.abs(np.asarray(image).astype(int) - (220, 40, 30)).max() <= 12


@pytest.mark.parametrize("missing", ["avif", "heif"])
def test_a_format_without_its_reader_names_the_command_that_installs_it(missing, tmp_path):
    """In a process of its own, where Pillow has no AVIF and pillow_heif is not installed."""
    commands = {"avif": "pip install --upgrade pillow", "heif": "pip install 'dopsd[heif]'"}
    path = tmp_path / f"a.{missing}"
    path.write_bytes(b"an image")
    script = (
        "import importlib.util, sys; from pathlib import Path; from PIL import features\n"
        "features.check = lambda name: False; importlib.util.find_spec = lambda name: None\n"
        "from dopsd.data.folder import read_folder\n"
        "try: read_folder(Path(sys.argv[1]), 'a cat')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert f"a.{missing} is not read: {commands[missing]}, or convert it" in done.stdout


def test_no_extension_is_read_and_refused():
    assert not FORMATS.keys() & NOT_READ.keys()


def test_a_crop_keeps_the_centre_and_fills_the_size_exactly():
    """Three stripes of a third each: a crop to the middle third holds the middle stripe alone."""
    stripes = Image.new("RGB", (90, 30), "white")
    stripes.paste((0, 0, 255), (30, 0, 60, 30))
    crop = cover_crop(stripes, (64, 64))
    assert crop.size == (64, 64)
    assert (np.asarray(crop)[:, 8:-8] == (0, 0, 255)).all()


def matrix_profile(red, green, blue, gamma: float) -> bytes:
    """An ICC profile (version 2) of three primaries in XYZ (D50) and a gamma."""

    def fixed(number: float) -> bytes:
        return struct.pack(">i", round(number * 65536))

    name = b"a test profile\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642) + fixed(1.0) + fixed(0.8249),
    }
    for letter, primary in zip((b"r", b"g", b"b"), (red, green, blue), strict=True):
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(fixed, primary))
        tags[letter + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    header = bytearray(128)
    header[8:12], header[12:24] = struct.pack(">I", 0x02100000), b"mntrRGB XYZ "
    header[36:40], header[68:80] = b"acsp", fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    header[0:4] = struct.pack(">I", start + len(body))
    return bytes(header) + struct.pack(">I", len(tags)) + table + body


# Columns of the matrices from linear RGB to XYZ (D50), by Lindbloom: Adobe RGB (1998) and sRGB.
ADOBE = (
    (0.6097559, 0.3111242, 0.0194811),
    (0.2052401, 0.6256560, 0.0608902),
    (0.1492240, 0.0632197, 0.7448387),
)
SRGB = (
    (0.4360747, 0.2225045, 0.0139322),
    (0.3850649, 0.7168786, 0.0971045),
    (0.1430804, 0.0606169, 0.7141733),
)


def adobe_in_srgb(colour) -> np.ndarray:
    """The closed form: gamma 563/256, two matrices, and sRGB's curve."""
    linear = (np.array(colour) / 255) ** (563 / 256)
    linear = np.linalg.inv(np.array(SRGB).T) @ np.array(ADOBE).T @ linear
    linear = linear.clip(0, 1)
    curve = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return (curve * 255).round()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_a_profile_become_srgb(suffix, mode, tmp_path):
    if suffix not in FORMATS or (mode, suffix) == ("RGBA", ".jpg"):
        pytest.skip("no such file")
    profile, colour = matrix_profile(*ADOBE, 563 / 256), (100, 150, 120)
    image = Image.new("RGB", (32, 32), colour)
    if mode == "RGBA":
        image.putalpha(255)
    options = (
        {"lossless": True} if suffix == ".webp" else {"quality": 100} if suffix != ".png" else {}
    )
    image.save(tmp_path / f"a{suffix}", icc_profile=profile, **options)
    seen = np.array(open_image(tmp_path / f"a{suffix}").getpixel((16, 16)))
    assert np.abs(seen - adobe_in_srgb(colour)).max() <= 3
    assert np.abs(np.array(colour) - adobe_in_srgb(colour)).max() > 10, "unlike the raw numbers"


def test_an_srgb_profile_leaves_every_number_as_it_is(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), noise)


@pytest.mark.parametrize("profile", [b"damaged", matrix_profile(*ADOBE, 2.2)[:150], b"\0" * 200])
def test_a_damaged_profile_is_left_out_and_that_is_said(profile, tmp_path, caplog):
    Image.new("RGB", (8, 8), (100, 150, 120)).save(tmp_path / "a.png", icc_profile=profile)
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (100, 150, 120)
    assert "a.png has a colour profile that cannot be used" in caplog.text


def test_grey_and_palette_images_with_a_profile_of_rgb_are_converted(tmp_path):
    profile = matrix_profile(*ADOBE, 1.0)
    for mode in ("L", "P"):
        path = tmp_path / f"{mode}.png"
        grey = Image.new("RGB", (8, 8), (128, 128, 128))
        grey.convert(mode, palette=Image.Palette.ADAPTIVE).save(path, icc_profile=profile)
        # linear grey 0.502 is 188 in sRGB's curve
        assert np.abs(np.array(open_image(path).getpixel((0, 0))) - 188).max() <= 2
