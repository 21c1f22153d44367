"""Recipes side by side, on a pocket lesson (measured) and on pictures that nothing can be measured of."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dopsd.compare import DEMO_STEPS, KEPT, MEASURES, compare, demo_recipe
from dopsd.pocket.exam import LESSON_FILE
from dopsd.recipe import Recipe, load_recipe, parse_recipe


def short(recipe: Recipe) -> Recipe:
    tree = recipe.model_dump()
    return parse_recipe(tree | {"train": tree["train"] | {"max_steps": 1}, "lora": {"rank": 2}})


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture()
def recipes(lesson: Path, tmp_path: Path) -> list[Recipe]:
    return [short(demo_recipe(method, lesson, tmp_path / "runs")) for method in ("dopsd", "sft")]


def test_a_lesson_is_examined_and_the_teacher_has_no_kept_measures(recipes, tmp_path):
    outcome = compare(recipes, tmp_path / "page.html", silent)
    assert list(outcome.numbers) == ["base", "teacher", "dopsd", "sft"]
    for name, row in outcome.numbers.items():
        for measure in MEASURES:
            assert (row[measure] is None) == (name == "teacher" and measure in KEPT)
    json.dumps(outcome.numbers)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") >= 4 * 8


def test_pictures_without_a_lesson_are_shown_not_measured_and_finished_runs_are_not_trained_again(recipes, tmp_path):
    (recipes[0].data.folder / LESSON_FILE).unlink()
    first = compare(recipes, tmp_path / "page.html", silent)
    files = [recipe.run_folder / f"{recipe.run_name}.safetensors" for recipe in recipes]
    stamps = [file.stat().st_mtime_ns for file in files]
    again = compare(recipes, tmp_path / "page.html", silent)
    assert first.header == ["model", "seconds", "pictures"] and again.numbers == first.numbers
    assert stamps == [file.stat().st_mtime_ns for file in files]


def test_lora_files_stand_beside_the_recipes_and_are_read_before_anything_is_trained(recipes, tmp_path):
    (recipes[0].data.folder / LESSON_FILE).unlink()
    compare(recipes[:1], tmp_path / "page.html", silent)
    file = recipes[0].run_folder / f"{recipes[0].run_name}.safetensors"
    other = tmp_path / "elsewhere.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, other)  # the form of another tool
    outcome = compare(recipes[:1], tmp_path / "page.html", silent, [other])
    assert list(outcome.numbers) == ["base", "dopsd", "elsewhere"]
    other.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        compare(recipes[1:], tmp_path / "page.html", silent, [other])
    assert not recipes[1].run_folder.exists()
    with pytest.raises(ValueError, match="at least one recipe"):
        compare([], tmp_path / "page.html", silent, [file])


def test_a_folder_with_a_run_of_another_recipe_is_refused(recipes, tmp_path):
    (recipes[0].data.folder / LESSON_FILE).unlink()
    compare(recipes[:1], tmp_path / "page.html", silent)
    other = parse_recipe(recipes[0].model_dump() | {"lora": {"rank": 3}})
    with pytest.raises(ValueError, match="another recipe"):
        compare([other], tmp_path / "page.html", silent)


@pytest.mark.parametrize("method", DEMO_STEPS)
def test_the_demo_is_what_the_pocket_identity_recipes_say(method, tmp_path):
    written = load_recipe(Path(__file__).parents[1] / "recipes" / f"pocket-identity-{method}.yaml")
    shown = demo_recipe(method, tmp_path, tmp_path)
    assert (written.train, written.lora, written.method) == (shown.train, shown.lora, shown.method)
