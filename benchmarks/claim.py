"""The claim, measured: what D-OPSD and SFT learn of a thing, and what the few-step model keeps.

    python benchmarks/claim.py sweep      # learning rate of each method on other things, 3 values
    python benchmarks/claim.py run        # 10 things x 1 seed, 2 things x 3 seeds, at these rates
    python benchmarks/write_pages.py      # docs/results.md

Numbers go to benchmarks/results/claim.json as they come; what is there is not measured
again. D-OPSD trains STEPS steps of BATCH images. SFT is evaluated after equally many images, after
equal wall time, and at its first evaluation whose thing_error is D-OPSD's or less (cap: 4 times
D-OPSD's wall time, else "never").
"""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from bench import CPU, Bench

from dopsd.files import write_json
from dopsd.methods import DOPSD, SFT, Method
from dopsd.pocket.world.datasets import HELD_OUT

STEPS = 120
RATES = (3e-4, 1e-3, 3e-3)
SWEEP_THINGS = tuple(range(HELD_OUT + 500, HELD_OUT + 503))
THINGS = tuple(range(HELD_OUT + 200, HELD_OUT + 210))
REPEATED, SEEDS = THINGS[:2], (0, 1, 2)
EVALUATE_EVERY = 40  # SFT steps between two evaluations of thing_error
CAP = 4  # times D-OPSD's wall time
RESULTS = Path(__file__).parent / "results" / "claim.json"

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
        base = bench.family.load_denoiser(CPU, torch.float32)
        found: dict[str, Any] = {
            "thing": thing,
            "seed": seed,
            "base": bench.evaluate(base),
            "base_other_noise": bench.evaluate(base, noise_seed=HELD_OUT),
            "teacher": bench.evaluate(base, "another"),
        }
        *_, (_, wall, velocity) = bench.train(DOPSD(), rates["dopsd"], seed, STEPS)
        found["dopsd"] = bench.evaluate(velocity) | {"seconds": wall}
        target = found["dopsd"]["thing_error"]
        assert target is not None, "a student answers every question"
        found |= _sft_beside(bench, rates["sft"], seed, wall, target)
    return found


def _sft_beside(bench: Bench, rate: float, seed: int, wall: float, target: float) -> dict[str, Any]:
    evaluations: dict[str, Any] = {
        "sft_equal_images": None,
        "sft_equal_wall": None,
        "sft_first_match": None,
    }
    best = float("inf")
    for step, seconds, velocity in bench.train(SFT(), rate, seed, max_steps=100_000):
        at = {"seconds": seconds, "steps": step}
        if step == STEPS:
            evaluations["sft_equal_images"] = bench.evaluate(velocity) | at
        if seconds >= wall and not evaluations["sft_equal_wall"]:
            evaluations["sft_equal_wall"] = bench.evaluate(velocity) | at
        if step % EVALUATE_EVERY == 0:
            error = bench.error(velocity)
            best = min(best, error)
            if error <= target and not evaluations["sft_first_match"]:
                evaluations["sft_first_match"] = bench.evaluate(velocity) | at
        done = all(evaluations.values())
        if done or seconds >= CAP * wall:
            break
    return evaluations | {"sft_best_thing_error": best}


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
        return bench.evaluate(velocity) | {
            "method": replicate.method,
            "thing": replicate.thing,
            "rate": replicate.rate,
            "seconds": seconds,
        }


@app.command()
def sweep(workers: int = 2) -> None:
    """Try the three rates of each method on three other things; the rate with the lowest mean
    thing_error is kept."""
    results = read_results()
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
                f"{row['method']} rate={row['rate']:g} thing={row['thing']} "
                f"thing_error={row['thing_error']:.4f} sharpness={row['sharpness']:.3f} "
                f"attributes={row['attributes']:.3f}",
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
    results = read_results()
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
            share = round(match["seconds"] / row["dopsd"]["seconds"], 2) if match else "never"
            print(
                f"thing={row['thing']} seed={row['seed']} base={row['base']['thing_error']:.4f} "
                f"teacher={row['teacher']['thing_error']:.4f} "
                f"dopsd={row['dopsd']['thing_error']:.4f} sft_match={share}",
                flush=True,
            )


def read_results() -> dict[str, Any]:
    """The rows that were measured: learning rates under `sweep`, trainings under `claim`."""
    if RESULTS.exists():
        return json.loads(RESULTS.read_text(encoding="utf-8"))
    return {"sweep": [], "claim": []}


if __name__ == "__main__":
    app()
