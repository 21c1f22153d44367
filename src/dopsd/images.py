"""Images: which formats are read, open, crop, resize, tensors to PIL and back, image grids."""

import io
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features
from torch import Tensor

log = logging.getLogger(__name__)

Size = tuple[int, int]

# File extensions that are read, and Pillow's names of their formats. No other format is tried:
# Pillow hands PostScript, whatever the file is called, to Ghostscript.
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".pjpeg", ".pjp")
FORMATS = dict.fromkeys(JPEG_EXTENSIONS, "JPEG")
FORMATS |= {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".dib": "BMP"}
# Image extensions that are not read, and what to do; a folder of them must not shrink unnoticed.
CONVERT = "convert it to JPEG or PNG"
UNREAD_EXTENSIONS = """
    .apng .gif .tif .tiff .jxl .jp2 .j2k .jpf .jpx .jpc .j2c .tga .icb .vda .vst .ppm .pgm .pbm .pnm
    .pam .pfm .psd .xcf .kra .svg .eps .exr .hdr .ico .icns .cur .dds .pcx .qoi .sgi .rgb .wmf .emf
    .jls .jxr .wdp .fits .xbm .xpm .dng .cr2 .cr3 .nef .nrw .arw .orf .raf .rw2 .pef .srw .x3f
"""
NOT_READ: dict[str, str] = dict.fromkeys(UNREAD_EXTENSIONS.split(), CONVERT)

if features.check("avif"):
    FORMATS[".avif"] = "AVIF"
else:
    NOT_READ[".avif"] = f"pip install --upgrade pillow, or {CONVERT}"

HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
if find_spec("pillow_heif"):
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()
    FORMATS |= dict.fromkeys(HEIF_EXTENSIONS, "HEIF")
else:
    NOT_READ |= dict.fromkeys(HEIF_EXTENSIONS, f"pip install 'dopsd[heif]', or {CONVERT}")

ANIMATED = ("PNG", "WEBP", "AVIF", "HEIF")  # formats whose files may hold several frames
# Pillow modes whose colours may have a profile of their own; all others are read as RGB.
COLOUR_SPACES = {"L": "L", "LA": "L", "CMYK": "CMYK"}
FORMAT_NAMES = tuple(dict.fromkeys(FORMATS.values()))

# How files of image formats begin: first bytes, at which offset, and the usual extension.
SIGNATURES = (
    (b"\xff\xd8\xff", 0, ".jpg"),
    (b"\x89PNG\r\n\x1a\n", 0, ".png"),
    (b"WEBP", 8, ".webp"),
    (b"GIF8", 0, ".gif"),
    (b"II*\0", 0, ".tif"),
    (b"MM\0*", 0, ".tif"),
    (b"ftypavi", 4, ".avif"),  # avif, avis
    (b"ftyphe", 4, ".heic"),  # heic, heix, heim, ...
    (b"ftypmif1", 4, ".heic"),
    (b"\0\0\0\x0cJXL ", 0, ".jxl"),
    (b"\0\0\0\x0cjP  ", 0, ".jp2"),
    (b"8BPS", 0, ".psd"),
)


def open_image(path: Path) -> Image.Image:
    """The image as it is displayed, in sRGB: EXIF rotation and colour profile applied, transparency
    on white, 16-bit grey as 8-bit. Of several frames, the first.

    Raises ValueError for a file that is no image of a known format, cannot be decoded, or is so
    large that Pillow takes it for a decompression bomb.
    """
    return _as_rgb(_upright(path), "white", path)


def open_mask(path: Path) -> Image.Image:
    """A mask in 8-bit grey, upright: white where an image is trained on, transparency as black.
    Raises ValueError as `open_image` does."""
    return _as_rgb(_upright(path), "black", None).convert("L")


def open_alpha(path: Path) -> Image.Image | None:
    """The transparency of an image, upright, in 8-bit grey with 255 = opaque; None for an image
    without. Raises ValueError as `open_image` does."""
    image = _upright(path)
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def frame_count(path: Path) -> int:
    """Frames of a file; 1 for a JPEG, whatever previews it holds (MPO)."""
    with Image.open(path, formats=FORMAT_NAMES) as image:
        return image.n_frames if image.format in ANIMATED else 1  # type: ignore[attr-defined]


