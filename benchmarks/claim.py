"""The claim, measured: what each way to train has learned and kept at looks along its training.

    python benchmarks/claim.py estimate               # minutes that are left to measure
    python benchmarks/claim.py sweep --minutes 20     # learning rates, on things of their own
    python benchmarks/claim.py run --minutes 90       # arms x things x seeds, most telling first
    python benchmarks/claim.py write                  # claim.json and docs/results.md

Looks are rows of benchmarks/results/claim.jsonl, one training (a cell) at a time; a cell that is
there is not measured again, and rows of other weights than the packaged ones are dropped. So both
can be stopped at any time, and `write` says what is missing. Order of `run`: the main arms on the
first thing, the second, and so on (seed 0); styles; the variants on three things; the best variant
on the others; then the next seed.
"""

import functools
import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from claim_arms import (
    ARMS,
    IN_STYLES,
    MAIN,
    RATES,
    REGIMES,
    SWEEP_FORWARDS,
    SWEEP_THINGS,
    UNRELATED,
    VARIANTS,
)
from claim_rows import Row, Rows, goal_of
from claim_verdict import best_variant, chosen_rate, numbers

from dopsd.evaluation.curves import Look
from dopsd.files import atomic_path, read_jsonl, sha256_of, write_json, write_jsonl
from dopsd.pocket import CHECKPOINT
from dopsd.pocket.curves import Bench, concept_recipe
from dopsd.pocket.world.datasets import HELD_OUT, write_concept, write_style_concept
from dopsd.runs.comparison.budget import forwards_a_step

RESULTS = Path(__file__).parent / "results"
ROWS, CLAIM = RESULTS / "claim.jsonl", RESULTS / "claim.json"
WORK = Path("runs/claim")
SECONDS = {"forward": 0.0075, "look": 6.0}  # where nothing is measured yet

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Minutes = Annotated[float, typer.Option(help="No training begins that would end later.")]
Workers = Annotated[int, typer.Option(help="Trainings at once, a thread each.")]


class Cell(NamedTuple):
    """One training: an arm on a concept. arm "references": the models that need no training. goal:
    thing_error at which a sweep ends; None: no end before the last look."""

    stage: str
    regime: str
    arm: str
    concept: int
    seed: int = 0
    rate: float | None = None
    goal: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What its rows are found by; another definition of the arm is another cell."""
        settings = ARMS[self.arm].mark if self.arm in ARMS else ""
        return (*self[:6], settings)

    @property
    def is_ready(self) -> bool:
        """Whether what it depends on is measured."""
        return self.stage == "run" or self.arm == "references" or self.goal is not None


@functools.cache
def weights_mark() -> str:
    """Stands for the packaged checkpoint in the rows."""
    files = sorted(CHECKPOINT.rglob("*.safetensors"))
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()[:12]


def plan_sweep(rows: Rows) -> Iterator[Cell]:
    """The sweep's cells in order: references, then every rate of each arm that is swept."""
    for thing in SWEEP_THINGS:
        yield Cell("sweep", "identity", "references", thing)
    for thing in SWEEP_THINGS:
        goal = goal_of(rows, "sweep", "identity", thing)
        for rate in RATES:
            for arm in MAIN:
                yield Cell("sweep", "identity", arm, thing, 0, rate, goal)


def plan_run(rows: Rows) -> Iterator[Cell]:
    """The cells of `run` in order (see the top of the file)."""

    def cells(regime: str, arms: Sequence[str], concepts: Sequence[int], seed: int):
        for concept in concepts:
            if seed == 0:
                yield Cell("run", regime, "references", concept)
            for arm in arms:
                yield Cell("run", regime, arm, concept, seed, chosen_rate(rows, arm))

    identity, style = REGIMES["identity"], REGIMES["style"]
    yield from cells("identity", list(MAIN), identity.concepts, 0)
    yield from cells("style", IN_STYLES, style.concepts, 0)
    yield from cells("identity", list(VARIANTS), identity.concepts[:3], 0)
    best = best_variant(rows)
    arms = [*MAIN, best] if best else list(MAIN)
    for seed in identity.seeds:
        yield from cells("identity", arms, identity.concepts, seed)


def data_of(cell: Cell, folder: Path) -> Path:
    """The images of a cell's concept, drawn where they are not there. Not for two processes at
    once: `measure` calls it before it starts one."""
    regime = REGIMES[cell.regime]
    data = folder / f"{regime.kind}-{cell.concept}"
    if not data.is_dir():
        write = write_concept if regime.kind == "thing" else write_style_concept
        with atomic_path(data) as temporary:
            write(temporary, cell.concept, regime.images)
    return data


def measure_cell(cell: Cell, folder: Path) -> list[Row]:
    """The rows of a cell, in a process of its own. Images and cached tensors go below `folder`."""
    torch.set_num_threads(1)
    regime, data = REGIMES[cell.regime], data_of(cell, folder)
    started = time.perf_counter()
    bench = Bench(data, UNRELATED, stream=cell.concept)
    about = {"weights": weights_mark(), "nfe": bench.family.default_nfe, "key": list(cell.key)}
    if cell.arm == "references":
        return [about | row for row in _references(bench)]

    # The steps of the looks, from the forwards before them
    arm = ARMS[cell.arm]
    forwards = SWEEP_FORWARDS if cell.stage == "sweep" else regime.forwards
    train = {"learning_rate": cell.rate, "seed": cell.seed}
    recipe = concept_recipe(arm.sections | {"train": train}, data, folder / "runs", "claim")
    cost = forwards_a_step(recipe, bench.family.default_nfe)
    steps = sorted({max(arm.first_step, round(each / cost)) for each in forwards})
    train |= {"max_steps": steps[-1]}
    recipe = concept_recipe(arm.sections | {"train": train}, data, folder / "runs", "claim")

    rows: list[Row] = []
    try:
        for look in bench.curve(recipe, steps):
            wall = time.perf_counter() - started
            spent = {"forwards": look.forwards, "seconds": look.seconds, "wall": wall}
            rows.append(about | {"step": look.step} | _means(look) | spent)
            if cell.goal is not None and look.mean("thing_error") <= cell.goal:
                break
    except ValueError as error:  # steps that are not finite: the rate is too high
        rows.append(about | {"step": 0, "failed": str(error)})
    return rows


