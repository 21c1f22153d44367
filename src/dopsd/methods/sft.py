"""SFT: flow matching on the images, as most trainers do. Baseline that loses the few-step ability.

t ~ times;  z = (1-t) clean + t noise
loss = w(t) |student(z, t, prompt) - (noise - clean)|^2
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import noise_like
from dopsd.diffusion.rollout import sample
from dopsd.methods.base import Loss, Need, Roles
from dopsd.methods.flow_matching import FlowMatching


class SFT(FlowMatching):
    """With samples: teacher it learns from what the base model generates with the image in its
    context: an off-policy ablation of D-OPSD with the same source of knowledge."""

    name: Literal["sft"] = "sft"
    samples: Literal["data", "teacher"] = Field(
        default="data",
        description="Images learned from: the data's, or those that the teacher generates when it "
        "sees them.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset() if self.samples == "data" else frozenset({"teacher", "privileged"})

    def forwards(self, nfe: int) -> int:
        return 3 if self.samples == "data" else 3 + nfe

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        clean = batch.latents
        if self.samples == "teacher":
            assert batch.privileged is not None, "the run must cache the teacher's contexts"
            schedule = roles.schedule(self.nfe, *clean.shape[-2:])
            clean = sample(roles.teacher, noise_like(clean, rng), schedule, batch.privileged, rng)
        error = self.matching_error(roles, batch, clean, rng)
        yield Loss(error, {"loss": error.detach()}, last=True)
