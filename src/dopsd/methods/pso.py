"""PSO, offline (arXiv:2410.03190): the data's images are preferred to what the few-step model
generates for their prompts, step by step of its own sampler. The paper's loss is for noise
predictions; its form for velocities is ours.

Winner, at every time t_k of the sampler: the image, noised; wanted there is its own velocity, noise
- image. Loser, form "rollout": a walk of the model that draws fresh noise at every step (eta);
wanted at each of its states is the velocity that its next state implies. Form "forward": an image
that the base model generated, noised likewise.
margin = beta sum_k w_k [ E_k(loser) - E_k(winner) ]               E as in `preference`
w_k    = slope^2 / (2 std^2) of the step as a Gaussian (`flow.transition`); normalised: divided by their mean
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
    """The customisation form of the paper's code is form: forward, link: hinge, reference: false,
    with a loser_prompt of the class and a loser_share below 1."""

    name: Literal["pso"] = "pso"
    form: Literal["rollout", "forward"] = Field(
        default="rollout",
        description="Losers: the student's own noisy walk, or pictures painted once, before training.",
    )
    eta: float = Field(
        default=0.5,
        ge=0.01,
        le=1,
        description="Noise of the walk: r = sin(eta pi/2), 1 = all noise is drawn anew.",
    )
    weights: Literal["normalised", "exact"] = Field(
        default="normalised",
        description="exact: the likelihood's own, which spread over three orders of magnitude.",
    )
    last_step: Literal["noised", "left_out"] = Field(
        default="noised",
        description="The last step has no density: noise both ends there, or leave it out (paper).",
    )
    link: Link = Field(
        default="logistic", description="Of the margin: -log sigmoid, or max(0, 1 - margin)."
    )
    reference: bool = Field(
        default=True, description="Measure errors relative to the untouched model."
    )
    losers: int = Field(default=4, ge=1, description="Of form forward: pictures painted a prompt.")
    loser_prompt: str | None = Field(
        default=None,
        min_length=1,
        description="Of form forward: what is painted; default: each picture's caption.",
    )
    loser_share: float = Field(
        default=1.0, gt=0, le=1, description="Weight of the loser's errors in the margin."
    )

    @model_validator(mode="after")
    def _loser_prompt_is_of_the_forward_form(self) -> Self:
        if self.loser_prompt is not None and self.form == "rollout":
            raise ValueError(
                "loser_prompt needs form: forward; in a rollout the loser walks under the picture's caption"
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
        return (
            ToGenerate("rejected", self.losers, self.loser_prompt)
            if self.form == "forward"
            else None
        )

    def refuse_nfe(self, nfe: int) -> None:
        if nfe == 1 and self.last_step == "left_out":
            raise ValueError(
                "a walk of one step has only the last: set method.last_step: noised, or a larger method.nfe."
            )

    def forwards(self, nfe: int) -> int:
        steps = nfe if self.last_step == "noised" else nfe - 1
        a_state = 5 if self.reference else 4  # student, base, and the student again with a backward
        return 2 * steps * a_state + (nfe if self.form == "rollout" else 0)

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        schedule = roles.schedule(self.nfe, *batch.latents.shape[-2:])
        noisy_schedule = schedule.stochastic(self.eta, range(schedule.nfe - 1))
        *moves, last = noisy_schedule.steps()
        weights = self._weights([transition(step).weight for step in moves])
        if self.form == "rollout":
            with torch.no_grad():
                sample_in_chunks = list(
                    rollout(
                        roles.student,
                        noise_like(batch.latents, rng),
                        noisy_schedule,
                        batch.context,
                        rng,
                    )
                )
            generated = sample_in_chunks[-1].z_next
        else:
            assert batch.rejected is not None, "the run must paint the losers"
            sample_in_chunks, generated = [], batch.rejected
        terms = []
        for step in [*moves, last] if self.last_step == "noised" else moves:
            noise, weight = noise_like(generated, rng), weights[step.index]
            terms.append(_noised("winner", step, batch.latents, noise, weight))
            if sample_in_chunks and step is not last:
                state = sample_in_chunks[step.index]
                wanted = transition(step).implied(state.z, state.z_next)
                t = step.now.to(state.z).expand(len(state.z))
                terms.append(
                    Term("loser", step.index, state.z, t, wanted, weight * self.loser_share)
                )
            else:
                terms.append(_noised("loser", step, generated, noise, weight * self.loser_share))
        yield from pairwise_losses(
            roles, batch.context, terms, self.beta, batch.weight, self.link, self.reference
        )

    def _weights(self, own: list[Tensor]) -> list[Tensor]:
        """One a step; the last, which has no density of its own, takes its neighbour's."""
        if not own:
            return [torch.ones(())]
        weights = normalised(own) if self.weights == "normalised" else own
        return [*weights, weights[-1]]


def _noised(branch: Branch, step: Step, clean: Tensor, noise: Tensor, weight: Tensor) -> Term:
    t = step.now.to(clean).expand(len(clean))
    return Term(branch, step.index, noisy(clean, noise, t), t, noise - clean, weight)
