"""SFT: plain flow matching on the pictures, what most tools do. The baseline that loses the few-step ability.

loss = |student((1-t) clean + t noise, t, prompt) - (noise - clean)|^2,  t ~ times
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dopsd.batch import Batch
from dopsd.flow import noisy
from dopsd.methods.base import Loss, Method, Roles, mean_error, noise_like

Times = Literal["uniform", "logit_normal", "shift", "own_steps"]


class SFT(Method):
    """times: how t is drawn. "uniform"; "logit_normal" (sigmoid of a standard normal); "shift" (uniform, moved toward
    noise by s t / (1 + (s-1) t) with s = `shift`); "own_steps" (the sampler's own times, its noise end included)."""

    name: Literal["sft"] = "sft"
    times: Times = "shift"
    shift: float = Field(default=3.0, gt=0)

    def forwards(self, nfe: int) -> int:
        return 3

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        clean = batch.latents
        noise = noise_like(clean, rng)
        t = self._draw_times(roles, clean, rng).to(clean.device)
        error = mean_error(roles.student(noisy(clean, noise, t), t, batch.context), noise - clean, batch.weight)
        yield Loss(error, {"loss": error.detach()}, last=True)

    def _draw_times(self, roles: Roles, clean: Tensor, rng: torch.Generator) -> Tensor:
        """t: float32 [B] in [0, 1]."""
        size = (len(clean),)
        if self.times == "own_steps":
            times = roles.schedule(self.nfe, *clean.shape[-2:]).times[:-1]
            return times[torch.randint(len(times), size, generator=rng, device=rng.device).cpu()]
        if self.times == "logit_normal":
            return torch.randn(size, generator=rng, device=rng.device).sigmoid()
        u = torch.rand(size, generator=rng, device=rng.device)
        return u if self.times == "uniform" else self.shift * u / (1 + (self.shift - 1) * u)
