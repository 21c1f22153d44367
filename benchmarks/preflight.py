"""Does `dopsd preflight` predict what D-OPSD then learns? Over things of the pocket world and
things out of it.

    python benchmarks/preflight.py run        # 20 trainings, about 40 minutes on two CPU cores
    python benchmarks/write_pages.py          # docs/results.md has a section on it

Fixed before any of these things was looked at (score, ENOUGH and this rule were made on others,
seeds 1000800-1000816): learned = 1 - thing_error after / thing_error before, means over the
benchmark's 24 unseen scenes. The sentence is right when it says "can" and learned >= ENOUGH, or
says "little" or "cannot" and learned < ENOUGH. The score is how much nearer the teacher comes
(`Preflight.nearer.value`), with SEEDS noises an image.
"""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from dopsd.evaluation.statistics import spearman
from dopsd.files import write_json
from dopsd.pocket.curves import BATCH, RANK, Bench, concept_recipe
from dopsd.pocket.world.datasets import HELD_OUT, write_concept
from dopsd.pocket.world.out_of_domain import OUT_OF_WORLD, kind_of
from dopsd.runs.preflight import ENOUGH, preflight

THINGS = (*range(HELD_OUT + 910, HELD_OUT + 920), *range(OUT_OF_WORLD + 10, OUT_OF_WORLD + 20))
STEPS, RATE, SEEDS = 80, 1e-3, 8
RESULTS = Path(__file__).parent / "results" / "preflight.json"
ABOUT = """## Does preflight predict what D-OPSD learns?

`python benchmarks/preflight.py run`; numbers in `benchmarks/results/preflight.json`. {count}
things, one training each of {steps} steps of {batch} images, LoRA rank {rank}, rate {rate:g}, seed
0, 2 CPU cores; preflight with {seeds} noises an image. nearer: the share by which the teacher comes
nearer to the training images; learned: the share of thing_error (24 unseen scenes) that training
removed. The sentence is right when it says "can" and learned is {enough:.2f} or more, or says
"little" or "cannot" and learned is less; this rule and the score were fixed on other things before
these were looked at.
"""

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.callback()
def _commands() -> None:
    """Keeps `run` a word of its own."""


@app.command()
def run(workers: int = 2) -> None:
    """Measure the things that are not there yet."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    have = {row["thing"] for row in rows}
    with ProcessPoolExecutor(workers) as pool:
        for row in pool.map(measure_thing, [thing for thing in THINGS if thing not in have]):
            rows.append(row)
            write_json(RESULTS, rows)
            print(
                f"{row['thing']} {row['kind']}: nearer {row['nearer']['value']:.3f} "
                f"{row['verdict']} learned {learned(row):.3f} right={is_right(row)}",
                flush=True,
            )


def measure_thing(thing: int) -> dict[str, Any]:
    """Preflight's conclusion on a thing, and its thing_error before and after D-OPSD."""
    with tempfile.TemporaryDirectory() as name:
        torch.set_num_threads(1)
        folder = Path(name)
        write_concept(folder / "images", thing)
        bench = Bench(folder / "images", unrelated=1)
        train = {"learning_rate": RATE, "max_steps": STEPS}
        sections = {"method": {"name": "dopsd"}, "train": train}
        recipe = concept_recipe(sections, bench.data, folder, "dopsd")
        answer = preflight(recipe, folder / "page.html", lambda what, done, total: None, SEEDS)
        (tuned,) = bench.curve(recipe, [STEPS])
        return {
            "thing": thing,
            "kind": kind_of(thing),
            "nearer": answer.nearer._asdict(),
            "images": [each.nearer.value for each in answer.comparisons],
            "verdict": answer.verdict,
            "base": bench.look(bench.base).mean("thing_error"),
            "dopsd": tuned.mean("thing_error"),
            "seconds": tuned.seconds,
        }


def learned(row: dict[str, Any]) -> float:
    """Share of thing_error that training removed."""
    return 1 - row["dopsd"] / row["base"]


def is_right(row: dict[str, Any]) -> bool:
    """Whether the sentence predicted the outcome."""
    return (row["verdict"] == "can") == (learned(row) >= ENOUGH)


def section() -> list[str]:
    """For docs/results.md."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    about = ABOUT.format(
        count=len(rows), steps=STEPS, batch=BATCH, rank=RANK, rate=RATE, seeds=SEEDS, enough=ENOUGH
    )
    lines = [
        *about.splitlines(),
        "",
        "| things | rank correlation of nearer and learned | sentence right "
        '| says "can" | learned enough |',
        "|---|---|---|---|---|",
    ]
    inside = [row for row in rows if row["kind"] == "of the world"]
    beyond = [row for row in rows if row["kind"] != "of the world"]
    for name, group in (("all", rows), ("of the pocket world", inside), ("out of it", beyond)):
        rank = spearman(
            np.array([r["nearer"]["value"] for r in group]), np.array([learned(r) for r in group])
        )
        counts = (
            sum(map(is_right, group)),
            sum(r["verdict"] == "can" for r in group),
            _enough(group),
        )
        lines.append(
            f"| {name} ({len(group)}) | {rank.value:.2f} [{rank.low:.2f}, {rank.high:.2f}] | "
            f"{counts[0]} of {len(group)} | {counts[1]} | {counts[2]} |"
        )
    always = max(_enough(rows), len(rows) - _enough(rows))
    lines += [
        "",
        f"Saying the same of every thing would have been right for {always} of {len(rows)}.",
        "",
        "| thing | differs from the training world in | nearer | verdict "
        "| thing_error before, after | learned | right |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        by = row["nearer"]
        lines.append(
            f"| {row['thing']} | {row['kind']} "
            f"| {by['value']:.3f} [{by['low']:.3f}, {by['high']:.3f}] | {row['verdict']} "
            f"| {row['base']:.3f}, {row['dopsd']:.3f} | {learned(row):.3f} "
            f"| {'yes' if is_right(row) else 'no'} |"
        )
    return [*lines, ""]


def _enough(rows: list[dict[str, Any]]) -> int:
    return sum(learned(row) >= ENOUGH for row in rows)


if __name__ == "__main__":
    app()
