"""Recipes side by side: same data, prompts, noise and measures. `demo` is a comparison whose recipes are built in.

Where the data is a pocket lesson every model sits the lesson's exam; elsewhere the pictures speak, beside the cost and
the bleed. What is trained or answered already is not done again.
"""

from collections.abc import Sequence
from pathlib import Path

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.evaluation.early_stopping import advise
from dopsd.evaluation.pages import write_comparison
from dopsd.models import load_family
from dopsd.models.folder import is_model
from dopsd.models.lora import read_lora
from dopsd.pocket.benchmark import lesson_of, write_lesson
from dopsd.runs.comparison.budget import Rule, forwards_a_step, on_budget_of
from dopsd.runs.comparison.evaluate import Contest, Contestant
from dopsd.runs.comparison.table import Entry, Outcome, notes, panels, tabulate
from dopsd.runs.outputs.folder import read_rows
from dopsd.runs.prepare import Progress
from dopsd.runs.train import train
from dopsd.training.checkpoint import checkpoints


def compare(
    recipes: Sequence[Recipe],
    report: Path,
    progress: Progress,
    loras: Sequence[Path] = (),
    nfes: Sequence[int] = (),
    equal: Rule | None = None,
    units: int = 1,
) -> Outcome:
    """Run the recipes that are not finished, then judge them, further LoRA files (of any tool) and the untouched model
    on the same questions, those of the first recipe, at each of `nfes` (default: the recipe's).

    equal: train the others on the first recipe's budget. units: on so many pocket lessons, the recipe's and the things
    after it. Raises ValueError without a recipe, for recipes of different data, and for a LoRA that does not fit,
    before anything is trained."""
    if not recipes:
        raise ValueError("give at least one recipe: its model, prompts and data are what LoRA files are compared on.")
    _refuse_unlike(recipes, loras, units)
    contests = [Contest(_on_unit(recipes[0], unit), recipes[0].output_dir / "answers") for unit in range(units)]
    family = contests[0].family
    for path in loras:
        if not is_model(path):
            read_lora(path, family)
        elif (its := load_family(str(path)).name) != family.name:
            raise ValueError(f"{path} is a {its} model, and {family.checkpoint.name} a {family.name}: compare alike.")
    nfes = tuple(nfes) or (recipes[0].sample.nfe or family.default_nfe,)
    untouched = _untouched(contests[0], many=len(nfes) > 1)
    entries = [Entry([contestant] * units) for contestant in untouched]
    entries += _tuned(recipes, equal, units, family.default_nfe, progress)
    entries += [Entry([Contestant(lora.stem, lora=lora)]) for lora in loras]
    return judge(contests, entries, nfes, report, "Comparison", _intro(recipes[0], equal, units), progress)






def judge(
    contests: Sequence[Contest],
    entries: Sequence[Entry],
    nfes: Sequence[int],
    report: Path,
    title: str,
    intro: str,
    progress: Progress,
) -> Outcome:
    """Ask every contestant the same questions in every unit, and write the page."""
    for done, entry in enumerate(entries):
        progress("judging", done, len(entries))
        asked = [contest.answers(c, nfes) for contest, c in zip(contests, entry.contestants, strict=True)]
        entry.answers = {nfe: [answers[nfe] for answers in asked] for nfe in nfes}
    progress("judging", len(entries), len(entries))
    outcome = tabulate(entries, nfes, measured=contests[0].thing is not None)
    said = notes(entries, nfes, measured=contests[0].thing is not None)
    shown = panels(contests[0].questions, entries, nfes)
    write_comparison(report, title, intro, outcome.header, outcome.table, shown, said)
    return outcome


