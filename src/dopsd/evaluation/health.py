"""Few-step health: what a tuned model retains of the base model, on prompts and seeds that training
never uses.

Both models generate from the same noise, at the deployed number of forwards and at twice that. Each
metric has a noise floor: its value between the base model and the base model on other noise.
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
FIRST_SEED, OTHER_SEED = 970_000, 980_000  # no overlap with the seeds of previews
CERTAIN = 2  # standard errors of the paired difference that a change must exceed
# Shares of the base model's value by which a metric may fall or rise before it is unhealthy.
LOSS_ALLOWED = {"sharpness": 0.10, "diversity": 0.20, "text": 0.05}
GAIN_ALLOWED = {"roughness": 0.50, "nfe_gap": 0.50}
# A share of the distance between two of the base model's images of a prompt on different noise.
DRIFT_ALLOWED = 0.60
VISIBLE = 1 / 255 / 8  # an eighth of a grey level: lower roughness cannot be seen

Images = tuple[np.ndarray, np.ndarray]  # at the deployed forwards and at twice that
# (images in [0, 1], number of consecutive images that share a prompt) -> one value an image
Agreement = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """value: relative to the base model's; of drift, relative to the distance between its images on
    different noise. error: standard error of the paired difference. floor: the change on other
    noise. Unhealthy is a value beyond the limit by more than chance."""

    value: float
    error: float
    floor: float
    limit: float
    healthy: bool


@dataclass(frozen=True)
class Health:
    """sharpness: mean of the steepest 5% of gradients. roughness: |Laplacian| in the flatter half
    of the pixels (artefacts). drift: distance to the base model's image. nfe_gap: distance between
    the images at one and two times the forwards. diversity: distance between the images of one
    prompt. text: agreement with the prompts, where a model for it is given."""

    metrics: dict[str, Metric]

    @property
    def healthy(self) -> bool:
        return all(metric.healthy for metric in self.metrics.values())

    def __str__(self) -> str:
        unhealthy = [
            f"{name} {metric.value:.2f} (limit {metric.limit:.2f})"
            for name, metric in self.metrics.items()
            if not metric.healthy
        ]
        return "unhealthy: " + ", ".join(unhealthy) if unhealthy else "healthy"

    def as_row(self, step: int) -> dict[str, Any]:
        """A row of health.jsonl."""
        metrics = {name: asdict(metric) for name, metric in self.metrics.items()}
        return {"step": step, "healthy": self.healthy, **metrics}


class HealthCheck:
    """Compares tuned models with the base model, whose images are generated once."""

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
        """schedule_of: number of forwards -> schedule. context: a row for each prompt.
        latent_shape: (channels, height, width). agreement: how well images match their prompts,
        for the metric `text`."""
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

    def _images(self, velocity: Velocity, vae: VAE, noise: Noise) -> Images:
        """Each float64 [N, H, W, 3] in [0, 1]."""
        once, twice = (
            generate(velocity, vae, s, self._context, noise).numpy() / 255 for s in self._schedules
        )
        return once, twice

    def examine(self, student: Velocity, vae: VAE) -> Health:
        """Generate with the student and compare."""
        student_images = self._images(student, vae, self._noise)
        metrics = {}
        for name, of in self._metrics.items():
            base, again, tuned = of(self._base), of(self._again), of(student_images)
            sign, allowed = (
                (-1, LOSS_ALLOWED[name]) if name in LOSS_ALLOWED else (1, GAIN_ALLOWED[name])
            )
            change = (tuned - base) / base.mean()
            value, error = 1 + float(change.mean()), _standard_error(change)
            healthy = sign * (value - 1) <= max(allowed, CERTAIN * error)
            floor = float(np.abs(again.mean() - base.mean()) / base.mean())
            metrics[name] = Metric(value, error, floor, 1 + sign * allowed, healthy)
        apart = _distance(self._base[0], self._again[0])
        drift = _distance(student_images[0], self._base[0]) / apart.mean()
        value, error = float(drift.mean()), _standard_error(drift)
        healthy = value <= max(DRIFT_ALLOWED, CERTAIN * error)
        metrics["drift"] = Metric(
            value, error, _standard_error(apart / apart.mean()), DRIFT_ALLOWED, healthy
        )
        return Health(metrics)


def _sharpness(images: Images) -> np.ndarray:
    down, right = np.gradient(images[0], axis=(1, 2))
    norms = np.sqrt((np.square(down) + np.square(right)).sum(3))
    ranked = np.sort(norms.reshape(len(norms), -1), axis=1)
    return ranked[:, -ranked.shape[1] // 20 :].mean(1)


def _roughness(images: Images) -> np.ndarray:
    p = images[0]
    laplacian = np.abs(
        4 * p[:, 1:-1, 1:-1] - p[:, :-2, 1:-1] - p[:, 2:, 1:-1] - p[:, 1:-1, :-2] - p[:, 1:-1, 2:]
    ).mean(3)
    ranked = np.sort(laplacian.reshape(len(p), -1), axis=1)
    return ranked[:, : ranked.shape[1] // 2].mean(1) + VISIBLE


def _diversity(images: Images) -> np.ndarray:
    """One value for each prompt, from its two consecutive images."""
    groups = images[0].reshape(-1, SEEDS, *images[0].shape[1:])
    return _distance(groups[:, 0], groups[:, 1])


def _gap(images: Images) -> np.ndarray:
    return _distance(*images)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Root mean square difference of each pair of images, [N]."""
    return np.sqrt(np.square(left - right).mean((1, 2, 3)))


METRICS: dict[str, Callable[[Images], np.ndarray]] = {
    "sharpness": _sharpness,
    "roughness": _roughness,
    "diversity": _diversity,
    "nfe_gap": _gap,
}
