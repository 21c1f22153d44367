"""How much closer the teacher's images are to a training image than the student's, from pixels.

Preflight is based on it. Images are reduced to SIDE cells first, so that what is compared is which
colours are where, not texture.
"""

import numpy as np
from PIL import Image

from dopsd.evaluation.statistics import Interval, resampled

SIDE = 64  # cells along the longer side of a reduced image


def distances(images: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Root mean square difference in [0, 1], [N], of reduced images [N, H, W, 3] to the reduced
    target [H, W, 3]; all uint8."""
    reduced = _reduced(target)
    return np.array([np.sqrt(np.square(_reduced(image) - reduced).mean()) for image in images])


def nearer(student: np.ndarray, teacher: np.ndarray) -> Interval:
    """The share of the student's distance by which the teacher is closer, 1 - teacher / student;
    negative if it is farther.

    Both are mean distances [images, seeds] for the same images and noise. Images are resampled for
    the interval; the seeds, if there is one image.
    """
    students, teachers = (
        each.ravel() if len(each) == 1 else each.mean(1) for each in (student, teacher)
    )
    return resampled(
        lambda picks: 1 - teachers[picks].mean(-1) / students[picks].mean(-1), len(students)
    )


def _reduced(image: np.ndarray) -> np.ndarray:
    """The mean of each cell, float64 in [0, 1]; images of up to SIDE pixels stay as they are."""
    reduced = Image.fromarray(image)
    factor = SIDE / max(reduced.size)
    if factor < 1:
        size = round(reduced.width * factor), round(reduced.height * factor)
        reduced = reduced.resize(size, Image.Resampling.BOX)
    return np.asarray(reduced) / 255
