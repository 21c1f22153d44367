"""Images: which formats are read, open, crop, resize, tensors to PIL and back, image grids."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

Size = tuple[int, int]

# File extensions that are read, and Pillow's names of their formats. No other format is tried:
# Pillow hands PostScript, whatever the file is called, to Ghostscript.
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
# Image extensions that are not read, and what to do; a folder of them must not shrink unnoticed.
CONVERT = "convert it to JPEG or PNG"
NOT_READ: dict[str, str] = dict.fromkeys((".gif", ".jxl", ".tif", ".tiff"), CONVERT)

if features.check("avif"):
    FORMATS[".avif"] = "AVIF"
else:
    NOT_READ[".avif"] = f"pip install --upgrade pillow, or {CONVERT}"

if find_spec("pillow_heif"):
    import pillow_heif  # pyright: ignore[reportMissingImports]

    pillow_heif.register_heif_opener()
    FORMATS |= {".heic": "HEIF", ".heif": "HEIF"}
else:
    NOT_READ |= dict.fromkeys((".heic", ".heif"), f"pip install 'dopsd[heif]', or {CONVERT}")

FORMAT_NAMES = tuple(dict.fromkeys(FORMATS.values()))


def open_image(path: Path) -> Image.Image:
    """The image as it is displayed, in RGB: EXIF rotation applied, transparency on white, 16-bit
    grey as 8-bit.

    Raises ValueError for a file that is no image of a known format, cannot be decoded, or is so
    large that Pillow takes it for a decompression bomb.
    """
    try:
        with Image.open(path, formats=FORMAT_NAMES) as image:
            return _as_rgb(ImageOps.exif_transpose(image))
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


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip instead of scale
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


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
