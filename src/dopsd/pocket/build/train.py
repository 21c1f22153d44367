"""Training of the pocket model: autoencoder, flow matching, step distillation; a function a stage.

Run by `python -m dopsd.pocket STAGE`. A stage can be killed and resumed: its randomness is a
function of (seed, step), and its state (weights, average, optimizer) is saved every few minutes.
Minutes are those of two CPU cores.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor
from transformers import Qwen3VLModel

from dopsd.files import read_tensors, write_tensors
from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build.corpus import SEED, Corpus, noise_of, rng_at, to_unit
from dopsd.pocket.build.network import Network, fresh_network
from dopsd.pocket.build.stages import Stage, optimise

# --- autoencoder


def train_vae(folder: Path, steps: int = 3000) -> AutoencoderKL:
    """Train with squared error, absolute error and a KL term, then whiten on 2,000 images. About 15
    minutes.

    The KL weight leaves a few percent of noise on the latents that encode outlines and more on the
    others, so that close latents give close images: with 1e-4 small errors of the model showed as
    speckle (docs/experiments.md).
    """
    torch.manual_seed(SEED)
    vae = parts.make_vae()
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = read_tensors(folder / "data.safetensors")["images"]

    def loss_at(step: int) -> Tensor:
        rng = rng_at("vae", step)
        pixels = to_unit(images[rng.integers(0, len(images), 16)]).contiguous(
            memory_format=torch.channels_last
        )
        posterior = vae.encode(pixels).latent_dist
        rebuilt = vae.decode(
            posterior.mean + posterior.std * noise_of(rng, posterior.mean.shape)
        ).sample
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(rebuilt, pixels) + 0.25 * F.l1_loss(rebuilt, pixels) + 2e-3 * divergence

    optimise(Stage("vae", steps, 2e-3, average_decay=0.99), folder, {"vae": vae}, loss_at)
    whiten(vae, to_unit(images[:: len(images) // 2000]))
    vae.save_pretrained(folder / "vae")
    return vae


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Decorrelate the latent channels: fold the whitening matrix into the encoder's last
    convolution and its inverse into the decoder's first. Reconstructions stay the same; scale and
    shift in the config are set for the new latents.

    Without it, principal standard deviations of the channels ranged from 0.27 to 3.3: under
    isotropic noise the small ones, which encode outlines, are hidden until the last steps
    (docs/experiments.md). The covariance includes the posterior's noise, so that a channel that
    encodes nothing is not amplified.
    """
    count = vae.config.latent_channels
    posteriors = [vae.encode(part).latent_dist for part in pixels.split(100)]
    latents = torch.cat([p.mean for p in posteriors])
    spread = torch.cov(latents.double().permute(1, 0, 2, 3).flatten(1))
    spread += torch.diag(torch.cat([p.var for p in posteriors]).double().mean((0, 2, 3)))
    variances, axes = torch.linalg.eigh(spread)
    print(
        f"stage=whiten principal_deviations={[round(v, 2) for v in variances.sqrt().tolist()]}",
        flush=True,
    )
    forth, back = (axes / variances.sqrt()) @ axes.T, (axes * variances.sqrt()) @ axes.T
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    assert last.bias is not None
    last.weight[:count] = torch.einsum("ij,jklm->iklm", forth, last.weight[:count].double()).float()
    last.bias[:count] = (forth @ last.bias[:count].double()).float()
    first.weight.copy_(torch.einsum("oikl,ij->ojkl", first.weight.double(), back))
    latents = torch.einsum("ij,njkl->nikl", forth.float(), latents)
    vae.register_to_config(
        scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item()
    )


