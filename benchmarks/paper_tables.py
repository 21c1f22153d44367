"""The paper's comparisons on pocket: what came out, and what of the paper's order agrees.

    python -m dopsd.pocket images runs/pocket-thing
    python -m dopsd.pocket many-step runs/pocket-many-step
    dopsd adapter train recipes/table1/adapter-prompts.txt --images 8 --steps 200
    python -m dopsd.pocket images runs/pocket-domain --count 32
    for NAME in ablations table1 table2; do
        dopsd compare recipes/$NAME/*.yaml --equal forwards --replicates 3 \\
            --json benchmarks/results/$NAME.json
    done
    python benchmarks/write_pages.py          # docs/results.md has a section on each

The statements below are the paper's, as known to us at second hand, written down before the numbers
were seen; two were forgotten, and say so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dopsd.pocket import CHECKPOINT as POCKET
from dopsd.pocket.benchmark import METRICS

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parents[1] / "recipes"
BETTER_IF_LESS = {"thing_error", "bleed", "speckle"}


@dataclass(frozen=True)
class Statement:
    """What the paper says: `better` has the better score than `worse`."""

    words: str
    metric: str
    better: str
    worse: str


ABLATIONS = (
    Statement(
        "on-policy states learn faster than off-policy ones",
        "thing_error",
        "1-on-policy",
        "2-off-policy",
    ),
    Statement(
        "teacher samples teach more slowly",
        "thing_error",
        "1-on-policy",
        "3-sft-on-teacher-samples",
    ),
    Statement(
        "teacher samples keep quality, the images lose it",
        "sharpness",
        "3-sft-on-teacher-samples",
        "4-sft-own-steps",
    ),
    Statement(
        "the images lose quality, on-policy keeps it",
        "sharpness",
        "1-on-policy",
        "4-sft-own-steps",
    ),
    Statement("a live copy as teacher collapses", "sharpness", "1-on-policy", "5-live-copy"),
    Statement("a frozen base teaches more slowly", "thing_error", "1-on-policy", "6-frozen-base"),
    Statement(
        "an average of 0.9 keeps less than 0.9999", "sharpness", "1-on-policy", "7-average-0.9"
    ),
)
TABLE1 = (
    Statement("PSO fits the images more closely than D-OPSD", "thing_error", "4-pso", "1-dopsd"),
    Statement(
        "DreamBooth fits them more closely than plain SFT", "thing_error", "3-dreambooth", "2-sft"
    ),
    Statement("D-OPSD keeps more quality than SFT", "sharpness", "1-dopsd", "2-sft"),
    Statement("D-OPSD keeps more quality than DreamBooth", "sharpness", "1-dopsd", "3-dreambooth"),
    Statement("D-OPSD keeps more quality than PSO", "sharpness", "1-dopsd", "4-pso"),
    Statement("D-OPSD follows prompts better than PSO", "attributes", "1-dopsd", "4-pso"),
    Statement(
        "a LoRA tuned apart and put on the distilled model keeps more quality than SFT",
        "sharpness",
        "6-sft-with-adapter",
        "2-sft",
    ),
    Statement(
        "a LoRA tuned apart and put on the distilled model comes nearer than SFT",
        "thing_error",
        "6-sft-with-adapter",
        "2-sft",
    ),
    Statement(
        "D-OPSD comes nearer than a LoRA tuned apart",
        "thing_error",
        "1-dopsd",
        "6-sft-with-adapter",
    ),
    Statement(
        "D-OPSD keeps more quality than a LoRA tuned apart",
        "sharpness",
        "1-dopsd",
        "6-sft-with-adapter",
    ),
)
ADDED_LATER = (
    Statement("D-OPSD comes nearer than SFT", "thing_error", "1-dopsd", "2-sft"),
    Statement("D-OPSD comes nearer than DreamBooth", "thing_error", "1-dopsd", "3-dreambooth"),
)
LATER = " (added after the numbers were seen)"
TABLE2 = (
    Statement("D-OPSD comes nearer to the domain than SFT", "thing_error", "1-dopsd", "2-sft"),
    Statement("D-OPSD comes nearer to the domain than PSO", "thing_error", "1-dopsd", "3-pso"),
    Statement("D-OPSD keeps more quality than SFT", "sharpness", "1-dopsd", "2-sft"),
    Statement("D-OPSD keeps more quality than PSO", "sharpness", "1-dopsd", "3-pso"),
    Statement("D-OPSD follows prompts better than SFT", "attributes", "1-dopsd", "2-sft"),
    Statement("D-OPSD follows prompts better than PSO", "attributes", "1-dopsd", "3-pso"),
)
TABLES = (
    ("The paper's ablations", "ablations", ABLATIONS),
    ("The paper's LoRA comparison", "table1", (*TABLE1, *ADDED_LATER)),
    ("The paper's full fine-tuning comparison", "table2", TABLE2),
)


def sections() -> list[str]:
    """For docs/results.md: one section a comparison that was run."""
    lines: list[str] = []
    for title, name, statements in TABLES:
        file = RESULTS / f"{name}.json"
        if file.is_file():
            lines += _section(title, name, json.loads(file.read_text(encoding="utf-8")), statements)
    return lines


def _section(
    title: str, name: str, models: dict[str, Any], statements: Sequence[Statement]
) -> list[str]:
    ((nfe, measured),) = models["base"]["nfe"].items()
    metrics = [metric for metric in METRICS if metric in measured]
    lines = [
        f"## {title}",
        "",
        f"`dopsd compare recipes/{name}/*.yaml --equal forwards --replicates 3`; numbers in",
        f"`benchmarks/results/{name}.json`. NFE {nfe};",
        "three things, one training of each recipe a thing (seed 0), at the forwards of the first",
        "recipe; 2 CPU cores. Intervals: 95% bootstrap over prompts, with these things.",
        "",
        f"| model | {' | '.join(metrics)} | images |",
        "|---" * (len(metrics) + 2) + "|",
    ]
    for model, row in models.items():
        cells = [_cell(row["nfe"][nfe][metric]) for metric in metrics]
        cells.append(str(round(row["images"])) if row["images"] else "-")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    packaged = json.loads((POCKET / "dopsd.json").read_text(encoding="utf-8"))["nfe"]
    if int(nfe) != packaged:
        lines += [
            "",
            f"Of earlier weights; the packaged ones (NFE {packaged}) are not measured here.",
        ]
    recipes = sorted(file.stem for file in (RECIPES / name).glob("*.yaml"))
    if later := [recipe for recipe in recipes if recipe not in models]:
        lines += ["", f"Not run yet: {', '.join(later)}."]
    lines += [
        "",
        "The last column counts the three things: as the paper says / within the noise floor / the",
        "other way. Floor: the largest difference that other noise makes to the base model on any",
        "of them.",
        "",
        "| the paper says | score | here | floor | things |",
        "|---|---|---|---|---|",
    ]
    for each in statements:
        names = (each.better, each.worse, "base", "base, other noise")
        better, worse, base, again = (models[name]["nfe"][nfe][each.metric] for name in names)
        floor = max(
            abs(a - b) for a, b in zip(base["replicates"], again["replicates"], strict=True)
        )
        sign = -1 if each.metric in BETTER_IF_LESS else 1
        leads = [
            sign * (a - b) for a, b in zip(better["replicates"], worse["replicates"], strict=True)
        ]
        counts = [sum(lead > floor for lead in leads), sum(abs(lead) <= floor for lead in leads)]
        here = f"{each.better} {better['value']:.3f}, {each.worse} {worse['value']:.3f}"
        shares = " / ".join(map(str, [*counts, len(leads) - sum(counts)]))
        words = f"{each.words}{LATER if each in ADDED_LATER else ''}"
        lines.append(f"| {words} | {each.metric} | {here} | {floor:.3f} | {shares} |")
    return [*lines, ""]


def _cell(score: dict[str, Any] | None) -> str:
    return (
        "-" if score is None else f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
    )
