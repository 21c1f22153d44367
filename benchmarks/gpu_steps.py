"""Training steps on this device: seconds, peak memory against the forecast, and share of the peak
FLOP/s, for a method at a resolution."""

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.methods import METHODS
from dopsd.models import load_family
from dopsd.runs.check import check
from dopsd.runs.fit import memory_of
from dopsd.runs.memory import Forecast, forecast_run
from dopsd.runs.prepare import Progress
from dopsd.runs.resolve import ResolvedRun, resolve
from dopsd.runs.train import train

WARM_UP, MEASURED, SECONDS = 2, 10, 90.0  # steps; the measured ones end after this many seconds
GIB = 2**30
CAPTION = (
    "zib, a small wooden toy figure with blue and orange stripes, standing on a stone in a shallow "
    "river at noon, out-of-focus trees in the background, photograph with a long lens"
)
# FLOP/s of dense bfloat16 matrix products by NVIDIA's data sheets; the first name that a card's
# name contains.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(card: str) -> float | None:
    """FLOP/s by the data sheet; None for a card that is not in the table."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)


@torch.no_grad()
def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a large square matrix product: what this device reaches at most in practice."""
    on_gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    factors = torch.randn(2, side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(12):
        _wait(device)
        began = time.perf_counter()
        torch.mm(factors[0], factors[1])
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds[2:])


def measure_step(
    model: str, method: str, side: int, folder: Path, progress: Progress
) -> dict[str, Any]:
    """A step of one image of side x side with LoRA, by the family's recommended settings, through
    the same `train` that users run.

    peak_gib: live tensors, as the forecast counts them; reserved_gib: what torch took of the
    device; both None without a GPU. flops: of the step, without the recomputation that
    `memory: low` adds. Raises ValueError where the method cannot run on the model.
    """
    recipe = _recipe(model, method, side, folder)
    run = resolve(recipe)
    check(run)
    high, flops = _forecast_and_flops(run, progress)
    level, forecast = "high", high
    if not high.fits(memory_of(run.device)):
        level = "low"
        forecast = forecast_run(run, run.dtype, low_memory=True, progress=progress)
    recipe = _with_memory(recipe, level)

    shutil.rmtree(recipe.run_folder, ignore_errors=True)
    seconds: list[float] = []
    for report in train(recipe, progress=progress):
        if report.step == WARM_UP and run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if report.step > WARM_UP:
            seconds.append(report.seconds)
        progress(f"{method} at {side}", report.step, WARM_UP + MEASURED)
        if len(seconds) == MEASURED or sum(seconds) > SECONDS:
            break
    peak, reserved = _peaks(run.device)
    shutil.rmtree(recipe.run_folder)
    return {
        "side": side,
        "memory": level,
        "nfe": run.nfe,
        "forwards": recipe.method.forwards(run.nfe),
        "seconds": statistics.median(seconds),
        "steps": len(seconds),
        "peak_gib": peak,
        "reserved_gib": reserved,
        "forecast_gib": forecast.peak / GIB,
        "flops": flops,
    }


def nested(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`section.key` to value as sections of a recipe."""
    tree: dict[str, dict[str, Any]] = {}
    for place, value in settings.items():
        section, _, key = place.partition(".")
        tree.setdefault(section, {})[key] = value
    return tree


def _recipe(model: str, method: str, side: int, folder: Path) -> Recipe:
    images = _write_images(folder / "images", side)
    start = nested(load_family(model).starting_points(METHODS[method].model_construct()))
    return parse_recipe(
        {
            "model": {"name_or_path": model},
            "data": {"folder": images, "resolution": side},
            "method": start.get("method", {}) | {"name": method},
            "lora": start.get("lora", {}),
            # One step more than are run: nothing is exported.
            "train": {"max_steps": WARM_UP + MEASURED + 1},
            "sample": {"every": 0, "prompts": [CAPTION], "unrelated": 0},
            "health": {"every": 0},
            "save": {"every": 0},
            "output_dir": folder / "runs",
            "run_name": f"step-{method}-{side}",
        }
    )


def _with_memory(recipe: Recipe, level: str) -> Recipe:
    tree = recipe.model_dump()
    return parse_recipe(tree | {"model": tree["model"] | {"memory": level}})


def _write_images(folder: Path, side: int) -> Path:
    """Four captioned images of coloured noise."""
    folder, rng = folder / str(side), np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(CAPTION, encoding="utf-8")
    return folder


def _forecast_and_flops(run: ResolvedRun, progress: Progress) -> tuple[Forecast, float]:
    """The forecast of a step with its activations kept, and the FLOPs of its matrix products.

    The forecast takes two steps of the sampler where the method allows it, and its forwards are in
    proportion.
    """
    with FlopCounterMode(display=False) as counter:
        high = forecast_run(run, run.dtype, low_memory=False, progress=progress)
    method = run.recipe.method
    ratio = method.forwards(run.nfe) / method.forwards(min(2, run.nfe))
    return high, counter.get_total_flops() * ratio


def _peaks(device: torch.device) -> tuple[float | None, float | None]:
    if device.type != "cuda":
        return None, None
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return allocated / GIB, reserved / GIB


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
