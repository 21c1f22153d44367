"""FID and KID between two sets of images, from their features, in float64."""

import torch
from torch import Tensor

SUBSETS, SUBSET = 100, 1000  # of KID, and features in each, as in arXiv:1801.01401


def fid(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between normal distributions fitted to features [n, D] and [m, D]
    (arXiv:1706.08500): |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)), covariances with n - 1.

    With C = R'R for a triangular R, the trace of the root is the sum of the singular values of
    R R2': no matrix root is needed, and n may be less than D. FID is biased upward for few images:
    compare at equal numbers only.
    """
    (mean, root), (other_mean, other_root) = _gaussian(features), _gaussian(reference)
    shared = torch.linalg.svdvals(root @ other_root.T).sum()
    spread = root.square().sum() + other_root.square().sum() - 2 * shared
    return float((mean - other_mean).square().sum() + spread)


def kid(features: Tensor, reference: Tensor, seed: int = 0) -> tuple[float, float]:
    """Unbiased squared MMD under the kernel (x.y / D + 1)^3 of features [n, D] and [m, D]: mean and
    standard deviation over subsets drawn without replacement. Its expectation does not depend on
    the number of images; it can be negative."""
    sets = (features, reference)
    _refuse_few(*sets)
    count = min(SUBSET, len(features), len(reference))
    rng = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(SUBSETS if count < max(len(features), len(reference)) else 1):
        x, y = (each.double()[torch.randperm(len(each), generator=rng)[:count]] for each in sets)
        within = sum(_kernel(z, z).sum() - _kernel(z, z).diagonal().sum() for z in (x, y)) / (
            count * (count - 1)
        )
        estimates.append(within - 2 * _kernel(x, y).mean())
    values = torch.stack(estimates)
    return float(values.mean()), float(values.std(correction=0))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [D], and a matrix R [min(n, D), D] with covariance R'R."""
    _refuse_few(features)
    wide = features.double()
    mean = wide.mean(0)
    return mean, torch.linalg.qr((wide - mean) / (len(wide) - 1) ** 0.5, mode="r").R


def _refuse_few(*sets: Tensor) -> None:
    if min(map(len, sets)) < 2:
        raise ValueError("FID and KID compare sets of images: each needs at least 2.")
