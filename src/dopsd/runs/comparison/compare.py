"""Train recipes and compare them with each other, with LoRA files and with the base model.

What is trained or measured already is not done again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.evaluation.benchmarks import find_benchmark
from dopsd.evaluation.early_stopping import advise
from dopsd.evaluation.pages import write_comparison
from dopsd.models import load_family
from dopsd.models.base import Family
from dopsd.models.folder import is_model
from dopsd.models.lora import read_lora
from dopsd.models.lora_source import LoraFile, parse_sum
from dopsd.runs.comparison.budget import Rule, forwards_a_step, on_budget_of
from dopsd.runs.comparison.evaluate import Candidate, Evaluator
from dopsd.runs.comparison.table import (
    Comparison,
    Entry,
    definitions,
    notes,
    panels,
    tabulate,
    verdict,
)
from dopsd.runs.outputs.folder import read_rows
from dopsd.runs.prepare import Progress
from dopsd.runs.train import train
from dopsd.training.checkpoint import checkpoints

SAME = ("name_or_path", "revision", "distilled_by")  # keys of `model` that recipes must share


@dataclass(frozen=True)
class Repeat:
    """One training of every recipe. replicate: number of the data set, 0 is the recipe's own; seed:
    replaces train.seed where it is given."""

    replicate: int = 0
    seed: int | None = None


def compare(
    recipes: Sequence[Recipe],
    report: Path,
    progress: Progress,
    tuned: Sequence[Path] = (),
    nfes: Sequence[int] = (),
    equal: Rule | None = None,
    replicates: int = 1,
    seeds: Sequence[int] = (),
) -> Comparison:
    """Train the recipes that are not finished, then measure them, further LoRAs (of any tool) or
    diffusers folders, and the base model on the data of the first recipe.

    Every model gets the same prompts and noise, at each of `nfes` forwards (default: the first
    recipe's). tuned: folders, and LoRAs as FILE@STRENGTH, several used together with + between
    them. equal: train the others on the budget of the first recipe. replicates: repeat it on
    so many data sets of the benchmark that the data belongs to. seeds: train each recipe once for
    each; a seed that is not the recipe's own has a run folder of its own, `<run_name>-seed<n>`.
    Raises ValueError, before anything is trained, without a recipe, for recipes of different data
    or models, and for a LoRA that does not fit.
    """
    # Refuse what cannot be compared.
    if not recipes:
        raise ValueError(
            "give at least one recipe: its model, prompts and data are what LoRA files are "
            "compared on."
        )
    repeats = [Repeat(k, seed) for k in range(replicates) for seed in seeds or (None,)]
    _refuse_unlike(recipes, tuned, replicates, seeds)
    evaluators = [
        Evaluator(repeat_of(recipes[0], Repeat(k)), recipes[0].output_dir / "answers")
        for k in range(replicates)
    ]
    family = evaluators[0].family
    given = [_candidate(each, family) for each in tuned]

    # Train.
    nfes = tuple(nfes) or (recipes[0].sample.nfe or family.default_nfe,)
    references = reference_candidates(evaluators[0], many_step=len(nfes) > 1)
    entries = [Entry([candidate] * len(repeats)) for candidate in references]
    entries += train_recipes(recipes, equal, repeats, family.default_nfe, progress)
    entries += [Entry([candidate] * len(repeats)) for candidate in given]

    # Measure.
    intro = _intro(recipes[0], equal, replicates, seeds)
    by_repeat = [evaluators[repeat.replicate] for repeat in repeats]
    return measure(by_repeat, entries, nfes, report, "Comparison", intro, progress)


def measure(
    evaluators: Sequence[Evaluator],
    entries: Sequence[Entry],
    nfes: Sequence[int],
    report: Path,
    title: str,
    intro: str,
    progress: Progress,
) -> Comparison:
    """Measure every entry with the evaluator of each repeat, and write the HTML page."""
    for done, entry in enumerate(entries):
        progress("measuring", done, len(entries))
        results = [
            evaluator.results(candidate, nfes)
            for evaluator, candidate in zip(evaluators, entry.candidates, strict=True)
        ]
        entry.results = {nfe: [each[nfe] for each in results] for nfe in nfes}
    progress("measuring", len(entries), len(entries))
    benchmark = evaluators[0].benchmark
    comparison = tabulate(entries, nfes, benchmark.metrics)
    write_comparison(
        report,
        title,
        intro,
        comparison.header,
        comparison.table,
        panels(benchmark, entries, nfes),
        notes(entries, nfes, benchmark),
        verdict(entries, nfes[-1], benchmark.metrics),
        definitions(entries, benchmark),
    )
    return comparison


def reference_candidates(evaluator: Evaluator, many_step: bool) -> list[Candidate]:
    """The models that need no training, as far as the benchmark and the checkpoint have them."""
    candidates = [Candidate("base", "base"), Candidate("base, other noise", "floor")]
    if evaluator.benchmark.asks_teacher:
        candidates.append(Candidate("teacher", "teacher"))
        candidates.append(Candidate("teacher, another image", "teacher_other"))
    if many_step and evaluator.benchmark.many_step:
        candidates.append(Candidate("many-step model", "many_step"))
    return candidates


def repeat_of(recipe: Recipe, repeat: Repeat) -> Recipe:
    """The recipe on the data set and with the seed of a repeat, under a run name of its own."""
    tree, name = recipe.model_dump(), recipe.run_name
    if repeat.replicate:
        data = recipe.data.folder
        benchmark = find_benchmark(data)
        assert benchmark is not None
        folder = benchmark.replicate(data, repeat.replicate, recipe.output_dir / "replicates")
        tree["data"] |= {"folder": folder}
        name = f"{name}-{folder.name}"
    if repeat.seed is not None and repeat.seed != recipe.train.seed:
        tree["train"] |= {"seed": repeat.seed}
        name = f"{name}-seed{repeat.seed}"
    return parse_recipe(tree | {"run_name": name}) if name != recipe.run_name else recipe


def train_recipes(
    recipes: Sequence[Recipe],
    equal: Rule | None,
    repeats: Sequence[Repeat],
    nfe: int,
    progress: Progress,
) -> list[Entry]:
    """Train each recipe in each repeat, with `equal` on the budget of the first recipe in that
    repeat. nfe: the model's own number of forwards."""
    entries = [Entry([]) for _ in recipes]
    for repeat in repeats:
        first = repeat_of(recipes[0], repeat)
        for entry, named in zip(entries, recipes, strict=True):
            recipe = repeat_of(named, repeat)
            if equal and named is not recipes[0]:
                recipe = on_budget_of(first, recipe, equal, nfe, _cost(first, nfe)["seconds"])
            train_once(recipe, progress)
            entry.candidates.append(_result_of(recipe, named.run_name))
            for name, cost in _cost(recipe, nfe).items():
                entry.cost[name] = entry.cost.get(name, 0) + cost / len(repeats)
            advice = advise(read_rows(recipe.run_folder / "health.jsonl"))
            if repeat is repeats[0] and advice:
                entry.advice = advice.sentence
    return entries


def _refuse_unlike(
    recipes: Sequence[Recipe], tuned: Sequence[Path], replicates: int, seeds: Sequence[int]
) -> None:
    first = recipes[0]
    for other in recipes[1:]:
        differing = [key for key in SAME if getattr(other.model, key) != getattr(first.model, key)]
        differing = [f"model.{key}" for key in differing]
        if other.data.folder != first.data.folder:
            differing.append("data.folder")
        if differing:
            raise ValueError(
                f"{other.run_name} and {first.run_name} differ in {' and '.join(differing)}: "
                "a comparison needs the same model and data."
            )
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {','.join(map(str, seeds))}: give each seed once.")
    runs = [
        repeat_of(recipe, Repeat(seed=seed)).run_name
        for recipe in recipes
        for seed in seeds or (None,)
    ]
    if twice := sorted({name for name in runs if runs.count(name) > 1}):
        raise ValueError(
            f"two runs are called {' and '.join(twice)}: give every recipe a run_name of its own."
        )
    if replicates > 1 and find_benchmark(first.data.folder) is None:
        raise ValueError(
            f"{first.data.folder} belongs to no benchmark, and only those have replicates: leave "
            "out --replicates, or use --seeds."
        )
    if replicates > 1 and tuned:
        raise ValueError(
            "a LoRA file was tuned on one set of images: compare it without --replicates."
        )


def _candidate(path: Path, family: Family) -> Candidate:
    """A model folder or LoRAs that were given. Raises ValueError where they do not fit."""
    if is_model(path):
        if (its := load_family(str(path)).name) != family.name:
            raise ValueError(
                f"{path} is a {its} model, and {family.checkpoint.name} is a {family.name} model: "
                "a comparison needs models of one family."
            )
        return Candidate(path.name, model=path)
    loras = parse_sum(path)
    for lora in loras:
        read_lora(lora.path, family)
    names = [str(LoraFile(Path(lora.path.stem), lora.strength)) for lora in loras]
    return Candidate(" + ".join(names), loras=loras)


def _result_of(recipe: Recipe, name: str) -> Candidate:
    if recipe.adapter == "full":
        return Candidate(name, model=recipe.result())
    return Candidate(name, loras=(LoraFile(recipe.result()),))


def train_once(recipe: Recipe, progress: Progress) -> None:
    """Train unless the run folder holds the result, resuming a run that was stopped. Raises
    ValueError for a folder of another recipe."""
    folder, result = recipe.run_folder, recipe.result()
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if result.exists() and (missing := [each for each in (config, metrics) if not each.is_file()]):
        raise ValueError(
            f"{missing[0]} is missing beside a finished LoRA: remove {folder} to run it again."
        )
    if result.exists() and config.read_text(encoding="utf-8") != recipe.to_yaml():
        raise ValueError(
            f"{folder} holds a run of another recipe; choose another run_name or output_dir."
        )
    if not result.exists():
        for step in train(recipe, "latest" if checkpoints(folder) else None, progress):
            progress(
                f"training {recipe.run_name}  loss {step.log['loss']:.4f}",
                step.step,
                recipe.train.max_steps,
            )


def _cost(recipe: Recipe, nfe: int) -> dict[str, float]:
    """What a finished run took: seconds, images and forwards."""
    rows = read_rows(recipe.run_folder / "metrics.jsonl")
    return {
        "seconds": sum(row["seconds"] for row in rows),
        "images": sum(row["images"] for row in rows),
        "forwards": len(rows) * forwards_a_step(recipe, nfe),
    }


def _intro(first: Recipe, equal: Rule | None, replicates: int, seeds: Sequence[int]) -> str:
    sentences = ["Same data, prompts, noise and metrics."]
    if equal:
        sentences.append(f"Each was trained on as many {equal} as {first.run_name}.")
    if replicates > 1:
        sentences.append(
            f"Means over {replicates} data sets, each with trainings of its own; the images are of "
            "the first."
        )
    if len(seeds) > 1:
        listed = ", ".join(map(str, seeds))
        sentences.append(f"Each was trained with the seeds {listed}; values are means over them.")
    return " ".join(sentences)
