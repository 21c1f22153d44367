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

from collections.abc import Collection, Iterator
from random import Random
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Schedule, Step, noise_like, noisy, transition
from dopsd.diffusion.rollout import rollout
from dopsd.methods.base import Loss, Need, Roles, ToGenerate
from dopsd.methods.preference import Branch, Link, RolloutPreference, Term, pairwise_losses


class PSO(RolloutPreference):
    """The customisation loss of the paper's code: form: forward, link: hinge, reference: false, a
    loser_prompt of the class, a loser_share below 1, and loss_steps: 1."""

    name: Literal["pso"] = "pso"
    form: Literal["rollout", "forward"] = Field(
        default="rollout",
        description="Losers: states of the student's own rollout, or images that the base model "
        "generates before training.",
    )
    last_step: Literal["noised", "left_out"] = Field(
        default="noised",
        description="The last step has no density: noise both images there, or leave it out "
        "(paper).",
    )
    loss_steps: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        default="all",
        description="Steps in the margin: all, or a number drawn at random for each batch.",
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

    def noisy_steps(self, nfe: int) -> Collection[int]:
        return range(nfe - 1)

    def refuse_schedule(self, schedule: Schedule) -> None:
        super().refuse_schedule(schedule)
        usable = self._usable_steps(schedule.nfe)
        if not usable:
            raise ValueError(
                "a sampler of one step has only the last: set method.last_step: noised, or a "
                "larger method.nfe."
            )
        if self.loss_steps != "all" and self.loss_steps > len(usable):
            raise ValueError(
                f"method.loss_steps asks for {self.loss_steps} of the {len(usable)} steps that can "
                f"have a loss: ask for at most {len(usable)}."
            )

    def _usable_steps(self, nfe: int) -> range:
        return range(nfe if self.last_step == "noised" else nfe - 1)

    def _loss_steps(self, nfe: int, seed: int) -> tuple[int, ...]:
        """Indices of the steps in the margin. Python's generator draws them: the memory forecast
        runs on tensors without values."""
        usable = self._usable_steps(nfe)
        if self.loss_steps == "all":
            return tuple(usable)
        return tuple(sorted(Random(seed).sample(usable, self.loss_steps)))

    def forwards(self, nfe: int) -> int:
        steps = len(self._loss_steps(nfe, seed=0))
        state = 5 if self.reference else 4  # student, base, and student again with a backward
        return 2 * steps * state + (nfe if self.form == "rollout" else 0)

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        schedule = roles.schedule(self.nfe, *batch.latents.shape[-2:])
        stochastic = self.noisy_schedule(schedule)
        *steps, last = stochastic.steps()
        # The last step has no density and takes the weight of the one before
        weights = self.weights_of(steps) or [torch.ones(())]
        weights.append(weights[-1])
        loss_steps = self._loss_steps(schedule.nfe, rng.initial_seed())

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
        for step in [*steps, last]:
            if step.index not in loss_steps:
                continue
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


def _noised(branch: Branch, step: Step, clean: Tensor, noise: Tensor, weight: Tensor) -> Term:
    t = step.now.to(clean).expand(len(clean))
    return Term(branch, step.index, noisy(clean, noise, t), t, noise - clean, weight)
