"""Sizes, the bucket an image gets, and crops without an edge."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from dopsd.data.buckets import bucket_sizes, cropped_images, enlarged_images, nearest_bucket
from dopsd.images import cover_crop, crop_box, to_pixels


@pytest.mark.parametrize("resolution", [64, 100, 256, 512, 768, 1000, 1024, 1536])
@pytest.mark.parametrize("multiple", [8, 16, 32])
def test_buckets_have_about_the_same_area_and_fitting_sides(resolution, multiple):
    buckets = bucket_sizes(resolution, multiple)
    assert buckets[0][0] == buckets[0][1] and abs(buckets[0][0] - resolution) <= multiple / 2
    assert len(set(buckets)) == len(buckets) and {(h, w) for w, h in buckets} == set(buckets)
    for width, height in buckets:
        assert width % multiple == 0 and height % multiple == 0
        assert 0.5 <= width / height <= 2
        # rounding the short side moves the area by at most half a multiple
        assert abs(width * height / resolution**2 - 1) <= max(
            0.01, 1.1 * multiple / min(width, height)
        )


def test_a_large_resolution_reaches_wide_and_tall_images_with_few_buckets():
    buckets = bucket_sizes(1024, 16)
    assert max(w / h for w, h in buckets) > 1.8 and len(buckets) < 20
    aspects = sorted(w / h for w, h in buckets)
    assert max(b / a for a, b in pairwise(aspects)) < 1.2


def test_a_resolution_below_one_multiple_is_refused():
    with pytest.raises(ValueError, match="at least 16 pixels"):
        bucket_sizes(4, 16)


def test_images_get_the_bucket_nearest_in_shape_whatever_their_size():
    buckets = bucket_sizes(1024, 16)
    for width, height in buckets:
        assert nearest_bucket(width, height, buckets) == (width, height)
        assert nearest_bucket(width * 3, height * 3, buckets) == (width, height)
    assert nearest_bucket(4000, 3990, buckets) == (1024, 1024)
    assert nearest_bucket(9000, 20, buckets) == max(buckets, key=lambda size: size[0] / size[1])
    assert nearest_bucket(20, 9000, buckets) == min(buckets, key=lambda size: size[0] / size[1])


def test_crop_boxes_of_ten_thousand_sizes_are_inside_centred_and_as_large_as_can_be():
    rng = np.random.default_rng(0)
    buckets = bucket_sizes(1024, 16)
    for width, height in np.exp(rng.uniform(0, math.log(20_000), (10_000, 2))).astype(int).tolist():
        size = buckets[rng.integers(len(buckets))]
        left, upper, right, lower = crop_box(width, height, size)
        assert 0 <= left < right <= width and 0 <= upper < lower <= height
        assert (right - left) / (lower - upper) == pytest.approx(size[0] / size[1])
        assert right - left == pytest.approx(width) or lower - upper == pytest.approx(height)
        assert left + right == pytest.approx(width) and upper + lower == pytest.approx(height)


def test_crops_of_white_images_have_no_dark_edge():
    rng = np.random.default_rng(1)
    buckets = bucket_sizes(64, 16)
    sizes = [
        (1, 1),
        (1, 700),
        (700, 1),
        (64, 64),
        (65, 63),
        *rng.integers(1, 300, (300, 2)).tolist(),
    ]
    for width, height in sizes:
        for size in (nearest_bucket(width, height, buckets), buckets[rng.integers(len(buckets))]):
            crop = cover_crop(Image.new("RGB", (width, height), "white"), size)
            assert crop.size == size and np.asarray(crop).min() == 255


def test_a_crop_keeps_the_middle_of_the_image():
    image = Image.new("RGB", (300, 100), "red")
    image.paste((0, 255, 0), (100, 0, 200, 100))
    crop = np.asarray(cover_crop(image, (64, 64)))
    assert (crop[:, 4:-4] == (0, 255, 0)).all()  # LANCZOS rings over the nearest columns


def test_pixels_are_between_minus_one_and_one_with_channels_first():
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    image.putpixel((2, 1), (255, 0, 0))
    pixels = to_pixels(image)
    assert pixels.shape == (3, 2, 3) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    assert pixels[:, 1, 2].tolist() == [1, -1, -1]


def test_images_smaller_than_their_bucket_are_listed_with_their_factor(tmp_path):
    sizes = {"small": (32, 48), "narrow": (40, 200), "exact": (64, 64), "large": (300, 200)}
    paths = [tmp_path / f"{name}.png" for name in sizes]
    for path, size in zip(paths, sizes.values(), strict=True):
        Image.new("RGB", size).save(path)
    enlarged = enlarged_images(paths, [(64, 64)] * 4)
    assert [(e.path.stem, e.size, e.bucket, e.factor) for e in enlarged] == [
        ("small", (32, 48), (64, 64), 2.0),
        ("narrow", (40, 200), (64, 64), 1.6),
    ]
    twice = enlarged_images([paths[0], paths[2], paths[0]], [(64, 64), (64, 64), (128, 96)])
    assert [(e.path.stem, e.bucket, e.factor) for e in twice] == [("small", (128, 96), 4.0)]


def test_images_of_which_the_crop_keeps_little_are_listed(tmp_path):
    sizes = {"strip": (660, 20), "tall": (20, 100), "wide": (120, 60), "square": (64, 64)}
    paths = [tmp_path / f"{name}.png" for name in sizes]
    for path, size in zip(paths, sizes.values(), strict=True):
        Image.new("RGB", size).save(path)
    cropped = cropped_images(paths * 2, [(80, 40), (40, 80), (80, 40), (64, 64)] * 2)
    assert [(c.path.stem, round(c.kept, 3)) for c in cropped] == [("strip", 0.061), ("tall", 0.4)]
