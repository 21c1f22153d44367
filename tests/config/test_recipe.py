"""Any file gives a recipe or one sentence; old recipes load; a section needs its keys."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dopsd.config.aliases import ALIASES
from dopsd.config.recipe import Recipe, known_keys, load_recipe, parse_recipe, read_recipe

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
        message = str(error)
        assert message.startswith("mutated.yaml") and message.endswith(".")
        assert "pydantic" not in message and "Traceback" not in message
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


GOOD = {
    "model": {"name_or_path": "pocket"},
    "data": {"folder": "images"},
    "method": {"name": "dopsd"},
    "run_name": "new",
}


@pytest.mark.parametrize(
    ("section", "value", "example"),
    [
        ("method", "dopsd", "method is 'dopsd', not a section: write method: {name: dopsd}."),
        ("method", "magic", "method is 'magic', not a section: write method: {name: dopsd}."),
        ("method", ["sft"], "method is ['sft'], not a section: write method: {name: dopsd}."),
        ("model", "owner/name", "write model: {name_or_path: owner/name}."),
        ("data", "images", "write data: {folder: images}."),
        (
            "data",
            {"folder": "a", "more": ["b"]},
            "data.more.0 is 'b', not a section: write {folder",
        ),
        ("lora", 8, "lora is 8, not a section: write lora: {rank: 8}."),
        ("train", 500, "write train: {max_steps: 500}."),
        ("sample", ["a cat"], "write sample: {prompts: ...}."),
        ("sample", {"prompts": [3]}, "sample.prompts.0 is 3, not a section: write {prompt: 3}."),
        ("health", False, "write health: {every: False}."),
        ("stop", "x" * 500, "..."),
        ("save", 10, "write save: {every: 10}."),
        ("track", "wandb", "write track: {to: wandb}."),
    ],
)
def test_a_value_where_a_section_is_meant_is_shown_as_that_section(section, value, example):
    with pytest.raises(ValueError) as refused:
        parse_recipe(GOOD | {section: value})
    assert example in str(refused.value) and len(str(refused.value)) < 400


def test_a_reason_is_given_in_plain_words():
    with pytest.raises(ValueError) as refused:
        parse_recipe(GOOD | {"train": {"max_steps": True}})
    assert str(refused.value) == "the recipe: train.max_steps is True: a number is expected."


# Recipes as they stood in the repository's history; comments left out.
OLD_RECIPES = {
    "gradient checkpointing off": """
model:
  name_or_path: pocket
  gradient_checkpointing: false # the model is small enough to keep its activations
data:
  folder: runs/pocket-thing
method:
  name: dopsd
  teacher_decay: 0.9999
lora:
  rank: 16
train:
  max_steps: 150
  batch_size: 4
  learning_rate: 1.0e-3
""",
    "gradient checkpointing on": """
model: {name_or_path: pocket, gradient_checkpointing: true}
data: {folder: runs/pocket-thing}
method: {name: sft}
""",
    "a judge": """
model:
  name_or_path: pocket
  memory: high
data:
  folder: runs/pocket-thing
method:
  name: pso_online
  judge: red
  beta: 100
lora:
  rank: 16
train:
  max_steps: 40
  batch_size: 4
  learning_rate: 2.0e-3
""",
    "class pictures": """
model: {name_or_path: pocket}
data: {folder: data/thing}
method: {name: dreambooth, class_prompt: a small dog, class_pictures: 7}
""",
    "several folders and a trigger": """
model: {name_or_path: Tongyi-MAI/Z-Image-Turbo, teacher_context: vlm}
data:
  folder: data/thing
  trigger: zib
  repeats: 10
  more:
    - folder: data/dogs
      weight: 0.5
  resolution: [512, 768]
  caption_dropout: 0.1
method: {name: dopsd}
stop: {unhealthy: true}
track: {to: tensorboard}
""",
}


@pytest.mark.parametrize("name", OLD_RECIPES)
def test_recipes_of_the_past_still_load(name, caplog):
    recipe = read_recipe(OLD_RECIPES[name], "old.yaml", {"run_name": "old"})
    expected = {
        "gradient checkpointing off": (recipe.model.memory, "high", "model.memory: high"),
        "gradient checkpointing on": (recipe.model.memory, "low", "model.memory: low"),
        "a judge": (getattr(recipe.method, "reward", None), "red", "method.reward"),
        "class pictures": (getattr(recipe.method, "class_images", None), 7, "method.class_images"),
    }
    value, meaning, written = expected.get(name, (None, None, ""))
    assert value == meaning
    assert f"is now {written}; the old name still works" in caplog.text or not written
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe


def test_a_key_under_its_old_and_its_new_name_is_refused():
    with pytest.raises(ValueError, match=r"method\.pso_online|method\.judge is no key of a recipe"):
        parse_recipe(GOOD | {"method": {"name": "pso_online", "judge": "red", "reward": "red"}})
