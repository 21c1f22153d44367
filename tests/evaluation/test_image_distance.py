"""The distance that preflight is based on, and its interval, against plain arithmetic."""

import numpy as np
import pytest

from dopsd.evaluation.image_distance import distances, nearer


@pytest.mark.parametrize("side", [48, 64])
def test_small_images_are_compared_pixel_by_pixel(side):
    images = np.random.default_rng(0).integers(256, size=(4, side, side, 3)).astype(np.uint8)
    wanted = [
        np.linalg.norm((p.astype(float) - images[0]).ravel()) / np.sqrt(p.size) / 255
        for p in images
    ]
    np.testing.assert_allclose(distances(images, images[0]), wanted, atol=1e-12)


def test_large_images_are_compared_cell_by_cell_so_grain_does_not_count():
    rng = np.random.default_rng(1)
    target = np.repeat(np.repeat(rng.integers(30, 226, size=(32, 64, 3)), 8, 0), 8, 1).astype(
        np.uint8
    )
    checks = np.where(np.indices(target.shape[:2]).sum(0) % 2, 30, -30)[..., None]
    assert distances((target + checks).astype(np.uint8)[None], target)[0] < 1e-9
    shifted = target.copy()
    shifted[:, :256] += 20  # a broad change counts in full: half of the cells, 20 levels
    assert distances(shifted[None], target)[0] == pytest.approx(20 / 255 / np.sqrt(2))


def test_the_share_is_one_minus_the_ratio_and_sure_where_nothing_varies():
    share = nearer(np.full((3, 4), 0.2), np.full((3, 4), 0.15))
    assert (share.value, share.low, share.high) == pytest.approx((0.25, 0.25, 0.25))
    assert nearer(np.full((1, 4), 0.2), np.full((1, 4), 0.22)).high == pytest.approx(-0.1)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    """The teacher is a fifth closer; distances vary by noise and, more, by a common part."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(200):
        common = rng.gamma(20, 0.01, size=(1, 40))
        student, teacher = (
            factor * common + rng.normal(0, 0.01, size=(1, 40)) for factor in (1.0, 0.8)
        )
        share = nearer(student, teacher)
        covered += share.low <= 0.2 <= share.high
    assert 0.90 <= covered / 200 <= 0.99
