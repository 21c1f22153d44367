"""Pairwise preference, which PSO and Diffusion-DPO share: a margin over states of two branches, and
its gradient.

E_k     = |u(z_k) - wanted_k|^2 - |u_base(z_k) - wanted_k|^2        relative to the base model
margin  = beta sum_k [ w_k E_k(loser) - w_k E_k(winner) ]
loss    = -log sigmoid(margin)      or, as a hinge, max(0, 1 - margin)

The margin couples all states of both branches, and its gradient is still a sum of single errors'
gradients, each times a number: d loss / d E_k = -loss'(margin) beta w_k for the winner, minus that
for the loser. So a first pass without gradient finds the margins, and a second yields one weighted
error a piece: exact, with one forward's memory.
"""

from collections.abc import Iterator, Sequence
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
SATURATED = 4.0  # margins beyond it have a gradient below 2 percent


@dataclass(frozen=True)
class Term:
    """A state of a branch: z [B, C, h, w] at t [B], and the velocity wanted there. step: of the
    walk, for the log; weight: one number, or one a row [B]."""

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
    told: dict[str, Tensor] | None = None,
) -> Iterator[Loss]:
    """The pieces of one batch of pairs. weight: [B], 0 drops a pair. reference: errors relative to
    the base model. told: further numbers for the log."""
    with torch.no_grad():
        errors = [row_errors(roles.student(term.z, term.t, context), term.wanted) for term in terms]
        if reference:
            base_tensors = [
                row_errors(roles.base(term.z, term.t, context), term.wanted) for term in terms
            ]
            errors = [error - base for error, base in zip(errors, base_tensors, strict=True)]
        pulls = [beta * term.weight * (1.0 if term.branch == "loser" else -1.0) for term in terms]
        parts = [pull * error for pull, error in zip(pulls, errors, strict=True)]
        margin = torch.stack(parts).sum(0)
        slope = -torch.sigmoid(-margin) if link == "logistic" else -(margin < 1).to(margin)
        loss = -logsigmoid(margin) if link == "logistic" else (1 - margin).clamp(min=0)
        log = {
            "loss": (weight * loss).mean(),
            **_story(terms, errors, parts, margin, weight),
            **(told or {}),
        }
    for index, (term, pull) in enumerate(zip(terms, pulls, strict=True)):
        error = row_errors(roles.student(term.z, term.t, context), term.wanted)
        last = index == len(terms) - 1
        yield Loss((weight * slope * pull * error).mean(), log if last else {}, last)


def normalised(weights: Sequence[Tensor]) -> list[Tensor]:
    """The same weights, 0-d, with mean 1."""
    return [weight / torch.stack(list(weights)).mean() for weight in weights]


def _story(
    terms: Sequence[Term],
    errors: Sequence[Tensor],
    parts: Sequence[Tensor],
    margin: Tensor,
    weight: Tensor,
) -> dict[str, Tensor]:
    """Winner and loser apart: a margin can grow by ruining both branches. Means over the pairs that
    count."""
    counts = (weight > 0).to(margin)

    def mean(values: Tensor) -> Tensor:
        return (counts * values).sum() / counts.sum().clamp(min=1)

    story = {
        "pairs": counts.sum(),
        "margin": mean(margin),
        "accuracy": mean((margin > 0).to(margin)),
        "saturated": mean((margin.abs() > SATURATED).to(margin)),
    }
    for branch in ("winner", "loser"):
        own = [error for term, error in zip(terms, errors, strict=True) if term.branch == branch]
        story[f"{branch}_error"] = mean(torch.stack(own).mean(0))
    for step in sorted({term.step for term in terms}):
        own = [part for term, part in zip(terms, parts, strict=True) if term.step == step]
        story[f"margin_at_{step}"] = mean(torch.stack(own).sum(0))
    return story
