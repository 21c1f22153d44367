"""Flow matching on noised images, shared by SFT, DreamBooth and Diffusion-DPO: how times are drawn
and weighted.

    t ~ times;  z = (1-t) clean + t noise;  wanted = noise - clean
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Space, loss_weight, noise_like, noisy
from dopsd.methods.base import Method, Roles, mean_error

# The velocity wanted at a noised image: noise - image, or the base model's
Target = Literal["data", "base"]
Times = Literal["uniform", "logit_normal", "shift", "own_steps"]


class DrawsTimes(Method):
    """A method that noises images at random times."""

    times: Times = Field(
        default="shift",
        description="How t is drawn: uniform; logit_normal (sigmoid of a standard normal); shift "
        "(uniform, moved toward noise by s t / (1 + (s-1) t), s = `shift`); own_steps (the "
        "sampler's own times, its noise end included).",
    )
    shift: float = Field(default=3.0, gt=0, description="s of times: shift.")

    def draw_times(self, roles: Roles, clean: Tensor, rng: torch.Generator) -> Tensor:
        """t: float32 [B] on the device of clean [B, C, h, w], in [0, the sampler's first time].

        That is 1, or less where the network was trained on no more noise than that.
        """
        size, times = (len(clean),), roles.schedule(self.nfe, *clean.shape[-2:]).times
        if self.times == "own_steps":
            own = torch.randint(len(times) - 1, size, generator=rng, device=rng.device)
            return times[own.cpu()].to(clean.device)
        if self.times == "logit_normal":
            t = torch.randn(size, generator=rng, device=rng.device).sigmoid()
        else:
            u = torch.rand(size, generator=rng, device=rng.device)
            t = u if self.times == "uniform" else self.shift * u / (1 + (self.shift - 1) * u)
        return times[0].to(clean.device) * t.to(clean.device)


class FlowMatching(DrawsTimes):
    """Regression on the velocity of noised images."""

    space: Space = Field(
        default="velocity", description="Where the error is measured: velocity, clean or noise."
    )
    min_snr_gamma: float | None = Field(
        default=None,
        gt=0,
        description="Min-SNR weighting of the noise error (arXiv:2303.09556); 5 is usual.",
    )

    @model_validator(mode="after")
    def _min_snr_weighs_the_noise_error(self) -> Self:
        if self.min_snr_gamma and self.space != "noise":
            raise ValueError("min_snr_gamma weighs the noise error: set space: noise beside it")
        return self

    @property
    def takes_masks(self) -> bool:
        return True

    def time_weight(self, t: Tensor) -> Tensor:
        """Weight [B] of the squared velocity error at t [B].

        With min-SNR it is (1-t)^2 min(SNR, gamma) / SNR, where SNR = ((1-t)/t)^2, written without
        the division by 0 at t = 1.
        """
        if self.min_snr_gamma is None:
            return loss_weight(t, self.space)
        return torch.minimum((1 - t) ** 2, self.min_snr_gamma * t**2)

    def matching_error(
        self,
        roles: Roles,
        batch: Batch,
        clean: Tensor,
        rng: torch.Generator,
        target: Target = "data",
    ) -> Tensor:
        """The loss of a batch, 0-d, with `clean` [B, C, h, w] in place of its latents."""
        noise = noise_like(clean, rng)
        t = self.draw_times(roles, clean, rng)
        z = noisy(clean, noise, t)
        wanted = noise - clean if target == "data" else roles.base(z, t, batch.context).detach()
        velocity = roles.student(z, t, batch.context)
        return mean_error(velocity, wanted, batch.weight * self.time_weight(t), batch.mask)
