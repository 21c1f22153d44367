"""PSO, offline (arXiv:2410.03190): images of the data are preferred to images that the few-step
model generates for the same prompts, at each step of its sampler. The paper's loss is for noise
predictions; the form for velocities is ours.

    at each time t_k of the sampler
        winner: z = the data's image, noised;  wanted = noise - image
        loser, form "rollout": z = state k of the student's rollout with fresh noise at each step;
            wanted = the velocity that the rollout's own next state implies
        loser, form "forward": z = an image of the base model, noised;  wanted = noise - image
    margin = beta sum_k w_k [ E_k(loser) - E_k(winner) ]            E_k as in `preference`
    w_k = slope^2 / (2 std^2) of step k as a Gaussian (`flow.Transition`); "normalised": / mean
"""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Step, noise_like, noisy, transition
from dopsd.diffusion.rollout import rollout
from dopsd.methods.base import Loss, Need, Roles, ToGenerate
from dopsd.methods.preference import Branch, Link, Preference, Term, normalised, pairwise_losses


class PSO(Preference):
    """The customisation loss of the paper's code: form: forward, link: hinge, reference: false, a
    loser_prompt of the class, and a loser_share below 1."""

    name: Literal["pso"] = "pso"
    form: Literal["rollout", "forward"] = Field(
        default="rollout",
        description="Losers: states of the student's own rollout, or images that the base model "
        "generates before training.",
    )
    eta: float = Field(
        default=0.5,
        ge=0.01,
        le=1,
        description="Fresh noise of the rollout: r = sin(eta pi/2), 1 = all noise is drawn anew.",
    )
    weights: Literal["normalised", "exact"] = Field(
        default="normalised",
        description="Weights of the steps. exact: those of the likelihood, which span three orders "
        "of magnitude.",
    )
    last_step: Literal["noised", "left_out"] = Field(
        default="noised",
        description="The last step has no density: noise both images there, or leave it out "
        "(paper).",
    )
    link: Link = Field(
        default="logistic",
        description="Loss of the margin: logistic, -log sigmoid(margin), or hinge, "
        "max(0, 1 - margin).",
    )
    reference: bool = Field(
        default=True, description="Whether errors are relative to the base model."
    )
    losers: int = Field(
        default=4, ge=1, description="Form forward: images generated for each prompt."
    )
    loser_prompt: str | None = Field(
        default=None,
        min_length=1,
        description="Form forward: prompt of the generated images; default: each image's caption.",
    )
    loser_share: float = Field(
        default=1.0, gt=0, le=1, description="Weight of the loser's errors in the margin."
    )

    @model_validator(mode="after")
    def _loser_prompt_is_of_the_forward_form(self) -> Self:
        if self.loser_prompt is not None and self.form == "rollout":
            raise ValueError(
                "loser_prompt needs form: forward; in form rollout the losers have the caption of "
                "the image"
            )
        return self

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"base"} if self.reference else set()
        if self.form == "forward":
            needs.add("rejected")
        return frozenset(needs)

    @property
    def to_generate(self) -> ToGenerate | None:
        if self.form == "rollout":
            return None
        return ToGenerate("rejected", self.losers, self.loser_prompt)

    def refuse_nfe(self, nfe: int) -> None:
        if nfe == 1 and self.last_step == "left_out":
            raise ValueError(
                "a sampler of one step has only the last: set method.last_step: noised, or a "
                "larger method.nfe."
            )

    def forwards(self, nfe: int) -> int:
        steps = nfe if self.last_step == "noised" else nfe - 1
        state = 5 if self.reference else 4  # student, base, and student again with a backward
        return 2 * steps * state + (nfe if self.form == "rollout" else 0)

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        schedule = roles.schedule(self.nfe, *batch.latents.shape[-2:])
        stochastic = schedule.stochastic(self.eta, range(schedule.nfe - 1))
        *steps, last = stochastic.steps()
        weights = self._weights([transition(step).weight for step in steps])

        # The losers' images, and the states on the way to them
        states = []
        if self.form == "rollout":
            start = noise_like(batch.latents, rng)
            with torch.no_grad():
                states = list(rollout(roles.student, start, stochastic, batch.context, rng))
            loser = states[-1].z_next
        else:
            assert batch.rejected is not None, "the run must generate the losers"
            loser = batch.rejected

        # A winner and a loser at each step
        terms = []
        for step in [*steps, last] if self.last_step == "noised" else steps:
            k, noise = step.index, noise_like(loser, rng)
            loser_weight = weights[k] * self.loser_share
            terms.append(_noised("winner", step, batch.latents, noise, weights[k]))
            if states and step is not last:
                z, t = states[k].z, states[k].t
                wanted = transition(step).implied(z, states[k].z_next)
                terms.append(Term("loser", k, z, t, wanted, loser_weight))
            else:
                terms.append(_noised("loser", step, loser, noise, loser_weight))
        yield from pairwise_losses(
            roles, batch.context, terms, self.beta, batch.weight, self.link, self.reference
        )

    def _weights(self, of_steps: list[Tensor]) -> list[Tensor]:
        """w_k for each step of the sampler. The last step has no density and takes the weight of
        the one before."""
        if not of_steps:
            return [torch.ones(())]
        weights = normalised(of_steps) if self.weights == "normalised" else of_steps
        return [*weights, weights[-1]]


def _noised(branch: Branch, step: Step, clean: Tensor, noise: Tensor, weight: Tensor) -> Term:
    t = step.now.to(clean).expand(len(clean))
    return Term(branch, step.index, noisy(clean, noise, t), t, noise - clean, weight)