def sharpen_decoder(folder: Path, steps: int = 1000) -> AutoencoderKL:
    """Train the decoder of `train_vae` further on fixed latents with noise of up to 0.2, so that
    plain areas stay plain where sampling ends a little off. About 5 minutes.

    The encoder does not change, so that models trained on its latents stay valid.
    """
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(memory_format=torch.channels_last)
    images = read_tensors(folder / "data.safetensors")["images"]

    def loss_at(step: int) -> Tensor:
        rng = rng_at("decoder", step)
        pixels = to_unit(images[rng.integers(0, len(images), 16)]).contiguous(
            memory_format=torch.channels_last
        )
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
        amount = torch.from_numpy(rng.uniform(0, 0.2, (16, 1, 1, 1))).float()
        rebuilt = vae.decode(latents + amount * noise_of(rng, latents.shape)).sample
        return F.mse_loss(rebuilt, pixels) + 0.25 * F.l1_loss(rebuilt, pixels)

    optimise(
        Stage("decoder", steps, 2e-3, average_decay=0.99), folder, {"decoder": vae.decoder}, loss_at
    )
    vae.save_pretrained(folder / "vae-sharp")
    return vae


@torch.no_grad()
def encode_data(folder: Path, vae_folder: Path | None = None) -> None:
    """All training images as scaled latents, `latents.safetensors` (float16 [N, 8, 16, 16]); about
    3 minutes. vae_folder: default: that of `train_vae`."""
    vae = AutoencoderKL.from_pretrained(vae_folder or folder / "vae").to(
        memory_format=torch.channels_last
    )
    images = read_tensors(folder / "data.safetensors")["images"]
    latents = []
    for start in range(0, len(images), 100):
        clean = vae.encode(to_unit(images[start : start + 100])).latent_dist.mode()
        latents.append(((clean - vae.config.shift_factor) * vae.config.scaling_factor).half())
        if start % 10_000 == 0:
            print(f"stage=encode images={start}/{len(images)}", flush=True)
    write_tensors(folder / "latents.safetensors", {"latents": torch.cat(latents)})


# --- flow matching


def training_times(rng: np.random.Generator, size: int) -> Tensor:
    """Flow-matching times in (0, 1), 1 = noise. Half are logit-normal and shifted toward noise as
    the sampler's times are, half are uniform: of the shifted ones only 14% are below 0.5, where
    plain areas are formed."""
    u = 1 / (1 + np.exp(-rng.normal(size=size)))
    shifted = parts.SHIFT * u / (1 + (parts.SHIFT - 1) * u)
    return torch.from_numpy(np.where(rng.random(size) < 0.5, shifted, rng.random(size))).float()


def train_flow(
    folder: Path,
    steps: int = 5000,
    compiled: bool = True,
    half_batch: int = 64,
    start_from: Path | None = None,
) -> Network:
    """Train transformer and VLM jointly by flow matching; half of the contexts have an image. About
    95 minutes.

    start_from: an earlier checkpoint whose many-step model and VLM are trained further, on this
    folder's latents.
    """
    corpus, network = Corpus.read(folder), fresh_network(compiled, parts.FIRST_TOWER)
    if start_from:
        transformer = ZImageTransformer2DModel.from_pretrained(
            start_from / "parent", subfolder="transformer"
        )
        network.transformer.load_state_dict(transformer.state_dict())
        network.vlm.load_state_dict(Qwen3VLModel.from_pretrained(start_from / "vlm").state_dict())
    stage = Stage("flow", steps, 1.5e-3, average_decay=0.998, muon=True)

    def loss_at(step: int) -> Tensor:
        rng = rng_at("flow", step)
        losses = []
        for rows, tokens, images in corpus.draw(rng, half_batch, unconditional_share=0.1):
            context, mask = (
                network.plain(tokens) if images is None else network.privileged(tokens, images)
            )
            clean = corpus.latents[rows].float()
            noise, t = noise_of(rng, clean.shape), training_times(rng, len(rows))
            z = torch.lerp(clean, noise, t.view(-1, 1, 1, 1))
            losses.append(F.mse_loss(network(z, t, context, mask), noise - clean))
        return sum(losses[1:], losses[0]) / len(losses)

    optimise(stage, folder, {"network": network}, loss_at)
    return network


# --- step distillation


def sampler_times(nfe: int) -> Tensor:
    """The scheduler's times [nfe + 1] from 1 (noise) to 0, as the pipeline sets them."""
    scheduler = parts.make_scheduler()
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(nfe))
    return scheduler.sigmas