def _references(bench: Bench) -> Iterator[Row]:
    """The base model, on the usual noise and on other noise, and both teachers."""
    yield {"of": "base", "step": 0, **_means(bench.look(bench.base))}
    other = bench.evaluate(bench.base, noise_seed=HELD_OUT).means()
    yield {"of": "floor", "step": 0, **other}
    for sees in ("target", "another"):
        means = bench.evaluate(bench.base, teacher_sees=sees).means()
        yield {"of": f"teacher, {sees}", "step": 0, **means}


def _means(look: Look) -> dict[str, float]:
    return {metric: look.mean(metric) for metric in look.values}


def read_rows() -> Rows:
    """The rows that were measured on the packaged weights."""
    if not ROWS.exists():
        return Rows([])
    rows = [row for _, row in read_jsonl(ROWS)]
    return Rows([row for row in rows if row["weights"] == weights_mark()])


def next_cell(plan: Any, rows: Rows, busy: Sequence[Cell]) -> Cell | None:
    """The first cell of the plan that is neither measured nor being measured."""
    taken = rows.keys | {cell.key for cell in busy}
    return next((each for each in plan(rows) if each.is_ready and each.key not in taken), None)


def seconds_of(cell: Cell, rows: Rows) -> float:
    """About how long a cell takes, from those that are measured."""
    looks = SWEEP_FORWARDS if cell.stage == "sweep" else REGIMES[cell.regime].forwards
    per_forward, per_look = rows.seconds_per_forward, rows.seconds_per_look
    look = SECONDS["look"] if per_look is None else per_look
    if cell.arm == "references":
        return 3 * look
    return looks[-1] * (per_forward or SECONDS["forward"]) + len(looks) * look


def measure(plan: Any, minutes: float, workers: int) -> None:
    """Measure the cells of a plan in its order as long as there is time; save after each."""
    deadline, rows = time.monotonic() + 60 * minutes, read_rows()
    running: dict[Future[list[Row]], Cell] = {}
    with ProcessPoolExecutor(workers) as pool:
        while True:
            while len(running) < workers:
                cell = next_cell(plan, rows, list(running.values()))
                if cell is None or time.monotonic() + seconds_of(cell, rows) > deadline:
                    break
                data_of(cell, WORK)
                running[pool.submit(measure_cell, cell, WORK)] = cell
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for job in done:
                cell = running.pop(job)
                rows = Rows([*rows.all, *job.result()])
                write_jsonl(ROWS, rows.all)
                _say(cell, rows.all[-1], deadline)
    left = minutes_left(plan, rows, workers)
    print(f"{left:.0f} minutes left to measure" if left else "everything is measured")


def _say(cell: Cell, row: Row, deadline: float) -> None:
    scores = ("thing_error", "thing_hit", "thing_sharp", "sharpness", "attributes", "drift")
    shown = " ".join(f"{name}={row[name]:.3f}" for name in scores if row.get(name) is not None)
    left = (deadline - time.monotonic()) / 60
    rate = f" rate={cell.rate:g}" if cell.rate else ""
    print(
        f"[{left:.0f} min left] {cell.stage} {cell.regime} {cell.concept} seed={cell.seed} "
        f"{cell.arm}{rate} step={row['step']} {row.get('failed', shown)}",
        flush=True,
    )


def minutes_left(plan: Any, rows: Rows, workers: int) -> float:
    """About how long what is not measured yet takes."""
    left = {cell.key: cell for cell in plan(rows) if cell.key not in rows.keys}
    return sum(seconds_of(cell, rows) for cell in left.values()) / workers / 60


@app.command()
def estimate(workers: Workers = 2) -> None:
    """Print about how many minutes are left."""
    rows = read_rows()
    for name, plan in (("sweep", plan_sweep), ("run", plan_run)):
        print(f"{name}: about {minutes_left(plan, rows, workers):.0f} minutes")


@app.command()
def sweep(minutes: Minutes = 30, workers: Workers = 2) -> None:
    """Try three learning rates of each main arm on two things of their own."""
    measure(plan_sweep, minutes, workers)


@app.command()
def run(minutes: Minutes = 90, workers: Workers = 2) -> None:
    """Measure arms x things x seeds at the chosen rates."""
    measure(plan_run, minutes, workers)


@app.command()
def write() -> None:
    """Write claim.json from the rows, and the pages from it."""
    import write_pages

    rows = read_rows()
    missing = {cell.key: cell for cell in plan_run(rows) if cell.key not in rows.keys}
    write_json(CLAIM, numbers(rows, [list(cell[:5]) for cell in missing.values()]))
    write_pages.main()


if __name__ == "__main__":
    app()
