"""Editing rows: images that a caption turns into another, from metadata.jsonl to batches."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dopsd.data.cache import Row, prepare
from dopsd.data.folder import read_folder
from dopsd.data.loader import Loader
from dopsd.data.sources import Source, read_sources
from dopsd.diffusion.batch import Context


def image(path: Path, colour: str, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five rows: two with a square reference, one with a wide one, one with two, one with none."""
    folder = tmp_path / "pairs"
    for name, colour in {"a": "red", "b": "green", "c": "blue", "d": "white", "e": "black"}.items():
        image(folder / f"{name}.png", colour)
    image(folder / "before" / "square.png", "gray")
    image(folder / "before" / "wide.png", "gray", (96, 48))
    square, wide = "before/square.png", "before/wide.png"
    rows = [
        {"target": "a.png", "references": [square], "text": "make it red"},
        {"target": "b.png", "references": square, "text": "make it green"},
        {"target": "c.png", "references": [wide], "text": "make it blue"},
        {"target": "d.png", "references": [square, wide], "text": ["both in white", "white"]},
        {"file_name": "e.png", "text": "a black square"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_row_names_its_references_and_its_target(folder):
    examples = read_folder(folder).examples
    named = [
        [path.relative_to(folder).as_posix() for path in (e.path, *e.references)] for e in examples
    ]
    assert named == [
        ["a.png", "before/square.png"],
        ["b.png", "before/square.png"],
        ["c.png", "before/wide.png"],
        ["d.png", "before/square.png", "before/wide.png"],
        ["e.png"],
    ]
    triggered = read_sources([Source(folder, repeats=2, trigger="zib")]).examples
    assert (
        len(triggered) == 10
        and triggered[6].references == examples[3].references
        and triggered[6].caption.startswith("zib, ")
    )


def test_a_reference_beside_the_targets_needs_no_row_of_its_own(tmp_path):
    for name in ("before.png", "after.png"):
        image(tmp_path / name, "red")
    (tmp_path / "metadata.jsonl").write_text(
        '{"target": "after.png", "references": ["before.png"], "text": "x"}\n'
    )
    assert len(read_folder(tmp_path).examples) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"target": "a.png", "references": ["gone.png"], "text": "x"},
            "names gone.png, and there is no such file",
        ),
        ({"references": ["before/square.png"], "text": "x"}, "has references and no target"),
        ({"target": "a.png", "references": ["/etc/passwd"], "text": "x"}, "outside the folder"),
        ({"target": "a.png", "references": [3], "text": "x"}, "which is not a file name"),
        ({"target": "a.png", "references": ["notes.txt"], "text": "x"}, "notes.txt is not one of"),
        ({"target": "a.png", "references": ["broken.png"], "text": "x"}, "broken.png is not a"),
    ],
)
def test_a_row_whose_references_cannot_be_used_is_named(folder, row, message):
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_bytes(b"no image")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_folder(folder)
    assert len(read_folder(folder, skip_bad=True).examples) == 5


def test_the_fingerprint_of_a_folder_depends_on_the_references_of_each_row(folder):
    before = read_folder(folder).fingerprint()
    image(folder / "before" / "wide.png", "yellow", (96, 48))
    assert read_folder(folder).fingerprint() != before


class ColourEncoder:
    """A token for each letter; a reference is an extra in the shape of its pixels, so other sizes
    do not stack."""

    fingerprint = "colours"

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []  # (prompts, references of each)

    def context(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        references: Sequence[Sequence[Image.Image]] | None = None,
    ) -> Context:
        rows = [list(row) for row in references or [[]] * len(prompts)]
        self.asked.append((len(prompts), len(rows[0])))
        if images is not None:
            rows = [[*row, image] for row, image in zip(rows, images, strict=True)]
        columns = [
            [torch.zeros(image.height, image.width) for image in column]
            for column in zip(*rows, strict=True)
        ]
        extras = {f"image_{i}": torch.stack(column) for i, column in enumerate(columns)}
        texts = [Context(torch.full((1, len(p), 1), float(len(p))), (len(p),)) for p in prompts]
        return Context(Context.stack(texts).tokens, tuple(map(len, prompts)), extras)


class PlainVAE:
    fingerprint = "plain"

    def latents(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, ::16, ::16]

    def pixels(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def cached(folder: Path, text_encoder: ColourEncoder, privileged: bool = True) -> tuple[Row, ...]:
    examples = read_folder(folder).examples
    return prepare(
        examples,
        folder.parent / "cache",
        text_encoder,
        PlainVAE(),
        resolution=64,
        multiple=16,
        privileged=privileged,
        unconditional=True,
        device="cpu",
    )


def test_contexts_depend_on_their_references_and_are_encoded_again_only_for_others(folder):
    rows = cached(folder, ColourEncoder())
    assert (
        len({row.context for row in rows}) == 5
        and len({row.unconditional.context for row in rows}) == 4
    )  # a and b share
    again = ColourEncoder()
    cached(folder, again)
    assert again.asked == []
    image(folder / "before" / "wide.png", "yellow", (96, 48))
    cached(folder, again)
    assert sum(prompts for prompts, _ in again.asked) == 2 * (
        2 + 3
    )  # plain and privileged: of c 2 captions, of d 3


@pytest.mark.parametrize("privileged", [True, False])
def test_a_batch_holds_rows_of_one_target_size_and_of_references_of_one_number_and_size(
    folder, privileged
):
    loader = Loader(
        cached(folder, ColourEncoder(), privileged), batch_size=4, seed=0, caption_dropout=0.3
    )
    assert loader.batches_per_epoch == 4
    for epoch in range(3):
        batches = [loader.batch(4 * epoch + i) for i in range(4)]
        assert Counter(map(len, batches)) == {1: 3, 2: 1}
        for batch in batches:
            seen = [name for name, _ in batch.context.layout]
            if privileged:
                assert [name for name, _ in batch.privileged.layout] == [
                    *seen,
                    f"image_{len(seen)}",
                ]


def test_contexts_of_other_references_do_not_stack():
    one = ColourEncoder().context(["x"], references=[[Image.new("RGB", (32, 16))]])
    for other in ([[]], [[Image.new("RGB", (16, 32))]]):
        with pytest.raises(AssertionError, match="several layouts"):
            Context.stack([one, ColourEncoder().context(["x"], references=other)])
