"""Benchmarks: questions on a data set whose answers can be scored, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from dopsd.diffusion.rollout import Velocity

SHOWN = 8  # images of a topic that are kept for the page


Kind = Literal["base", "floor", "teacher", "parent", "tuned"]


@dataclass(frozen=True)
class BenchmarkResult:
    """values: of each measure, one a question, [N], or [N, seeds]; images: some of each topic,
    uint8 [H, W, 3]."""

    values: Mapping[str, np.ndarray]
    images: Mapping[str, Sequence[Tensor]]


class Benchmark(Protocol):
    """What is asked. captions: of the images that are shown, by topic; truth: how they should look,
    where known."""

    about: Any  # whatever the answers depend on besides the model, as JSON
    captions: Mapping[str, tuple[str, ...]]
    truth: Mapping[str, Sequence[Tensor]]

    def ask(self, velocity: Velocity, nfe: int, kind: Kind) -> BenchmarkResult: ...
