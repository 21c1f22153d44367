"""Does the health check tell a blurred model from a harmless one? False alarms, and agreement with
the benchmark's sharpness.

    python benchmarks/health.py run       # benchmarks/results/health.json; 15 minutes on one core
    python benchmarks/write_pages.py      # docs/health_measured.md

Harmless: LoRA files that were pushed off the base model at random and pulled back to it by D-OPSD
with the same context for teacher and student (20 seeds, each examined on noise of its own). Tuned:
SFT at a high rate and D-OPSD on three things, examined while they train, by the health check and by
the benchmark's sharpness.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import typer

from dopsd.diffusion.batch import Batch
from dopsd.evaluation.health import FIRST_SEED, Health, HealthCheck
from dopsd.files import write_json
from dopsd.methods import DOPSD
from dopsd.pocket.curves import CPU, RANK, Bench, concept_recipe
from dopsd.pocket.world.datasets import HELD_OUT, write_concept
from dopsd.runs.train import train_in_memory
from dopsd.training.adapters import add_lora
from dopsd.training.loop import generator_at
from dopsd.training.roles import Teacher, make_roles

RESULTS = Path(__file__).parent / "results" / "health.json"
RERUNS, PULLS, PUSH = 20, 20, 0.02
THINGS = tuple(range(HELD_OUT + 600, HELD_OUT + 603))
LOOKS = {"sft": (25, 100, 400), "dopsd": (40, 120)}
RATE = 1e-3
BLURRED = 0.9  # of the base model's sharpness in the benchmark: what the check should notice
IMAGES = 4  # a pull

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


def health_check(bench: Bench, rerun: int) -> HealthCheck:
    """On noise that belongs to this rerun."""
    family = bench.family
    context = family.load_text_encoder(CPU, torch.float32, images=False).context(
        list(family.unrelated_prompts)
    )
    return HealthCheck(
        family.load_denoiser(CPU, torch.float32),
        bench.vae,
        lambda nfe: family.schedule(nfe, *bench.latent_shape[1:]),
        family.default_nfe,
        context,
        bench.latent_shape,
        first_seed=FIRST_SEED + 1000 * rerun,
    )


def harmless(bench: Bench, seed: int) -> tuple[Health, float]:
    """The health of a LoRA that was pushed and pulled back, and how large its deltas still are
    beside the push."""
    family = bench.family
    denoiser = family.load_denoiser(CPU, torch.float32)
    student = add_lora(denoiser.network, family.lora_targets, RANK, RANK, seed)
    teacher = Teacher(student, decay=1.0)
    noise = torch.Generator().manual_seed(seed)
    pushed = {name: p for name, p in student.items() if ".lora_B." in name}
    with torch.no_grad():
        for parameter in pushed.values():
            parameter.copy_(PUSH * torch.randn(parameter.shape, generator=noise))
    start = _size(list(pushed.values()))
    roles = make_roles(
        denoiser, student, teacher, lambda nfe, h, w: family.schedule(family.default_nfe, h, w)
    )
    text_encoder = family.load_text_encoder(CPU, torch.float32, images=False)
    prompts = tuple(family.unrelated_prompts[:IMAGES])
    context = text_encoder.context(list(prompts))
    batch = Batch(
        torch.zeros(IMAGES, *bench.latent_shape), context, prompts, torch.ones(IMAGES), context
    )
    optimizer = torch.optim.AdamW(student.values(), lr=1e-3, weight_decay=0.0)
    for step in range(PULLS):
        for piece in DOPSD(teacher_decay=1.0).losses(roles, batch, generator_at(seed, step)):
            piece.surrogate.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return health_check(bench, seed).examine(roles.student, bench.vae), _size(
        list(pushed.values())
    ) / start


def _size(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.sqrt(sum((t.detach() ** 2).sum() for t in tensors)))  # type: ignore[arg-type]


def tuned(bench: Bench, name: str, thing: int, rerun: int) -> list[dict[str, Any]]:
    """A row for each check of a training: the benchmark's sharpness over the base's, and health."""
    train = {"learning_rate": RATE, "max_steps": max(LOOKS[name])}
    sections = {"method": {"name": name}, "train": train}
    recipe = concept_recipe(sections, bench.data, bench.data.parent / "runs", name)
    check = health_check(bench, rerun)
    base = bench.evaluate(bench.base).sharpness.mean()
    rows = []
    for report, session in train_in_memory(recipe):
        if report.step in LOOKS[name]:
            velocity = session.deployed_roles.student
            sharpness = float(bench.evaluate(velocity).sharpness.mean() / base)
            health = check.examine(velocity, bench.vae)
            rows.append(
                {
                    "method": name,
                    "thing": thing,
                    "step": report.step,
                    "sharpness": sharpness,
                    "health_sharpness": health.metrics["sharpness"].value,
                    "healthy": health.healthy,
                    "health": str(health),
                }
            )
            print(rows[-1], flush=True)
    return rows


@app.callback()
def _commands() -> None:
    """Keeps `run` a command of its own."""


@app.command()
def run() -> None:
    """Measure, and write the numbers."""
    healths, sizes, rows = [], [], []
    with TemporaryDirectory() as folder:
        for index, thing in enumerate(THINGS):
            data = Path(folder) / f"thing-{thing}"
            write_concept(data, thing)
            bench = Bench(data)
            for name in LOOKS:
                rows += tuned(bench, name, thing, rerun=100 + index)
        for seed in range(RERUNS):
            health, size = harmless(bench, seed)
            healths.append(health)
            sizes.append(size)
            print("harmless", seed, health, size, flush=True)
    metrics = {}
    for name, metric in healths[0].metrics.items():
        values = [health.metrics[name].value for health in healths]
        spread = {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}
        metrics[name] = spread | {"limit": metric.limit}
    alarms = [str(health) for health in healths if not health.healthy]
    summary = {
        "count": len(healths),
        "alarms": alarms,
        "size_over_push": float(np.mean(sizes)),
        "metrics": metrics,
    }
    write_json(RESULTS, {"harmless": summary, "tuned": rows})


def page() -> str:
    """docs/health_measured.md from the numbers."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return (
        "\n".join([*_harmless_lines(results["harmless"]), *_tuned_lines(results["tuned"])]) + "\n"
    )


