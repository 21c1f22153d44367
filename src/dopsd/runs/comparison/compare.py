"""Recipes side by side: same data, prompts, noise and measures. `demo` is a comparison whose
recipes are built in.

Where the data is a pocket concept dataset every model sits the concept dataset's exam; elsewhere
the images speak, beside the cost and the bleed. What is trained or answered already is not done
again.
"""

from collections.abc import Sequence
from pathlib import Path

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.evaluation.early_stopping import advise
from dopsd.evaluation.pages import write_comparison
from dopsd.models import load_family
from dopsd.models.folder import is_model
from dopsd.models.lora import read_lora
from dopsd.pocket.benchmark import concept_of, write_concept
from dopsd.runs.comparison.budget import Rule, forwards_a_step, on_budget_of
from dopsd.runs.comparison.evaluate import Candidate, Evaluator
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
    replicates: int = 1,
) -> Outcome:
    """Run the recipes that are not finished, then reward them, further LoRA files (of any tool) and
    the base model on the same questions, those of the first recipe, at each of `nfes` (default: the
    recipe's).

    equal: train the others on the first recipe's budget. units: on so many pocket concept datasets,
    the recipe's and the things after it. Raises ValueError without a recipe, for recipes of
    different data, and for a LoRA that does not fit, before anything is trained."""
    if not recipes:
        raise ValueError(
            "give at least one recipe: its model, prompts and data are what LoRA files are compared on."
        )
    _refuse_unlike(recipes, loras, replicates)
    evaluators = [
        Evaluator(_on_replicate(recipes[0], replicate), recipes[0].output_dir / "answers")
        for replicate in range(replicates)
    ]
    family = evaluators[0].family
    for path in loras:
        if not is_model(path):
            read_lora(path, family)
        elif (its := load_family(str(path)).name) != family.name:
            raise ValueError(
                f"{path} is a {its} model, and {family.checkpoint.name} a {family.name}: compare alike."
            )
    nfes = tuple(nfes) or (recipes[0].sample.nfe or family.default_nfe,)
    base_tensors = _base_candidates(evaluators[0], many=len(nfes) > 1)
    entries = [Entry([candidate] * replicates) for candidate in base_tensors]
    entries += _tuned(recipes, equal, replicates, family.default_nfe, progress)
    entries += [Entry([Candidate(lora.stem, lora=lora)]) for lora in loras]
    return reward(
        evaluators,
        entries,
        nfes,
        report,
        "Comparison",
        _intro(recipes[0], equal, replicates),
        progress,
    )


def reward(
    evaluators: Sequence[Evaluator],
    entries: Sequence[Entry],
    nfes: Sequence[int],
    report: Path,
    title: str,
    intro: str,
    progress: Progress,
) -> Outcome:
    """Ask every candidate the same questions in every unit, and write the page."""
    for done, entry in enumerate(entries):
        progress("judging", done, len(entries))
        asked = [
            evaluator.answers(c, nfes)
            for evaluator, c in zip(evaluators, entry.candidates, strict=True)
        ]
        entry.answers = {nfe: [answers[nfe] for answers in asked] for nfe in nfes}
    progress("judging", len(entries), len(entries))
    outcome = tabulate(entries, nfes, measured=evaluators[0].thing is not None)
    said = notes(entries, nfes, measured=evaluators[0].thing is not None)
    shown = panels(evaluators[0].questions, entries, nfes)
    write_comparison(report, title, intro, outcome.header, outcome.table, shown, said)
    return outcome


def _refuse_unlike(recipes: Sequence[Recipe], loras: Sequence[Path], replicates: int) -> None:
    first, names = recipes[0], [recipe.run_name for recipe in recipes]
    for other in recipes[1:]:
        if any(
            getattr(other.model, key) != getattr(first.model, key)
            for key in ("name_or_path", "distilled_by")
        ) or (other.data.folder != first.data.folder):
            raise ValueError(
                f"{other.run_name} and {first.run_name} differ in model or data; a comparison needs the same of both."
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{' and '.join(twice)} is there twice: give every recipe a run_name of its own."
        )
    if replicates > 1 and concept_of(first.data.folder) is None:
        raise ValueError(
            f"{first.data.folder} is no pocket lesson, and only of those there are more: leave out --units."
        )
    if replicates > 1 and loras:
        raise ValueError(
            "a LoRA file was tuned on one set of pictures: compare it without --units."
        )


