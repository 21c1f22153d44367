"""FID and KID against the closed form for normal distributions and against plain sums."""

import numpy as np
import pytest
import torch

from dopsd.evaluation.metrics.fid import fid, kid


def normal(count: int, mean: np.ndarray, root: np.ndarray, seed: int) -> torch.Tensor:
    """Features whose sample mean and covariance are exactly `mean` and root root'."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, len(mean)))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T)).T)
    return torch.from_numpy(z @ root.T + mean)


def root_of(matrix: np.ndarray) -> np.ndarray:
    """The square root of a symmetric matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T


def test_fid_is_the_closed_form_for_normal_distributions():
    rng = np.random.default_rng(0)
    (a, b), mean, other = rng.normal(size=(2, 6, 6)), rng.normal(size=6), rng.normal(size=6)
    one, two = a @ a.T, b @ b.T
    shared = root_of(root_of(one) @ two @ root_of(one))
    wanted = np.square(mean - other).sum() + np.trace(one + two - 2 * shared)
    assert fid(normal(50, mean, a, 1), normal(70, other, b, 2)) == pytest.approx(wanted, rel=1e-9)


def test_fid_where_covariances_commute_is_a_sum_of_squares():
    s, t = np.array([1.0, 2.0, 3.0]), np.array([4.0, 0.5, 3.0])
    distance = fid(
        normal(40, np.zeros(3), np.diag(s), 1), normal(40, np.array([1.0, 0, 0]), np.diag(t), 2)
    )
    assert distance == pytest.approx(1 + np.square(s - t).sum(), rel=1e-9)


def test_fid_of_fewer_images_than_dimensions_is_finite_and_zero_for_itself():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 200)))
    other = torch.from_numpy(np.random.default_rng(1).normal(size=(9, 200)))
    assert fid(features, features) == pytest.approx(0, abs=1e-9)
    one, two = (np.cov(each.T.numpy()) for each in (features, other))
    shared = np.sqrt(np.maximum(np.linalg.eigvals(one @ two).real, 0)).sum()
    gap = (features.mean(0) - other.mean(0)).square().sum().item()
    assert fid(features, other) == pytest.approx(
        gap + np.trace(one) + np.trace(two) - 2 * shared, rel=1e-6
    )


def kid_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kid_of_sets_within_one_subset_is_the_sum_written_out():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)), rng.normal(size=(9, 5)) + 0.5
    value, spread = kid(torch.from_numpy(x), torch.from_numpy(y))
    assert value == pytest.approx(kid_by_hand(x, y), rel=1e-9) and spread == 0


def test_kid_is_unbiased_and_its_subsets_spread():
    rng = np.random.default_rng(0)
    same = [
        kid(torch.from_numpy(rng.normal(size=(20, 4))), torch.from_numpy(rng.normal(size=(25, 4))))[
            0
        ]
        for _ in range(60)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    value, spread = kid(
        torch.from_numpy(rng.normal(size=(20, 4))), torch.from_numpy(rng.normal(size=(60, 4)) + 1)
    )
    assert value > 0 and spread > 0


@pytest.mark.parametrize("metric", [fid, kid])
def test_a_single_image_is_refused(metric):
    with pytest.raises(ValueError, match="each needs at least 2"):
        metric(torch.zeros(1, 4), torch.zeros(5, 4))
