"""Captions that a text encoder does not take are all named, with their images."""

import pytest
from image_folders import write_image
from transformers import AutoTokenizer

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.models import load_family
from dopsd.models.prompt_limits import refuse_unfit
from dopsd.runs.resolve import resolve

CAPTIONS = {"a": "a star", "b": "long " * 900, "c": "a <|image_pad|> star", "d": "x " * 1000}


def recipe_for(folder, method: str = "sft", **data) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket"},
            "data": {"folder": str(folder)} | data,
            "method": {"name": method},
            "run_name": "run",
        }
    )


@pytest.fixture()
def folder(tmp_path):
    for name, caption in CAPTIONS.items():
        write_image(tmp_path / f"{name}.png", size=(64, 64)).with_suffix(".txt").write_text(caption)
    return tmp_path


@pytest.mark.parametrize("method", ["sft", "dopsd"])
def test_all_captions_that_do_not_fit_are_named(method, folder):
    with pytest.raises(ValueError, match="the captions of 3 of 4 images do not fit") as refused:
        resolve(recipe_for(folder, method))
    message = str(refused.value)
    assert "b.png makes " in message and "d.png makes " in message
    assert "c.png contains <|image_pad|>" in message and "a.png" not in message
    assert "data.skip_bad: true" in message


def test_with_skip_bad_their_images_are_left_out_and_listed(folder):
    run = resolve(recipe_for(folder, skip_bad=True))
    assert [example.path.name for example in run.listing.examples] == ["a.png"]
    assert sorted(path.name for path, _ in run.listing.refused) == ["b.png", "c.png", "d.png"]
    assert len(run.sizes[0]) == 1
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match="Nothing is left to train on"):
        resolve(recipe_for(folder, skip_bad=True))


def test_a_caption_that_fits_alone_but_not_beside_the_teachers_image_is_named(folder, monkeypatch):
    for name in "bcd":
        (folder / f"{name}.txt").write_text("a star")
    monkeypatch.setattr("dopsd.models.qwen3_prompts.PRIVILEGED_TOKENS", 1)
    assert resolve(recipe_for(folder))
    with pytest.raises(ValueError, match="captions of 4 of 4 images do not fit"):
        resolve(recipe_for(folder, "dopsd"))


def test_marks_of_each_tokenizer_are_refused_and_ordinary_text_is_not(sdxl):
    qwen = AutoTokenizer.from_pretrained(load_family("pocket").checkpoint.folder / "tokenizer")
    clip = AutoTokenizer.from_pretrained(sdxl("turbo") / "tokenizer_2")
    for tokenizer in (qwen, clip):
        for mark in tokenizer.all_special_tokens:
            if len(mark) > 1:
                with pytest.raises(ValueError, match="a mark of its own"):
                    refuse_unfit(tokenizer, ["a star", f"a {mark} star"], [1, 1], [9, 9])
        refuse_unfit(tokenizer, ["hello! <b> | a star |>", "[trigger]", "<|"], [1] * 3, [9] * 3)
