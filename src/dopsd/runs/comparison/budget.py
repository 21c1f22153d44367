"""Training budgets: other recipes get as many images, forwards or seconds as the first one."""

from typing import Literal, cast, get_args

from dopsd.config.recipe import Recipe, parse_recipe

Rule = Literal["images", "seconds", "forwards"]
RULES = get_args(Rule)
RENAMED = {"pictures": "images"}  # earlier name of a rule -> its name
NO_LAST_STEP = 10**6  # optimizer steps of a run that ends by its seconds


def rule_of(text: str | None) -> Rule | None:
    """The rule of a name; None for None. Raises ValueError for another name."""
    if text in RENAMED:
        raise ValueError(
            f"--equal {text} is now called {RENAMED[text]}: use --equal {RENAMED[text]}."
        )
    if text is not None and text not in RULES:
        raise ValueError(f"--equal {text} is no budget: give one of {', '.join(RULES)}.")
    return cast(Rule | None, text)


def forwards_a_step(recipe: Recipe, nfe: int) -> float:
    """Network forwards of one optimizer step, a backward counted as two. nfe: the model's own,
    for methods that name none."""
    return recipe.objective.forwards_per_step(recipe.method.nfe or nfe, recipe.images_per_step)


def on_budget_of(
    first: Recipe, other: Recipe, rule: Rule, nfe: int, seconds: float | None = None
) -> Recipe:
    """The other recipe with the budget of the first, under the run name `<run_name>-equal-<rule>`.

    nfe: the model's own number of forwards. seconds: what the first one took, for that rule. Raises
    ValueError where one step takes more than the whole budget, and for a schedule that needs to
    know its last step under a budget of seconds.
    """
    name = f"{other.run_name}-equal-{rule}"
    if rule == "seconds":
        assert seconds is not None
        if other.train.lr_schedule != "constant":
            raise ValueError(
                f"{other.run_name}: a {other.train.lr_schedule} schedule needs to know its last "
                "step, and with a budget of seconds nobody does: use --equal forwards."
            )
        return _with(other, name, max_steps=NO_LAST_STEP, max_seconds=round(seconds, 1))

    def cost(recipe: Recipe) -> float:
        return recipe.images_per_step if rule == "images" else forwards_a_step(recipe, nfe)

    budget = first.train.max_steps * cost(first)
    steps = round(budget / cost(other))
    if steps < 1:
        raise ValueError(
            f"one step of {other.run_name} takes {cost(other):g} {rule}, and all of "
            f"{first.run_name} takes {budget:g}: give the longer recipe first."
        )
    return _with(other, name, max_steps=steps)


def _with(recipe: Recipe, run_name: str, **train: float) -> Recipe:
    tree = recipe.model_dump()
    return parse_recipe(tree | {"run_name": run_name, "train": tree["train"] | train})
