"""The reward of an online method, computed on decoded latents."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from dopsd.evaluation.rewards import load_reward
from dopsd.runs.resolve import ResolvedRun

log = logging.getLogger(__name__)

ROLLOUTS_PER_BATCH = 2  # that an online method scores


class LatentReward:
    """The method's reward as a function of latents; reward model and VAE stay in memory.

    It also watches the reward: one that gives no finite score for as many steps in a row as the
    recipe would skip ends the run, one that cannot tell images apart is reported.
    """

    def __init__(self, run: ResolvedRun, low_memory: bool):
        settings = run.recipe.train
        self._name = str(run.recipe.method.reward_name)
        self._reward = load_reward(self._name, run.device)
        self._vae = run.family.load_vae(run.device, torch.float32, tiled=low_memory)
        self._limit = (
            ROLLOUTS_PER_BATCH * settings.max_skipped_steps * settings.gradient_accumulation_steps
        )
        self._without_score = 0  # calls in a row
        self._alike = 0  # calls in a row with the scores of the call before
        self._previous: Tensor | None = None

    @torch.no_grad()
    def __call__(self, clean: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B], float32, of clean latents [B, C, h, w]; NaN where there is none. Raises
        ValueError once there has been no finite score for too long."""
        scores = self._reward((self._vae.pixels(clean) / 2 + 0.5).clamp(0, 1), prompts)
        alike = self._previous is not None and torch.equal(scores, self._previous)
        self._without_score = self._without_score + 1 if scores.isnan().all() else 0
        self._alike = self._alike + 1 if alike else 0
        self._previous = scores
        if self._alike == self._limit:
            log.warning(
                "The reward %s gave the same scores to %d rollouts in a row: pairs of equal score "
                "teach nothing.",
                self._name,
                self._limit,
            )
        if self._without_score == self._limit:
            raise ValueError(
                f"the reward {self._name} gave no image of {self._limit} rollouts in a row a "
                "finite score, and nothing can be learned from that. What was saved before is "
                "kept; look at what the reward returns for images [B, 3, H, W] in [0, 1]."
            )
        return scores
