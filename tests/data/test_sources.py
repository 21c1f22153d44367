"""Several folders are one listing; repeats, weights and triggers are each folder's own."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dopsd.config.recipe import parse_recipe
from dopsd.data.sources import Source, read_sources, show_next_image, split_captions
from dopsd.runs.resolve import read_data


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
    own, others = (
        folder_of(tmp_path, "own", "a zib"),
        folder_of(tmp_path, "others", "a dog", "a cat"),
    )
    listing = read_sources([Source(own, repeats=3), Source(others, weight=0.5)])
    assert [(e.caption, e.weight) for e in listing.examples] == [("a zib", 1.0)] * 3 + [
        ("a dog", 0.5),
        ("a cat", 0.5),
    ]
    assert str(own) in listing.source and str(others) in listing.source


def test_a_trigger_belongs_to_its_own_folder(tmp_path):
    own = folder_of(tmp_path, "own", "a zib on grass", ["on sand", "zib, asleep"])
    regularisation = folder_of(tmp_path, "dogs", "a dog")
    style = folder_of(tmp_path, "style", "a house in [trigger] style")
    sources = [Source(own, trigger="zib"), Source(regularisation), Source(style, trigger="brux")]
    assert [(e.caption, e.also) for e in read_sources(sources).examples] == [
        ("a zib on grass", ()),
        ("zib, on sand", ("zib, asleep",)),
        ("a dog", ()),
        ("a house in brux style", ()),
    ]


def test_a_recipes_trigger_does_not_reach_further_folders(tmp_path):
    """The documented recipe: a thing with a trigger, and a regularisation folder in `more`."""
    tree = {
        "model": {"name_or_path": "pocket"},
        "method": {"name": "sft"},
        "run_name": "new",
        "data": {
            "folder": str(folder_of(tmp_path, "own", "on grass")),
            "trigger": "zib",
            "more": [
                {"folder": str(folder_of(tmp_path, "dogs", "a dog"))},
                {"folder": str(folder_of(tmp_path, "cats", "on grass")), "trigger": "brux"},
            ],
        },
    }
    captions = [e.caption for e in read_data(parse_recipe(tree)).examples]
    assert captions == ["zib, on grass", "a dog", "brux, on grass"]


def test_images_without_captions_take_the_instance_prompt_or_the_trigger_alone(tmp_path):
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    listing = read_sources([Source(tmp_path, trigger="zib")])
    assert [e.caption for e in listing.examples] == ["zib", "zib"]
    assert listing.source == "the trigger alone"
    (tmp_path / "1.txt").write_text("asleep")
    listing = read_sources([Source(tmp_path, trigger="zib")])
    assert [e.caption for e in listing.examples] == ["zib", "zib, asleep"]
    assert listing.source == ".txt files and the trigger alone"
    prompted = read_sources([Source(tmp_path, "a small dog", "zib")]).examples
    assert [e.caption for e in prompted] == ["zib, a small dog", "zib, asleep"]


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "is \\[\\], which is not text"),
        (["a", ""], "is empty"),
        (["a", 3], "is 3, which is not text"),
    ],
)
def test_a_list_of_captions_is_checked_like_one(captions, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_sources([Source(folder_of(tmp_path, "own", captions))])


def test_a_teacher_that_sees_another_image_sees_the_next_one_of_the_same_folder(tmp_path):
    own, others = (
        folder_of(tmp_path, "own", "a", "b", "c"),
        folder_of(tmp_path, "others", "d", "e"),
    )
    listing = show_next_image(read_sources([Source(own, repeats=2), Source(others)]))
    seen = {
        (e.path.parent.name, e.path.stem): (e.shown.parent.name, e.shown.stem)
        for e in listing.examples
    }
    assert seen == {
        ("own", "0"): ("own", "1"),
        ("own", "1"): ("own", "2"),
        ("own", "2"): ("own", "0"),
        ("others", "0"): ("others", "1"),
        ("others", "1"): ("others", "0"),
    }
    with pytest.raises(ValueError, match="holds one image"):
        show_next_image(read_sources([Source(folder_of(tmp_path, "single", "a"))]))


def test_every_caption_can_have_an_example_of_its_own(tmp_path):
    listing = split_captions(
        read_sources([Source(folder_of(tmp_path, "own", ["a", "b"], "c"), weight=0.5)])
    )
    assert [(e.path.stem, e.caption, e.also, e.weight) for e in listing.examples] == [
        ("0", "a", (), 0.5),
        ("0", "b", (), 0.5),
        ("1", "c", (), 0.5),
    ]
