"""Distances, blur and gradients of images as arrays."""

import functools

import numpy as np

from dopsd.pocket.world.scenes import SIZE


def rmse(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one - other).mean()))


@functools.cache
def _blur_matrix(sigma: float) -> np.ndarray:
    """A Gaussian blur along one side as a float32 matrix [64, 64]; the border is repeated."""
    taps = np.arange(-8, 9)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    matrix = np.zeros((SIZE, SIZE), dtype=np.float32)
    for tap, weight in zip(taps, weights / weights.sum(), strict=True):
        np.add.at(matrix, (np.arange(SIZE), np.clip(np.arange(SIZE) + tap, 0, SIZE - 1)), weight)
    return matrix


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    """Images [..., 64, 64, 3] after a Gaussian blur of sigma pixels."""
    if not sigma:
        return images
    matrix = _blur_matrix(sigma)
    rows_done = (matrix @ images.reshape(*images.shape[:-2], -1)).reshape(images.shape)
    return matrix @ rows_done


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A bool mask [64, 64] grown by `pixels` in every direction, corners included."""
    padded = np.pad(mask, pixels)
    side = 2 * pixels + 1
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side)).any((2, 3))


def gradient(image: np.ndarray) -> np.ndarray:
    """Norm over x, y and RGB of central differences, [64, 64]."""
    down, right = np.gradient(image, axis=(0, 1))
    return np.sqrt((np.square(down) + np.square(right)).sum(2))
