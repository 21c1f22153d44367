"""Benchmarks: fixed prompts and noise for a data set, and the metrics of what a model generates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from dopsd.diffusion.rollout import Velocity
from dopsd.models.pipeline import ImagePipeline

SHOWN = 8  # images of a topic that are kept for the report
# Added to the seeds of the noise when the base model is asked again for its noise floor.
FLOOR_SEED_OFFSET = 1_000_000

Kind = Literal["base", "floor", "teacher", "teacher_other", "many_step", "tuned"]
"""What is asked: the base model, the base model on other noise, the base model with the image to
generate in its context (what D-OPSD's teacher sees in training), the base model with another image
of the same data in its context, the many-step model that it was distilled from, or a tuned
model."""
TEACHERS: tuple[Kind, ...] = ("teacher", "teacher_other")


@dataclass(frozen=True)
class BenchmarkResult:
    """values: metric -> one value a prompt, [N] or [N, seeds], empty where it was not measured.
    images: topic -> the first SHOWN images, each uint8 [H, W, 3]."""

    values: Mapping[str, np.ndarray]
    images: Mapping[str, Sequence[Tensor]]


class Benchmark(Protocol):
    """What a comparison measures of every model."""

    about: Any  # what results depend on besides the model, as JSON; part of the cache key
    metrics: tuple[str, ...]  # columns of the comparison table
    learned: str | None  # the metric that training should lower, where there is one
    definitions: Mapping[str, str]  # metric -> what it measures, and which way is better
    captions: Mapping[str, tuple[str, ...]]  # topic -> captions of the images that are shown
    truth: Mapping[str, Sequence[Tensor]]  # topic -> true images uint8 [H, W, 3], where known
    asks_teacher: bool  # whether `ask` can measure the kinds of TEACHERS
    # Loads the many-step model that the base model was distilled from; None where there is none.
    many_step: Callable[[], Velocity] | None

    def ask(self, velocity: Velocity, nfe: int, kind: Kind) -> BenchmarkResult:
        """Generate with `nfe` forwards and measure."""
        ...


class DataBenchmark(Benchmark, Protocol):
    """A benchmark that is registered in BENCHMARKS and made from a data folder."""

    def __init__(self, data: Path, pipeline: ImagePipeline): ...

    @staticmethod
    def replicate(data: Path, number: int, target: Path) -> Path:
        """The folder of another data set of the same kind, the `number`-th after that of `data`,
        written below `target` if it is not there; `data` itself for 0."""
        ...


# A data folder belongs to the benchmark NAME if it holds a file NAME.json. Values are
# `module:attribute`, imported on first use.
BENCHMARKS = {"pocket": "dopsd.pocket.benchmark:ConceptBenchmark"}


def find_benchmark(data: Path) -> type[DataBenchmark] | None:
    """The benchmark that a data folder belongs to; None for a folder of plain images."""
    names = [name for name in BENCHMARKS if (data / f"{name}.json").is_file()]
    return load_benchmark(names[0]) if names else None


def load_benchmark(name: str) -> type[DataBenchmark]:
    """The benchmark of a name in BENCHMARKS."""
    module, _, attribute = BENCHMARKS[name].partition(":")
    return getattr(import_module(module), attribute)
