"""The student's health during a run: looked at every so often, written to health.jsonl, the last
healthy LoRA kept."""

import logging
from collections.abc import Sequence

from dopsd.diffusion.batch import Context
from dopsd.runs.outputs.folder import Rows
from dopsd.runs.outputs.trackers import Trackers
from dopsd.runs.session import Session

log = logging.getLogger(__name__)


class HealthMonitor:
    """Checkups of one run. The base model's images are generated when the first is due."""

    def __init__(
        self,
        session: Session,
        unrelated: Context,
        prompts: Sequence[str],
        steps_done: int,
        trackers: Trackers,
    ):
        """unrelated: what the prompts were read as."""
        recipe = session.recipe
        self._session, self._trackers = session, trackers
        self._unrelated, self._prompts = unrelated, prompts
        self._every = recipe.sample.every if recipe.health.every is None else recipe.health.every
        self._health_check = None
        if self._every:
            self._rows = Rows(recipe.run_folder / "health.jsonl", steps_done)

    def state(self, step: int, last: bool) -> str | None:
        """Look, where it is due after this step; what is wrong, if the recipe wants to stop for it."""
        if not self._every or not (last or step % self._every == 0):
            return None
        if self._health_check is None:
            self._health_check = self._session.health_check(self._unrelated, self._prompts)
        found = self._session.health(self._health_check)
        self._rows.append(found.as_row(step))
        values = {name: metric.value for name, metric in found.metrics.items()}
        self._trackers.numbers("health", values | {"healthy": found.healthy}, step)
        log.log(
            logging.INFO if found.healthy else logging.WARNING, "step=%d health=%s", step, found
        )
        recipe = self._session.recipe
        if found.healthy:
            self._session.export(recipe.result("-healthy"), step)
        return str(found) if recipe.stop.unhealthy and not found.healthy else None
