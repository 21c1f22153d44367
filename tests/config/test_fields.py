"""Paths of a recipe expand `~` and are local; names on the hub are not URLs."""

from pathlib import Path

import pytest

from dopsd.config.recipe import Recipe, parse_recipe

PATHS = (
    "output_dir",
    "data.folder",
    "data.more",
    "model.training_adapter",
    "sample.prompts",
)
NAMES = (
    "model.name_or_path",
    "model.vlm",
    "model.train_on",
    "model.distilled_by",
    "data.dataset",
    "health.text_model",
    "lora.init_from",
)


def recipe_with(key: str, value: str) -> Recipe:
    tree: dict = {
        "model": {"name_or_path": "pocket"},
        "data": {"folder": "images"},
        "method": {"name": "sft"},
        "run_name": "new",
    }
    section, _, name = key.partition(".")
    if key == "data.more":
        tree["data"]["more"] = [{"folder": value}]
    elif key == "sample.prompts":
        tree["sample"] = {"prompts": [{"prompt": "a cat", "references": value}]}
    elif name:
        tree[section] = tree.get(section, {}) | {name: value}
    else:
        tree[section] = value
    return parse_recipe(tree)


def value_of(recipe: Recipe, key: str) -> object:
    section, _, name = key.partition(".")
    value = getattr(getattr(recipe, section), name) if name else getattr(recipe, section)
    if key == "data.more":
        return value[0].folder
    if key == "lora.init_from":
        return value[0]
    return value[0].references[0] if key == "sample.prompts" else value


@pytest.mark.parametrize("key", PATHS + NAMES)
def test_every_path_expands_the_home_folder(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(value_of(recipe_with(key, "~/a/b"), key)) == "/home/someone/a/b"
    assert str(value_of(recipe_with(key, "a/~b"), key)) == "a/~b"


def test_a_file_of_replayed_prompts_expands_and_a_prompt_does_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert recipe_with("retention.prompts", "~/p.txt").retention.prompts == ("/home/someone/p.txt",)
    assert recipe_with("retention.prompts", "~ waves ~").retention.prompts == ("~ waves ~",)


def test_a_home_folder_that_does_not_exist_is_one_sentence():
    with pytest.raises(ValueError, match="~nobody-here has no home folder on this machine"):
        recipe_with("data.folder", "~nobody-here/images")


@pytest.mark.parametrize(
    "url", ["s3://bucket/runs", "gs://b/r", "https://host/x", "file:///home/x"]
)
@pytest.mark.parametrize("key", PATHS)
def test_a_url_is_not_taken_for_a_folder(key, url):
    with pytest.raises(ValueError, match=f"is '{url}': it is a URL, and only local files and fold"):
        recipe_with(key, url)


@pytest.mark.parametrize("key", NAMES)
def test_a_url_is_not_taken_for_a_name_on_the_hub(key):
    with pytest.raises(ValueError, match=r"it is a URL: give a name on the hub \(owner/name\)"):
        recipe_with(key, "https://huggingface.co/owner/name")


def test_a_url_that_lost_a_slash_and_a_drive_are_told_apart():
    with pytest.raises(ValueError, match="it is a URL"):
        recipe_with("output_dir", "s3:/bucket/runs")
    assert recipe_with("output_dir", "C:/runs").output_dir == Path("C:/runs")
    assert recipe_with("output_dir", "out: a/b").output_dir == Path("out: a/b")
