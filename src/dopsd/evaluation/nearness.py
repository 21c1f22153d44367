"""How much nearer the teacher comes to a training picture than the student, from pixels: what preflight judges by.

Pictures are first reduced to SIDE cells: what is compared is where which colours are, not grain and pores.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 64  # cells of a reduced picture's longer side
DRAWS = 2000


@dataclass(frozen=True)
class Nearer:
    """By what share of the student's distance the teacher is nearer (negative: farther), and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


def distances(pictures: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Root mean square difference in [0, 1], [N], of the reduced pictures [N, H, W, 3] to the reduced target
    [H, W, 3], all uint8."""
    aim = _reduced(target)
    return np.array([np.sqrt(np.square(_reduced(picture) - aim).mean()) for picture in pictures])


def nearer(student: np.ndarray, teacher: np.ndarray, seed: int = 0) -> Nearer:
    """1 - teacher / student, both mean distances over pictures and noises [P, S] that are paired. The interval is a
    percentile bootstrap over the noises, and over the pictures where there are several."""
    rng, (pictures, noises) = np.random.default_rng(seed), student.shape
    rows = rng.integers(pictures, size=(DRAWS, pictures, 1))
    columns = rng.integers(noises, size=(DRAWS, 1, noises))
    shares = 1 - teacher[rows, columns].mean((1, 2)) / student[rows, columns].mean((1, 2))
    low, high = np.percentile(shares, (2.5, 97.5))
    return Nearer(float(1 - teacher.mean() / student.mean()), float(low), float(high))


def _reduced(picture: np.ndarray) -> np.ndarray:
    """A mean over each cell, float64 in [0, 1]; a picture of SIDE pixels or less stays as it is."""
    image = Image.fromarray(picture)
    factor = SIDE / max(image.size)
    if factor < 1:
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BOX)
    return np.asarray(image) / 255
