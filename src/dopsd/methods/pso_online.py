"""PSO, online (arXiv:2410.03190): for each prompt two rollouts of the student, ranked by a reward.

some steps of the rollouts draw fresh noise (eta), the others are the sampler's own
at each of those steps  wanted = the velocity that the rollout's own next state implies
winner, loser = the rollouts with the higher and the lower reward of their final images
margin = beta sum_k w_k [ E_k(loser) - E_k(winner) ]
E_k and w_k as in `preference`; clip limits each exp(-w_k E_k) to 1 - clip ... 1 + clip
"""

from collections.abc import Callable, Collection, Iterator
from random import Random
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.flow import Schedule, Step, noise_like, transition
from dopsd.diffusion.rollout import RolloutStep, rollout
from dopsd.methods.base import Loss, Need, Roles, row_errors
from dopsd.methods.preference import Branch, RolloutPreference, Term, pairwise_losses

Index = Annotated[int, Field(ge=0)]


class PSOOnline(RolloutPreference):
    """Pairs with equal scores, or with a missing score (NaN), are left out."""

    name: Literal["pso_online"] = "pso_online"
    reward: str = Field(
        min_length=1,
        description="Scores images, higher is better: red, pickscore, clip, ... or "
        "package.module:callable.",
        examples=["pickscore"],
    )
    start: Literal["shared", "own"] = Field(
        default="shared",
        description="Start and the sampler's own noise of the two rollouts: shared, so that only "
        "the trained steps differ; own, as in the paper's code.",
    )
    stochastic_steps: tuple[Index, ...] | None = Field(
        default=None,
        min_length=1,
        description="Steps that draw noise and are trained; default: the second and third.",
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Limits the density ratio of student and base at each step to 1 - clip ... "
        "1 + clip; 0.1 in the published code.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"base", "reward"})

    @property
    def reward_name(self) -> str:
        return self.reward

    def noisy_steps(self, nfe: int) -> Collection[int]:
        default = tuple(range(1, min(3, nfe - 1))) or (0,)
        return tuple(sorted(set(self.stochastic_steps or default)))

    def refuse_schedule(self, schedule: Schedule) -> None:
        nfe = schedule.nfe
        if nfe == 1:
            raise ValueError(
                "pso_online needs a sampler of 2 steps or more: the last step draws no noise. "
                "Set method.nfe."
            )
        if late := [step for step in self.stochastic_steps or () if step >= nfe - 1]:
            raise ValueError(
                f"method.stochastic_steps names step {late[0]}, and a sampler of {nfe} steps draws "
                f"noise at 0 to {nfe - 2}."
            )
        super().refuse_schedule(schedule)

    def forwards(self, nfe: int) -> int:
        # Two rollouts; for each trained step and branch student, base, and student with backward
        return 2 * nfe + 10 * len(self.noisy_steps(nfe))

    def losses(self, roles: Roles, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        assert roles.score is not None, "the run must provide a reward"
        schedule = roles.schedule(self.nfe, *batch.latents.shape[-2:])
        trained = self.noisy_steps(schedule.nfe)
        schedule = self.noisy_schedule(schedule)

        # Two rollouts for each prompt
        first_start = noise_like(batch.latents, rng)
        second_start = first_start if self.start == "shared" else noise_like(first_start, rng)
        first_seeds, second_seeds = self._noise_seeds(rng.initial_seed(), schedule.nfe, trained)

        def states(start: Tensor, seeds: list[int]) -> list[RolloutStep]:
            noise = _generator_of_step(seeds, rng.device)
            return list(rollout(roles.student, start, schedule, batch.context, noise))

        with torch.no_grad():
            first, second = states(first_start, first_seeds), states(second_start, second_seeds)

        # The reward names the winner
        ends = [first[-1].z_next, second[-1].z_next]
        scores = torch.stack([roles.score(end, batch.prompts).to(end) for end in ends])
        order = (scores[0] - scores[1]).sign().nan_to_num(0)  # [B]: 1 = first won, 0 = left out

        # A winner and a loser at each trained step
        steps = [step for step in schedule.steps() if step.index in trained]
        weights = self.weights_of(steps)
        terms = []
        for step, weight in zip(steps, weights, strict=True):
            one, other = first[step.index], second[step.index]
            takes_first: dict[Branch, Tensor] = {"winner": order > 0, "loser": order < 0}
            for branch, from_first in takes_first.items():
                rows = from_first.view(-1, 1, 1, 1)
                z = torch.where(rows, one.z, other.z)
                z_next = torch.where(rows, one.z_next, other.z_next)
                wanted = transition(step).implied(z, z_next)
                terms.append(Term(branch, step.index, z, one.t, wanted, weight))
        extra_log = {"score": scores.nanmean(), "diversity": row_errors(*ends).sqrt().mean()}
        pair_weight = batch.weight * (order != 0)
        yield from pairwise_losses(
            roles,
            batch.context,
            terms,
            self.beta,
            pair_weight,
            extra_log=extra_log,
            clip=self.clip,
        )

    def _noise_seeds(self, seed: int, nfe: int, trained: Collection[int]) -> list[list[int]]:
        """A seed for each step of both rollouts. With a shared start, steps that are not trained
        share theirs: noise that the loss does not see must not decide who wins. Python's generator
        draws them, so that the memory forecast, whose tensors have no values, can run; all are of
        2^31 and above, where no seed of an image lies (see `training/seeds.py`)."""
        draw = Random(seed)
        first, second = ([2**31 + draw.getrandbits(31) for _ in range(nfe)] for _ in range(2))
        if self.start == "shared":
            second = [second[k] if k in trained else first[k] for k in range(nfe)]
        return [first, second]


def _generator_of_step(seeds: list[int], device: torch.device) -> Callable[[Step], torch.Generator]:
    return lambda step: torch.Generator(device).manual_seed(seeds[step.index])
