"""The claim, measured: what D-OPSD and SFT learn of a thing, and what the few-step model keeps.

    python benchmarks/claim.py sweep      # learning rate of each method, the same 3 values, on other things
    python benchmarks/claim.py run        # 10 things x 1 seed and 2 things x 3 seeds, at the swept rates
    python benchmarks/claim.py write      # docs/results.md from the numbers

Numbers go to benchmarks/results/claim.json as they come; a unit that is there is not measured
again. D-OPSD trains STEPS steps of BATCH images. SFT is evaluated after equally many images, after
equal wall time, and at its first evaluation whose thing_error is D-OPSD's or less (cap: 4 times
D-OPSD's wall time, else "never").
"""

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from bench import BATCH, CPU, RANK, Bench

from dopsd.evaluation.statistics import bootstrap
from dopsd.files import write_json, write_text
from dopsd.methods import DOPSD, SFT, Method
from dopsd.models import POCKET
from dopsd.pocket.benchmark import HELD_OUT

STEPS = 120
RATES = (3e-4, 1e-3, 3e-3)
SWEEP_THINGS = tuple(range(HELD_OUT + 500, HELD_OUT + 503))
THINGS = tuple(range(HELD_OUT + 200, HELD_OUT + 210))
REPEATED, SEEDS = THINGS[:2], (0, 1, 2)
LOOK_EVERY = 40  # SFT steps between two looks at thing_error
CAP = 4  # times D-OPSD's wall time
RESULTS, PAGE = Path("benchmarks/results/claim.json"), Path("docs/results.md")
METRICS = ("thing_error", "thing_hit", "sharpness", "speckle", "attributes")

INTRODUCTION = """# Results on pocket

Written by `python benchmarks/claim.py write` from the JSON files in `benchmarks/results`; commands, seeds and
run times are on the page [reproduce](reproduce.md). Everything here is measured on *pocket*, a model of 2 M
parameters whose images are drawn by this repository, so that scores are read from pixels. No model of full
size and no GPU has been measured.

**What the numbers say.** D-OPSD closes the whole gap to its teacher and, at that point, keeps more of the
few-step sharpness than SFT does at the same thing_error. It does not keep more attributes of other prompts
(at most 3 points lost were expected; more are), and SFT reaches the same thing_error in a fraction of the
time. The teacher of this small model, given the image, shows the colours of the thing and not its stripes;
SFT goes on to learn the stripes, which then appear in unrelated prompts too. In the paper's comparison
D-OPSD and PSO keep the most sharpness and learn the least. What a stronger teacher does is not measured, and
the packaged model misses two of its seven gates: outlines are wobbly.

**Scores.** A *thing* is an object that no word describes; a model learns it from four images. thing_error
(lower is better): RMSE in [0, 1] between the generated image and the true scene inside the object, on 24
unseen scenes. thing_hit: share of images nearer to their thing than to 63 others. sharpness, speckle (lower
is better) and attributes (share of the prompt's attributes shown): on 96 unrelated prompts. bleed: by how
much thing_error falls when the prompt gives another name, or none. Definitions: [words](words.md).
"""

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@dataclass(frozen=True)
class Unit:
    """One training: a method at a rate on a thing with a seed."""

    method: str
    thing: int
    seed: int
    rate: float


