"""The reward of an online method, computed on decoded latents."""

import logging
from collections.abc import Sequence

import torch

from dopsd.config.recipe import Recipe
from dopsd.evaluation.rewards import load_reward
from dopsd.methods.base import Score
from dopsd.models.base import Family

log = logging.getLogger(__name__)


def latent_reward(recipe: Recipe, family: Family, device: torch.device, low_memory: bool) -> Score:
    """The method's reward, looking at latents through the autoencoder; both stay in memory. Raises
    ValueError once it has been without an answer for as many steps in a row as the recipe would
    skip."""
    reward = load_reward(str(recipe.method.reward_name), device)
    vae = family.load_vae(device, torch.float32, tiled=low_memory)
    most = (
        2 * recipe.train.max_skipped_steps * recipe.train.gradient_accumulation_steps
    )  # two walks a batch
    silent_in_a_row, alike_in_a_row, before = 0, 0, None

    @torch.no_grad()
    def score(clean: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        nonlocal silent_in_a_row, alike_in_a_row, before
        scores = reward((vae.pixels(clean) / 2 + 0.5).clamp(0, 1), prompts)
        silent_in_a_row = silent_in_a_row + 1 if scores.isnan().all() else 0
        alike_in_a_row = (
            alike_in_a_row + 1 if before is not None and torch.equal(scores, before) else 0
        )
        before = scores
        if alike_in_a_row == most:
            log.warning(
                "the judge %s gave the same scores to %d walks in a row: pairs of equal score teach nothing",
                recipe.method.reward_name,
                most,
            )
        if silent_in_a_row == most:
            raise ValueError(
                f"the judge {recipe.method.reward_name} gave no picture of {most} walks in a row a finite score: "
                "nothing can be learned from that. What was saved before is kept; look at what the judge makes of "
                "pictures [B, 3, H, W] in [0, 1]."
            )
        return scores

    return score
