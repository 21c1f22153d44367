"""Recipes side by side, on a pocket concept dataset (measured) and on images that nothing can be
measured of."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import Recipe, load_recipe, parse_recipe
from dopsd.models.pipeline import sample
from dopsd.pocket.benchmark import CONCEPT_FILE, concept_of
from dopsd.pocket.demo import DEMO_STEPS, demo_recipe
from dopsd.runs.comparison.budget import on_budget_of
from dopsd.runs.comparison.compare import _tuned, compare
from dopsd.runs.comparison.table import KEPT, METRICS
from dopsd.runs.outputs.folder import read_rows

THING = 1_000_100  # of conftest.concept dataset


def short(recipe: Recipe) -> Recipe:
    tree = recipe.model_dump()
    return parse_recipe(tree | {"train": tree["train"] | {"max_steps": 1}, "lora": {"rank": 2}})


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture()
def recipes(concept: Path, tmp_path: Path) -> list[Recipe]:
    return [short(demo_recipe(method, concept, tmp_path / "runs")) for method in ("dopsd", "sft")]


@pytest.mark.slow
def test_a_lesson_is_examined_and_the_teacher_has_no_kept_measures(recipes, tmp_path):
    outcome = compare(recipes, tmp_path / "page.html", silent)
    assert list(outcome.numbers) == ["base", "base, other noise", "teacher", "dopsd", "sft"]
    base = outcome.numbers["base"]["nfe"]["4"]
    for name, found in outcome.numbers.items():
        for metric in METRICS:
            score = found["nfe"]["4"][metric]
            assert (score is None) == (name == "teacher" and metric in KEPT)
            if score and metric != "bleed":
                assert score["difference"]["value"] == pytest.approx(
                    score["value"] - base[metric]["value"], abs=1e-9
                )
    assert base["bleed"]["value"] == 0
    json.dumps(outcome.numbers)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 8 * (5 + 3 + 3)  # truth and four models; three; three
    answers = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "answers").iterdir()}
    assert len(answers) == 5
    assert compare(recipes, tmp_path / "page.html", silent).numbers == outcome.numbers
    assert answers == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "answers").iterdir()
    }


@pytest.fixture()
def unavailable(recipes) -> list[Recipe]:
    """The same recipes on images that are no concept dataset."""
    (recipes[0].data.folder / CONCEPT_FILE).unlink()
    return recipes


def test_pictures_without_a_lesson_are_shown_and_finished_runs_are_not_trained_again(
    unavailable, tmp_path
):
    first = compare(unavailable, tmp_path / "page.html", silent, nfes=(1, 2))
    files = [recipe.run_folder / f"{recipe.run_name}.safetensors" for recipe in unavailable]
    stamps = [file.stat().st_mtime_ns for file in files]
    again = compare(unavailable, tmp_path / "page.html", silent, nfes=(1, 2))
    assert first.header == ["model", "NFE", "bleed", "seconds", "images", "forwards"]
    assert [row[:2] for row in first.table[:2]] == [["base", "1"], ["base", "2"]]
    assert again.numbers == first.numbers
    assert stamps == [file.stat().st_mtime_ns for file in files]
    assert (
        first.numbers["dopsd"]["forwards"] == 4 * 16 and first.numbers["sft"]["forwards"] == 4 * 3
    )


def test_bleed_is_how_much_nearer_neutral_prompts_come_to_the_pictures(
    unavailable, tmp_path, pocket
):
    recipe = unavailable[0]
    outcome = compare([recipe], tmp_path / "page.html", silent)
    lora = recipe.run_folder / f"{recipe.run_name}.safetensors"
    targets = [
        np.asarray(Image.open(path)) / 255 for path in sorted(recipe.data.folder.glob("*.png"))
    ]

    def nearest(tuned: Path | None) -> float:
        far = []
        for prompt in pocket.unrelated_prompts:
            for image in sample("pocket", [prompt] * 2, tuned, seed=960_000):
                far.append(
                    min(
                        np.sqrt(np.mean((np.asarray(image) / 255 - target) ** 2))
                        for target in targets
                    )
                )
        return float(np.mean(far))

    found = outcome.numbers["dopsd"]["nfe"]["4"]["bleed"]
    assert found["value"] == pytest.approx(nearest(None) - nearest(lora), abs=1e-5)
    assert found["low"] <= found["value"] <= found["high"]


@pytest.mark.parametrize("rule", ["forwards", "seconds"])
def test_others_are_trained_on_the_first_recipes_budget(unavailable, tmp_path, rule):
    numbers = compare(unavailable, tmp_path / "page.html", silent, nfes=(1,), equal=rule).numbers
    first, other = numbers["dopsd"], numbers["sft"]
    if rule == "seconds":
        rows = read_rows(unavailable[1].output_dir / "sft-equal-seconds" / "metrics.jsonl")
        budget = round(first["seconds"], 1)
        assert other["seconds"] >= budget > other["seconds"] - rows[-1]["seconds"]
    else:
        assert other[rule] == pytest.approx(first[rule], abs=12)  # less than a step of SFT
    assert not (unavailable[1].output_dir / "sft").exists()


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(unavailable, tmp_path):
    page, (one, two) = tmp_path / "page.html", unavailable
    cosine = parse_recipe(
        two.model_dump() | {"train": two.model_dump()["train"] | {"lr_schedule": "cosine"}}
    )
    with pytest.raises(ValueError, match="no pocket lesson"):
        compare(unavailable, page, silent, replicates=2)
    with pytest.raises(ValueError, match="dopsd is there twice"):
        compare([one, one], page, silent)
    assert on_budget_of(one, two, "images", 4).train.max_steps == one.train.max_steps
    with pytest.raises(ValueError, match="use --equal forwards"):
        on_budget_of(one, cosine, "seconds", 4, 1.0)
    with pytest.raises(ValueError, match="give the longer recipe first"):
        on_budget_of(two, one, "forwards", 4)
    assert not one.run_folder.exists()


def test_units_are_further_lessons_each_with_trainings_of_its_own(recipes, tmp_path):
    tuned = _tuned(recipes[1:], None, 2, 4, silent)
    assert [candidate.lora.parent.name for candidate in tuned[0].candidates] == [
        "sft",
        f"sft-{THING + 1}",
    ]
    folder = tmp_path / "runs" / "lessons" / str(THING + 1)
    assert concept_of(folder) == THING + 1 and len(list(folder.glob("*.png"))) == 4
    assert tuned[0].cost["images"] == 4


def test_lora_files_stand_beside_the_recipes_and_are_read_before_anything_is_trained(
    recipes, tmp_path
):
    (recipes[0].data.folder / CONCEPT_FILE).unlink()
    compare(recipes[:1], tmp_path / "page.html", silent, nfes=(1,))
    file = recipes[0].run_folder / f"{recipes[0].run_name}.safetensors"
    other = tmp_path / "elsewhere.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, other)  # the form of another tool
    outcome = compare(recipes[:1], tmp_path / "page.html", silent, [other], nfes=(1,))
    assert list(outcome.numbers) == ["base", "base, other noise", "dopsd", "elsewhere"]
    other.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        compare(recipes[1:], tmp_path / "page.html", silent, [other])
    assert not recipes[1].run_folder.exists()
    with pytest.raises(ValueError, match="at least one recipe"):
        compare([], tmp_path / "page.html", silent, [file])


def test_a_folder_with_a_run_of_another_recipe_is_refused(recipes, tmp_path):
    (recipes[0].data.folder / CONCEPT_FILE).unlink()
    compare(recipes[:1], tmp_path / "page.html", silent)
    other = parse_recipe(recipes[0].model_dump() | {"lora": {"rank": 3}})
    with pytest.raises(ValueError, match="another recipe"):
        compare([other], tmp_path / "page.html", silent)


@pytest.mark.parametrize("method", DEMO_STEPS)
def test_the_demo_is_what_the_pocket_identity_recipes_say(method, tmp_path):
    written = load_recipe(Path(__file__).parents[3] / "recipes" / f"pocket-identity-{method}.yaml")
    shown = demo_recipe(method, tmp_path, tmp_path)
    assert (written.train, written.lora, written.method) == (shown.train, shown.lora, shown.method)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--nfe", "0"], "--nfe 0: give numbers of forwards from 1"),
        (["--nfe", "1,,4"], "--nfe 1,,4: give numbers"),
        (["--nfe", "many"], "--nfe many: give numbers"),
        (
            ["--equal", "effort"],
            "--equal effort is no budget: give one of images, seconds, forwards.",
        ),
    ],
)
def test_bad_options_are_one_sentence(option, sentence):
    result = CliRunner().invoke(app, ["compare", "recipe.yaml", *option])
    assert result.exit_code == 2 and sentence in " ".join(result.output.split())


def test_a_damaged_answer_is_named_and_the_others_are_kept(unavailable, tmp_path):
    compare(unavailable[:1], tmp_path / "page.html", silent, nfes=(1,))
    files = sorted((tmp_path / "runs" / "answers").iterdir())
    files[0].write_bytes(b"")
    with pytest.raises(ValueError, match=f"{files[0].name} is not a readable safetensors file"):
        compare(unavailable[:1], tmp_path / "page.html", silent, nfes=(1,))
    files[0].unlink()
    stamps = {file: file.stat().st_mtime_ns for file in files[1:]}
    compare(unavailable[:1], tmp_path / "page.html", silent, nfes=(1,))
    assert files[0].is_file() and stamps == {file: file.stat().st_mtime_ns for file in files[1:]}
