"""What this machine's GPU does, in one file to send: parity with diffusers, cost of training steps
against the forecast, and the claim on real images.

    python benchmarks/gpu.py --minutes 60
    python benchmarks/gpu.py --model FOLDER --data data/thing --minutes 240

Writes results.json and report.html into `--out`. What is there is not measured again, so the same
command goes on where the minutes ended. Where the checkpoint cannot be had, or with --random, full-
size random weights take its place (about 30 GB for Z-Image): speed, memory and parity are the same,
and the claim is left out. The claim needs captioned images of an object in --data; it trains both
arms of `dopsd demo` and looks at them along the way.
"""

import gc
import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from full_size import FOLDERS, write_configs, write_random_weights
from gpu_claim import Claim, OutOfTime
from gpu_page import write_gpu_page
from gpu_parity import compare_with_diffusers
from gpu_steps import GIB, matmul_flops, measure_step, peak_flops

from dopsd.cli.console import field, note
from dopsd.cli.progress import progress_bar
from dopsd.files import write_json
from dopsd.models import load_family
from dopsd.models.pipeline import device_and_dtype
from dopsd.pocket.demo import ARMS
from dopsd.runs.fit import memory_of
from dopsd.runs.prepare import Progress

METHODS = ("dopsd", "sft", "pso")
Task = Callable[[], dict[str, Any]]


def main(
    model: Annotated[
        str, typer.Option(help="Diffusers folder or hub id.")
    ] = "Tongyi-MAI/Z-Image-Turbo",
    random: Annotated[bool, typer.Option("--random", help="Random weights of its shapes.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Captioned images of an object, for the claim.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts of the object with targets; default: the captions."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="No measurement begins after these.")] = 60,
    sizes: Annotated[str, typer.Option(help="Sides of images in pixels.")] = "512,1024",
    looks: Annotated[
        str, typer.Option(help="Steps after which the claim looks at a training.")
    ] = "100,200,400,800",
    dino: Annotated[str, typer.Option(help="Hub id or folder.")] = "facebook/dinov2-base",
    clip: Annotated[
        str, typer.Option(help="Hub id or folder.")
    ] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of the results and of what leads to them.")
    ] = Path("runs/gpu"),
) -> None:
    """Measure what is not measured yet, as long as there is time."""
    deadline = time.monotonic() + 60 * minutes
    sides = [int(side) for side in sizes.split(",")]

    # The checkpoint, or random weights in its place.
    checkpoint, weights = (random_checkpoint(model, folder), "random") if random else (model, "own")
    if not random:
        try:
            load_family(model)
        except ValueError as error:
            if model not in FOLDERS:
                raise
            note(f"{error} Full-size random weights take its place; the claim is left out.")
            checkpoint, weights = random_checkpoint(model, folder), "random"

    results = Results(folder / "results.json", {"model": model, "weights": weights} | machine())
    with progress_bar() as progress:
        tasks: dict[str, Task] = {
            f"parity {side}": partial(compare_with_diffusers, checkpoint, side) for side in sides
        }
        for method in METHODS:
            for side in sides:
                tasks[f"step {method} {side}"] = partial(
                    measure_step, checkpoint, method, side, folder, progress
                )
        if data and weights == "own":
            metrics = (f"dino={dino}", f"clip={clip}")
            claim = Claim(checkpoint, data, folder, metrics, sides[-1], prompts)
            steps = [int(look) for look in looks.split(",")]
            tasks |= claim_tasks(claim, steps, lambda: time.monotonic() < deadline, progress)
        left = work(tasks, results, deadline)

    write_gpu_page(folder, results.content, left)
    field("results", f"{results.file}: the file to send")
    field("report", folder / "report.html")
    if left:
        field("left", f"{', '.join(left)}: give the same command again")


class Results:
    """results.json: the machine, and a row for each measurement."""

    def __init__(self, file: Path, about: dict[str, Any]):
        """Raises ValueError where the file is of another machine or model."""
        self.file = file
        if not file.exists():
            write_json(file, {"machine": about, "rows": {}})
        self.content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        before = self.content["machine"]
        for key in ("device", "model", "weights"):
            if before[key] != about[key]:
                raise ValueError(
                    f"{file} is of {key} {before[key]}, now it is {about[key]}: choose another "
                    "--out."
                )

    @property
    def rows(self) -> dict[str, Any]:
        return self.content["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        write_json(self.file, self.content)


def machine() -> dict[str, Any]:
    """The device and the libraries."""
    device, dtype = device_and_dtype()
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    return {
        "device": name,
        "memory_gib": memory_of(device) / GIB,
        "dtype": str(dtype).removeprefix("torch."),
        "peak_flops": peak_flops(name),
        "matmul_flops": matmul_flops(device),
        **{package: version(package) for package in ("dopsd", "torch", "diffusers")},
    }


def random_checkpoint(model: str, folder: Path) -> str:
    """A folder with the model's shapes and random weights, written once."""
    target = folder / "random" / model.rpartition("/")[2]
    done = target / "complete"
    if not done.exists():
        note(f"Writing random weights of the shapes of {model} into {target}.")
        shutil.rmtree(target, ignore_errors=True)  # of an interrupted call
        target.mkdir(parents=True)
        write_configs(model, target)
        write_random_weights(target, device_and_dtype()[0])
        done.touch()
    return str(target)


def claim_tasks(
    claim: Claim, looks: list[int], has_time: Callable[[], bool], progress: Progress
) -> dict[str, Task]:
    """The base model twice, then both arms look by look, so that they stay comparable."""
    tasks: dict[str, Task] = {
        "claim base": partial(claim.measure_base, False, progress),
        "claim base, other noise": partial(claim.measure_base, True, progress),
    }
    for steps in looks:
        for arm in ARMS:
            tasks[f"claim {arm} {steps}"] = partial(
                claim.measure_look, arm, steps, has_time, progress
            )
    return tasks


def work(tasks: dict[str, Task], results: Results, deadline: float) -> list[str]:
    """Run the tasks without a row, or whose row is a failure; returns those for which there was no
    time. What cannot be measured becomes a row that says why."""
    left = []
    for key, task in tasks.items():
        if "failed" not in results.rows.get(key, {"failed": ""}):
            continue
        if time.monotonic() >= deadline:
            left.append(key)
            continue
        try:
            row = task()
        except OutOfTime:
            left.append(key)
            continue
        except (ValueError, torch.OutOfMemoryError) as error:
            row = {"failed": str(error).splitlines()[0]}
            note(f"{key}: {row['failed']}")
        results.add(key, row)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return left


if __name__ == "__main__":
    typer.run(main)
