"""Several folders are one listing: repeats, weights, trigger word, several captions an image."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dopsd.data.sources import Source, one_caption_each, read_sources, seen_in_turn


def folder_of(parent: Path, name: str, *captions: str | list[str]) -> Path:
    folder = parent / name
    folder.mkdir()
    rows = []
    for index, caption in enumerate(captions):
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_each_folder_brings_its_repeats_and_its_weight(tmp_path):
    mine, others = (
        folder_of(tmp_path, "mine", "a zib"),
        folder_of(tmp_path, "others", "a dog", "a cat"),
    )
    listing = read_sources([Source(mine, repeats=3), Source(others, weight=0.5)])
    assert [(e.caption, e.weight) for e in listing.examples] == [("a zib", 1.0)] * 3 + [
        ("a dog", 0.5),
        ("a cat", 0.5),
    ]
    assert str(mine) in listing.source and str(others) in listing.source


def test_the_trigger_is_put_before_captions_that_lack_it(tmp_path):
    folder = folder_of(tmp_path, "mine", "a zib on grass", ["on sand", "zib, asleep"])
    examples = read_sources([Source(folder)], trigger="zib").examples
    assert [(e.caption, e.also) for e in examples] == [
        ("a zib on grass", ()),
        ("zib, on sand", ("zib, asleep",)),
    ]


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        ([], "is \\[\\], which is not text"),
        (["a", ""], "is empty"),
        (["a", 3], "is 3, which is not text"),
    ],
)
def test_a_list_of_captions_is_checked_like_one(captions, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_sources([Source(folder_of(tmp_path, "mine", captions))])


def test_a_teacher_that_sees_another_picture_sees_the_next_one_of_the_same_folder(tmp_path):
    mine, others = (
        folder_of(tmp_path, "mine", "a", "b", "c"),
        folder_of(tmp_path, "others", "d", "e"),
    )
    listing = seen_in_turn(read_sources([Source(mine, repeats=2), Source(others)]))
    seen = {
        (e.path.parent.name, e.path.stem): (e.shown.parent.name, e.shown.stem)
        for e in listing.examples
    }
    assert seen == {
        ("mine", "0"): ("mine", "1"),
        ("mine", "1"): ("mine", "2"),
        ("mine", "2"): ("mine", "0"),
        ("others", "0"): ("others", "1"),
        ("others", "1"): ("others", "0"),
    }
    with pytest.raises(ValueError, match="holds one picture"):
        seen_in_turn(read_sources([Source(folder_of(tmp_path, "single", "a"))]))


def test_every_caption_can_have_an_example_of_its_own(tmp_path):
    listing = one_caption_each(
        read_sources([Source(folder_of(tmp_path, "mine", ["a", "b"], "c"), weight=0.5)])
    )
    assert [(e.path.stem, e.caption, e.also, e.weight) for e in listing.examples] == [
        ("0", "a", (), 0.5),
        ("0", "b", (), 0.5),
        ("1", "c", (), 0.5),
    ]
