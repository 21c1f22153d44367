"""Images: open, crop, resize, tensors to PIL and back, image grids."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Size = tuple[int, int]


def crop_box(width: int, height: int, size: Size) -> tuple[float, float, float, float]:
    """The largest centred rectangle with the aspect of `size` in an image: left, upper, right,
    lower in pixels."""
    wide = min(float(width), height * size[0] / size[1])
    high = min(float(height), width * size[1] / size[0])
    return (width - wide) / 2, (height - high) / 2, (width + wide) / 2, (height + high) / 2


def cover_crop(image: Image.Image, size: Size) -> Image.Image:
    """The image scaled until it covers `size` and cropped around its centre; exactly `size`, no
    edge added.

    Crop and scale are one resampling: a 20 x 9000 strip scaled first and cropped later would not
    fit in memory.
    """
    return image.resize(size, Image.Resampling.LANCZOS, box=crop_box(*image.size, size))


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as float32 [3, H, W] in [-1, 1]."""
    assert image.mode == "RGB", f"a {image.mode} picture; folder.open_picture gives RGB"
    values = np.array(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}


OPENED = tuple(
    dict.fromkeys(FORMATS.values())
)  # no others: Pillow hands a renamed PostScript file to Ghostscript


def open_image(path: Path) -> Image.Image:
    """The image as one sees it, in RGB: EXIF rotation applied, transparency on white, 16-bit grey
    as 8-bit.

    Raises ValueError for an image that cannot be decoded, or that is too large to be an honest one.
    """
    try:
        with Image.open(path, formats=OPENED) as image:
            return _as_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} holds no {' / '.join(OPENED)} picture, or a broken one."
        ) from error
    except (
        Exception
    ) as error:  # on a broken file Pillow raises anything, from SyntaxError to struct.error
        raise ValueError(
            f"{path} cannot be decoded ({str(error) or type(error).__name__})."
        ) from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of what `open_picture` would return, from the file's header."""
    with Image.open(path, formats=OPENED) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # the quarter turns
    return (height, width) if turned else (width, height)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip instead of scale
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def as_bytes(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in about [0, 1] as uint8 [B, H, W, 3] on the CPU."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 [B, H, W, 3] as PIL images."""
    return [Image.fromarray(image.numpy()) for image in images]


def grid(rows: Sequence[Sequence[Tensor]], gap: int = 2) -> Image.Image:
    """Rows of images (uint8 [H, W, 3] each) as one image on white; a column is as wide as its
    widest."""
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
