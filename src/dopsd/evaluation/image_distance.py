"""How much nearer the teacher comes to a training image than the student, from pixels: what
preflight rewards by.

Images are first reduced to SIDE cells: what is compared is where which colours are, not grain and
pores.
"""

import numpy as np
from PIL import Image

from dopsd.evaluation.statistics import Interval, resampled

SIDE = 64  # cells of a reduced image's longer side


def distances(images: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Root mean square difference in [0, 1], [N], of the reduced images [N, H, W, 3] to the reduced
    target [H, W, 3], all uint8."""
    aim = _reduced(target)
    return np.array([np.sqrt(np.square(_reduced(image) - aim).mean()) for image in images])


def nearer(student: np.ndarray, teacher: np.ndarray) -> Interval:
    """By what share of the student's distance the teacher is nearer (negative: farther): 1 -
    teacher / student, both mean distances for the same images and noises [P, S]. Images are
    resampled, of a single one its noises."""
    ours, theirs = (each.ravel() if len(each) == 1 else each.mean(1) for each in (student, teacher))
    return resampled(lambda picks: 1 - theirs[picks].mean(-1) / ours[picks].mean(-1), len(ours))


def _reduced(image: np.ndarray) -> np.ndarray:
    """A mean over each cell, float64 in [0, 1]; an image of SIDE pixels or less stays as it is."""
    reduced = Image.fromarray(image)
    factor = SIDE / max(reduced.size)
    if factor < 1:
        size = round(reduced.width * factor), round(reduced.height * factor)
        reduced = reduced.resize(size, Image.Resampling.BOX)
    return np.asarray(reduced) / 255
