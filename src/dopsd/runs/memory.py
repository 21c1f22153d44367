"""Memory of training, forecast before a weight is loaded: one step on tensors that have shapes and
no storage.

Counted as benchmarks/step_cost.py counts a real step: bytes of live tensor storage. Not counted are
what a device needs beside that (CUDA's own half a gigabyte, gaps between blocks) and the encoders,
which leave memory before training. Where a reward scores images the VAE is counted; the reward's
own model is not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dopsd.config.recipe import Recipe
from dopsd.data.buckets import bucket_sizes
from dopsd.diffusion.batch import Batch, Context, Replay
from dopsd.diffusion.components import VAE
from dopsd.diffusion.flow import Schedule
from dopsd.images import image_size
from dopsd.methods import Method, WithRetention
from dopsd.methods.base import Score
from dopsd.models.base import Family, Size, fitted_size, latent_size
from dopsd.runs.prepare import Progress
from dopsd.runs.resolve import ResolvedRun
from dopsd.training.adapters import add_lora, base_tensors
from dopsd.training.loop import Plan, accumulate_gradient
from dopsd.training.memory_meter import LiveBytes
from dopsd.training.offload import offload_blocks
from dopsd.training.quantize import saved_bytes
from dopsd.training.roles import Teacher, make_roles
from dopsd.training.trainable import Student, full_student

CPU = torch.device("cpu")
RESERVED = 2**30  # bytes of a device that tensors never get


@dataclass(frozen=True)
class Forecast:
    """In bytes. resident: weights, adapter, teacher and optimizer; peak: the most that is alive
    during a step."""

    resident: int
    peak: int

    def fits(self, room: int) -> bool:
        """Whether `room` bytes are enough: the peak, a tenth for gaps, and what is reserved."""
        return self.peak * 1.1 + RESERVED <= room


class _SameBatch:
    """The same batch for every micro-batch."""

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
    replayed: Sequence[str] = ("",),
    progress: Callable[[int, int], None] | None = None,
) -> Forecast:
    """Memory of an optimizer step of a recipe.

    size: of the images, (width, height) in pixels. captions: of which the longest are taken.
    low_memory: with activations recomputed and images decoded in tiles. references: sizes of the
    images that each image is edited from. replayed: prompts of retention. progress: called with the
    forwards done, of how many; a backward counts as two.
    """
    latents = latent_size(family, size[1], size[0])
    nfe = recipe.method.nfe or family.default_nfe
    if _can_take(recipe.method, family.schedule(2, *latents)):
        nfe = min(2, nfe)
    method = recipe.method.model_copy(update={"nfe": nfe})
    schedule = family.schedule(nfe, *latents)
    objective = WithRetention(method, recipe.retention)
    contexts = _blank_contexts(recipe, family, size, captions, references, replayed)

    # The network by its config alone: shapes without storage.
    with torch.device("meta"):
        denoiser = family.empty_denoiser().to(dtype)
        kind = recipe.model.quantize
        elsewhere = saved_bytes(denoiser.network, family.quantizable, kind) if kind else 0
        if recipe.adapter == "lora":
            targets = recipe.lora.targets or family.lora_targets
            add_lora(denoiser.network, targets, recipe.lora.rank, alpha=1, seed=0)
    if low_memory:
        denoiser.network.enable_gradient_checkpointing()  # type: ignore[operator]
    if progress:
        total = ceil(objective.forwards_per_step(nfe, images=1))
        _report_forwards(denoiser.network, progress, total)

    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as meter:
        # What is resident before a step, the optimizer's moments included.
        _give_storage(denoiser)
        score = _mean_score(family.empty_vae(tiled=low_memory)) if method.reward_name else None
        student, teacher, offloaded = _make_student(recipe, denoiser.network)
        weights = student.weights
        elsewhere += offloaded + _bytes_of_8_bit_moments(recipe, weights)
        optimizer = torch.optim.AdamW(weights.values())
        for parameter in weights.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if recipe.train.gradient_accumulation_steps == 1:
            optimizer.zero_grad(set_to_none=True)
        roles = make_roles(
            denoiser, weights, teacher, lambda nfe, h, w: schedule, score, student.base
        )
        batch = _blank_batch(recipe, family, size, contexts, dtype)
        meter.peak = resident = meter.now

        # One step.
        plan = Plan(max_steps=1, learning_rate=1.0)
        accumulate_gradient(roles, objective, _SameBatch(batch), CPU, plan, step=0)
        torch.nn.utils.clip_grad_norm_(weights.values(), plan.max_grad_norm)
        optimizer.step()
        teacher.follow()
    return Forecast(resident - elsewhere, meter.peak - elsewhere)


def _report_forwards(network: nn.Module, progress: Callable[[int, int], None], total: int) -> None:
    """Call `progress` after each forward of the network, with its backward where it has one."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done = min(total, done + (3 if torch.is_grad_enabled() else 1))
        progress(done, total)

    network.register_forward_hook(count)


