"""DreamBooth with prior preservation (arXiv:2208.12242): SFT on the subject's images, and on images
of its class that the base model generated before training.

    loss = matching(images, prompts) + prior_weight matching(class images, class prompt)

With prior_target "base" the class images are matched to the base model's velocity instead of
noise - image (see `retention`).
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from dopsd.diffusion.batch import Batch
from dopsd.methods.base import Loss, Need, Roles, ToGenerate
from dopsd.methods.flow_matching import FlowMatching, Target


class DreamBooth(FlowMatching):
    """The class images come from the model as it is deployed: few steps, no guidance."""

    name: Literal["dreambooth"] = "dreambooth"
    class_prompt: str = Field(
        min_length=1, description="Prompt of the class images.", examples=["a photo of a dog"]
    )
    class_images: int = Field(
        default=100, ge=1, description="How many class images the base model generates."
    )
    prior_weight: float = Field(
        default=1.0, ge=0, description="Weight of the loss on class images; 0 is SFT."
    )
    prior_target: Target = Field(
        default="data",
        description="Velocity wanted on class images: noise - image (data), or the base model's.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"prior"} if self.prior_target == "data" else {"prior", "base"})

    @property
    def to_generate(self) -> ToGenerate:
        return ToGenerate("prior", self.class_images, self.class_prompt)

    def forwards(self, nfe: int) -> int:
        return 6 if self.prior_target == "data" else 7

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        assert batch.prior is not None, "the run must generate the class images"
        subject = self.matching_error(roles, batch, batch.latents, rng)
        yield Loss(subject, {"loss": subject.detach(), "subject": subject.detach()}, last=False)
        prior = self.matching_error(roles, batch.prior, batch.prior.latents, rng, self.prior_target)
        weighted = self.prior_weight * prior
        log = {"loss": weighted.detach(), "prior": prior.detach()}
        yield Loss(weighted, log, last=True, over="prior")
