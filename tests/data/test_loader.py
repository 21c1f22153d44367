"""Batches are a pure function of (seed, index): every row once an epoch, one size a batch."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dopsd.data.cache import Row
from dopsd.data.examples import Example
from dopsd.data.loader import BucketVisits, Loader, count_visits
from dopsd.data.replay import Replays
from dopsd.diffusion.batch import Batch, Replay
from dopsd.files import write_tensors

SIZES = [(64, 64)] * 7 + [(96, 48)] * 3 + [(48, 96)] * 1


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[Row]:
    """Eleven rows of three sizes; row i has latents full of i and i + 1 tokens full of i."""
    return [cached_row(tmp_path_factory.mktemp("cache"), i, size) for i, size in enumerate(SIZES)]


def cached_row(folder: Path, i: int, size: tuple[int, int]) -> Row:
    latents, context, privileged = (
        folder / f"{i}.{kind}" for kind in ("latents", "context", "privileged")
    )
    write_tensors(latents, {"latents": torch.full((4, size[1] // 8, size[0] // 8), float(i))})
    for path, length in ((context, i + 1), (privileged, i + 3)):
        mask = torch.ones(length, dtype=torch.bool)
        write_tensors(
            path,
            {
                "tokens": torch.full((length, 2), float(i)),
                "mask": mask,
                "extra.pooled": torch.ones(5),
            },
        )
    return Row(Example(folder / f"{i}.png", str(i)), size, latents, context, privileged)


def epoch(loader: Loader, number: int) -> list[Batch]:
    each = loader.batches_per_epoch
    return [loader.batch(number * each + i) for i in range(each)]


def order(loader: Loader, number: int) -> list[tuple[str, ...]]:
    return [batch.prompts for batch in epoch(loader, number)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
def test_every_row_comes_exactly_once_an_epoch(rows, batch_size):
    loader = Loader(rows, batch_size, seed=0)
    assert loader.batches_per_epoch == {1: 11, 2: 7, 3: 5, 4: 4, 100: 3}[batch_size]
    for number in range(5):
        batches = order(loader, number)
        assert Counter(p for prompts in batches for p in prompts) == Counter(map(str, range(11)))
        assert all(len(prompts) <= batch_size for prompts in batches)


def test_a_batch_holds_one_size_and_what_belongs_together(rows):
    for batch in epoch(Loader(rows, 3, seed=1), 0):
        indices = [int(prompt) for prompt in batch.prompts]
        width, height = SIZES[indices[0]]
        assert {SIZES[i] for i in indices} == {(width, height)}
        assert batch.latents.shape == (len(indices), 4, height // 8, width // 8)
        assert batch.latents[:, 0, 0, 0].tolist() == indices
        assert torch.equal(batch.weight, torch.ones(len(indices)))
        for context, surplus in ((batch.context, 1), (batch.privileged, 3)):
            assert list(context.lengths) == [i + surplus for i in indices]
            assert context.tokens[:, 0, 0].tolist() == indices and not any(
                t[n:].any() for t, n in zip(context.tokens, context.lengths, strict=True)
            )
            assert context.extras["pooled"].shape == (len(indices), 5)


def test_a_batch_depends_on_seed_and_index_alone(rows):
    straight = Loader(rows, 2, seed=3)
    first = [straight.batch(i) for i in range(20)]
    resumed = Loader(rows, 2, seed=3)
    for i in (19, 4, 11, 4):
        again = resumed.batch(i)
        assert again.prompts == first[i].prompts and torch.equal(again.latents, first[i].latents)
        assert torch.equal(again.context.tokens, first[i].context.tokens)


def test_epochs_and_seeds_differ_in_order(rows):
    loader = Loader(rows, 2, seed=3)
    assert len({tuple(order(loader, number)) for number in range(5)}) == 5
    assert order(Loader(rows, 2, seed=4), 0) != order(loader, 0)


def test_sizes_come_in_shuffled_order(rows):
    loader = Loader(rows, 4, seed=0)
    assert (
        len(
            {
                tuple(SIZES[int(prompts[0])] for prompts in order(loader, number))
                for number in range(8)
            }
        )
        > 1
    )


def test_files_are_read_once_at_the_start(rows, tmp_path):
    own = [cached_row(tmp_path, i, (64, 64)) for i in range(3)]
    loader = Loader(own, 2, seed=0)
    for path in tmp_path.iterdir():
        path.unlink()
    assert len(order(loader, 0)) == 2


def test_rows_without_privileged_contexts_give_batches_without_them(rows):
    plain = [Row(row.example, row.size, row.latents, row.context, None) for row in rows]
    assert Loader(plain, 2, seed=0).batch(0).privileged is None


def test_nothing_to_train_on_and_empty_batches_are_refused(rows):
    with pytest.raises(ValueError, match="no examples"):
        Loader([], 1, seed=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Loader(rows, 0, seed=0)


def captioned(row: Row, folder: Path, caption: str) -> Row:
    """The same image with another caption of its own."""
    other = cached_row(folder, 100 + sum(caption.encode()), row.size)
    return replace(other, example=replace(row.example, caption=caption), latents=row.latents)


@pytest.fixture()
def with_three_captions(rows, tmp_path) -> list[Row]:
    """The rows, each with two further captions (`0b`, `0c`, ...) and the empty one."""
    return [
        replace(
            row,
            also=tuple(captioned(row, tmp_path, f"{i}{letter}") for letter in "bc"),
            unconditional=captioned(row, tmp_path, ""),
        )
        for i, row in enumerate(rows)
    ]


def test_an_epoch_draws_one_caption_a_row_and_epochs_differ(with_three_captions):
    loader = Loader(with_three_captions, 2, seed=0)
    drawn = Counter()
    for number in range(60):
        prompts = [prompt for batch in order(loader, number) for prompt in batch]
        assert sorted(prompt.rstrip("bc") for prompt in prompts) == sorted(map(str, range(11)))
        drawn.update("own" if prompt.isdigit() else prompt[-1] for prompt in prompts)
    assert set(drawn) == {"own", "b", "c"} and min(drawn.values()) > 60 * 11 / 3 * 0.8


def test_captions_are_dropped_in_the_given_share_with_their_context(with_three_captions):
    loader = Loader(with_three_captions, 4, seed=0, caption_dropout=0.25)
    seen = [
        (batch, i)
        for number in range(60)
        for batch in epoch(loader, number)
        for i in range(len(batch))
    ]
    dropped = [(batch, i) for batch, i in seen if batch.prompts[i] == ""]
    assert 0.2 < len(dropped) / len(seen) < 0.3
    assert all(
        batch.context.tokens[i, 0, 0] == 100 and batch.privileged.tokens[i, 0, 0] == 100
        for batch, i in dropped
    )


def test_weights_of_a_folder_reach_the_batch(rows):
    weighted = [
        replace(row, example=replace(row.example, weight=1 + i / 4)) for i, row in enumerate(rows)
    ]
    for batch in epoch(Loader(weighted, 3, seed=0), 0):
        assert batch.weight.tolist() == [1 + int(prompt) / 4 for prompt in batch.prompts]


def paired(rows: list[Row]) -> list[Row]:
    """Each row with the latents of the other rows of its size as rejected ones, or of itself where
    it is alone."""
    others = [
        tuple(other.latents for other in rows if other.size == row.size and other is not row)
        for row in rows
    ]
    return [
        replace(row, rejected=latents or (row.latents,))
        for row, latents in zip(rows, others, strict=True)
    ]


def test_rejected_images_come_with_the_batch_and_all_are_drawn_in_time(rows):
    loader = Loader(paired(rows), 3, seed=0)
    seen: dict[str, set[float]] = {}
    for index in range(200):
        batch = loader.batch(index)
        assert batch.rejected is not None and batch.rejected.shape == batch.latents.shape
        for prompt, rejected in zip(
            batch.prompts, batch.rejected[:, 0, 0, 0].tolist(), strict=True
        ):
            seen.setdefault(prompt, set()).add(rejected)
    assert seen["0"] == {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}
    again = Loader(paired(rows), 3, seed=0)
    assert torch.equal(again.batch(7).rejected, loader.batch(7).rejected)


def test_class_images_come_beside_every_batch_and_replayed_prompts_beside_some(rows):
    context = Loader(rows, 11, seed=0)._contexts[rows[4].context]
    replays = Replays([Replay(context)], count=3, micro_batches=5, seed=0)
    loader = Loader(rows[:7], 2, seed=0, prior=rows[7:10], replays=replays)
    for index in (0, 5, 12):
        batch = loader.batch(index)
        assert batch.prior is not None and set(batch.prior.prompts) <= {"7", "8", "9"}
        assert (batch.replay is None) == (index == 12)
        if batch.replay:
            assert batch.replay.context.tokens[:, 0, 0].tolist() == [4.0] * 3
    seen = {prompt for index in range(6) for prompt in loader.batch(index).prior.prompts}
    assert seen == {"7", "8", "9"}
    plain = Loader(rows[:7], 2, seed=0).batch(3)
    assert plain.prior is None and plain.replay is None and plain.rejected is None


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("batches", [0, 1, 4, 11, 30])
def test_visits_are_counted_as_the_loader_makes_them(rows, batch_size, batches):
    loader = Loader(rows, batch_size, seed=5)
    prompts = [prompt for i in range(batches) for prompt in loader.batch(i).prompts]
    counted = count_visits([(size,) for size in SIZES], batch_size, 5, batches)
    for size, bucket in counted.items():
        of_size = [prompt for prompt in prompts if SIZES[int(prompt)] == size]
        assert bucket.visits == len(of_size) and bucket.visited == len(set(of_size))
        assert bucket.rows == SIZES.count(size)
    assert sum(b.batches_per_epoch for b in counted.values()) == loader.batches_per_epoch


def test_small_buckets_make_fewer_visits_than_steps_times_batch_size():
    """Eight steps of 4 images are not 32 images where no bucket holds 4."""
    sizes = [(64, 64), (64, 64), (96, 48), (48, 96), (80, 56), (56, 80), (72, 56), (56, 72)]
    counted = count_visits([(size,) for size in sizes], 4, seed=0, batches=8)
    assert sum(bucket.visits for bucket in counted.values()) == 10
    assert counted[64, 64].rows == 2 and counted[64, 64].batches_per_epoch == 1


def test_images_that_are_edited_from_other_sizes_are_batches_of_their_own():
    kinds = [((64, 64), (64, 64)), ((64, 64), (64, 64)), ((64, 64), (96, 48)), ((64, 64),)]
    counted = count_visits(kinds, 4, seed=0, batches=3)
    assert counted == {(64, 64): BucketVisits(rows=4, batches_per_epoch=3, visits=4, visited=4)}
