"""Does `dopsd preflight` predict what D-OPSD then learns? Over things of the pocket world and things out of it.

    python benchmarks/preflight.py run        # 20 trainings of STEPS steps, about 40 minutes on two CPU cores
    python benchmarks/claim.py write          # docs/results.md, with a section on this

Fixed before any of these things was looked at (score, ENOUGH and this rule were made on others, seeds 1000800-1000816):
learned = 1 - thing_error after / thing_error before, means over the exam's 24 unseen scenes. The sentence is right when
it says "can" and learned >= ENOUGH, or says "little" or "cannot" and learned < ENOUGH. The score is how much nearer the
teacher comes (`Preflight.nearer.value`), with SEEDS noises a picture.
"""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import typer
from claim import CPU, Bench

from dopsd.compare import demo_recipe
from dopsd.files import write_json
from dopsd.methods import DOPSD
from dopsd.pocket.beyond import OUT_OF_WORLD, kind_of
from dopsd.pocket.exam import HELD_OUT
from dopsd.preflight import ENOUGH, preflight

THINGS = (*range(HELD_OUT + 910, HELD_OUT + 920), *range(OUT_OF_WORLD + 10, OUT_OF_WORLD + 20))
STEPS, RATE, SEEDS = 80, 1e-3, 8
RESULTS = Path("docs/preflight.json")

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
        for row in pool.map(measure, [thing for thing in THINGS if thing not in have]):
            rows.append(row)
            write_json(RESULTS, rows)
            print(f"{row['thing']} {row['kind']}: nearer {row['nearer']['value']:.3f} {row['verdict']} "
                  f"learned {learned(row):.3f} right={is_right(row)}", flush=True)  # fmt: skip


def measure(thing: int) -> dict[str, Any]:
    """What preflight says of a thing, and its thing_error before and after D-OPSD."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(thing, folder)
        recipe = demo_recipe("dopsd", folder / "lesson", folder)
        said = preflight(recipe, folder / "page.html", lambda what, done, total: None, SEEDS)
        untouched = bench.family.load_denoiser(CPU, torch.float32)
        *_, (_, seconds, velocity) = bench.train(DOPSD(), RATE, 0, STEPS)
        return {
            "thing": thing,
            "kind": kind_of(thing),
            "nearer": said.nearer._asdict(),
            "pictures": [look.nearer.value for look in said.looks],
            "verdict": said.verdict,
            "base": bench.error(untouched),
            "dopsd": bench.error(velocity),
            "seconds": seconds,
        }


def learned(row: dict[str, Any]) -> float:
    """Share of thing_error that training took away."""
    return 1 - row["dopsd"] / row["base"]


def is_right(row: dict[str, Any]) -> bool:
    """Whether the sentence said what came."""
    return (row["verdict"] == "can") == (learned(row) >= ENOUGH)


if __name__ == "__main__":
    app()
