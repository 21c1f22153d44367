"""Diffusion-DPO (arXiv:2311.12908) for flow models: of two images for a prompt, one is preferred.

t ~ times; one noise for both images
for each image:  z = (1-t) image + t noise;  wanted = noise - image
margin = beta w(t) [ E(rejected) - E(chosen) ]                  E as in `preference`
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Space, loss_weight, noise_like, noisy
from dopsd.methods.base import Loss, Need, Roles
from dopsd.methods.flow_matching import DrawsTimes
from dopsd.methods.preference import Preference, Term, pairwise_losses


class DPO(DrawsTimes, Preference):
    """Errors are means over latent elements, so beta does not depend on the image size."""

    name: Literal["dpo"] = "dpo"
    beta: float = Field(
        default=1000.0,
        gt=0,
        description="Multiplies the margin; codes with beta / 2 call this value 2000.",
    )
    space: Space = Field(
        default="velocity", description="Where the error is measured: velocity, clean or noise."
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"base", "rejected"})

    def forwards(self, nfe: int) -> int:
        return 10  # for each image: student, base, and student again with a backward

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        assert batch.rejected is not None, "the run must provide the rejected images"
        noise = noise_like(batch.latents, rng)
        t = self.draw_times(roles, batch.latents, rng)
        weight = loss_weight(t, self.space)
        terms = [
            Term("winner", 0, noisy(batch.latents, noise, t), t, noise - batch.latents, weight),
            Term("loser", 0, noisy(batch.rejected, noise, t), t, noise - batch.rejected, weight),
        ]
        yield from pairwise_losses(roles, batch.context, terms, self.beta, batch.weight)
