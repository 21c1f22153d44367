"""Does the health check tell a blurred model from a harmless one? False alarms, and agreement with
the frozen measures.

    python benchmarks/health.py        # writes docs/health_measured.md; about 15 minutes on one CPU core

Harmless: LoRA files that were pushed off the base model at random and pulled back to it by D-OPSD
with the same context for teacher and student (20 seeds, each examined on noise of its own). Tuned:
SFT at a high rate and D-OPSD on three things, looked at while they train, by the health check and
by the exam's sharpness.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from bench import CPU, RANK, Bench

from dopsd.diffusion.batch import Batch
from dopsd.evaluation.health import FIRST_SEED, Health, HealthCheck
from dopsd.files import write_text
from dopsd.methods import DOPSD, SFT, Method
from dopsd.pocket.benchmark import HELD_OUT
from dopsd.training.adapters import add_lora
from dopsd.training.loop import generator_at
from dopsd.training.roles import Teacher, make_roles

PAGE = Path("docs/health_measured.md")
RERUNS, PULLS, PUSH = 20, 20, 0.02
THINGS = tuple(range(HELD_OUT + 600, HELD_OUT + 603))
LOOKS = {"sft": (25, 100, 400), "dopsd": (40, 120)}
METHODS: dict[str, tuple[Method, float]] = {"sft": (SFT(), 1e-3), "dopsd": (DOPSD(), 1e-3)}
BLURRED = 0.9  # of the base model's sharpness, by the exam: what the check promises to notice
IMAGES = 4  # a pull


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


def tuned(
    bench: Bench, name: str, thing: int, rerun: int
) -> list[tuple[str, int, int, float, Health]]:
    """(method, thing, step, the exam's sharpness over the base model's, health) at each look."""
    method, rate = METHODS[name]
    check, base = (
        health_check(bench, rerun),
        bench.exam(bench.family.load_denoiser(CPU, torch.float32))["sharpness"],
    )
    rows = []
    for step, _, velocity in bench.train(method, rate, seed=0, max_steps=max(LOOKS[name])):
        if step in LOOKS[name]:
            sharpness = bench.exam(velocity)["sharpness"] / base  # type: ignore[operator]
            rows.append((name, thing, step, sharpness, check.examine(velocity, bench.vae)))
            print(*rows[-1][:4], rows[-1][4], flush=True)
    return rows


def main() -> None:
    """Measure and write the page."""
    found, rows = [], []
    with TemporaryDirectory() as folder:
        for index, thing in enumerate(THINGS):
            bench = Bench(thing, Path(folder) / str(thing))
            for name in METHODS:
                rows += tuned(bench, name, thing, rerun=100 + index)
        for seed in range(RERUNS):
            found.append(harmless(bench, seed))
            print("harmless", seed, *found[-1], flush=True)
    write_text(PAGE, "\n".join([*_harmless_lines(found), *_tuned_lines(rows)]) + "\n")


def _harmless_lines(found: Sequence[tuple[Health, float]]) -> list[str]:
    alarms = [str(health) for health, _ in found if not health.healthy]
    left = np.mean([size for _, size in found])
    names = list(found[0][0].metrics)
    lines = [
        "# The health check, measured on pocket",
        "",
        "Written by `python benchmarks/health.py`.",
        "",
        "## False alarms",
        "",
        f"{len(alarms)} of {len(found)} harmless LoRA files raised an alarm. Each was pushed off the untouched model",
        f"at random, pulled back by {PULLS} steps of D-OPSD with equal contexts (B ends at {left:.2f} of the push),",
        "and examined on noise of its own.",
        "The untouched model itself cannot raise one: it is compared with itself on the same noise.",
        "",
        "| measure | mean | least | most | limit |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        values = [health.metrics[name].value for health, _ in found]
        limit = found[0][0].metrics[name].limit
        lines.append(
            f"| {name} | {np.mean(values):.3f} | {min(values):.3f} | {max(values):.3f} | {limit:.2f} |"
        )
    return [*lines, *[f"\nAlarm: {alarm}." for alarm in alarms], ""]


def _tuned_lines(rows: Sequence[tuple[str, int, int, float, Health]]) -> list[str]:
    lines = [
        "## Agreement with the exam's sharpness",
        "",
        f"Blurred: below {BLURRED} of the untouched model's sharpness on the exam's 96 unrelated prompts.",
        "",
        "| method | thing | step | sharpness (exam) | sharpness (health) | blurred | health |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, thing, step, sharpness, health in rows:
        blurred = "yes" if sharpness < BLURRED else "no"
        value = health.metrics["sharpness"].value
        lines.append(
            f"| {name} | {thing} | {step} | {sharpness:.3f} | {value:.3f} | {blurred} | {health} |"
        )
    flagged = [not row[4].healthy for row in rows]
    truth = [row[3] < BLURRED for row in rows]
    caught = sum(f for f, t in zip(flagged, truth, strict=True) if t)
    false = sum(f for f, t in zip(flagged, truth, strict=True) if not t)
    return [
        *lines,
        "",
        f"Of {sum(truth)} blurred looks {caught} were flagged; of the other {len(rows) - sum(truth)}, "
        f"{false} were.",
    ]


if __name__ == "__main__":
    main()
