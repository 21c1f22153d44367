"""Batches from cached rows. `batch(index)` is a pure function of (seed, index): no state, no
workers.

So a resumed run, or a second process, asks for the same index and gets the same batch. Which index
belongs to whom is left to the training loop.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch

from dopsd.data.cache import Row, read_context, read_latents
from dopsd.diffusion.batch import Batch, Context


class Loader:
    """Rows in shuffled batches of one size (of the image, and of those it is edited from). Within
    an epoch every row comes exactly once, with one of its captions (or, in a share
    `caption_dropout`, with the empty one) and one of its rejected images, if it has any; a size's
    last batch may be smaller. prior: rows that come beside, a batch with every batch; replay:
    contexts of other prompts, likewise. Each file is read once, at the start, and its tensors stay
    in memory on the CPU."""

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        seed: int,
        caption_dropout: float = 0.0,
        prior: Sequence[Row] = (),
        replay: Context | None = None,
    ):
        if not rows:
            raise ValueError("there are no examples to train on.")
        if batch_size < 1:
            raise ValueError(f"train.batch_size is {batch_size}; it must be at least 1.")
        self.rows = tuple(rows)
        self.batch_size = batch_size
        self.seed = seed
        self.caption_dropout = caption_dropout
        images = dict.fromkeys(path for row in rows for path in (row.latents, *row.rejected))
        self._latents = {path: read_latents(path) for path in images}
        versions = [version for row in rows for version in row.versions]
        contexts = dict.fromkeys(
            path for row in versions for path in (row.context, row.privileged) if path
        )
        self._contexts = {path: read_context(path) for path in contexts}
        self._prior = Loader(prior, batch_size, seed) if prior else None
        self._replay = replay

    @property
    def batches_per_epoch(self) -> int:
        """Batches that visit every row once."""
        return sum(
            -(-count // self.batch_size) for count in Counter(map(self._kind, self.rows)).values()
        )

    def batch(self, index: int) -> Batch:
        """Batch number `index` of the endless sequence of epochs, counted from 0."""
        epoch, position = divmod(index, self.batches_per_epoch)
        rows = [self._captioned(i, epoch) for i in self._epoch(epoch)[position]]
        privileged = [self._contexts[row.privileged] for row in rows if row.privileged]
        rejected = [
            self._latents[file]
            for i, row in enumerate(rows)
            if (file := self._drawn(row.rejected, index, i))
        ]
        assert len(privileged) in (0, len(rows)), (
            "either all rows have a privileged context, or none"
        )
        assert len(rejected) in (0, len(rows)), "either all rows have a rejected picture, or none"
        return Batch(
            latents=torch.stack([self._latents[row.latents] for row in rows]),
            context=Context.stack([self._contexts[row.context] for row in rows]),
            prompts=tuple(row.example.caption for row in rows),
            weight=torch.tensor([row.example.weight for row in rows]),
            privileged=Context.stack(privileged) if privileged else None,
            rejected=torch.stack(rejected) if rejected else None,
            prior=self._prior.batch(index) if self._prior else None,
            replay=self._replayed(index, len(rows)) if self._replay else None,
        )

    def _drawn(self, files: Sequence[Path], index: int, place: int) -> Path | None:
        """One of the files, by the seed, for the row at this place of batch `index`."""
        return (
            files[int(np.random.default_rng([self.seed, index, place, 2]).integers(len(files)))]
            if files
            else None
        )

    def _replayed(self, index: int, count: int) -> Context:
        """`count` of the other prompts for batch `index`."""
        assert self._replay is not None
        drawn = np.random.default_rng([self.seed, index, 3]).integers(len(self._replay), size=count)
        return Context.stack([self._replay.row(int(i)) for i in drawn])

    def _captioned(self, index: int, epoch: int) -> Row:
        """The row with the caption that this epoch draws for it."""
        row = self.rows[index]
        rng = np.random.default_rng([self.seed, epoch, index, 1])
        if row.unconditional and rng.random() < self.caption_dropout:
            return row.unconditional
        return (row, *row.also)[rng.integers(1 + len(row.also))]

    def _kind(self, row: Row) -> Hashable:
        """What the rows of a batch share: the image's size, and the layouts of its contexts."""
        return row.size, *(
            self._contexts[path].layout for path in (row.context, row.privileged) if path
        )

    def _epoch(self, epoch: int) -> list[list[int]]:
        """The epoch's batches as indices of rows: shuffled, grouped by kind, cut, and the batches
        shuffled again."""
        rng = np.random.default_rng([self.seed, epoch])
        groups: dict[Hashable, list[int]] = {}
        for i in rng.permutation(len(self.rows)):
            groups.setdefault(self._kind(self.rows[i]), []).append(int(i))
        cut = self.batch_size
        batches = [
            group[start : start + cut]
            for group in groups.values()
            for start in range(0, len(group), cut)
        ]
        return [batches[i] for i in rng.permutation(len(batches))]
