"""Image sizes for training: which sizes there are, which one an image gets, and the crop that fills
it.

Sizes are (width, height) in pixels, as in Pillow. Opening images is left to `folder`.
"""

import math
from collections.abc import Sequence

from dopsd.images import Size

WIDEST = 2.0  # aspect of the widest bucket; wider images lose their ends
# Neighbouring buckets differ by about resolution / STEPS pixels, so a crop loses a few percent
STEPS = 16


def bucket_sizes(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Sizes of about resolution^2 pixels with sides that are multiples of `multiple`, from 1:2 to
    2:1.

    The square comes first, then pairs of a wide and a tall size. Raises ValueError where no square
    fits.
    """
    square = round(resolution / multiple) * multiple
    if square < multiple:
        raise ValueError(
            f"data.resolution is {resolution}; this model needs at least {multiple} pixels."
        )
    stride = max(1, round(resolution / STEPS / multiple)) * multiple
    sizes = [(square, square)]
    for long in range(
        square + stride, math.ceil(resolution * math.sqrt(WIDEST)) + multiple, stride
    ):
        short = round(resolution**2 / long / multiple) * multiple
        if short and long <= WIDEST * short:
            sizes += [(long, short), (short, long)]
    return tuple(sizes)


def nearest_bucket(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest on a log scale, so that wide and tall images are
    treated alike."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda size: abs(aspect - math.log(size[0] / size[1])))
