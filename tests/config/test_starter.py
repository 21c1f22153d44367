"""Starter recipes hold every key, load as they stand, and take settings as plain values."""

from pathlib import Path

import pytest

from dopsd.config.recipe import Recipe, read_recipe
from dopsd.config.starter import starter_recipe
from dopsd.methods import METHODS

STARTING_POINTS = {"train.learning_rate": 2e-4, "lora.rank": 8, "sample.nfe": 4}


def starter(method: str = "dopsd", adapter: str = "lora") -> str:
    return starter_recipe(
        "owner/model",
        method,
        Path("images"),
        family="zimage",
        licence="Apache-2.0",
        starting_points=STARTING_POINTS,
        adapter=adapter,
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_starter_recipe_holds_every_key_and_the_familys_settings(method):
    text = starter(method)
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    for name, section in (sections | {"method": METHODS[method]}).items():
        for key in getattr(section, "model_fields", ()):
            assert f"  {key}: " in text or f"  # {key}: " in text, f"{name}.{key}"
    assert text.splitlines()[0] == f"# {method} on owner/model (family zimage, licence Apache-2.0)."
    recipe = read_recipe(text, "starter", {"run_name": "new"})
    assert (recipe.train.learning_rate, recipe.lora.rank, recipe.sample.nfe) == (2e-4, 8, 4)
    assert (recipe.model.name_or_path, recipe.data.folder) == ("owner/model", Path("images"))


def test_a_starter_recipe_for_every_weight_takes_a_tenth_of_the_rate_and_no_lora_settings():
    recipe = read_recipe(starter(adapter="full"), "starter", {"run_name": "new"})
    assert recipe.adapter == "full" and recipe.train.learning_rate == pytest.approx(2e-5)
    assert recipe.lora.rank == 32 and "\n  # rank: 32\n" in starter(adapter="full")


def test_removing_the_comment_sign_of_a_default_changes_nothing():
    text = starter()
    bare = "\n".join(
        line.replace("# ", "", 1)
        if line.startswith(("  # ", "# adapter", "# output_dir"))
        else line
        for line in text.splitlines()
    )
    assert "\n  # " not in bare
    defaults = {"run_name": "new"}
    assert read_recipe(bare, "bare", defaults) == read_recipe(text, "starter", defaults)
