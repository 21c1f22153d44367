"""Few-step health: what a tuned model keeps of the untouched one, on prompts and seeds that
training never sees.

Both generate the same noise at the deployed number of forwards and at twice that. Every measure
stands beside its noise floor, which is what it shows between the base model and itself on other
noise. From pixels alone, unless a recipe names a model for the agreement with the text.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE
from dopsd.diffusion.flow import Schedule
from dopsd.diffusion.rollout import Velocity
from dopsd.diffusion.sampling import Noise, generate, noise_for

PROMPTS = (
    "a red bicycle leaning against a brick wall",
    "a bowl of ramen on a wooden table, seen from above",
    "a lighthouse on a cliff at dusk",
    "portrait of an old fisherman, black and white photograph",
    "an astronaut riding a horse, watercolour",
    "a street market in the rain at night",
    "a snow-covered pine forest",
    "a handwritten sign that says open",
)
SEEDS = 2  # images a prompt
FIRST_SEED, OTHER_SEED = 970_000, 980_000  # far from any preview's
CERTAIN = 2  # standard errors of the paired difference that a change must exceed
# What may change without alarm, as a share of the base model's value; below or above it is
# unhealthy.
LOSS_ALLOWED = {"sharpness": 0.10, "diversity": 0.20, "text": 0.05}
GAIN_ALLOWED = {"roughness": 0.50, "nfe_gap": 0.50}
DRIFT_ALLOWED = 0.60  # of the distance between two images of one prompt on different noise


@dataclass(frozen=True)
class Metric:
    """value: over the base model's (drift: over the distance of its images on other noise). error:
    standard error of the paired difference. floor: of the noise. Unhealthy: beyond the limit, and
    not by chance."""

    value: float
    error: float
    floor: float
    limit: float
    healthy: bool


@dataclass(frozen=True)
class Health:
    """sharpness: mean of the steepest 5% of slopes; roughness: |Laplacian| in the flatter half
    (artefacts); drift: distance to the base model's image; nfe_gap: distance between the images at
    one and two times the forwards; diversity: distance between the images of one prompt; text:
    agreement with the prompts, where a model is given."""

    metrics: dict[str, Metric]

    @property
    def healthy(self) -> bool:
        return all(metric.healthy for metric in self.metrics.values())

    def __str__(self) -> str:
        ill = [
            f"{name} {m.value:.2f} (limit {m.limit:.2f})"
            for name, m in self.metrics.items()
            if not m.healthy
        ]
        return "healthy" if not ill else "unhealthy: " + ", ".join(ill)

    def as_row(self, step: int) -> dict[str, Any]:
        """A row of health.jsonl."""
        return {
            "step": step,
            "healthy": self.healthy,
            **{name: asdict(m) for name, m in self.metrics.items()},
        }


Agreement = Callable[
    [np.ndarray, int], np.ndarray
]  # images in [0, 1], and how many of a prompt stand in a row


class HealthCheck:
    """The base model's images, generated once, and the comparison with whatever was tuned from it."""

    def __init__(
        self,
        base: Velocity,
        vae: VAE,
        schedule_of: Callable[[int], Schedule],
        nfe: int,
        context: Context,
        latent_shape: tuple[int, int, int],
        first_seed: int = FIRST_SEED,
        agreement: Agreement | None = None,
    ):
        """context: one row a prompt; cells: latent (channels, height, width); schedule_of: forwards
        -> times; agreement: what says whether images show what their prompts say, if there is such
        a model."""
        self._metrics = dict(METRICS)
        if agreement:
            self._metrics["text"] = lambda images: agreement(images[0], SEEDS)
        rows = [context.row(index) for index in range(len(context)) for _ in range(SEEDS)]
        self._context = Context.stack(rows)
        self._noise = noise_for(range(first_seed, first_seed + len(rows)), *latent_shape)
        other = noise_for(
            range(OTHER_SEED + first_seed, OTHER_SEED + first_seed + len(rows)), *latent_shape
        )
        self._schedules = schedule_of(nfe), schedule_of(2 * nfe)
        self._base = self._images(base, vae, self._noise)
        self._again = self._images(base, vae, other)

    def _images(
        self, velocity: Velocity, vae: VAE, noise: Noise
    ) -> "tuple[np.ndarray, np.ndarray]":
        """At the deployed forwards and at twice that, float64 [N, H, W, 3] in [0, 1]."""
        once, twice = (
            generate(velocity, vae, s, self._context, noise).numpy() / 255 for s in self._schedules
        )
        return once, twice

    def examine(self, student: Velocity, vae: VAE) -> Health:
        """Paint as the student and compare."""
        mine = self._images(student, vae, self._noise)
        metrics = {}
        for name, of in self._metrics.items():
            base, again, tuned = of(self._base), of(self._again), of(mine)
            sign, allowed = (
                (-1, LOSS_ALLOWED[name]) if name in LOSS_ALLOWED else (1, GAIN_ALLOWED[name])
            )
            change = (tuned - base) / base.mean()
            value, error = 1 + float(change.mean()), _standard_error(change)
            healthy = sign * (value - 1) <= max(allowed, CERTAIN * error)
            floor = float(np.abs(again.mean() - base.mean()) / base.mean())
            metrics[name] = Metric(value, error, floor, 1 + sign * allowed, healthy)
        apart = _distance(self._base[0], self._again[0])
        drift = _distance(mine[0], self._base[0]) / apart.mean()
        value, error = float(drift.mean()), _standard_error(drift)
        healthy = value <= max(DRIFT_ALLOWED, CERTAIN * error)
        metrics["drift"] = Metric(
            value, error, _standard_error(apart / apart.mean()), DRIFT_ALLOWED, healthy
        )
        return Health(metrics)


Images = tuple[np.ndarray, np.ndarray]  # at once and twice the forwards


def _sharpness(images: Images) -> np.ndarray:
    down, right = np.gradient(images[0], axis=(1, 2))
    slopes = np.sqrt((np.square(down) + np.square(right)).sum(3))
    ranked = np.sort(slopes.reshape(len(slopes), -1), axis=1)
    return ranked[:, -ranked.shape[1] // 20 :].mean(1)


def _roughness(images: Images) -> np.ndarray:
    p = images[0]
    curve = np.abs(
        4 * p[:, 1:-1, 1:-1] - p[:, :-2, 1:-1] - p[:, 2:, 1:-1] - p[:, 1:-1, :-2] - p[:, 1:-1, 2:]
    ).mean(3)
    ranked = np.sort(curve.reshape(len(p), -1), axis=1)
    return (
        ranked[:, : ranked.shape[1] // 2].mean(1) + 1 / 255 / 8
    )  # below an eighth of a grey level nothing is seen


def _diversity(images: Images) -> np.ndarray:
    """One value a prompt: its SEEDS images stand side by side."""
    groups = images[0].reshape(-1, SEEDS, *images[0].shape[1:])
    return _distance(groups[:, 0], groups[:, 1])


def _gap(images: Images) -> np.ndarray:
    return _distance(*images)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Root mean square difference, image by image [N]."""
    return np.sqrt(np.square(left - right).mean((1, 2, 3)))


METRICS: dict[str, Callable[[Images], np.ndarray]] = {
    "sharpness": _sharpness,
    "roughness": _roughness,
    "diversity": _diversity,
    "nfe_gap": _gap,
}
