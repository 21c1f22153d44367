"""Training of the teacher's ability: to draw what it sees in its context.

D-OPSD's teacher sees the target itself, so most contexts hold the very image that is noised, and
the rest another scene of the same thing or style. The language model is frozen, so that prompts
without an image stay what they are; the transformer's answers to them are held by regression on
the 4-step model's own rollout.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3VLModel

from dopsd.files import read_tensors
from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build.corpus import Corpus, noise_of, rng_at
from dopsd.pocket.build.network import Network, fresh_network
from dopsd.pocket.build.stages import Stage, optimise, process_rank
from dopsd.pocket.build.train import sampler_times, without_prefix
from dopsd.pocket.build.vision import vlm_with_new_tower

TARGET_SHARE = 0.8  # of contexts with an image: the target itself, not another scene
WITH_IMAGE, CAPTIONS_ONLY = 24, 12  # rows of a batch, for each process
RETENTION = 2.0  # weight of the captions' regression
GUIDANCE_OF_ATTENTION = 0.3  # its weight at the start; falls to 0 at GUIDED_PART of the steps
GUIDED_PART = 0.6
REMEMBERED = 512  # rollouts that captions are held to, for each process


@dataclass(frozen=True)
class Remembered:
    """States of a frozen model's own rollouts: z [N, 8, 16, 16], t [N], velocity like z, and the
    contexts [N, 32, 128] with their masks."""

    z: Tensor
    t: Tensor
    velocity: Tensor
    context: Tensor
    mask: Tensor


def few_step_start(
    folder: Path, start_from: Path | None
) -> tuple[ZImageTransformer2DModel, Qwen3VLModel]:
    """The 4-step transformer and its VLM: those of a checkpoint, or of the stages in `folder`."""
    if start_from:
        return (
            ZImageTransformer2DModel.from_pretrained(start_from, subfolder="transformer"),
            Qwen3VLModel.from_pretrained(start_from / "vlm", dtype=torch.float32),
        )
    network = fresh_network(compiled=False, tower=parts.FIRST_TOWER)
    flow = without_prefix(read_tensors(folder / "flow.safetensors"), "network.")
    network.load_state_dict(flow)
    distilled = without_prefix(read_tensors(folder / "distill.safetensors"), "transformer.")
    network.transformer.load_state_dict(distilled)
    return network.transformer, network.vlm


def seeing_network(folder: Path, start_from: Path | None, compiled: bool) -> Network:
    """The 4-step transformer with the trained vision tower, before the teacher is trained."""
    transformer, vlm = few_step_start(folder, start_from)
    network = fresh_network(compiled)
    network.transformer.load_state_dict(transformer.state_dict())
    network.vlm.load_state_dict(vlm_with_new_tower(vlm).state_dict())
    tower = without_prefix(read_tensors(folder / "vision.safetensors"), "network.tower.")
    network.vlm.visual.load_state_dict(tower)
    return network


def train_teacher(
    folder: Path, steps: int, start_from: Path | None = None, compiled: bool = True
) -> None:
    """Train transformer and vision tower; writes `<folder>/teacher.safetensors`."""
    rank, corpus = process_rank(), Corpus.read(folder)
    network = seeing_network(folder, start_from, compiled)
    network.vlm.language_model.requires_grad_(False)
    remembered = remember_rollouts(network, corpus, rank)

    def loss_at(step: int) -> Tensor:
        rng = rng_at("teacher", step, rank)

        # Flow matching with an image in the context
        rows, tokens, images = corpus.with_images(rng, WITH_IMAGE, TARGET_SHARE)
        context, mask = network.privileged(tokens, images)
        clean = corpus.latents[rows].float()
        noise, t = noise_of(rng, clean.shape), early_times(rng, len(rows))
        z = torch.lerp(clean, noise, t.view(-1, 1, 1, 1))
        velocity, gaze = network.gazing(z, t, context, mask)
        matching = F.mse_loss(velocity, noise - clean)

        # Captions alone: what the model did before
        drawn = torch.from_numpy(rng.integers(0, len(remembered.t), CAPTIONS_ONLY))
        state = (remembered.z, remembered.t, remembered.context, remembered.mask)
        kept = F.mse_loss(network(*(each[drawn] for each in state)), remembered.velocity[drawn])

        guidance = GUIDANCE_OF_ATTENTION * max(0, 1 - step / (GUIDED_PART * steps))
        return matching + RETENTION * kept + guidance * gaze

    stage = Stage(
        "teacher", steps, 1.5e-3, warm_up=40, average_decay=0.99, save_every=50, muon=True
    )
    optimise(stage, folder, {"network": network}, loss_at)


@torch.no_grad()
def remember_rollouts(network: Network, corpus: Corpus, rank: int) -> Remembered:
    """The network's own 4-step rollouts of captions, before it is trained."""
    times, rng, kept = sampler_times(parts.DISTILLED_NFE), rng_at("rollouts", 0, rank), []
    for _ in range(REMEMBERED // 64):
        _, tokens = corpus.captions(rng, 64)
        context, mask = network.plain(tokens)
        z = noise_of(rng, (64, *corpus.latents.shape[1:]))
        for now, after in pairwise(times):
            t = now.expand(64)
            velocity = network(z, t, context, mask)
            kept.append((z, t, velocity, context, mask))
            z = z + (after - now) * velocity
    return Remembered(*(torch.cat(each) for each in zip(*kept, strict=True)))


def early_times(rng: np.random.Generator, size: int) -> Tensor:
    """Flow-matching times [size], mostly near noise, where the image in the context has most to
    say: 80% are 1 - u^1.5 / 2, the rest uniform."""
    u = rng.random(size)
    return torch.from_numpy(np.where(rng.random(size) < 0.8, 1 - 0.5 * u**1.5, u)).float()