def _base_candidates(evaluator: Evaluator, many: bool) -> list[Candidate]:
    """Who needs no training; the parent only where step budgets are compared, and where the
    checkpoint carries it."""
    base, floor = Candidate("base", "base"), Candidate("base, other noise", "floor")
    if evaluator.thing is None:
        return [base, floor]
    carried = many and (evaluator.family.checkpoint.folder / "parent").is_dir()
    teacher = [Candidate("teacher", "teacher")] if evaluator.family.teacher_contexts else []
    return [base, floor, *teacher, *([Candidate("parent", "parent")] if carried else [])]


def _on_replicate(recipe: Recipe, replicate: int) -> Recipe:
    """The recipe on its own concept dataset (unit 0), or on that of the thing so many seeds later,
    drawn if it is not there."""
    if replicate == 0:
        return recipe
    thing = concept_of(recipe.data.folder)
    assert thing is not None
    folder = recipe.output_dir / "lessons" / str(thing + replicate)
    if not folder.is_dir():
        write_concept(folder, thing + replicate, images=len(list(recipe.data.folder.glob("*.png"))))
    tree = recipe.model_dump()
    data = tree["data"] | {"folder": folder}
    return parse_recipe(tree | {"data": data, "run_name": f"{recipe.run_name}-{thing + replicate}"})


def _tuned(
    recipes: Sequence[Recipe], equal: Rule | None, replicates: int, nfe: int, progress: Progress
) -> list[Entry]:
    """Each recipe trained in each unit; where asked for, on the budget of the first recipe in that
    unit."""
    entries = [Entry([]) for _ in recipes]
    for replicate in range(replicates):
        budget = _on_replicate(recipes[0], replicate)
        for entry, named in zip(entries, recipes, strict=True):
            recipe = _on_replicate(named, replicate)
            if equal and named is not recipes[0]:
                recipe = on_budget_of(budget, recipe, equal, nfe, _cost(budget, nfe)["seconds"])
            _train(recipe, progress)
            entry.candidates.append(Candidate(named.run_name, lora=recipe.result()))
            entry.cost = {
                name: entry.cost.get(name, 0) + cost / replicates
                for name, cost in _cost(recipe, nfe).items()
            }
            if replicate == 0 and (found := advise(read_rows(recipe.run_folder / "health.jsonl"))):
                entry.advice = found.sentence
    return entries


def _train(recipe: Recipe, progress: Progress) -> None:
    """Unless the run folder holds it already; from where it was stopped, if it was."""
    folder, lora = recipe.run_folder, recipe.result()
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if lora.exists() and (missing := [file for file in (config, metrics) if not file.is_file()]):
        raise ValueError(
            f"{missing[0]} is missing beside a finished LoRA: remove {folder} to run it again."
        )
    if lora.exists() and config.read_text(encoding="utf-8") != recipe.to_yaml():
        raise ValueError(
            f"{folder} holds a run of another recipe; choose another run_name or output_dir."
        )
    if not lora.exists():
        for step in train(recipe, "latest" if checkpoints(folder) else None, progress):
            progress(
                f"{recipe.run_name}  loss {step.log['loss']:.4f}", step.step, recipe.train.max_steps
            )


def _cost(recipe: Recipe, nfe: int) -> dict[str, float]:
    """What a finished run took; nfe: the model's own."""
    rows = read_rows(recipe.run_folder / "metrics.jsonl")
    forwards = len(rows) * forwards_a_step(recipe, nfe)
    return {
        "seconds": sum(r["seconds"] for r in rows),
        "images": sum(r["images"] for r in rows),
        "forwards": forwards,
    }


def _intro(first: Recipe, equal: Rule | None, replicates: int) -> str:
    budget = f" Each was trained on as many {equal} as {first.run_name}." if equal else ""
    concepts = (
        f" Means over {replicates} things, each with trainings of its own; the pictures are of the first."
        if replicates > 1
        else ""
    )
    return f"Same data, prompts, noise and measures.{budget}{concepts}"
