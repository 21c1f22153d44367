"""FID and KID: how far two sets of images are apart, from their features. In float64; no image is
seen here."""

import torch
from torch import Tensor

SUBSETS, SUBSET = (
    100,
    1000,
)  # of KID, and features in each, as its authors took them (arXiv:1801.01401)


def fid(ours: Tensor, theirs: Tensor) -> float:
    """Fréchet distance of two normal distributions fitted to features [n, D] and [m, D]
    (arXiv:1706.08500):
    |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)), covariances with n - 1.

    With C = R'R from a triangular R, the trace of the root is the sum of singular values of R R2':
    no matrix root is taken, and features fewer than D make no trouble. Biased upward by few images:
    compare at equal numbers only.
    """
    (mean, root), (other_mean, other_root) = _gaussian(ours), _gaussian(theirs)
    shared = torch.linalg.svdvals(root @ other_root.T).sum()
    spread = root.square().sum() + other_root.square().sum() - 2 * shared
    return float((mean - other_mean).square().sum() + spread)


def kid(ours: Tensor, theirs: Tensor, seed: int = 0) -> tuple[float, float]:
    """Unbiased squared MMD under the kernel (x.y / D + 1)^3 of features [n, D] and [m, D]: mean and
    standard deviation over subsets drawn without replacement. Not biased by the number of images;
    below 0 by chance."""
    _refuse_few(ours, theirs)
    count = min(SUBSET, len(ours), len(theirs))
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(SUBSETS if count < max(len(ours), len(theirs)) else 1):
        x, y = (
            each.double()[torch.randperm(len(each), generator=rng)[:count]]
            for each in (ours, theirs)
        )
        within = sum(_kernel(z, z).sum() - _kernel(z, z).diagonal().sum() for z in (x, y)) / (
            count * (count - 1)
        )
        found.append(within - 2 * _kernel(x, y).mean())
    values = torch.stack(found)
    return float(values.mean()), float(values.std(correction=0))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D], and a matrix [min(n, D), D] whose square is the covariance."""
    _refuse_few(features)
    wide = features.double()
    mean = wide.mean(0)
    return mean, torch.linalg.qr((wide - mean) / (len(wide) - 1) ** 0.5, mode="r").R


def _refuse_few(*sets: Tensor) -> None:
    if min(map(len, sets)) < 2:
        raise ValueError("FID and KID compare sets of pictures: each needs at least 2.")
