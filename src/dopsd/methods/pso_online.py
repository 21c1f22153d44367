"""PSO, online (arXiv:2410.03190): two walks of the student a prompt, and a reward says which image
is better.

Some steps of the walks draw fresh noise (eta), the others are the sampler's own. At each of those,
the velocity wanted is the one that the walk's next state implies; the better walk is the winner.
The label holds for the whole pair.
margin = beta sum_k w_k [ E_k(loser) - E_k(winner) ]               E as in `preference`, w_k as in `pso`, normalised
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Step, noise_like, transition
from dopsd.diffusion.rollout import rollout
from dopsd.methods.base import Loss, Need, Roles, row_errors
from dopsd.methods.preference import Branch, Preference, Term, normalised, pairwise_losses

Index = Annotated[int, Field(ge=0)]


class PSOOnline(Preference):
    """Pairs whose images score alike, or one of which has no score (NaN), are dropped."""

    name: Literal["pso_online"] = "pso_online"
    reward: str = Field(
        min_length=1,
        description="Scores pictures, higher is better: red, pickscore, clip, ... or package.module:callable.",
        examples=["pickscore"],
    )
    eta: float = Field(
        default=0.5, ge=0.01, le=1, description="Noise of the steps below: r = sin(eta pi/2)."
    )
    start: Literal["shared", "own"] = Field(
        default="shared",
        description="Start and sampler's own noise: shared, so that the trained steps decide; own is the paper's code.",
    )
    stochastic_steps: tuple[Index, ...] | None = Field(
        default=None,
        min_length=1,
        description="Steps that draw noise and are trained; default: the second and third.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"base", "reward"})

    @property
    def reward_name(self) -> str:
        return self.reward

    def refuse_nfe(self, nfe: int) -> None:
        if nfe == 1:
            raise ValueError(
                "pso_online needs a walk of 2 steps or more: the last step draws no noise. Set method.nfe."
            )
        if late := [step for step in self.stochastic_steps or () if step >= nfe - 1]:
            able = f"a walk of {nfe} steps draws noise at 0 to {nfe - 2}"
            raise ValueError(f"method.stochastic_steps names step {late[0]}, and {able}.")

    def _stochastic(self, nfe: int) -> tuple[int, ...]:
        own = self.stochastic_steps or tuple(range(1, min(3, nfe - 1))) or (0,)
        return tuple(sorted(set(own)))

    def forwards(self, nfe: int) -> int:
        return 2 * nfe + 10 * len(self._stochastic(nfe))

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        assert roles.score is not None, "the run must bring a judge"
        schedule = roles.schedule(self.nfe, *batch.latents.shape[-2:])
        chosen = self._stochastic(schedule.nfe)
        schedule = schedule.stochastic(self.eta, chosen)
        first = noise_like(batch.latents, rng)
        starts = (first, first if self.start == "shared" else noise_like(first, rng))
        drawn = Random(rng.initial_seed())  # no tensor: the forecast walks where none has a value
        seeds = [[drawn.getrandbits(62) for _ in range(schedule.nfe)] for _ in starts]
        if (
            self.start == "shared"
        ):  # what the sampler itself draws, at steps that are not trained, decides nothing
            seeds[1] = [
                (own if k in chosen else other)
                for k, (other, own) in enumerate(zip(*seeds, strict=True))
            ]
        with torch.no_grad():
            rollouts = [
                list(rollout(roles.student, start, schedule, batch.context, _drawing(own, rng)))
                for start, own in zip(starts, seeds, strict=True)
            ]
        ends = [sample[-1].z_next for sample in rollouts]
        scores = torch.stack([roles.score(end, batch.prompts).to(end) for end in ends])
        better = _better(scores)
        moves = [transition(step) for step in schedule.steps() if step.index in chosen]
        terms = []
        for k, move, weight in zip(
            chosen, moves, normalised([move.weight for move in moves]), strict=True
        ):
            first, second = (sample[k] for sample in rollouts)
            t = first.step.now.to(first.z).expand(len(first.z))
            sides: dict[Branch, Tensor] = {"winner": better > 0, "loser": better < 0}
            for branch, is_first in sides.items():
                rows = is_first.view(-1, 1, 1, 1)
                z, z_next = (
                    torch.where(rows, a, b)
                    for a, b in ((first.z, second.z), (first.z_next, second.z_next))
                )
                terms.append(Term(branch, k, z, t, move.implied(z, z_next), weight))
        told = {"score": scores.nanmean(), "diversity": row_errors(*ends).sqrt().mean()}
        yield from pairwise_losses(
            roles, batch.context, terms, self.beta, batch.weight * (better != 0), told=told
        )


def _drawing(seeds: list[int], rng: torch.Generator) -> Callable[[Step], torch.Generator]:
    """A generator of its own for each step of a walk, where `rng` lives."""
    return lambda step: torch.Generator(rng.device).manual_seed(seeds[step.index])


def _better(scores: Tensor) -> Tensor:
    """Of scores [2, B]: 1 where the first walk won, -1 where the second did, 0 for a tie or a
    missing score."""
    return (scores[0] - scores[1]).sign().nan_to_num(0)