def _harmless_lines(harmless: dict[str, Any]) -> list[str]:
    lines = [
        "# The health check, measured on pocket",
        "",
        "Written by `python benchmarks/write_pages.py`; measured by",
        "`python benchmarks/health.py run`.",
        "",
        "## False alarms",
        "",
        f"{len(harmless['alarms'])} of {harmless['count']} harmless LoRA files raised an alarm.",
        f"Each was pushed off the base model at random, pulled back by {PULLS} steps of D-OPSD",
        f"with equal contexts (B ends at {harmless['size_over_push']:.2f} of the push), and",
        "examined on noise of its own. The base model itself cannot raise one: it is compared with",
        "itself on the same noise.",
        "",
        "| score | mean | least | most | limit |",
        "|---|---|---|---|---|",
    ]
    for name, spread in harmless["metrics"].items():
        cells = " | ".join(f"{spread[key]:.3f}" for key in ("mean", "least", "most"))
        lines.append(f"| {name} | {cells} | {spread['limit']:.2f} |")
    return [*lines, *[f"\nAlarm: {alarm}." for alarm in harmless["alarms"]], ""]


def _tuned_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## Agreement with the benchmark's sharpness",
        "",
        f"Blurred: below {BLURRED} of the base model's sharpness on the benchmark's 96 unrelated",
        "prompts.",
        "",
        "| method | thing | step | sharpness (benchmark) | sharpness (health) | blurred | health |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        blurred = "yes" if row["sharpness"] < BLURRED else "no"
        lines.append(
            f"| {row['method']} | {row['thing']} | {row['step']} | {row['sharpness']:.3f} "
            f"| {row['health_sharpness']:.3f} | {blurred} | {row['health']} |"
        )
    blurred = [row for row in rows if row["sharpness"] < BLURRED]
    sharp = [row for row in rows if row["sharpness"] >= BLURRED]
    caught, false = (sum(not row["healthy"] for row in group) for group in (blurred, sharp))
    return [
        *lines,
        "",
        f"Of {len(blurred)} blurred looks {caught} were flagged; of the other",
        f"{len(sharp)}, {false} were.",
    ]


if __name__ == "__main__":
    app()
