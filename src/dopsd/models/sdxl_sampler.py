"""SDXL's samplers in this package's time: which one a checkpoint was distilled for, and its times.

SDXL adds noise by x = clean + sigma noise. Here t = sigma / (1 + sigma) and z = x / (1 + sigma).
The scheduler's class in the checkpoint says which sampler it is for.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from dopsd.diffusion.flow import Schedule
from dopsd.models.distilled_weights import lightning_steps, refuse_no_distiller
from dopsd.models.hub import Checkpoint

Steps = Literal["euler", "ancestral", "renoise"]


@dataclass(frozen=True)
class Kind:
    """A kind of SDXL checkpoint: how its sampler steps, and what follows from it."""

    steps: Steps
    default_nfe: int
    licence: str
    hub_licence: str
    distilled: bool = True


# 50: the pipeline's own default
BASE = Kind("euler", 50, "openrail++", "openrail++", distilled=False)
TURBO = Kind("ancestral", 4, "Stability AI Community License", "other")
DMD2 = Kind("renoise", 4, "cc-by-nc-4.0", "cc-by-nc-4.0")
LIGHTNING = Kind("euler", 4, "openrail++", "openrail++")  # arXiv:2402.13929


class Sampler:
    """A checkpoint's scheduler, and its times as this package counts them."""

    def __init__(self, checkpoint: Checkpoint, distilled_by: str | None):
        """distilled_by: a file that makes a base checkpoint a few-step one, as DMD2 or Lightning.
        Raises ValueError for a scheduler that is not supported, and for a file that is of no use
        here."""
        with checkpoint.reading("scheduler"):
            config = EulerDiscreteScheduler.load_config(checkpoint.folder / "scheduler")
            scheduler, spacing = config["_class_name"], config.get("timestep_spacing")
        steps = None
        if distilled_by:
            if scheduler == "LCMScheduler" or spacing == "trailing":
                raise ValueError(
                    f"{checkpoint.name} is a few-step model already: leave model.distilled_by out."
                )
            refuse_no_distiller(distilled_by)
            # Its own sampler takes the place of the base's.
            scheduler = "LCMScheduler"
            if steps := lightning_steps(distilled_by):
                scheduler, spacing = "EulerDiscreteScheduler", "trailing"
        if (prediction := config.get("prediction_type", "epsilon")) != "epsilon":
            raise ValueError(
                f"{checkpoint.name} predicts {prediction}; only SDXL's epsilon is supported."
            )
        self.kind, self.scheduler = _scheduler_of(checkpoint, scheduler, spacing, config)
        if steps:
            self.kind = replace(self.kind, default_nfe=steps)
        sigmas = ((1 - self.scheduler.alphas_cumprod) / self.scheduler.alphas_cumprod) ** 0.5
        self.times = _time_of(sigmas)  # float32 [T], rising: t of the timesteps 0, 1, ...

    def schedule(self, nfe: int) -> Schedule:
        """The pipeline's times: its scheduler, called as the pipeline calls it; for DMD2 with the
        timesteps that its authors give (999, 749, 499, 249 for 4), those of trailing spacing."""
        trained = self.scheduler.config.num_train_timesteps
        if not 1 <= nfe <= trained:
            raise ValueError(f"nfe is {nfe}; SDXL samples with 1 to {trained} forwards.")
        if self.kind.steps == "renoise":
            times = torch.cat([self.times[self.renoise_timesteps(nfe)], torch.zeros(1)])
            # The first state is unit noise at x / sqrt(1 + sigma^2).
            start = math.hypot(1 - times[0].item(), times[0].item())
            return Schedule(times, (1.0,) * (nfe - 1) + (0.0,), start)
        self.scheduler.set_timesteps(nfe)
        sigmas = self.scheduler.sigmas
        start = float(self.scheduler.init_noise_sigma) / (1 + sigmas[0].item())
        shares = (0.0,) * nfe
        if self.kind.steps == "ancestral":  # sigma_up / sigma'; the last step ends without noise
            pairs = zip(sigmas[:-2].tolist(), sigmas[1:-1].tolist(), strict=True)
            shares = (*(math.sqrt(1 - (after / now) ** 2) for now, after in pairs), 0.0)
        return Schedule(_time_of(sigmas), shares, start)

    def renoise_timesteps(self, nfe: int) -> Tensor:
        """Timesteps, int64 [nfe], of the sampler that re-noises at each step."""
        trained = self.scheduler.config.num_train_timesteps
        ends = torch.arange(trained, 0, -trained / nfe, dtype=torch.float64)
        return ends.round().long()[:nfe] - 1

    def save(self, folder: Path) -> str:
        """Write the scheduler's config into the folder; returns the name of its class."""
        self.scheduler.save_pretrained(folder)
        return type(self.scheduler).__name__


def _scheduler_of(
    checkpoint: Checkpoint, scheduler: str, spacing: str | None, config: dict[str, Any]
) -> tuple[Kind, Any]:
    if scheduler == "LCMScheduler":
        return DMD2, LCMScheduler.from_config(config)
    if scheduler == "EulerAncestralDiscreteScheduler" and spacing == "trailing":
        return TURBO, EulerAncestralDiscreteScheduler.from_config(config)
    if scheduler == "EulerDiscreteScheduler":
        given = {"timestep_spacing": spacing} if spacing else {}
        kind = LIGHTNING if spacing == "trailing" else BASE
        return kind, EulerDiscreteScheduler.from_config(config, **given)
    raise ValueError(
        f"{checkpoint.name} is an SDXL for the {scheduler} with {spacing} spacing; dopsd knows "
        "EulerAncestralDiscreteScheduler with trailing spacing (SDXL-Turbo), LCMScheduler (DMD2), "
        "EulerDiscreteScheduler with trailing spacing (SDXL-Lightning) and without (the base)."
    )


def _time_of(sigmas: Tensor) -> Tensor:
    """t = sigma / (1 + sigma), float32."""
    return (sigmas / (1 + sigmas)).float()
