"""What one training batch costs: seconds and peak bytes, per method and number of steps K, in one
run.

    python benchmarks/step_cost.py --json benchmarks/results/step_cost.json

Variant `per_visit` is what dopsd does, one backward at each rollout step; `one_backward` keeps all
K graphs and runs backward once, as the reference code of D-OPSD does. Peak bytes are live tensor
storage created during the batch.
"""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.sampling import noise_for
from dopsd.methods import DOPSD, PSO, SFT, Loss, Method, PSOOnline, Roles
from dopsd.models import load_family
from dopsd.training.adapters import add_lora
from dopsd.training.loop import generator_at
from dopsd.training.memory_meter import LiveBytes
from dopsd.training.roles import Teacher, make_roles


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where the rows go.")],
    model: str = "pocket",
    batch_size: int = 4,
    repeats: int = 5,
    threads: int = 2,
) -> None:
    """Measure and print one row a (method, variant, K)."""
    torch.set_num_threads(threads)
    roles, batch = workbench(model, batch_size)
    rows = []
    cases: list[tuple[Method, str]] = [(SFT(), "one_forward")]
    for variant in ("per_visit", "one_backward"):
        cases += [(DOPSD(nfe=k), variant) for k in (2, 4, 8)]
        cases += [(PSO(nfe=k), variant) for k in (2, 4, 8)]
        cases += [(PSO(nfe=k, form="forward"), variant) for k in (2, 4, 8)]
        cases += [
            (PSOOnline(nfe=k, reward="red", stochastic_steps=tuple(range(k - 1))), variant)
            for k in (2, 4, 8)
        ]
    for method, variant in cases:
        run = all_at_once if variant == "one_backward" else piece_by_piece
        run(method.losses(roles, batch, generator_at(0, 0)))  # warm-up
        with LiveBytes() as meter:
            run(method.losses(roles, batch, generator_at(0, 0)))
        seconds = []
        for index in range(repeats):
            began = time.perf_counter()
            run(method.losses(roles, batch, generator_at(0, index)))
            seconds.append(time.perf_counter() - began)
        row = {
            "method": " ".join(filter(None, (method.name, getattr(method, "form", "")))),  # type: ignore[attr-defined]
            "variant": variant,
            "nfe": method.nfe,
            "forwards": method.forwards(method.nfe or 1),
            "seconds": statistics.median(seconds),
            "peak_bytes": meter.peak,
        }
        rows.append(row)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    json_file.write_text(json.dumps(rows, indent=2) + "\n")


def workbench(model: str, batch_size: int) -> tuple[Roles, Batch]:
    """Roles over the model with rank-16 LoRA, and one batch whose teacher sees an image."""
    cpu = torch.device("cpu")
    family = load_family(model)
    text_encoder = family.load_text_encoder(cpu, torch.float32, images=True)
    denoiser = family.load_denoiser(cpu, torch.float32)
    student = add_lora(denoiser.network, family.lora_targets, rank=16, alpha=16, seed=0)
    roles = make_roles(
        denoiser,
        student,
        Teacher(student, 0.9999),
        lambda nfe, h, w: family.schedule(nfe or family.default_nfe, h, w),
        # Any: what a reward costs is its own affair
        score=lambda clean, prompts: clean.mean((1, 2, 3)),
    )
    prompts = ("a zib toy at the left on night",) * batch_size
    image = Image.new("RGB", (family.resolution, family.resolution), "red")
    side = family.resolution // family.vae_scale_factor
    latents = noise_for(range(batch_size), family.channels, side, side).start
    privileged = text_encoder.context(prompts, [image] * batch_size)
    weight = torch.ones(batch_size)
    return roles, Batch(
        latents,
        text_encoder.context(prompts),
        prompts,
        weight,
        privileged,
        rejected=latents.flip(0),
    )


def piece_by_piece(losses: Iterator[Loss]) -> None:
    for piece in losses:
        piece.surrogate.backward()


def all_at_once(losses: Iterator[Loss]) -> None:
    total = sum(piece.surrogate for piece in losses)
    assert isinstance(total, torch.Tensor)
    total.backward()


if __name__ == "__main__":
    typer.run(main)
