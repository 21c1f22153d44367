"""Which memory settings let a run fit a device, by the forecast of a step."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from dopsd.config.recipe import Recipe
from dopsd.models.base import network_on_meta
from dopsd.runs.memory import Forecast, forecast_run
from dopsd.runs.prepare import Progress
from dopsd.runs.resolve import ResolvedRun, frozen_dtype
from dopsd.training.quantize import Kind, saved_bytes

log = logging.getLogger(__name__)

# Tried in this order, the fastest first.
QUANTIZE: tuple[Kind, ...] = ("int8", "nf4")


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


@dataclass(frozen=True)
class Device:
    """What a run is planned for. room: bytes of memory; dtype: of the frozen weights there."""

    name: str
    room: int
    dtype: torch.dtype


def planned_device(run: ResolvedRun, card: float | None) -> Device:
    """A GPU of `card` GiB, or this machine's device."""
    if card is not None:
        gpu = torch.device("cuda")
        dtype = frozen_dtype(run.recipe, gpu)
        return Device(f"a card of {card:g} GiB", int(card * 2**30), dtype)
    room = memory_of(run.device)
    name = f"this machine's {run.device.type} with {room / 2**30:.0f} GiB"
    return Device(name, room, run.dtype)


@dataclass(frozen=True)
class Saver:
    """A key of the section `model` that saves memory, and the forecast of a step with it."""

    key: str
    value: Any
    forecast: Forecast


def fitting_saver(
    run: ResolvedRun, low: Forecast, device: Device, progress: Progress | None = None
) -> Saver | None:
    """The setting with which a step of a LoRA fits a device that it does not fit at `memory: low`,
    of which `low` is the forecast; None where none of quantize and offload is enough."""
    model = run.recipe.model
    if model.quantize is None and not model.offload:
        network = network_on_meta(run.family).to(device.dtype)
        for kind in QUANTIZE:
            saved = saved_bytes(network, run.family.quantizable, kind)
            quantized = Forecast(low.resident - saved, low.peak - saved)
            if quantized.fits(device.room):
                return Saver("quantize", kind, quantized)
    if not model.offload:
        offloading = model.model_copy(update={"offload": True})
        changed = replace(run, recipe=run.recipe.model_copy(update={"model": offloading}))
        offloaded = forecast_run(changed, device.dtype, low_memory=True, progress=progress)
        if offloaded.fits(device.room):
            return Saver("offload", "true", offloaded)
    return None


def refuse_too_large(recipe: Recipe, peak: Forecast, device: Device) -> None:
    """Raise ValueError where a step of full fine-tuning does not fit. peak: at memory: low."""
    if peak.fits(device.room):
        return
    ways = ["a smaller data.resolution"]
    if recipe.train.optimizer != "adamw_8bit":
        ways.insert(0, "train.optimizer: adamw_8bit")
    if not recipe.model.offload:
        ways.insert(0, "model.offload: true (teacher and base model in main memory)")
    raise ValueError(
        f"full fine-tuning takes {peak.peak / 2**30:.2f} GiB in a step at model.memory: low, and "
        f"with a tenth and 1 GiB to spare that is too much for {device.name}. Set "
        f"{', '.join(ways)}, or tune LoRA (adapter: lora)."
    )


def choose_low_memory(run: ResolvedRun, progress: Progress | None = None) -> bool:
    """Whether to recompute activations and decode in tiles: as the recipe says, or, with `memory:
    auto`, where the device is too small to do without.

    Raises ValueError where full fine-tuning is too large for the device even then.
    """
    recipe = run.recipe
    if recipe.adapter == "full":
        peak = forecast_run(run, run.dtype, low_memory=True, progress=progress)
        refuse_too_large(recipe, peak, planned_device(run, None))
    if recipe.model.offload:
        # Without recomputation all lent copies would stay alive until the end of the backward pass.
        return True
    if recipe.model.memory != "auto":
        return recipe.model.memory == "low"
    peak = forecast_run(run, run.dtype, low_memory=False, progress=progress)
    room = memory_of(run.device)
    low_memory = not peak.fits(room)
    log.info(
        "model.memory: auto means %s here: high would take %.1f GiB of %.1f GiB.",
        "low" if low_memory else "high",
        peak.peak / 2**30,
        room / 2**30,
    )
    return low_memory
