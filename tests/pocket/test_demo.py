"""The demo: its recipes, its sentences, and all of it as a user runs it (minutes, so that is marked
slow)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import load_recipe
from dopsd.evaluation.curves import Look
from dopsd.pocket.demo import ARMS, COLUMNS, NAMES, arm_recipe, look_steps, sentences_of
from dopsd.pocket.world.datasets import HELD_OUT, write_concept

RECIPES = Path(__file__).parents[2] / "recipes"
WRITTEN = {"sft": "pocket-identity-sft", "ours": "pocket-identity-sft-retention"}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_of_the_demo_is_what_its_recipe_file_says(arm, tmp_path):
    written = load_recipe(RECIPES / f"{WRITTEN[arm]}.yaml").model_dump()
    shown = arm_recipe(arm, tmp_path, tmp_path).model_dump()
    for section in ("model", "method", "retention", "lora", "train"):
        assert written[section] == shown[section]


@pytest.mark.parametrize("arm", ARMS)
def test_the_run_saves_a_lora_at_every_look(arm, tmp_path):
    recipe = arm_recipe(arm, tmp_path, tmp_path)
    steps = look_steps(recipe)
    assert len(set(steps)) == 4 and steps[-1] == recipe.train.max_steps
    assert all(step % recipe.save.every == 0 for step in steps[:-1])


def curve(kept: float, spread: float = 0.01) -> list[Look]:
    """A training that halves the error and keeps a share of the rest."""
    noise = spread * np.cos(np.arange(24))

    def look(step: int, error: float, share: float) -> Look:
        values = {"thing_error": error + noise, "thing_hit": np.ones(24)}
        return Look(step, values | {"sharpness": share + noise, "attributes": share + noise})

    return [look(0, 0.4, 1.0), look(10, 0.2, kept)]


def test_the_sentences_say_what_is_shown():
    *ends, sharpness, attributes, intervals = sentences_of({"sft": curve(0.7), "ours": curve(0.9)})
    assert ends == [
        f"After 10 steps {NAMES[arm]} shows the thing in 100% of new scenes, and on unrelated "
        f"prompts keeps {kept} of sharpness, {kept} of attributes."
        for arm, kept in (("sft", "70%"), ("ours", "90%"))
    ]
    assert sharpness.startswith(f"{NAMES['ours']} keeps more sharpness than SFT")
    assert attributes.endswith("by 0.200 [0.200, 0.200].") and "one thing" in intervals


def test_what_the_intervals_do_not_show_is_said_not_to_be_shown():
    noisy = curve(0.7)
    noisy[1].values["sharpness"][::2] += 0.5
    noisy[1].values["sharpness"][1::2] -= 0.5
    sentences = sentences_of({"sft": curve(0.7), "ours": noisy})
    assert sentences[2].startswith(f"Not shown: that {NAMES['ours']} keeps more sharpness")
    assert sentences_of({"sft": curve(0.9), "ours": curve(0.7)})[2].startswith(
        f"{NAMES['ours']} keeps less sharpness than SFT"
    )


@pytest.mark.parametrize(
    ("thing", "sentence"),
    [
        (5, "things below 1000000 were in the pocket model's training"),
        (HELD_OUT + 4, "is of thing 1000009: choose another --out"),
    ],
)
def test_a_known_thing_and_a_folder_of_another_thing_are_refused(thing, sentence, tmp_path):
    write_concept(tmp_path / "images", HELD_OUT + 9)
    result = CliRunner().invoke(app, ["demo", "--thing", str(thing), "--out", str(tmp_path)])
    assert result.exit_code == 2 and sentence in " ".join(result.output.split())


@pytest.mark.slow
def test_in_the_demo_the_default_learns_the_thing_and_keeps_what_sft_loses(tmp_path):
    result = CliRunner().invoke(
        app, ["demo", "--out", str(tmp_path / "demo"), "--json", str(tmp_path / "demo.json")]
    )
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) < 40
    numbers = json.loads((tmp_path / "demo.json").read_text())
    base, sft, ours = (numbers[name] for name in ("base", "sft", "ours"))
    assert base.keys() == sft.keys() == ours.keys() == COLUMNS.keys()
    # One concept and one seed show the contrast; benchmarks/claim.py measures many.
    assert ours["thing_hit"] >= 0.5 > base["thing_hit"]
    assert ours["sharpness"] >= 0.95 * base["sharpness"] > sft["sharpness"]
    assert base["attributes"] - ours["attributes"] <= 0.03
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:3] == [
        "What it learned, and what it still knows",
        "Along the training",
        "What this shows",
    ]
    assert page.count("<img") == 4 + 4 * 4 + 4 * 3 and page.count("<svg") == 2
