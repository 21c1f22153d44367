"""Distillation to the packaged model's 2 steps, with and without an image in the context.

Teacher and student of D-OPSD are one network, so both must be few-step models: a teacher that was
only trained by flow matching is blurred at 2 steps, and so is what it teaches.

    at states z_k of the student's own 2-step rollout, from times t_k to t_{k+1}:
    wanted_k = (integral of the fine model from z_k to t_{k+1} - z_k) / (t_{k+1} - t_k)
    loss = sum over k of |student(z_k, t_k) - wanted_k|^2 + edges of the decoded end states

The fine model is the 4-step model for captions, in its own steps, and the teacher for contexts with
an image, in 8 steps. Chords of the many-step model, finer and with guidance, were a worse target
(docs/experiments.md).
"""

from collections.abc import Callable, Mapping
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

CAPTIONS, WITH_IMAGE = 32, 16  # rows of a batch, for each process
FINE_STEPS = {"captions": parts.DISTILLED_NFE, "images": 8}  # of the fine model's whole rollout
DECODED = 8  # rows of each kind whose edges are compared
EDGES = 1.0  # weight of the edges' absolute difference, pixels in [-1, 1]

Velocity = Callable[[Tensor, Tensor], Tensor]


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
    four_step = seeing_network(folder, start_from, compiled).requires_grad_(False)
    teacher = trained_teacher(folder, start_from, compiled).requires_grad_(False)
    student = fresh_network(compiled)
    student.transformer.load_state_dict(teacher.transformer.state_dict())
    vae_folder = start_from / "vae" if start_from else folder / "vae-sharp"
    vae = AutoencoderKL.from_pretrained(vae_folder).requires_grad_(False)
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latent_shape = corpus.latents.shape[1:]

    def loss_at(step: int) -> Tensor:
        rng = rng_at("student", step, rank)
        _, tokens = corpus.captions(rng, CAPTIONS)
        captions = teacher.plain(tokens)
        _, tokens, seen = corpus.with_images(rng, WITH_IMAGE)
        images = teacher.privileged(tokens, seen)
        loss = torch.zeros(())
        for kind, fine, (context, mask) in (
            ("captions", four_step, captions),
            ("images", teacher, images),
        ):
            noise = noise_of(rng, (len(context), *latent_shape))
            chord_loss, end, wanted = distillation(
                lambda z, t, c=context, m=mask: student(z, t, c, m),
                lambda z, t, c=context, m=mask, fine=fine: fine(z, t, c, m),
                noise,
                FINE_STEPS[kind],
            )
            edges = edge_distance(vae, end[:DECODED], wanted[:DECODED])
            loss = loss + chord_loss + EDGES * edges
        return loss

    stage = Stage(
        "student", steps, 1.2e-3, warm_up=30, average_decay=0.98, save_every=40, muon=True
    )
    optimise(stage, folder, {"transformer": student.transformer}, loss_at)


def distillation(
    student: Velocity, fine_model: Velocity, noise: Tensor, fine_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Roll the student out from noise [B, 8, 16, 16], each state detached from the one before.

    Returns the sum over its steps of the mean squared distance to the fine model's chords (0-d),
    and the clean latents at the end of the student's last step and of the last chord.
    """
    times, fine_times = sampler_times(parts.NFE), sampler_times(fine_steps)
    substeps = fine_steps // parts.NFE
    z, loss = noise, torch.zeros(())
    end = wanted = noise
    for k, (now, after) in enumerate(pairwise(times)):
        fine = fine_times[k * substeps : (k + 1) * substeps + 1]
        with torch.no_grad():
            wanted = euler(fine_model, z, fine)
        velocity = student(z, now.expand(len(z)))
        loss = loss + F.mse_loss(velocity, (wanted - z) / (after - now))
        end = z + (after - now) * velocity
        z = end.detach()
    return loss, end, wanted


def edge_distance(vae: AutoencoderKL, latents: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of the decoded images' horizontal and vertical differences, 0-d."""
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
