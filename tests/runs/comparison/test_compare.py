"""Comparisons of recipes, on a pocket concept (a benchmark) and on plain images."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import Recipe, load_recipe, parse_recipe
from dopsd.models.pipeline import sample
from dopsd.pocket.benchmark import METRICS
from dopsd.pocket.world.datasets import CONCEPT_FILE, concept_of
from dopsd.runs.comparison.budget import on_budget_of, rule_of
from dopsd.runs.comparison.compare import Repeat, compare, train_recipes
from dopsd.runs.comparison.evaluate import Candidate, Evaluator
from dopsd.runs.outputs.folder import read_rows

RECIPES = Path(__file__).parents[3] / "recipes"
THING = 1_000_100  # of the fixture `concept`
NOT_OF_THE_TEACHER = METRICS[3:]  # metrics that are measured on prompts without an image


def short(recipe: Recipe) -> Recipe:
    tree = recipe.model_dump()
    return parse_recipe(tree | {"train": tree["train"] | {"max_steps": 1}, "lora": {"rank": 2}})


def silent(what: str, done: int, total: int) -> None:
    pass


def recipe_of(method: str, data: Path, folder: Path) -> Recipe:
    """recipes/pocket-identity-<method>.yaml on this data, as the run <method>."""
    file = RECIPES / f"pocket-identity-{method}.yaml"
    places = (f"data.folder={data}", f"output_dir={folder}", f"run_name={method}")
    return load_recipe(file, (*places, "sample.every=0", "save.every=0"))


@pytest.fixture()
def recipes(concept: Path, tmp_path: Path) -> list[Recipe]:
    return [short(recipe_of(method, concept, tmp_path / "runs")) for method in ("dopsd", "sft")]


@pytest.mark.slow
def test_a_concept_is_measured_and_the_teacher_only_on_the_thing(recipes, tmp_path):
    outcome = compare(recipes, tmp_path / "page.html", silent)
    assert list(outcome.numbers) == [
        *("base", "base, other noise", "teacher", "teacher, another image"),
        *("dopsd", "sft"),
    ]
    base = outcome.numbers["base"]["nfe"]["2"]
    for name, numbers in outcome.numbers.items():
        for metric in METRICS:
            score = numbers["nfe"]["2"][metric]
            assert (score is None) == (name.startswith("teacher") and metric in NOT_OF_THE_TEACHER)
            if score and metric != "bleed":
                assert score["difference"]["value"] == pytest.approx(
                    score["value"] - base[metric]["value"], abs=1e-9
                )
    assert base["bleed"]["value"] == 0
    json.dumps(outcome.numbers)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 8 * (6 + 3 + 3)  # truth and five models; three; three
    cache = tmp_path / "runs" / "answers"
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(written) == 6
    assert compare(recipes, tmp_path / "page.html", silent).numbers == outcome.numbers
    assert written == {path: path.stat().st_mtime_ns for path in cache.iterdir()}


@pytest.fixture()
def plain(recipes) -> list[Recipe]:
    """The same recipes on plain images, which belong to no benchmark."""
    (recipes[0].data.folder / CONCEPT_FILE).unlink()
    return recipes


def test_plain_images_are_shown_and_finished_runs_are_not_trained_again(plain, tmp_path):
    first = compare(plain, tmp_path / "page.html", silent, nfes=(1, 2))
    files = [recipe.run_folder / f"{recipe.run_name}.safetensors" for recipe in plain]
    stamps = [file.stat().st_mtime_ns for file in files]
    again = compare(plain, tmp_path / "page.html", silent, nfes=(1, 2))
    assert first.header == ["model", "NFE", "bleed", "seconds", "images", "forwards"]
    assert [row[:2] for row in first.table[:2]] == [["base", "1"], ["base", "2"]]
    assert again.numbers == first.numbers
    assert stamps == [file.stat().st_mtime_ns for file in files]
    assert first.numbers["dopsd"]["forwards"] == 4 * 8 and first.numbers["sft"]["forwards"] == 4 * 3


def test_bleed_is_how_much_nearer_neutral_prompts_come_to_the_images(plain, tmp_path, pocket):
    recipe = plain[0]
    outcome = compare([recipe], tmp_path / "page.html", silent)
    lora = recipe.run_folder / f"{recipe.run_name}.safetensors"
    targets = [
        np.asarray(Image.open(path)) / 255 for path in sorted(recipe.data.folder.glob("*.png"))
    ]

    def nearest(tuned: Path | None) -> float:
        errors = []
        for prompt in pocket.unrelated_prompts:
            for image in sample("pocket", [prompt] * 2, tuned, seed=960_000):
                errors.append(
                    min(
                        np.sqrt(np.mean((np.asarray(image) / 255 - target) ** 2))
                        for target in targets
                    )
                )
        return float(np.mean(errors))

    bleed = outcome.numbers["dopsd"]["nfe"]["2"]["bleed"]
    assert bleed["value"] == pytest.approx(nearest(None) - nearest(lora), abs=1e-5)
    assert bleed["low"] <= bleed["value"] <= bleed["high"]


@pytest.mark.parametrize("rule", ["forwards", "seconds"])
def test_others_are_trained_on_the_first_recipes_budget(plain, tmp_path, rule):
    numbers = compare(plain, tmp_path / "page.html", silent, nfes=(1,), equal=rule).numbers
    first, other = numbers["dopsd"], numbers["sft"]
    if rule == "seconds":
        rows = read_rows(plain[1].output_dir / "sft-equal-seconds" / "metrics.jsonl")
        budget = round(first["seconds"], 1)
        assert other["seconds"] >= budget > other["seconds"] - rows[-1]["seconds"]
    else:
        assert other[rule] == pytest.approx(first[rule], abs=12)  # less than a step of SFT
    assert not (plain[1].output_dir / "sft").exists()


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(plain, tmp_path):
    page, (one, two) = tmp_path / "page.html", plain
    cosine = parse_recipe(
        two.model_dump() | {"train": two.model_dump()["train"] | {"lr_schedule": "cosine"}}
    )
    with pytest.raises(ValueError, match="belongs to no benchmark"):
        compare(plain, page, silent, replicates=2)
    with pytest.raises(ValueError, match="two runs are called dopsd"):
        compare([one, one], page, silent)
    assert on_budget_of(one, two, "images", 4).train.max_steps == one.train.max_steps
    with pytest.raises(ValueError, match="use --equal forwards"):
        on_budget_of(one, cosine, "seconds", 4, 1.0)
    with pytest.raises(ValueError, match="give the longer recipe first"):
        on_budget_of(two, one, "forwards", 4)
    assert not one.run_folder.exists()


def test_models_of_two_revisions_are_not_compared(plain, tmp_path):
    one, two = plain
    pinned = parse_recipe(
        two.model_dump() | {"model": two.model_dump()["model"] | {"revision": "v2"}}
    )
    with pytest.raises(ValueError, match=r"differ in model\.revision"):
        compare([one, pinned], tmp_path / "page.html", silent)


def test_replicates_are_further_things_each_with_trainings_of_its_own(recipes, tmp_path):
    (tuned,) = train_recipes(recipes[1:], None, [Repeat(0), Repeat(1)], 4, silent)
    folders = [lora.path.parent.name for candidate in tuned.candidates for lora in candidate.loras]
    assert folders == ["sft", f"sft-{THING + 1}"]
    folder = tmp_path / "runs" / "replicates" / str(THING + 1)
    assert concept_of(folder) == ("thing", THING + 1) and len(list(folder.glob("*.png"))) == 4
    assert tuned.cost["images"] == 4


def test_each_seed_is_trained_once_in_a_run_folder_of_its_own(plain, tmp_path):
    alone = compare(plain[:1], tmp_path / "page.html", silent, nfes=(1,))
    folder = plain[0].run_folder
    stamp = (folder / "metrics.jsonl").stat().st_mtime_ns
    outcome = compare(plain[:1], tmp_path / "page.html", silent, nfes=(1,), seeds=(0, 1, 2))

    # The recipe's own seed is not trained again, and the others are other trainings.
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == stamp
    loras = [
        folder.parent / name / f"{name}.safetensors"
        for name in ("dopsd", "dopsd-seed1", "dopsd-seed2")
    ]
    weights = [load_file(lora) for lora in loras]
    assert all(any((a[k] != b[k]).any() for k in a) for a, b in pairwise(weights))

    # Values are means over seeds, and the spread over them is told.
    bleed = outcome.numbers["dopsd"]["nfe"]["1"]["bleed"]
    assert bleed["replicates"][0] == alone.numbers["dopsd"]["nfe"]["1"]["bleed"]["value"]
    assert bleed["value"] == pytest.approx(np.mean(bleed["replicates"]))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    spread = np.std(bleed["replicates"], ddof=1)
    sentence = "Standard deviation over the 3 trainings of each recipe at 1 forwards"
    assert f"{sentence}: dopsd bleed {spread:.3f}" in page


def test_a_seed_is_given_once_and_runs_keep_names_of_their_own(plain, tmp_path):
    named = parse_recipe(plain[1].model_dump() | {"run_name": "dopsd-seed1"})
    with pytest.raises(ValueError, match="--seeds 1,1: give each seed once"):
        compare(plain, tmp_path / "page.html", silent, seeds=(1, 1))
    with pytest.raises(ValueError, match="two runs are called dopsd-seed1"):
        compare([plain[0], named], tmp_path / "page.html", silent, seeds=(0, 1))


def test_a_teachers_cached_results_are_of_its_own_suffix_and_context(recipes, tmp_path):
    teacher, base = Candidate("teacher", "teacher"), Candidate("base", "base")

    def results(suffix: str | None, candidate: Candidate) -> dict[str, np.ndarray]:
        model = recipes[0].model_dump()["model"] | {"teacher_suffix": suffix}
        recipe = parse_recipe(recipes[0].model_dump() | {"model": model})
        evaluator = Evaluator(recipe, tmp_path / "answers")
        return dict(evaluator.results(candidate, (1,))[1].values)

    usual, other = (results(suffix, teacher)["thing_error"] for suffix in (None, "on night"))
    assert (usual != other).any()
    np.testing.assert_array_equal(results(None, teacher)["thing_error"], usual)
    results(None, base)
    count = len(list((tmp_path / "answers").iterdir()))
    results("on night", base)
    assert len(list((tmp_path / "answers").iterdir())) == count == 3


def test_the_earlier_name_of_a_budget_leads_to_its_name():
    with pytest.raises(ValueError, match="--equal pictures is now called images"):
        rule_of("pictures")


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


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--nfe", "0"], "--nfe 0: give numbers from 1"),
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


def test_a_damaged_result_is_named_and_the_others_are_kept(plain, tmp_path):
    compare(plain[:1], tmp_path / "page.html", silent, nfes=(1,))
    files = sorted((tmp_path / "runs" / "answers").iterdir())
    files[0].write_bytes(b"")
    with pytest.raises(ValueError, match=f"{files[0].name} is not a readable safetensors file"):
        compare(plain[:1], tmp_path / "page.html", silent, nfes=(1,))
    files[0].unlink()
    stamps = {file: file.stat().st_mtime_ns for file in files[1:]}
    compare(plain[:1], tmp_path / "page.html", silent, nfes=(1,))
    assert files[0].is_file() and stamps == {file: file.stat().st_mtime_ns for file in files[1:]}