@dataclass(frozen=True)
class _Contexts:
    """Contexts of the right shapes, on the CPU: the student's, and those of the teacher and of
    retention where there are any."""

    prompts: tuple[str, ...]
    student: Context
    teacher: Context | None
    replay: Context | None


def _blank_contexts(
    recipe: Recipe,
    family: Family,
    size: Size,
    captions: Sequence[str],
    references: Sequence[Size],
    replayed: Sequence[str],
) -> _Contexts:
    count = recipe.train.batch_size
    prompts = sorted(captions, key=len)[-count:]
    prompts += prompts[-1:] * (count - len(prompts))
    edited = [references] * count if references else None
    teacher = None
    if "privileged" in recipe.method.needs:
        teacher = family.blank_context(prompts, [size] * count, edited)
    student = family.blank_context(prompts, references=edited)
    replay = None
    if recipe.retention.weight:
        replay = family.blank_context([max(replayed, key=len)] * recipe.retention.per_step)
    return _Contexts(tuple(prompts), student, teacher, replay)


def _blank_batch(
    recipe: Recipe, family: Family, size: Size, contexts: _Contexts, dtype: torch.dtype
) -> Batch:
    """A batch with everything that the method needs, in the tensor mode that is active."""
    needs, count = recipe.method.needs, recipe.train.batch_size
    latents = torch.zeros(count, family.channels, *latent_size(family, size[1], size[0]))
    student = _blank_copy(contexts.student, dtype)
    plain = Batch(latents, student, contexts.prompts, torch.ones(count))
    return replace(
        plain,
        privileged=_blank_copy(contexts.teacher, dtype) if contexts.teacher else None,
        rejected=latents if "rejected" in needs else None,
        prior=plain if "prior" in needs else None,
        replay=_blank_replay(recipe, family, contexts.replay, dtype) if contexts.replay else None,
    )


def _blank_replay(recipe: Recipe, family: Family, context: Context, dtype: torch.dtype) -> Replay:
    """Replayed prompts, with square images of the largest resolution."""
    side = max(recipe.data.resolution, default=family.resolution)
    width, height = bucket_sizes(side, family.multiple)[0]
    latents = torch.zeros(len(context), family.channels, *latent_size(family, height, width))
    return Replay(_blank_copy(context, dtype), latents)


def _bytes_of_8_bit_moments(recipe: Recipe, weights: Mapping[str, Tensor]) -> int:
    """Bytes that an 8-bit optimizer saves: two a number instead of eight, of tensors of 4096
    numbers and more."""
    if recipe.train.optimizer != "adamw_8bit":
        return 0
    return sum(6 * weight.numel() for weight in weights.values() if weight.numel() >= 4096)


def _can_take(method: Method, schedule: Schedule) -> bool:
    """Whether the method's settings fit a sampler of two steps. They need as much memory as all of
    them, because each step's graph is freed before the next; a method whose settings name later
    steps keeps its own number."""
    try:
        method.refuse_schedule(schedule)
    except ValueError:
        return False
    return True


def _mean_score(vae: VAE) -> Score:
    """A reward that takes no memory itself; the VAE that decodes for it stays resident."""

    @torch.no_grad()
    def score(clean: Tensor, prompts: Sequence[str]) -> Tensor:
        return vae.pixels(clean).flatten(1).mean(1)

    return score


def _make_student(recipe: Recipe, network: nn.Module) -> tuple[Student, Teacher, int]:
    """Student, teacher, and the bytes that `model.offload` keeps in main memory. As
    `session.make_student`, on weights without storage."""
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
    """Replace each parameter and buffer on the meta device by a tensor of the active mode."""
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


def _blank_copy(context: Context, dtype: torch.dtype) -> Context:
    """Zeros of the same shapes, in the tensor mode that is active."""
    extras = {
        name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in context.extras.items()
    }
    return Context(torch.zeros(context.tokens.shape, dtype=dtype), context.lengths, extras)


def forecast_run(
    run: ResolvedRun,
    dtype: torch.dtype,
    low_memory: bool,
    progress: Progress | None = None,
) -> Forecast:
    """Memory of a step at the run's largest bucket, with its largest images to edit."""
    level = "low" if low_memory else "high"
    examples = run.listing.examples
    size = max(run.buckets, key=lambda size: size[0] * size[1])
    captions = [
        text for e in examples for text in (e.caption, *e.also, e.teacher_text) if text is not None
    ]
    references = [
        [fitted_size(run.family, path, image_size(path)) for path in paths]
        for paths in {example.references for example in examples}
    ]
    largest = max(references, key=lambda sizes: sum(width * height for width, height in sizes))
    count = partial(progress, f"forecasting memory ({level})") if progress else None
    replayed = run.replay_prompts or ("",)
    return forecast(
        run.recipe, run.family, size, captions, dtype, low_memory, largest, replayed, count
    )
