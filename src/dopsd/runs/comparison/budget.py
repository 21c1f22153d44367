"""Recipes with an equal budget: as many images, network forwards or seconds of training as the
first of them.

Steps and refusals only; training them and looking up what a run took is left to `compare`.
"""

from typing import Literal, cast, get_args

from dopsd.config.recipe import Recipe, parse_recipe

Rule = Literal["images", "seconds", "forwards"]
RULES = get_args(Rule)
NO_END = 10**6  # steps: a run on a budget of seconds ends by its seconds


def rule_of(text: str | None) -> Rule | None:
    """A rule by its name. Raises ValueError for another."""
    if text is not None and text not in RULES:
        raise ValueError(f"--equal {text} is no budget: give one of {', '.join(RULES)}.")
    return cast(Rule | None, text)


def images_a_step(recipe: Recipe) -> int:
    """That one optimizer step sees."""
    return recipe.train.batch_size * recipe.train.gradient_accumulation_steps


def forwards_a_step(recipe: Recipe, nfe: int) -> int:
    """Network forwards of one optimizer step, a backward counted as two; nfe: the model's own,
    where the method names none."""
    return images_a_step(recipe) * recipe.method.forwards(recipe.method.nfe or nfe)


def on_budget_of(
    first: Recipe, other: Recipe, rule: Rule, nfe: int, seconds: float | None = None
) -> Recipe:
    """The other recipe, under a run_name of its own, to be trained on what the first one takes;
    seconds: of the first one's steps, for that rule. Raises ValueError where a step of it is more
    than the whole budget."""
    name = f"{other.run_name}-equal-{rule}"
    if rule == "seconds":
        assert seconds is not None
        if other.train.lr_schedule != "constant":
            raise ValueError(
                f"{other.run_name}: a {other.train.lr_schedule} schedule needs to know its last step, and "
                "a budget of seconds does not: use --equal forwards."
            )
        return _changed(other, name, max_steps=NO_END, max_seconds=round(seconds, 1))
    cost = images_a_step if rule == "images" else lambda recipe: forwards_a_step(recipe, nfe)
    budget = first.train.max_steps * cost(first)
    steps = round(budget / cost(other))
    if steps < 1:
        raise ValueError(
            f"one step of {other.run_name} takes {cost(other)} {rule}, and {first.run_name} in all takes "
            f"{budget}: give the longer recipe first."
        )
    return _changed(other, name, max_steps=steps)


def _changed(recipe: Recipe, run_name: str, **train: float) -> Recipe:
    tree = recipe.model_dump()
    return parse_recipe(tree | {"run_name": run_name, "train": tree["train"] | train})
