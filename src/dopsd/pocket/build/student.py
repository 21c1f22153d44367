"""Distillation to the packaged model's 2 steps, with and without an image in the context.

Teacher and student of D-OPSD are one network, so both must be few-step models: a teacher that was
only trained by flow matching is blurred at 2 steps, and so is what it teaches.

    at states z_k of the student's own 2-step rollout, from times t_k to t_{k+1}:
    wanted_k = (integral of the fine model from z_k to t_{k+1} - z_k) / (t_{k+1} - t_k)
    loss = |student(z_k, t_k) - wanted_k|^2 + edges of the decoded end states

The fine model is the many-step model with guidance for captions, and the teacher for contexts with
an image, each in 8 steps an interval.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor

from dopsd.files import read_tensors
from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build.corpus import Corpus, noise_of, rng_at
from dopsd.pocket.build.network import Network, fresh_network
from dopsd.pocket.build.stages import Stage, optimise, process_rank
from dopsd.pocket.build.teacher import seeing_network
from dopsd.pocket.build.train import euler, sampler_times, without_prefix

SUBSTEPS = 8  # of the fine model in each of the student's steps
UPDATES_PER_ROUND = 8  # updates between two collections of chords
ROUNDS_REMEMBERED = 24
COLLECTED = {"captions": 32, "images": 16}  # rollouts of a round, for each process
BATCH = {"captions": 24, "images": 16}  # rows of an update at each step of the rollout
DECODED = 8  # of these, whose edges are compared
EDGES = 1.0  # weight of the edges' absolute difference, pixels in [-1, 1]

Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Chords:
    """Rollouts of one kind of context: z and slope [steps, N, 8, 16, 16], context, mask."""

    z: Tensor
    slope: Tensor
    context: Tensor
    mask: Tensor


def trained_teacher(folder: Path, start_from: Path | None, compiled: bool) -> Network:
    """The network after the teacher's stage."""
    network = seeing_network(folder, start_from, compiled)
    trained = without_prefix(read_tensors(folder / "teacher.safetensors"), "network.")
    network.load_state_dict(network.state_dict() | trained)
    return network


def many_step_transformer(folder: Path, start_from: Path | None) -> Mapping[str, Tensor]:
    """Weights of the transformer before any distillation, of a checkpoint or of `folder`."""
    if start_from:
        parent = start_from / "parent"
        return ZImageTransformer2DModel.from_pretrained(
            parent, subfolder="transformer"
        ).state_dict()
    return without_prefix(read_tensors(folder / "flow.safetensors"), "network.transformer.")


def train_student(
    folder: Path, steps: int, start_from: Path | None = None, compiled: bool = True
) -> None:
    """Distill; writes the transformer as `<folder>/student.safetensors`."""
    rank, corpus = process_rank(), Corpus.read(folder)
    teacher = trained_teacher(folder, start_from, compiled).requires_grad_(False)
    many_step = fresh_network(compiled).requires_grad_(False)
    many_step.transformer.load_state_dict(many_step_transformer(folder, start_from))
    student = fresh_network(compiled)
    student.transformer.load_state_dict(teacher.transformer.state_dict())
    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    times = sampler_times(parts.NFE)
    memory: deque[dict[str, Chords]] = deque(maxlen=ROUNDS_REMEMBERED)

    def loss_at(step: int) -> Tensor:
        if step % UPDATES_PER_ROUND == 0 or not memory:
            memory.append(_collect(corpus, teacher, many_step, student, step, rank))
        rng = rng_at("student", step, rank)
        loss = torch.zeros(())
        for kind, size in BATCH.items():
            chords = memory[rng.integers(len(memory))][kind]
            drawn = torch.from_numpy(rng.permutation(len(chords.mask))[:size])
            context, mask = chords.context[drawn], chords.mask[drawn]
            for k in range(parts.NFE):
                z, slope = chords.z[k, drawn], chords.slope[k, drawn]
                velocity = student(z, times[k].expand(len(z)), context, mask)
                loss = loss + F.mse_loss(velocity, slope)
            few = slice(DECODED)
            end, wanted = (z[few] - times[-2] * each[few] for each in (velocity, slope))
            loss = loss + EDGES * _edge_distance(vae, end, wanted)
        return loss

    stage = Stage(
        "student", steps, 1.2e-3, warm_up=30, average_decay=0.98, save_every=40, muon=True
    )
    optimise(stage, folder, {"transformer": student.transformer}, loss_at)


@torch.no_grad()
def _collect(
    corpus: Corpus, teacher: Network, many_step: Network, student: Network, step: int, rank: int
) -> dict[str, Chords]:
    """Chords of both kinds of contexts at states of the student's own rollouts."""
    rng = rng_at("chords", step, rank)
    _, tokens = corpus.captions(rng, COLLECTED["captions"])
    captions = teacher.plain(tokens)
    empty = corpus.unconditional_ids.expand(len(tokens), -1)
    unconditional = teacher.plain(empty)

    def guided(z: Tensor, t: Tensor) -> Tensor:
        without = many_step(z, t, *unconditional)
        return torch.lerp(without, many_step(z, t, *captions), parts.GUIDANCE)

    _, tokens, seen = corpus.with_images(rng, COLLECTED["images"])
    images = teacher.privileged(tokens, seen)
    shape = corpus.latents.shape[1:]
    return {
        "captions": _chords(student, guided, *captions, noise_of(rng, (len(captions[0]), *shape))),
        "images": _chords(
            student,
            lambda z, t: teacher(z, t, *images),
            *images,
            noise_of(rng, (len(images[0]), *shape)),
        ),
    }


def _chords(
    student: Network, fine_model: Velocity, context: Tensor, mask: Tensor, noise: Tensor
) -> Chords:
    times, fine_times = sampler_times(parts.NFE), sampler_times(parts.NFE * SUBSTEPS)
    z, states, slopes = noise, [], []
    for k, (now, after) in enumerate(pairwise(times)):
        fine = fine_times[k * SUBSTEPS : (k + 1) * SUBSTEPS + 1]
        states.append(z)
        slopes.append((euler(fine_model, z, fine) - z) / (after - now))
        z = z + (after - now) * student(z, now.expand(len(z)), context, mask)
    return Chords(torch.stack(states), torch.stack(slopes), context, mask)


def _edge_distance(vae: AutoencoderKL, latents: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of the decoded images' horizontal and vertical differences."""
    decoded = _decode(vae, latents)
    with torch.no_grad():
        target = _decode(vae, wanted)
    return sum(
        (F.l1_loss(decoded.diff(dim=axis), target.diff(dim=axis)) for axis in (2, 3)),
        start=torch.zeros(()),
    )


def _decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(scaled).sample