def euler(velocity: Callable[[Tensor, Tensor], Tensor], z: Tensor, times: Tensor) -> Tensor:
    """Integrate z from times[0] to times[-1] in Euler steps."""
    for now, after in pairwise(times):
        z = z + (after - now) * velocity(z, now.expand(len(z)))
    return z


def distill(
    folder: Path,
    rounds: int = 8,
    updates: int = 24,
    compiled: bool = True,
    substeps: int = 6,
    size: int = 64,
) -> Network:
    """Distill `substeps` Euler steps of the many-step model into each step of a 4-step student.
    About 8 minutes.

    At states of the *student's own* 4-step rollout, the many-step model with classifier-free
    guidance integrates to the end of the interval in small steps; the student's velocity is
    regressed on the slope of that chord, which distills guidance as well. Contexts with an image
    use no guidance: it made things worse (docs/experiments.md). The VLM does not change. Chords of
    all rounds so far are trained on; a resumed stage collects them anew.
    """
    many_step = fresh_network(compiled, parts.FIRST_TOWER)
    many_step.load_state_dict(without_prefix(read_tensors(folder / "flow.safetensors"), "network."))
    many_step.requires_grad_(False)
    student = fresh_network(compiled, parts.FIRST_TOWER)
    student.load_state_dict(many_step.state_dict())
    student.vlm.requires_grad_(False)
    corpus, nfe = Corpus.read(folder), parts.DISTILLED_NFE
    times = sampler_times(nfe)
    fine = [torch.lerp(a, b, torch.linspace(0, 1, substeps + 1)) for a, b in pairwise(times)]
    memory: list[list[tuple[Tensor, ...]]] = []
    with torch.no_grad():
        unconditional, unconditional_mask = many_step.plain(
            corpus.unconditional_ids[None].expand(size, -1).long()
        )

    @torch.no_grad()
    def chords(round_: int) -> list[tuple[Tensor, ...]]:
        """Batches (state, time, slope, context, mask) at the student's states, one for each kind of
        context and step."""
        rng, batches = rng_at("chords", round_), []
        for _ in range(2):
            for rows, tokens, images in corpus.draw(rng, size):
                context, mask = (
                    many_step.plain(tokens)
                    if images is None
                    else many_step.privileged(tokens, images)
                )

                def guided(
                    z: Tensor, t: Tensor, context: Tensor = context, mask: Tensor = mask
                ) -> Tensor:
                    return torch.lerp(
                        many_step(z, t, unconditional, unconditional_mask),
                        many_step(z, t, context, mask),
                        parts.GUIDANCE,
                    )

                unguided = partial(many_step, context=context, mask=mask)
                velocity = guided if images is None else unguided
                z = noise_of(rng, (len(rows), *corpus.latents.shape[1:]))
                for k in range(nfe):
                    slope = (euler(velocity, z, fine[k]) - z) / (times[k + 1] - times[k])
                    batches.append((z, times[k], slope, context, mask))
                    z = euler(partial(student, context=context, mask=mask), z, times[k : k + 2])
        return batches

    def loss_at(step: int) -> Tensor:
        if step % updates == 0 or not memory:
            memory.append(chords(step // updates))
        rng = rng_at("distill", step)
        losses = []
        for kind in range(2):  # text contexts and contexts with images have different lengths
            batch = memory[rng.integers(len(memory))]
            place = rng.integers(len(batch) // (2 * nfe)) * 2 * nfe + kind * nfe
            z, t, slope, context, mask = batch[place + rng.integers(nfe)]
            losses.append(F.mse_loss(student(z, t.expand(len(z)), context, mask), slope))
        return sum(losses[1:], losses[0]) / len(losses)

    stage = Stage(
        "distill", rounds * updates, 6e-4, warm_up=20, average_decay=0.98, save_every=updates
    )
    optimise(stage, folder, {"transformer": student.transformer}, loss_at)
    return student


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, without it."""
    return {n.removeprefix(prefix): each for n, each in tensors.items() if n.startswith(prefix)}
