"""Batches from cached rows: `batch(index)` is a pure function of (seed, index), without workers.

So a resumed run, or a second process, asks for the same index and gets the same batch. Which index
belongs to which process is left to the training loop.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dopsd.data.cache import Row, read_context, read_latents, read_mask
from dopsd.data.replay import Replays
from dopsd.diffusion.batch import Batch, Context
from dopsd.images import Size


class Loader:
    """Rows in shuffled batches of one size (of the image, and of those it is edited from).

    Within an epoch every row comes exactly once, with one of its captions (or, in a share
    `caption_dropout`, the empty one) and one of its rejected images, if it has any. The last batch
    of a size is smaller where its rows are no multiple of `batch_size`. prior: rows of which a
    further batch comes with every batch. replays: other prompts, of which some batches bring a few.
    Each file is read once, at the start; its tensors stay in memory on the CPU.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        seed: int,
        caption_dropout: float = 0.0,
        prior: Sequence[Row] = (),
        replays: Replays | None = None,
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
        self._masks = {row.mask: read_mask(row.mask) for row in rows if row.mask}
        versions = [version for row in rows for version in row.versions]
        contexts = dict.fromkeys(
            path for row in versions for path in (row.context, row.privileged) if path
        )
        self._contexts = {path: read_context(path) for path in contexts}
        self._kinds = [self._kind(row) for row in self.rows]
        self._prior = Loader(prior, batch_size, seed) if prior else None
        self._replays = replays

    @property
    def batches_per_epoch(self) -> int:
        """Batches that visit every row once."""
        return batches_per_epoch(self._kinds, self.batch_size)

    def batch(self, index: int) -> Batch:
        """Batch number `index` of the endless sequence of epochs, counted from 0."""
        epoch, position = divmod(index, self.batches_per_epoch)
        batches = shuffled_batches(self._kinds, self.batch_size, self.seed, epoch)
        rows = [self._with_drawn_caption(i, epoch) for i in batches[position]]
        privileged = [self._contexts[row.privileged] for row in rows if row.privileged]
        rejected = [
            self._latents[file]
            for i, row in enumerate(rows)
            if (file := self._drawn(row.rejected, index, i))
        ]
        assert len(privileged) in (0, len(rows)), "privileged contexts of all rows, or of none"
        assert len(rejected) in (0, len(rows)), "rejected images of all rows, or of none"
        return Batch(
            latents=torch.stack([self._latents[row.latents] for row in rows]),
            context=Context.stack([self._contexts[row.context] for row in rows]),
            prompts=tuple(row.example.caption for row in rows),
            weight=torch.tensor([row.example.weight for row in rows]),
            mask=self._mask_of(rows),
            privileged=Context.stack(privileged) if privileged else None,
            rejected=torch.stack(rejected) if rejected else None,
            prior=self._prior.batch(index) if self._prior else None,
            replay=self._replays.at(index) if self._replays else None,
        )

    def _mask_of(self, rows: Sequence[Row]) -> Tensor | None:
        """Weights at latent positions, 1 for rows without a mask; None where no row has one."""
        if not any(row.mask for row in rows):
            return None
        blank = torch.ones(1, *self._latents[rows[0].latents].shape[-2:])
        return torch.stack([self._masks[row.mask] if row.mask else blank for row in rows])

    def _drawn(self, files: Sequence[Path], index: int, position: int) -> Path | None:
        """One of the files, by the seed, for the row at this position of batch `index`."""
        if not files:
            return None
        rng = np.random.default_rng([self.seed, index, position, 2])
        return files[int(rng.integers(len(files)))]

    def _with_drawn_caption(self, index: int, epoch: int) -> Row:
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


def batches_per_epoch(kinds: Sequence[Hashable], batch_size: int) -> int:
    """Batches that visit every row once. kinds: of each row; a batch holds rows of one kind."""
    return sum(-(-count // batch_size) for count in Counter(kinds).values())


def shuffled_batches(
    kinds: Sequence[Hashable], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """An epoch's batches as indices of rows: shuffled, grouped by kind, cut, and the batches
    shuffled again. kinds: of each row."""
    rng = np.random.default_rng([seed, epoch])
    groups: dict[Hashable, list[int]] = {}
    for i in rng.permutation(len(kinds)):
        groups.setdefault(kinds[i], []).append(int(i))
    batches = [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
    return [batches[i] for i in rng.permutation(len(batches))]


@dataclass(frozen=True)
class BucketVisits:
    """How a bucket takes part in a run.

    rows: examples of this size, which an epoch visits once each. batches_per_epoch: batches that
    takes; the last is smaller where `rows` is no multiple of the batch size. visits: examples that
    the run trains on, repeated ones counted each time. visited: different ones among them.
    """

    rows: int
    batches_per_epoch: int
    visits: int
    visited: int


def count_visits(
    kinds: Sequence[tuple[Size, *tuple[Hashable, ...]]], batch_size: int, seed: int, batches: int
) -> dict[Size, BucketVisits]:
    """What the first `batches` batches of a `Loader` train on, by the size of the image.

    A step takes `gradient_accumulation_steps` batches, and a batch holds images of one kind, so
    small buckets give small batches: steps x batch size overstates the images seen. kinds: of each
    row, (size of the image, sizes of the images it is edited from).
    """
    epochs, rest = divmod(batches, batches_per_epoch(kinds, batch_size))
    visits = [epochs] * len(kinds)
    for batch in shuffled_batches(kinds, batch_size, seed, epochs)[:rest]:
        for row in batch:
            visits[row] += 1
    buckets = {}
    for size in dict.fromkeys(kind[0] for kind in kinds):
        of_size = [i for i, kind in enumerate(kinds) if kind[0] == size]
        buckets[size] = BucketVisits(
            rows=len(of_size),
            batches_per_epoch=batches_per_epoch([kinds[i] for i in of_size], batch_size),
            visits=sum(visits[i] for i in of_size),
            visited=sum(visits[i] > 0 for i in of_size),
        )
    return buckets
