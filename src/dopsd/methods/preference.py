"""Loss on pairs of images (winner, loser), shared by PSO and Diffusion-DPO, and its exact gradient.

E_k    = |u(z_k) - wanted_k|^2 - |u_base(z_k) - wanted_k|^2     state k; mean over latent elements
margin = beta ( sum_k w_k E_k over the loser's states - sum_k w_k E_k over the winner's )
loss   = -log sigmoid(margin)      logistic link
         max(0, 1 - margin)        hinge link

The margin couples all states, but its gradient is a sum over them: d loss / d E_k is a number,
loss'(margin) beta w_k for the loser and minus that for the winner. So a first pass without gradient
computes the margins, and a second yields one weighted error per state. The result is exact, with
the activations of one forward in memory.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from dopsd.diffusion.batch import Context
from dopsd.diffusion.flow import Schedule, Step, transition
from dopsd.methods.base import Loss, Method, Roles, row_errors

Link = Literal["logistic", "hinge"]
Branch = Literal["winner", "loser"]
SATURATED = 4.0  # a logistic margin beyond it leaves less than 2% of the gradient


@dataclass(frozen=True)
class Term:
    """One state of one branch: z [B, C, h, w] at t [B], and the velocity wanted there, like z.

    step: index in the sampler's schedule, for the log. weight: w_k, one number or one per row [B].
    """

    branch: Branch
    step: int
    z: Tensor
    t: Tensor
    wanted: Tensor
    weight: float | Tensor = 1.0


class Preference(Method):
    """A method that learns from pairs."""

    beta: float = Field(
        default=10.0,
        gt=0,
        description="Multiplies the margin; codes with beta/2 say twice as much.",
    )


class RolloutPreference(Preference):
    """A method whose margin weighs each step of a rollout by its density as a Gaussian policy:

    w_k = slope^2 / (2 std^2)                                      see `flow.Transition`
    """

    eta: Literal["own"] | Annotated[float, Field(ge=0.01, le=1)] = Field(
        default=0.5,
        description="Fresh noise of the trained steps: r = sin(eta pi/2), 1 = all noise is drawn "
        "anew; own: what the model's sampler draws (SDXL's samplers do; the published code).",
    )
    weights: Literal["normalised", "exact"] = Field(
        default="normalised",
        description="Weights of the steps. exact: those of the likelihood, which span three orders "
        "of magnitude.",
    )

    def noisy_steps(self, nfe: int) -> Collection[int]:
        """Indices of the steps whose noise `eta` sets."""
        raise NotImplementedError

    def noisy_schedule(self, schedule: Schedule) -> Schedule:
        """The sampler's schedule with the noise that `eta` asks for."""
        if self.eta == "own":
            return schedule
        return schedule.stochastic(self.eta, self.noisy_steps(schedule.nfe))

    def refuse_schedule(self, schedule: Schedule) -> None:
        if self.eta == "own" and not all(
            schedule.renoise[step] for step in self.noisy_steps(schedule.nfe)
        ):
            raise ValueError(
                "method.eta: own takes the noise that the model's own sampler draws, and this "
                "model's sampler draws none: give method.eta a number, such as 0.5."
            )

    def weights_of(self, steps: Sequence[Step]) -> list[Tensor]:
        """w_k, 0-d, of steps that draw noise; normalised: divided by their mean."""
        weights = [transition(step).weight for step in steps]
        if self.weights == "exact" or not weights:
            return weights
        return [weight / torch.stack(weights).mean() for weight in weights]


def pairwise_losses(
    roles: Roles,
    context: Context,
    terms: Sequence[Term],
    beta: float,
    weight: Tensor,
    link: Link = "logistic",
    reference: bool = True,
    extra_log: Mapping[str, Tensor] | None = None,
    clip: float | None = None,
) -> Iterator[Loss]:
    """The pieces of the loss of one batch of pairs.

    weight: [B], of each pair; 0 leaves a pair out. reference: whether errors are relative to the
    base model. extra_log: more numbers to report. clip: limit of each term's density ratio,
    exp(-w_k E_k), to 1 - clip ... 1 + clip; beyond it a term has no gradient.
    """
    # Margins, without gradient
    with torch.no_grad():
        errors = [row_errors(roles.student(term.z, term.t, context), term.wanted) for term in terms]
        if reference:
            base_errors = [
                row_errors(roles.base(term.z, term.t, context), term.wanted) for term in terms
            ]
            errors = [error - base for error, base in zip(errors, base_errors, strict=True)]
        factors = [beta * term.weight * (1.0 if term.branch == "loser" else -1.0) for term in terms]
        parts = [factor * error for factor, error in zip(factors, errors, strict=True)]
        if clip is not None:
            # w_k E_k = -log ratio
            low, high = -beta * math.log1p(clip), -beta * math.log1p(-clip)
            signs = [1.0 if term.branch == "loser" else -1.0 for term in terms]
            kept = [
                sign * (sign * p).clamp(low, high) for sign, p in zip(signs, parts, strict=True)
            ]
            factors = [f * (p == k) for f, p, k in zip(factors, parts, kept, strict=True)]
            parts = kept
        margin = torch.stack(parts).sum(0)
        slope = -torch.sigmoid(-margin) if link == "logistic" else -(margin < 1).to(margin)
        loss = -logsigmoid(margin) if link == "logistic" else (1 - margin).clamp(min=0)
        log = {
            "loss": (weight * loss).mean(),
            **_statistics(terms, errors, parts, margin, weight),
            **(extra_log or {}),
        }
        counts = {"pairs": (weight > 0).to(margin).sum()}

    # One error per state, with gradient
    for index, (term, factor) in enumerate(zip(terms, factors, strict=True)):
        error = row_errors(roles.student(term.z, term.t, context), term.wanted)
        surrogate = (weight * slope * factor * error).mean()
        if index < len(terms) - 1:
            yield Loss(surrogate, {}, last=False)
        else:
            yield Loss(surrogate, log, last=True, counts=counts)


def _statistics(
    terms: Sequence[Term],
    errors: Sequence[Tensor],
    parts: Sequence[Tensor],
    margin: Tensor,
    weight: Tensor,
) -> dict[str, Tensor]:
    """Means over the pairs that are used, of winner and loser apart: a margin can also grow while
    both become worse. errors, parts: [B] of each term."""
    used = (weight > 0).to(margin)

    def mean(values: Tensor) -> Tensor:
        return (used * values).sum() / used.sum().clamp(min=1)

    statistics = {
        "margin": mean(margin),
        "accuracy": mean((margin > 0).to(margin)),
        "saturated": mean((margin.abs() > SATURATED).to(margin)),
    }
    for branch in ("winner", "loser"):
        own = [error for term, error in zip(terms, errors, strict=True) if term.branch == branch]
        statistics[f"{branch}_error"] = mean(torch.stack(own).mean(0))
    for step in sorted({term.step for term in terms}):
        own = [part for term, part in zip(terms, parts, strict=True) if term.step == step]
        statistics[f"margin_at_{step}"] = mean(torch.stack(own).sum(0))
    return statistics
