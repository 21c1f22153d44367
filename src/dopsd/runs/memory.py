"""Peak memory of training, known before a weight is loaded: one step on tensors that have shapes
and no storage.

Counted as benchmarks/step_cost.py counts a real step, in bytes of live tensor storage. What a
device needs beside that (CUDA's own half a gigabyte, gaps between blocks) is not in it, nor are the
encoders, which leave before training. Where a reward looks at images the autoencoder is in it, and
the reward's own model is not.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dopsd.config.recipe import Recipe
from dopsd.diffusion.batch import Batch, Context
from dopsd.diffusion.components import VAE
from dopsd.images import image_size
from dopsd.methods import Method
from dopsd.methods.base import Score
from dopsd.models.base import Family, Size, fitted_size
from dopsd.runs.check import Checked
from dopsd.runs.resolve import dtype_of
from dopsd.training.adapters import add_lora, base_tensors
from dopsd.training.loop import Plan, backward
from dopsd.training.memory_meter import LiveBytes
from dopsd.training.offload import offload_blocks
from dopsd.training.quantize import saved_bytes
from dopsd.training.roles import Teacher, make_roles
from dopsd.training.trainable import Student, full_student

ITS_OWN = 2**30  # bytes of a device that tensors never get


@dataclass(frozen=True)
class Forecast:
    """Bytes. resident: weights, what trains, teacher and optimizer; peak: the most that is alive
    during a step."""

    resident: int
    peak: int

    def fits(self, room: int) -> bool:
        """Whether a device of so many bytes is enough: a tenth for gaps, and what it needs for
        itself."""
        return self.peak * 1.1 + ITS_OWN <= room


class _Same:
    """Every micro-batch alike."""

    def __init__(self, batch: Batch):
        self._batch = batch

    def batch(self, index: int) -> Batch:
        return self._batch


def forecast(
    recipe: Recipe,
    family: Family,
    size: Size,
    captions: Sequence[str],
    dtype: torch.dtype,
    low_memory: bool,
    references: Sequence[Size] = (),
) -> Forecast:
    """Of a recipe's steps at an image size (width, height) in pixels with the longest of these
    captions, edited from images of the sizes `references`; lean: with activations recomputed."""
    count, (width, height) = recipe.train.batch_size, size
    edited = [references] * count if references else None
    prompts = sorted(captions, key=len)[-count:]
    prompts += prompts[-1:] * (count - len(prompts))
    latent_shape = height // family.vae_scale_factor, width // family.vae_scale_factor
    nfe = _fewest_steps(recipe.method, recipe.method.nfe or family.default_nfe)
    method = recipe.method.model_copy(update={"nfe": nfe})
    schedule = family.schedule(nfe, *latent_shape)
    text = family.blank_context(prompts, references=edited)
    seeing = (
        family.blank_context(prompts, [size] * count, edited)
        if "privileged" in method.needs
        else None
    )
    with torch.device("meta"):
        denoiser = family.empty_denoiser().to(dtype)
        kind = recipe.model.quantize
        saved = saved_bytes(denoiser.network, family.quantizable, kind) if kind else 0
        if recipe.adapter == "lora":
            add_lora(
                denoiser.network,
                recipe.lora.targets or family.lora_targets,
                recipe.lora.rank,
                alpha=1,
                seed=0,
            )
    if low_memory:
        denoiser.network.enable_gradient_checkpointing()  # type: ignore[operator]
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as meter:
        _give_storage(denoiser)
        score = _mean_score(family.empty_vae(tiled=low_memory)) if method.reward_name else None
        subject, teacher, away = _student_of(recipe, denoiser.network)
        student, saved = subject.weights, saved + away
        optimizer = torch.optim.AdamW(student.values())
        roles = make_roles(
            denoiser, student, teacher, lambda nfe, h, w: schedule, score, subject.base
        )
        latents, context = (
            torch.zeros(count, family.channels, *latent_shape),
            _unstored(text, dtype),
        )
        plain = Batch(latents, context, tuple(prompts), torch.ones(count))
        batch = replace(
            plain,
            privileged=_unstored(seeing, dtype) if seeing else None,
            rejected=latents if "rejected" in method.needs else None,
            prior=plain if "prior" in method.needs else None,
            replay=context if "replay" in method.needs else None,
        )
        plan = Plan(max_steps=1, learning_rate=1.0)
        for parameter in student.values():  # as after a first step: the moments are there
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if recipe.train.gradient_accumulation_steps == 1:
            optimizer.zero_grad(set_to_none=True)
        if recipe.train.optimizer == "adamw_8bit":  # two bytes a number instead of eight
            saved += sum(
                6 * parameter.numel() for parameter in student.values() if parameter.numel() >= 4096
            )
        meter.peak = resident = meter.now
        backward(roles, method, _Same(batch), torch.device("cpu"), plan, step=0)
        torch.nn.utils.clip_grad_norm_(student.values(), plan.clip)
        optimizer.step()
        teacher.follow()
    return Forecast(resident - saved, meter.peak - saved)


def _fewest_steps(method: Method, nfe: int) -> int:
    """Two steps need as much memory as all, for a walk's graphs are freed step by step. A method
    that names later steps keeps its own number."""
    try:
        method.refuse_nfe(2)
    except ValueError:
        return nfe
    return min(2, nfe)


def _mean_score(vae: VAE) -> Score:
    """A reward without memory, looking through the autoencoder, which stays in memory beside the
    step."""

    @torch.no_grad()
    def score(clean: Tensor, prompts: Sequence[str]) -> Tensor:
        return vae.pixels(clean).flatten(1).mean(1)

    return score


def _student_of(recipe: Recipe, network: nn.Module) -> tuple[Student, Teacher, int]:
    """Student, teacher, and the bytes that `model.offload` keeps in main memory."""
    home = torch.device("cpu")
    if recipe.adapter == "full":
        student = full_student(network, home)
        teacher = Teacher(student.weights, recipe.method.decay, student.base, home)
        frozen = {
            id(tensor): tensor.nbytes
            for tensor in (*student.base.values(), *teacher.state.values())
        }
        return student, teacher, sum(frozen.values()) if recipe.model.offload else 0
    away = offload_blocks(network, home) if recipe.model.offload else 0
    weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
    return (
        Student(weights, base_tensors(dict(weights)), lambda: None),
        Teacher(weights, recipe.method.decay),
        away,
    )


def _give_storage(module: nn.Module) -> None:
    """Put a tensor of the active mode in place of each parameter and buffer on the meta device."""
    for part in module.modules():
        stores: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    stored = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = (
                        nn.Parameter(stored, tensor.requires_grad) if is_parameter else stored
                    )


def _unstored(context: Context, dtype: torch.dtype) -> Context:
    """The same shapes in the mode that is active."""
    extras = {
        name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in context.extras.items()
    }
    return Context(torch.zeros(context.tokens.shape, dtype=dtype), context.lengths, extras)


def memory_of(device: torch.device) -> int:
    """Bytes that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


