"""Recipes under mutation: whatever a file holds, the answer is a recipe or a sentence, never a
traceback."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dopsd.config.recipe import ALIASES, Recipe, known_keys, load_recipe, parse_recipe, read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated(draw) -> dict:
    """A recipe of the repository with one to four keys or sections changed, dropped, renamed or
    added."""
    tree = copy.deepcopy(yaml.safe_load(draw(st.sampled_from(RECIPES)).read_text(encoding="utf-8")))
    for _ in range(draw(st.integers(1, 4))):
        section = draw(st.sampled_from([*tree, None])) if tree else None
        inside = tree.get(section) if section else tree
        place = inside if isinstance(inside, dict) else tree
        key = draw(st.sampled_from(sorted(map(str, place))) if place else st.text(max_size=6))
        key = draw(
            st.sampled_from([key, *(name.rpartition(".")[2] for name in known_keys()), *ALIASES])
            | st.text(max_size=6)
        )
        if draw(st.booleans()):
            place[key] = draw(ANYTHING)
        else:
            place.pop(key, None)
    return tree


@given(mutated())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_mutated_recipe_is_a_recipe_or_a_sentence(tree):
    try:
        recipe = read_recipe(yaml.safe_dump(tree), "mutated.yaml", {"run_name": "mutated"})
    except ValueError as error:
        said = str(error)
        assert said.startswith("mutated.yaml") and said.endswith(".")
        assert "pydantic" not in said and "Traceback" not in said
    else:
        assert (
            isinstance(recipe, Recipe) and parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
        )


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_file_of_any_bytes_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "any.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"any\.yaml"):
        load_recipe(tmp_path / "any.yaml")


@given(st.text(max_size=12), ANYTHING)
@settings(max_examples=300, deadline=None)
def test_any_change_on_the_command_line_is_taken_or_refused(key, value):
    try:
        read_recipe(
            RECIPES[0].read_text(encoding="utf-8"), "r.yaml", {"run_name": "r"}, [f"{key}={value}"]
        )
    except ValueError as error:
        assert str(error).startswith(("r.yaml", "--set"))


@pytest.mark.parametrize(("word", "meant"), ALIASES.items())
def test_words_of_other_tools_are_translated(word, meant):
    with pytest.raises(ValueError, match="is no key of a recipe") as refused:
        parse_recipe({"train": {word: 1}})
    assert f"{word} is {meant} here" in str(refused.value)
    assert meant in known_keys() or meant == "the --resume flag"
