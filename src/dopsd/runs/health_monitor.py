"""Few-step health during a run: measured now and then, written to health.jsonl, the last healthy
weights kept, and whether the run should end."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dopsd.diffusion.batch import Context
from dopsd.evaluation.early_stopping import plateau
from dopsd.evaluation.health import Agreement, HealthCheck
from dopsd.runs.outputs.folder import ON_SCREEN, Rows, read_rows
from dopsd.runs.outputs.metadata import weights_metadata
from dopsd.runs.outputs.trackers import Trackers
from dopsd.runs.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reasons:
    """Why a run should end after a step, as its recipe wants: what is unhealthy, and what shows a
    plateau. None: no reason."""

    unhealthy: str | None = None
    plateau: str | None = None


class HealthMonitor:
    """The health checks of one run. The base model's images are generated when the first is due."""

    def __init__(self, session: Session, contexts: Context, steps_done: int, trackers: Trackers):
        """contexts: of the run's health prompts, one row a prompt."""
        recipe = session.run.recipe
        self._session, self._contexts, self._trackers = session, contexts, trackers
        self._every = recipe.sample.every if recipe.health.every is None else recipe.health.every
        self._check: HealthCheck | None = None
        if self._every:
            self._rows = Rows(recipe.run_folder / "health.jsonl", steps_done)

    def after_step(self, step: int, last: bool) -> Reasons:
        """Measure where it is due after this step. Returns the reasons to end the run."""
        if not self._every or not (last or step % self._every == 0):
            return Reasons()
        session, recipe = self._session, self._session.run.recipe
        if self._check is None:
            self._check = _health_check(session, self._contexts)
        health = self._check.examine(session.deployed_roles.student, session.load_vae())
        self._rows.append(health.as_row(step))
        values = {name: metric.value for name, metric in health.metrics.items()}
        self._trackers.numbers("health", values | {"healthy": health.healthy}, step)
        level = logging.INFO if health.healthy else logging.WARNING
        log.log(level, "Step %d: few-step health: %s.", step, health, extra=ON_SCREEN)
        if health.healthy:
            session.export(recipe.result("-healthy"), weights_metadata(session.run, step))
        return Reasons(
            unhealthy=str(health) if recipe.stop.unhealthy and not health.healthy else None,
            plateau=self._plateau() if recipe.stop.plateau else None,
        )

    def _plateau(self) -> str | None:
        recipe = self._session.run.recipe
        assert recipe.stop.plateau is not None, "asked for only where the recipe stops for it"
        metrics = read_rows(recipe.run_folder / "metrics.jsonl")
        return plateau(read_rows(self._rows.path), metrics, recipe.stop.plateau)


def _health_check(session: Session, contexts: Context) -> HealthCheck:
    run = session.run
    return HealthCheck(
        session.deployed_roles.base,
        session.load_vae(),
        lambda nfe: run.schedule(nfe, *run.latent_size),
        run.deployed_nfe,
        contexts.to(run.device),
        (run.family.channels, *run.latent_size),
        agreement=_text_agreement(session, run.health_prompts),
    )


def _text_agreement(session: Session, prompts: Sequence[str]) -> Agreement | None:
    """How well images agree with their prompts by the CLIP that the recipe names, if it does."""
    model = session.run.recipe.health.text_model
    if model is None:
        return None
    from dopsd.evaluation.metrics.clip import ClipScore

    clip = ClipScore(model, session.run.device, called="health.text_model")

    def agreement(images: np.ndarray, images_per_prompt: int) -> np.ndarray:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        return clip(pixels, repeated).double().cpu().numpy()

    return agreement