log = logging.getLogger(__name__)


def foresee(recipe: Recipe, found: Checked, dtype: torch.dtype, low_memory: bool) -> Forecast:
    """Peak memory of a step at the largest bucket, and the largest references."""
    examples = found.listing.examples
    size = max(found.buckets, key=lambda size: size[0] * size[1])
    captions = [caption for example in examples for caption in (example.caption, *example.also)]
    edited = {
        e.references: [fitted_size(found.family, path, image_size(path)) for path in e.references]
        for e in examples
    }
    largest = max(edited.values(), key=lambda sizes: sum(width * height for width, height in sizes))
    return forecast(recipe, found.family, size, captions, dtype, low_memory, largest)


def planned_for(recipe: Recipe, card: float | None) -> tuple[int, torch.dtype, str]:
    """Bytes, dtype and name of what a recipe would be trained on: a GPU of `card` GiB, or this
    machine."""
    if card is not None:
        return int(card * 2**30), dtype_of(recipe, torch.device("cuda")), f"a card of {card:g} GiB"
    device = Accelerator().device
    room = memory_of(device)
    return (
        room,
        dtype_of(recipe, device),
        f"this machine's {device.type} with {room / 2**30:.0f} GiB",
    )


def refuse_too_large(recipe: Recipe, peak: Forecast, room: int, where: str) -> None:
    """Raise ValueError where full fine-tuning's step, at the least memory that it can take, does
    not fit."""
    if not peak.fits(room):
        ways = (
            []
            if recipe.model.offload
            else ["model.offload: true (teacher and untouched model in main memory)"]
        )
        ways += [] if recipe.train.optimizer == "adamw_8bit" else ["train.optimizer: adamw_8bit"]
        raise ValueError(
            f"full fine-tuning takes {peak.peak / 2**30:.2f} GiB in a step at model.memory: low, and with a tenth and "
            f"1 GiB to spare that is too much for {where}. Set {', '.join([*ways, 'a smaller data.resolution'])}, or "
            "tune LoRA (adapter: lora)."
        )


def choose_low_memory(
    recipe: Recipe, found: Checked, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether to save memory: as the recipe says, or where the device is too small to do without.
    Raises ValueError where full fine-tuning is too large for it all the same."""
    if recipe.adapter == "full":
        room, dtype, where = planned_for(recipe, None)
        refuse_too_large(recipe, foresee(recipe, found, dtype, low_memory=True), room, where)
    if recipe.model.offload:
        return (
            True  # or all copies of the weights would stay alive until the end of a backward pass
        )
    if recipe.model.memory != "auto":
        return recipe.model.memory == "low"
    peak, room = foresee(recipe, found, dtype, low_memory=False), memory_of(device)
    level = "high" if peak.fits(room) else "low"
    log.info(
        "memory=auto chosen=%s high_would_take=%.1f_GiB device=%.1f_GiB",
        level,
        peak.peak / 2**30,
        room / 2**30,
    )
    return level == "low"