def _refuse_unlike(recipes: Sequence[Recipe], loras: Sequence[Path], units: int) -> None:
    first, names = recipes[0], [recipe.run_name for recipe in recipes]
    for other in recipes[1:]:
        if any(getattr(other.model, key) != getattr(first.model, key) for key in ("name_or_path", "distilled_by")) or (
            other.data.folder != first.data.folder
        ):
            raise ValueError(
                f"{other.run_name} and {first.run_name} differ in model or data; a comparison needs the same of both."
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{' and '.join(twice)} is there twice: give every recipe a run_name of its own.")
    if units > 1 and lesson_of(first.data.folder) is None:
        raise ValueError(
            f"{first.data.folder} is no pocket lesson, and only of those there are more: leave out --units."
        )
    if units > 1 and loras:
        raise ValueError("a LoRA file was tuned on one set of pictures: compare it without --units.")


def _untouched(contest: Contest, many: bool) -> list[Contestant]:
    """Who needs no training; the parent only where step budgets are compared, and where the checkpoint carries it."""
    base, floor = Contestant("base", "base"), Contestant("base, other noise", "floor")
    if contest.thing is None:
        return [base, floor]
    carried = many and (contest.family.checkpoint.folder / "parent").is_dir()
    teacher = [Contestant("teacher", "teacher")] if contest.family.teacher_contexts else []
    return [base, floor, *teacher, *([Contestant("parent", "parent")] if carried else [])]


def _on_unit(recipe: Recipe, unit: int) -> Recipe:
    """The recipe on its own lesson (unit 0), or on that of the thing so many seeds later, drawn if it is not there."""
    if unit == 0:
        return recipe
    thing = lesson_of(recipe.data.folder)
    assert thing is not None
    folder = recipe.output_dir / "lessons" / str(thing + unit)
    if not folder.is_dir():
        write_lesson(folder, thing + unit, pictures=len(list(recipe.data.folder.glob("*.png"))))
    tree = recipe.model_dump()
    data = tree["data"] | {"folder": folder}
    return parse_recipe(tree | {"data": data, "run_name": f"{recipe.run_name}-{thing + unit}"})


def _tuned(recipes: Sequence[Recipe], equal: Rule | None, units: int, nfe: int, progress: Progress) -> list[Entry]:
    """Each recipe trained in each unit; where asked for, on the budget of the first recipe in that unit."""
    entries = [Entry([]) for _ in recipes]
    for unit in range(units):
        budget = _on_unit(recipes[0], unit)
        for entry, named in zip(entries, recipes, strict=True):
            recipe = _on_unit(named, unit)
            if equal and named is not recipes[0]:
                recipe = on_budget_of(budget, recipe, equal, nfe, _cost(budget, nfe)["seconds"])
            _train(recipe, progress)
            entry.contestants.append(Contestant(named.run_name, lora=recipe.result()))
            entry.cost = {name: entry.cost.get(name, 0) + cost / units for name, cost in _cost(recipe, nfe).items()}
            if unit == 0 and (found := advise(read_rows(recipe.run_folder / "health.jsonl"))):
                entry.advice = found.sentence
    return entries


def _train(recipe: Recipe, progress: Progress) -> None:
    """Unless the run folder holds it already; from where it was stopped, if it was."""
    folder, lora = recipe.run_folder, recipe.result()
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if lora.exists() and (missing := [file for file in (config, metrics) if not file.is_file()]):
        raise ValueError(f"{missing[0]} is missing beside a finished LoRA: remove {folder} to run it again.")
    if lora.exists() and config.read_text(encoding="utf-8") != recipe.to_yaml():
        raise ValueError(f"{folder} holds a run of another recipe; choose another run_name or output_dir.")
    if not lora.exists():
        for step in train(recipe, "latest" if checkpoints(folder) else None, progress):
            progress(f"{recipe.run_name}  loss {step.log['loss']:.4f}", step.step, recipe.train.max_steps)


def _cost(recipe: Recipe, nfe: int) -> dict[str, float]:
    """What a finished run took; nfe: the model's own."""
    rows = read_rows(recipe.run_folder / "metrics.jsonl")
    forwards = len(rows) * forwards_a_step(recipe, nfe)
    return {
        "seconds": sum(r["seconds"] for r in rows),
        "pictures": sum(r["pictures"] for r in rows),
        "forwards": forwards,
    }


def _intro(first: Recipe, equal: Rule | None, units: int) -> str:
    budget = f" Each was trained on as many {equal} as {first.run_name}." if equal else ""
    lessons = (
        f" Means over {units} things, each with trainings of its own; the pictures are of the first."
        if units > 1
        else ""
    )
    return f"Same data, prompts, noise and measures.{budget}{lessons}"
