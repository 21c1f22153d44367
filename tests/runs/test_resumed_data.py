"""What a resumed run may find changed: where the data lies, and that the result is gone."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.runs.train import train


def recipe_for(folder: Path, output: Path, **train_settings) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(folder)},
            "method": {"name": "sft"},
            "lora": {"rank": 2},
            "train": {"max_steps": 2} | train_settings,
            "sample": {"every": 0, "prompts": "a star", "unrelated": 0},
            "health": {"every": 0},
            "save": {"every": 1, "keep_last": None},
            "output_dir": str(output),
            "run_name": "run",
        }
    )


def resumed(recipe: Recipe, resume: str = "latest") -> int:
    """The steps that a resumed run trains."""
    return len(list(train(recipe, resume)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with `data/` and the finished run of two steps on it."""
    from dopsd.pocket.world.datasets import write_concept

    folder = tmp_path_factory.mktemp("finished")
    write_concept(folder / "data", 1_000_100)
    list(train(recipe_for(folder / "data", folder / "runs")))
    return folder


@pytest.fixture()
def work(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


def change_caption(data: Path) -> None:
    file = data / "metadata.jsonl"
    if file.is_file():
        file.write_text(file.read_text().replace('"text": "', '"text": "another ', 1))
    else:
        next(iter(sorted(data.glob("*.txt")))).write_text("another caption")


def remove_image(data: Path) -> None:
    """The last image, with its caption."""
    image = sorted(data.glob("*.png"))[-1]
    image.unlink()
    image.with_suffix(".txt").unlink(missing_ok=True)
    file = data / "metadata.jsonl"
    if file.is_file():
        lines = [line for line in file.read_text().splitlines() if image.name not in line]
        file.write_text("\n".join(lines))


def reorder(data: Path) -> None:
    """Another order of the same images: the first one gets a name behind all others."""
    image = sorted(data.glob("*.png"))[0]
    image.rename(data / "zzz.png")
    caption = image.with_suffix(".txt")
    if caption.is_file():
        caption.rename(data / "zzz.txt")
    file = data / "metadata.jsonl"
    if file.is_file():
        file.write_text(file.read_text().replace(image.name, "zzz.png"))


@pytest.mark.parametrize("change", [change_caption, remove_image, reorder])
def test_data_that_changed_is_refused(change, work):
    change(work / "data")
    with pytest.raises(ValueError, match=r"images or captions of .* have changed since it"):
        resumed(recipe_for(work / "data", work / "runs", max_steps=3))


def test_data_that_moved_is_the_same_data(work):
    (work / "data").rename(work / "elsewhere")
    assert resumed(recipe_for(work / "elsewhere", work / "runs", max_steps=3)) == 1


def test_a_result_that_was_removed_is_exported_again(work):
    recipe = recipe_for(work / "data", work / "runs")
    before = load_file(recipe.result())
    recipe.result().unlink()
    assert resumed(recipe) == 0
    after = load_file(recipe.result())
    assert before.keys() == after.keys() and all((before[k] == after[k]).all() for k in before)


def test_fewer_steps_than_are_done_are_refused(work):
    recipe = recipe_for(work / "data", work / "runs", max_steps=1)
    recipe.result().unlink()
    with pytest.raises(ValueError, match=r"is at step 2, and train\.max_steps is 1"):
        resumed(recipe)
    assert not recipe.result().exists()
    assert resumed(recipe, str(work / "runs" / "run" / "checkpoints" / "step-000001")) == 0
    assert recipe.result().exists(), "exported from the checkpoint that was named"


def test_a_cosine_schedule_is_not_stretched(work):
    config = work / "runs" / "run" / "config.yaml"
    config.write_text(config.read_text().replace("constant", "cosine"))
    with pytest.raises(ValueError, match="cosine falls to 0 at that step"):
        resumed(recipe_for(work / "data", work / "runs", max_steps=4, lr_schedule="cosine"))
    assert resumed(recipe_for(work / "data", work / "runs", lr_schedule="cosine")) == 0