def measure_pair(thing: int, seed: int, rates: dict[str, float]) -> dict[str, Any]:
    """D-OPSD on a thing, then SFT looked at where it can be compared."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(thing, Path(folder))
        base_tensors = bench.family.load_denoiser(CPU, torch.float32)
        found: dict[str, Any] = {
            "thing": thing,
            "seed": seed,
            "base": bench.exam(base_tensors),
            "base_other_noise": bench.exam(base_tensors, noise_seed=HELD_OUT),
            "teacher": bench.exam(base_tensors, seeing=True),
        }
        *_, (_, wall, velocity) = bench.train(DOPSD(), rates["dopsd"], seed, STEPS)
        found["dopsd"] = bench.exam(velocity) | {"seconds": wall}
        target = found["dopsd"]["thing_error"]
        assert target is not None, "a student answers every question"
        found |= _sft_beside(bench, rates["sft"], seed, wall, target)
    return found


def _sft_beside(bench: Bench, rate: float, seed: int, wall: float, target: float) -> dict[str, Any]:
    looks: dict[str, Any] = {
        "sft_equal_pictures": None,
        "sft_equal_wall": None,
        "sft_first_match": None,
    }
    best = float("inf")
    for step, seconds, velocity in bench.train(SFT(), rate, seed, max_steps=100_000):
        at = {"seconds": seconds, "steps": step}
        if step == STEPS:
            looks["sft_equal_pictures"] = bench.exam(velocity) | at
        if seconds >= wall and not looks["sft_equal_wall"]:
            looks["sft_equal_wall"] = bench.exam(velocity) | at
        if step % LOOK_EVERY == 0:
            error = bench.error(velocity)
            best = min(best, error)
            if error <= target and not looks["sft_first_match"]:
                looks["sft_first_match"] = bench.exam(velocity) | at
        done = all(looks.values())
        if done or seconds >= CAP * wall:
            break
    return looks | {"sft_best_thing_error": best}


def sweep_unit(replicate: Unit) -> dict[str, Any]:
    """thing_error at the end of a training of D-OPSD's length, or of SFT's equal forward units."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(replicate.thing, Path(folder))
        method: Method = DOPSD() if replicate.method == "dopsd" else SFT()
        cost_ratio = DOPSD().forwards(bench.family.default_nfe) / method.forwards(
            bench.family.default_nfe
        )
        *_, (_, seconds, velocity) = bench.train(
            method, replicate.rate, replicate.seed, round(STEPS * cost_ratio)
        )
        return bench.exam(velocity) | {
            "method": replicate.method,
            "thing": replicate.thing,
            "rate": replicate.rate,
            "seconds": seconds,
        }


@app.command()
def sweep(workers: int = 2) -> None:
    """Try the three rates of each method on three other things; the rate with the lowest mean
    thing_error is kept."""
    results = _results()
    have = {(row["method"], row["thing"], row["rate"]) for row in results["sweep"]}
    replicates = [
        Unit(method, thing, 0, rate)
        for thing in SWEEP_THINGS
        for method in ("dopsd", "sft")
        for rate in RATES
        if (method, thing, rate) not in have
    ]
    with ProcessPoolExecutor(workers) as pool:
        for row in pool.map(sweep_unit, replicates):
            results["sweep"].append(row)
            write_json(RESULTS, results)
            print(
                f"{row['method']} rate={row['rate']:g} thing={row['thing']} thing_error={row['thing_error']:.4f} "
                f"sharpness={row['sharpness']:.3f} attributes={row['attributes']:.3f}",
                flush=True,
            )
    print("chosen:", chosen_rates(results))


def chosen_rates(results: dict[str, Any]) -> dict[str, float]:
    """The rate of each method with the lowest mean thing_error over the sweep's things."""

    def mean(method: str, rate: float) -> float:
        rows = [
            r["thing_error"] for r in results["sweep"] if (r["method"], r["rate"]) == (method, rate)
        ]
        return float(np.mean(rows)) if rows else float("inf")

    return {method: min(RATES, key=lambda rate: mean(method, rate)) for method in ("dopsd", "sft")}


