"""Replayed prompts beside the batches: `at(index)` is a pure function of (seed, index)."""

from collections.abc import Sequence

import numpy as np
import torch

from dopsd.diffusion.batch import Context, Replay


class Replays:
    """For the first micro-batch of each optimizer step, rows drawn from all of one size.

    groups: the rows of each size. count: rows of a step. micro_batches: of a step.
    """

    def __init__(self, groups: Sequence[Replay], count: int, micro_batches: int, seed: int):
        assert all(len(group) for group in groups), "a group without a prompt"
        self._groups, self._count = tuple(groups), count
        self._micro_batches, self._seed = micro_batches, seed

    def at(self, index: int) -> Replay | None:
        """The rows for micro-batch `index`, on the CPU; None where its step has had them."""
        if index % self._micro_batches:
            return None
        rng = np.random.default_rng([self._seed, index, 3])
        group = self._groups[rng.integers(len(self._groups))]
        rows = [int(row) for row in rng.integers(len(group), size=self._count)]
        return Replay(
            Context.stack([group.context.row(row) for row in rows]),
            None if group.latents is None else torch.stack([group.latents[row] for row in rows]),
        )
