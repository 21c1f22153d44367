"""Replayed prompts: the first micro-batch of each step has them, by seed and index alone."""

import torch

from dopsd.data.replay import Replays
from dopsd.diffusion.batch import Context, Replay


def group(value: float, rows: int, side: int) -> Replay:
    """Rows whose token and latents hold value + their number; the contexts differ in length."""
    contexts = [Context(torch.full((1, 1 + i, 2), value + i), (1 + i,)) for i in range(rows)]
    latents = torch.arange(rows).view(-1, 1, 1, 1).expand(rows, 1, side, side) + value
    return Replay(Context.stack(contexts), latents)


def test_the_first_micro_batch_of_each_step_has_the_rows():
    replays = Replays([group(0, 4, 2)], count=3, micro_batches=4, seed=0)
    assert [replays.at(index) is not None for index in range(9)] == [i % 4 == 0 for i in range(9)]
    assert len(replays.at(4)) == 3


def test_a_row_keeps_its_prompt_and_its_image_together():
    replays = Replays([group(0, 5, 2), group(10, 5, 3)], count=2, micro_batches=1, seed=0)
    drawn = set()
    for index in range(60):
        rows = replays.at(index)
        values = rows.context.tokens[:, 0, 0].tolist()
        assert rows.latents[:, 0, 0, 0].tolist() == values
        assert rows.latents.shape[-1] == (2 if values[0] < 10 else 3)
        assert list(rows.context.lengths) == [1 + value % 10 for value in values]
        drawn |= set(values)
    assert drawn == {*range(5), *range(10, 15)}


def test_rows_depend_on_the_seed_and_the_index_and_on_nothing_drawn_before():
    def rows(seed: int, index: int) -> list[float]:
        replays = Replays([group(0, 100, 2)], count=8, micro_batches=2, seed=seed)
        return replays.at(index).context.tokens[:, 0, 0].tolist()

    assert rows(0, 6) == rows(0, 6)
    assert rows(0, 6) != rows(0, 8) and rows(0, 6) != rows(1, 6)


def test_prompts_without_images_have_none():
    replays = Replays([Replay(group(0, 3, 2).context)], count=1, micro_batches=1, seed=0)
    assert replays.at(0).latents is None
