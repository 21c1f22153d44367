"""docs/results.md: the claim, the paper's comparisons, preflight, the gates of the pocket model.

`python benchmarks/write_pages.py` writes it from benchmarks/results.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from bench import BATCH, RANK
from claim import CAP, RATES, REPEATED, SEEDS, STEPS, SWEEP_THINGS, chosen_rates, read_results
from paper_tables import sections
from preflight import section

from dopsd.evaluation.statistics import bootstrap
from dopsd.pocket import CHECKPOINT as POCKET

METRICS = ("thing_error", "thing_hit", "sharpness", "speckle", "attributes")
INTRODUCTION = """# Results on pocket

Written by `python benchmarks/write_pages.py` from the JSON files in `benchmarks/results`; commands,
seeds and run times are on the page [reproduce](reproduce.md). Everything here is measured on
*pocket*, a model of 2 M parameters whose images are drawn by this repository, so that scores are
read from pixels. No model of full size and no GPU has been measured.

**What the numbers say.** D-OPSD closes the whole gap to its teacher and, at that point, keeps more
of the few-step sharpness than SFT does at the same thing_error. It does not keep more attributes of
other prompts (at most 3 points lost were expected; more are), and SFT reaches the same thing_error
in a fraction of the time. The teacher of this small model, given the image, shows the colours of
the thing and not its stripes; SFT goes on to learn the stripes, which then appear in unrelated
prompts too. In the paper's comparison D-OPSD and PSO keep the most sharpness and learn the least.
What a stronger teacher does is not measured, and the packaged model misses two of its seven gates:
outlines are wobbly.