def kind_of_image(path: Path) -> str | None:
    """The usual extension of a file's format where its first bytes are an image's, else None; also
    None for a file that may not be read."""
    if not os.access(path, os.R_OK):
        return None
    with path.open("rb") as file:
        start = file.read(16)
    return next((e for mark, at, e in SIGNATURES if start[at : at + len(mark)] == mark), None)


def _upright(path: Path) -> Image.Image:
    """The decoded file with its EXIF rotation applied."""
    try:
        with Image.open(path, formats=FORMAT_NAMES) as image:
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} is not a {' / '.join(FORMAT_NAMES)} image, or it is broken."
        ) from error
    except Exception as error:  # on broken files Pillow raises anything, even struct.error
        raise ValueError(
            f"{path} cannot be decoded ({str(error) or type(error).__name__})."
        ) from error


def image_size(path: Path) -> Size:
    """(width, height) in pixels of what `open_image` would return, from the file's header."""
    with Image.open(path, formats=FORMAT_NAMES) as image:
        width, height = image.size
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)  # quarter turns


def _as_rgb(image: Image.Image, background: str, profile_of: Path | None) -> Image.Image:
    """In RGB on a background. profile_of: the file whose colour profile is applied; None: no
    profile is, as the numbers of a mask are no colours."""
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip instead of scale
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    rgb = _in_srgb(image, profile_of) if profile_of else image.convert("RGB")
    if image.has_transparency_data:
        rgb.putalpha(image.convert("RGBA").getchannel("A"))
        canvas = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(canvas, rgb).convert("RGB")
    return rgb


def _in_srgb(image: Image.Image, path: Path) -> Image.Image:
    """Without transparency, its colours converted from its ICC profile to sRGB. A profile that
    cannot be used is left out with a warning, as browsers do."""
    content, mode = image.info.get("icc_profile"), COLOUR_SPACES.get(image.mode, "RGB")
    opaque = image.convert(mode)
    if not content:
        return opaque.convert("RGB")
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(content))
        if ImageCms.getProfileDescription(profile).startswith("sRGB"):
            return opaque.convert("RGB")
        if profile.profile.xcolor_space.strip() == "RGB":  # type: ignore[attr-defined]
            opaque = opaque.convert("RGB")
        converted = ImageCms.profileToProfile(
            opaque, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        log.warning(
            "%s has a colour profile that cannot be used (%s): its colours are read as sRGB.",
            path.name,
            error,
        )
        return opaque.convert("RGB")
    assert converted is not None
    return converted


def crop_box(width: int, height: int, size: Size) -> tuple[float, float, float, float]:
    """The largest centred rectangle of the aspect ratio of `size` in an image of width x height:
    left, upper, right, lower in pixels."""
    crop_width = min(float(width), height * size[0] / size[1])
    crop_height = min(float(height), width * size[1] / size[0])
    left, upper = (width - crop_width) / 2, (height - crop_height) / 2
    return left, upper, (width + crop_width) / 2, (height + crop_height) / 2


def cover_crop(image: Image.Image, size: Size) -> Image.Image:
    """The image scaled until it covers `size` and cropped around its centre, to exactly `size`.

    Crop and scale are one resampling: a strip of 20 x 9000 pixels that is scaled first and cropped
    later would not fit in memory.
    """
    return image.resize(size, Image.Resampling.LANCZOS, box=crop_box(*image.size, size))


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as float32 [3, H, W] in [-1, 1]."""
    assert image.mode == "RGB", f"a {image.mode} image; open_image gives RGB"
    values = np.array(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def as_bytes(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in about [0, 1] as uint8 [B, H, W, 3] on the CPU."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 [B, H, W, 3] as PIL images."""
    return [Image.fromarray(image.numpy()) for image in images]


def grid(rows: Sequence[Sequence[Tensor]], gap: int = 2) -> Image.Image:
    """Rows of images (uint8 [H, W, 3] each) as one image on white. Columns are as wide as their
    widest image, rows as high as the highest of all. gap: pixels between images."""
    height = max(image.shape[0] for row in rows for image in row)
    count = max(len(row) for row in rows)
    widths = [
        max(row[column].shape[1] for row in rows if column < len(row)) for column in range(count)
    ]
    lefts = [sum(widths[:column]) + column * gap for column in range(count)]
    canvas = np.full((len(rows) * (height + gap) - gap, lefts[-1] + widths[-1], 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for left, image in zip(lefts, row, strict=False):
            top = y * (height + gap)
            canvas[top : top + image.shape[0], left : left + image.shape[1]] = image.numpy()
    return Image.fromarray(canvas)
