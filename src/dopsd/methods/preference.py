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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from dopsd.diffusion.batch import Context
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


def pairwise_losses(
    roles: Roles,
    context: Context,
    terms: Sequence[Term],
    beta: float,
    weight: Tensor,
    link: Link = "logistic",
    reference: bool = True,
    extra_log: Mapping[str, Tensor] | None = None,
) -> Iterator[Loss]:
    """The pieces of the loss of one batch of pairs.

    weight: [B], of each pair; 0 leaves a pair out. reference: whether errors are relative to the
    base model. extra_log: more numbers to report.
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


def normalised(weights: Sequence[Tensor]) -> list[Tensor]:
    """The same weights, 0-d each, divided by their mean."""
    return [weight / torch.stack(list(weights)).mean() for weight in weights]


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