**Scores.** A *thing* is an object that no word describes; a model learns it from four images.
thing_error (lower is better): RMSE in [0, 1] between the generated image and the true scene inside
the object, on 24 unseen scenes. thing_hit: share of images nearer to their thing than to 63 others.
sharpness, speckle (lower is better) and attributes (share of the prompt's attributes shown): on 96
unrelated prompts. bleed: by how much thing_error falls when the prompt gives another name, or none.
Definitions: [words](words.md).
"""


def page() -> str:
    """The whole page."""
    results = read_results()
    first = [row for row in results["claim"] if row["seed"] == SEEDS[0]]
    lines = [INTRODUCTION, *_claim_lines(results, first), "", *sections(), *section()]
    return "\n".join([*lines, *_gate_lines()]).rstrip() + "\n"


def _gate_lines() -> list[str]:
    gates = json.loads((POCKET / "gates.json").read_text(encoding="utf-8"))
    lines = [
        "## The pocket model's gates",
        "",
        "By `python -m dopsd.pocket gates`; 256 captions, 12 held-out things of 24 scenes, one",
        "training of the model. The many-step model (parent) runs with classifier-free guidance",
        f"{gates['many_step_guidance']:g}, as it was distilled. Intervals: 95% bootstrap.",
        "",
        "| gate | measured | wanted | |",
        "|---|---|---|---|",
    ]
    for gate in gates["gates"]:
        verdict = "passed" if gate["passed"] else "**missed**"
        measured = f"{gate['value']:.3f} [{gate['low']:.3f}, {gate['high']:.3f}]"
        lines.append(f"| {gate['name']} | {measured} | {gate['wanted']} | {verdict} |")
    sides = ", ".join(
        f"{side} thing_error {gates[side]['thing_error']:.3f} "
        f"and thing_hit {gates[side]['thing_hit']:.3f}"
        for side in ("student", "teacher")
    )
    floor = f"Noise floor of thing_error: {gates['noise_floor_thing_error']:.4f}."
    return [*lines, "", f"In numbers: {sides}. {floor}", ""]


def _claim_lines(results: dict[str, Any], first: list[dict[str, Any]]) -> list[str]:
    return [
        "## The claim: set-up",
        "",
        "Numbers are in `benchmarks/results/claim.json`; measure again with",
        "`python benchmarks/claim.py sweep` and `run`.",
        f"Machine: 2 CPU cores, one training a core. {len(first)} held-out things, 1 seed each",
        f"({len(results['claim'])} trainings of each method in all). Intervals: 95% bootstrap over",
        f"things. Trainings: LoRA rank {RANK}, batch {BATCH}, {STEPS} steps of D-OPSD, constant",
        "rate after a warm-up of 10.",
        "",
        *_sweep_lines(results),
        *_table_lines(first),
        *_verdict_lines(first),
        *_seed_lines(results["claim"]),
    ]


def _sweep_lines(results: dict[str, Any]) -> list[str]:
    lines = [
        "## Learning rates",
        "",
        f"The same three values on {len(SWEEP_THINGS)} other things; lowest mean "
        "thing_error is kept.",
        "",
        "| method | rate | thing_error | sharpness | attributes |",
        "|---|---|---|---|---|",
    ]
    chosen = chosen_rates(results)
    for method in ("dopsd", "sft"):
        for rate in RATES:
            rows = [r for r in results["sweep"] if (r["method"], r["rate"]) == (method, rate)]
            if rows:
                cells = [
                    f"{np.mean([r[m] for r in rows]):.3f}"
                    for m in ("thing_error", "sharpness", "attributes")
                ]
                mark = " (kept)" if rate == chosen[method] else ""
                lines.append(f"| {method} | {rate:g}{mark} | {' | '.join(cells)} |")
    return [*lines, ""]


def _table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## What was learned and what was kept",
        "",
        "All at NFE 4 on the same noise.",
        "",
        f"| model | {' | '.join(METRICS)} | seconds |",
        "|---|" + "---|" * (len(METRICS) + 1),
    ]
    names = {
        "base": "base",
        "base_other_noise": "base, other noise (the noise floor)",
        "teacher": "teacher (base with an image in context)",
        "dopsd": "D-OPSD",
        "sft_equal_images": "SFT, equal images",
        "sft_equal_wall": "SFT, equal wall time",
        "sft_first_match": "SFT, where it first has D-OPSD's thing_error",
    }
    for key, name in names.items():
        have = [row[key] for row in rows if row[key]]
        if not have:
            lines.append(f"| {name} (0 of {len(rows)} things) |" + " - |" * (len(METRICS) + 1))
            continue
        hidden = ("sharpness", "speckle", "attributes") if key == "teacher" else ()
        cells = [
            "-" if m in hidden else interval([a[m] for a in have], 4 if m == "speckle" else 3)
            for m in METRICS
        ]
        cells.append(interval([a["seconds"] for a in have], 0) if "seconds" in have[0] else "-")
        count = "" if len(have) == len(rows) else f" ({len(have)} of {len(rows)} things)"
        lines.append(f"| {name}{count} | {' | '.join(cells)} |")
    return [*lines, ""]


def _verdict_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    def gap(row: dict[str, Any], key: str) -> float:
        base, teacher = row["base"]["thing_error"], row["teacher"]["thing_error"]
        return (base - row[key]["thing_error"]) / (base - teacher)

    def over_base(key: str, metric: str) -> list[float]:
        return [row[key][metric] / row["base"][metric] for row in rows if row[key]]

    def points(key: str) -> list[float]:
        return [
            100 * (row[key]["attributes"] - row["base"]["attributes"]) for row in rows if row[key]
        ]

    lines = [
        "## The claim",
        "",
        "Closed gap = (E_base - E) / (E_base - E_teacher) in thing_error.",
        "",
        "| | expected | D-OPSD | SFT, equal wall time | SFT at its first match |",
        "|---|---|---|---|---|",
    ]
    keys = ("dopsd", "sft_equal_wall", "sft_first_match")
    have = {key: [row for row in rows if row[key]] for key in keys}
    for label, expected, values in (
        ("closed gap", "D-OPSD >= 0.5", lambda k: [gap(row, k) for row in have[k]]),
        ("sharpness over base", "D-OPSD >= 0.95; SFT < 0.85", lambda k: over_base(k, "sharpness")),
        ("speckle over base", "void above 1.2", lambda k: over_base(k, "speckle")),
        ("attributes, points", "D-OPSD within 3; SFT 15 down", points),
    ):
        cells = [interval(values(k)) if have[k] else "never" for k in keys]
        lines.append(f"| {label} | {expected} | {' | '.join(cells)} |")
    never = sum(row["sft_first_match"] is None for row in rows)
    return [
        *lines,
        "",
        f"SFT never reached D-OPSD's thing_error within {CAP} times its wall time on {never} of "
        f"{len(rows)} things.",
        "",
    ]


def _seed_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## Spread over seeds",
        "",
        "| thing | score | D-OPSD, each seed | SFT at equal wall time, each seed |",
        "|---|---|---|---|",
    ]
    for thing in REPEATED:
        same = [row for row in rows if row["thing"] == thing]
        for metric in ("thing_error", "sharpness", "attributes"):
            cells = [
                ", ".join(f"{row[key][metric]:.3f}" for row in same)
                for key in ("dopsd", "sft_equal_wall")
            ]
            lines.append(f"| {thing} | {metric} | {' | '.join(cells)} |")
    return lines


def interval(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """Mean and 95% bootstrap interval of values, as a cell of a table."""
    mean, low, high = bootstrap(np.asarray(values, dtype=float))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