@app.command()
def run(workers: int = 2, most: int = 100) -> None:
    """Measure the claim's units that are not there yet, `most` of them."""
    results = _results()
    rates = chosen_rates(results)
    have = {(row["thing"], row["seed"]) for row in results["claim"]}
    wanted = [(thing, 0) for thing in THINGS] + [
        (thing, seed) for thing in REPEATED for seed in SEEDS[1:]
    ]
    replicates = [replicate for replicate in wanted if replicate not in have][:most]
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(measure_pair, thing, seed, rates) for thing, seed in replicates]
        for job in jobs:
            row = job.result()
            results["claim"].append(row)
            write_json(RESULTS, results)
            match = row["sft_first_match"]
            print(
                f"thing={row['thing']} seed={row['seed']} base={row['base']['thing_error']:.4f} "
                f"teacher={row['teacher']['thing_error']:.4f} dopsd={row['dopsd']['thing_error']:.4f} "
                f"sft_match={'never' if match is None else round(match['seconds'] / row['dopsd']['seconds'], 2)}",
                flush=True,
            )


def _results() -> dict[str, Any]:
    if RESULTS.exists():
        return json.loads(RESULTS.read_text(encoding="utf-8"))
    return {"sweep": [], "claim": []}


@app.command()
def write() -> None:
    """Write docs/results.md."""
    write_text(PAGE, page())
    print(PAGE)


def page() -> str:
    """docs/results.md: the gates, the claim, the paper's comparisons, and what
    benchmarks/preflight.py found."""
    from paper_tables import sections
    from preflight import section  # which imports this file

    results = _results()
    first = [row for row in results["claim"] if row["seed"] == SEEDS[0]]
    lines = [INTRODUCTION]
    lines += (
        _claim_lines(results, first)
        if first
        else ["## The claim", "", "Not measured on these weights yet."]
    )
    return "\n".join([*lines, "", *sections(), *section(), *_gate_lines()]).rstrip() + "\n"


def _gate_lines() -> list[str]:
    found = json.loads((POCKET / "gates.json").read_text(encoding="utf-8"))
    lines = [
        "## The pocket model's gates",
        "",
        "By `python -m dopsd.pocket gates`; 256 captions, 12 held-out things "
        "of 24 scenes, one training of the model. The many-step model (parent) runs with classifier-free "
        f"guidance {found['parent_guidance']:g}, as it was distilled. Intervals: 95% bootstrap.",
        "",
        "| gate | measured | wanted | |",
        "|---|---|---|---|",
    ]
    for gate in found["gates"]:
        verdict = "passed" if gate["passed"] else "**missed**"
        measured = f"{gate['value']:.3f} [{gate['low']:.3f}, {gate['high']:.3f}]"
        lines.append(f"| {gate['name']} | {measured} | {gate['wanted']} | {verdict} |")
    sides = ", ".join(
        f"{side} thing_error {found[side]['thing_error']:.3f} and thing_hit {found[side]['thing_hit']:.3f}"
        for side in ("student", "teacher")
    )
    floor = f"Noise floor of thing_error: {found['noise_floor_thing_error']:.4f}."
    return [*lines, "", f"In numbers: {sides}. {floor}", ""]


def _claim_lines(results: dict[str, Any], first: list[dict[str, Any]]) -> list[str]:
    return [
        "## The claim: set-up",
        "",
        "Numbers are in `benchmarks/results/claim.json`; measure again with",
        "`python benchmarks/claim.py sweep` and `run`.",
        f"Machine: 2 CPU cores, one training a core. {len(first)} held-out things, 1 seed each"
        f" ({len(results['claim'])} trainings of each method in all). Intervals: 95% bootstrap over things.",
        f"Trainings: LoRA rank {RANK}, batch {BATCH}, {STEPS} steps of D-OPSD, constant rate after a warm-up of 10.",
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
        "sft_equal_pictures": "SFT, equal images",
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
            "-" if m in hidden else _interval([a[m] for a in have], 4 if m == "speckle" else 3)
            for m in METRICS
        ]
        cells.append(_interval([a["seconds"] for a in have], 0) if "seconds" in have[0] else "-")
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
        cells = [_interval(values(k)) if have[k] else "never" for k in keys]
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
        "| thing | measure | D-OPSD, each seed | SFT at equal wall time, each seed |",
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


def _interval(values: Sequence[float], digits: int = 3) -> str:
    mean, low, high = bootstrap(np.asarray(values, dtype=float))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    app()
