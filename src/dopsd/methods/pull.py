"""The teacher's pull on the student of D-OPSD: numbers for the log, and its direction and length
apart.

    pull   = teacher(z, t, prompt + image) - student(z, t, prompt)
    error  = (z - image) / t               - student(z, t, prompt)
    cosine = pull . error / (|pull| |error|)
    ratio  = |pull| / |error|

(z - image) / t is the velocity that leads straight from z to the image that is trained on. Where
cosine and ratio are 1 the teacher shows that image; where they are near 0 it ignores it, and its
pull teaches something else. The numbers cost no forward.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from dopsd.diffusion.flow import Schedule, per_row

BINS = 4  # of equal width over t; a time on an edge is in the noisier bin


@dataclass(frozen=True)
class NoiseBins:
    """The bins of the steps that have a loss.

    names: such as "t0.50-0.75", by index of the step. counts: how many of the steps are in a bin.
    """

    names: Mapping[int, str]
    counts: Mapping[str, int]


def noise_bins(schedule: Schedule, steps: Sequence[int]) -> NoiseBins:
    """The bins of these steps of a schedule."""
    times = schedule.times.tolist()
    names = {step: _bin_of(times[step]) for step in steps}
    return NoiseBins(names, Counter(names.values()))


def _bin_of(t: float) -> str:
    index = min(int(t * BINS), BINS - 1)
    return f"t{index / BINS:.2f}-{(index + 1) / BINS:.2f}"


@torch.no_grad()
def pull_log(
    student: Tensor,
    teacher: Tensor,
    z: Tensor,
    t: Tensor,
    image: Tensor,
    bins: NoiseBins,
    step: int,
) -> dict[str, Tensor]:
    """Log entries of one step, of which those of all steps in its bin add up to the bin's mean:
    cosine and ratio, means over the rows.

    student, teacher: velocities at z; image: clean latents; all [B, C, h, w]. t: [B].
    """
    pull = (teacher - student).flatten(1)
    error = ((z - image) / per_row(t, z) - student).flatten(1)
    ratio = pull.norm(dim=1) / error.norm(dim=1)
    name = bins.names[step]
    return {
        f"pull_cosine_at_{name}": cosine_similarity(pull, error).mean() / bins.counts[name],
        f"pull_ratio_at_{name}": ratio.mean() / bins.counts[name],
    }


@torch.no_grad()
def lengthened(student: Tensor, teacher: Tensor, base: Tensor) -> Tensor:
    """The teacher's velocity, moved along the student's own correction so that the squared error to
    it trains direction and length of the correction apart. Velocities [B, C, h, w], as the result.

        c = student - base;  p = teacher - base
        result = teacher + |p| (1 - cos(c, p)) c / |c|

    The plain squared error |c - p|^2 is shortest at |c| = |p| cos(c, p): as long as the direction
    is not right it shrinks the correction. The error to this result has the gradient of
    (|c| - |p|)^2 + 2 |c| |p| (1 - cos(c, p)) with the second |c| a constant, whose best length is
    |p|. Where c is 0, as at the start of a run, it is the teacher's velocity.
    """
    correction, wanted = (student - base).flatten(1), (teacher - base).flatten(1)
    shortening = wanted.norm(dim=1) * (1 - cosine_similarity(correction, wanted))
    extension = shortening[:, None] * normalize(correction, dim=1)
    return teacher + extension.view_as(teacher)
