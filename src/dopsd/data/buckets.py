"""Image sizes for training: which there are, which one an image gets, which images are enlarged.

Sizes are (width, height) in pixels, as in Pillow. Opening images is left to `images`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dopsd.images import Size, crop_box, image_size

MAX_ASPECT = 2.0  # of the widest bucket; wider images lose their ends
# Neighbouring buckets differ by about resolution / STEPS pixels, so a crop loses a few percent.
STEPS = 16
LITTLE = 0.6  # share of an image's area; images of up to 3:1 keep more


def bucket_sizes(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Sizes of about resolution^2 pixels, sides multiples of `multiple`, from 1:2 to 2:1.

    The square comes first, then pairs of a wide and a tall size. Raises ValueError where no square
    fits.
    """
    square = round(resolution / multiple) * multiple
    if square < multiple:
        raise ValueError(
            f"data.resolution is {resolution}; this model needs at least {multiple} pixels."
        )
    stride = max(1, round(resolution / STEPS / multiple)) * multiple
    longest = math.ceil(resolution * math.sqrt(MAX_ASPECT))
    sizes = [(square, square)]
    for long in range(square + stride, longest + multiple, stride):
        short = round(resolution**2 / long / multiple) * multiple
        if short and long <= MAX_ASPECT * short:
            sizes += [(long, short), (short, long)]
    return tuple(sizes)


def nearest_bucket(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest on a log scale, so that wide and tall images are
    treated alike."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda size: abs(aspect - math.log(size[0] / size[1])))


@dataclass(frozen=True)
class EnlargedImage:
    """An image that is smaller than the size it is trained at. size, bucket: in pixels; factor:
    by which it is enlarged to cover the bucket."""

    path: Path
    size: Size
    bucket: Size
    factor: float


@dataclass(frozen=True)
class CroppedImage:
    """An image of which the crop to its bucket leaves little. size, bucket: in pixels; kept: share
    of its area."""

    path: Path
    size: Size
    bucket: Size
    kept: float


def cropped_images(paths: Sequence[Path], buckets: Sequence[Size]) -> list[CroppedImage]:
    """The images of which less than LITTLE of the area is trained on, the most cropped first, each
    once. buckets: of each path. Reads the files' headers."""
    cropped: dict[Path, CroppedImage] = {}
    for path, bucket in zip(paths, buckets, strict=True):
        if path in cropped:
            continue
        width, height = image_size(path)
        left, upper, right, lower = crop_box(width, height, bucket)
        kept = (right - left) * (lower - upper) / (width * height)
        if kept < LITTLE:
            cropped[path] = CroppedImage(path, (width, height), bucket, kept)
    return sorted(cropped.values(), key=lambda image: image.kept)


def enlarged_images(paths: Sequence[Path], buckets: Sequence[Size]) -> list[EnlargedImage]:
    """The images that are enlarged to cover their bucket, the most enlarged first, each once at
    its largest bucket. buckets: of each path. Reads the files' headers."""
    enlarged: dict[Path, EnlargedImage] = {}
    sizes = {path: image_size(path) for path in dict.fromkeys(paths)}
    for path, bucket in zip(paths, buckets, strict=True):
        width, height = sizes[path]
        factor = max(bucket[0] / width, bucket[1] / height)
        if factor > 1 and (path not in enlarged or factor > enlarged[path].factor):
            enlarged[path] = EnlargedImage(path, (width, height), bucket, factor)
    return sorted(enlarged.values(), key=lambda image: image.factor, reverse=True)
