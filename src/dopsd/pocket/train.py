"""How the pocket model was trained: autoencoder, flow matching, step distillation. One function a stage.

Run by `python -m dopsd.pocket STAGE`. A stage is killed and resumed at will: its randomness is a function of (seed,
step), and its state (weights, average, optimizer) is saved every few minutes.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor, nn

from dopsd.files import load_optimizer_tensors, optimizer_tensors, read_tensors, write_tensors, write_text
from dopsd.pocket import model as parts
from dopsd.pocket.corpus import SEED, Corpus, noise_of, rng_at, to_unit
from dopsd.pocket.painter import Painter, fresh_painter


@dataclass(frozen=True)
class Stage:
    """A training loop's settings. `minutes` in the comments of the commands are those of two CPU cores."""

    name: str
    steps: int
    learning_rate: float
    warm_up: int = 100
    average_decay: float = 0.0  # of the weights; 0 = none kept
    save_every: int = 250
    muon: bool = False  # Muon for the matrices inside blocks, AdamW for the rest


def optimise(
    stage: Stage, folder: Path, modules: Mapping[str, nn.Module], loss_at: Callable[[int], Tensor]
) -> dict[str, Tensor]:
    """Minimise `loss_at(step)` with AdamW (or Muon), linear warm-up and decay; resume where the folder left off.

    Returns the averaged weights (the plain ones without average) under `<module>.<parameter>`, which are also left in
    `<folder>/<stage>.safetensors`.
    """
    named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    optimizers = _optimizers(stage, named)
    average = {n: p.detach().clone() for n, p in named.items()}
    state_file = folder / f"{stage.name}.state.safetensors"
    start = 0
    if state_file.exists():
        start = _load_state(state_file, named, average, optimizers)
        print(f"stage={stage.name} resumed_at={start}", flush=True)
    began, shown = time.perf_counter(), []
    for step in range(start, stage.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = stage.learning_rate * min((step + 1) / stage.warm_up, 1) * (1 - step / stage.steps)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(stage.average_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, parameter in named.items():
                average[name].lerp_(parameter, 1 - decay)
        shown.append(loss.item())
        if (step + 1) % 50 == 0:
            rate = (step + 1 - start) / (time.perf_counter() - began)
            left = (stage.steps - step - 1) / rate / 60
            print(
                f"stage={stage.name} step={step + 1}/{stage.steps} loss={np.mean(shown[-50:]):.4f} "
                f"steps_per_second={rate:.2f} minutes_left={left:.1f}",
                flush=True,
            )
        if (step + 1) % stage.save_every == 0 or step + 1 == stage.steps:
            _save_state(state_file, step + 1, named, average, optimizers)
    write_tensors(folder / f"{stage.name}.safetensors", average)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(average[name])
    return average


def _optimizers(stage: Stage, named: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    inner = {n: p for n, p in named.items() if stage.muon and p.ndim == 2 and re.search(r"\.\d+\.", n)}
    outer = [p for n, p in named.items() if n not in inner]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(outer, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    ]
    if inner:
        optimizers.append(
            torch.optim.Muon(inner.values(), lr=stage.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def _save_state(
    path: Path, step: int, named: Mapping, average: Mapping, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    tensors = {f"weight:{n}": p for n, p in named.items()}
    tensors |= {f"average:{n}": p for n, p in average.items()}
    for index, optimizer in enumerate(optimizers):
        tensors |= {f"optimizer{index}:{n}": p for n, p in optimizer_tensors(optimizer).items()}
    write_tensors(path, tensors | {"step": torch.tensor(step)})


def _load_state(path: Path, named: Mapping, average: Mapping, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    tensors = read_tensors(path)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"weight:{name}"])
            average[name].copy_(tensors[f"average:{name}"])
    for index, optimizer in enumerate(optimizers):
        prefix = f"optimizer{index}:"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        load_optimizer_tensors(optimizer, own)
    return int(tensors["step"])


# --- autoencoder ------------------------------------------------------------------------------------------------------


def train_vae(folder: Path, steps: int = 1500) -> AutoencoderKL:
    """Squared and absolute error, a little KL; then whitened on 2,000 pictures. About 8 minutes."""
    torch.manual_seed(SEED)
    vae = parts.make_vae()
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pictures = read_tensors(folder / "data.safetensors")["pictures"]

    def loss_at(step: int) -> Tensor:
        rows = rng_at("vae", step).integers(0, len(pictures), 16)
        pixels = to_unit(pictures[rows]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        generator = torch.Generator().manual_seed(SEED + step)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(rebuilt, pixels) + 0.25 * F.l1_loss(rebuilt, pixels) + 1e-4 * divergence

    optimise(Stage("vae", steps, 2e-3, average_decay=0.99), folder, {"vae": vae}, loss_at)
    whiten(vae, to_unit(pictures[:: len(pictures) // 2000]))
    vae.save_pretrained(folder / "vae")
    return vae


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Decorrelate the latent channels: fold the whitening matrix into the encoder's last convolution and its inverse
    into the decoder's first. Pictures are rebuilt as before; scale and shift in the config are set for the new latents.

    As trained, the channels' principal deviations spanned 0.27 to 3.3: under isotropic noise the small ones, which
    hold outlines, are buried until the very end of the walk (docs/experiments.md).
    """
    count = vae.config.latent_channels
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(100)])
    variances, axes = torch.linalg.eigh(torch.cov(latents.double().permute(1, 0, 2, 3).flatten(1)))
    forth, back = (axes / variances.sqrt()) @ axes.T, (axes * variances.sqrt()) @ axes.T
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    assert last.bias is not None
    last.weight[:count] = torch.einsum("ij,jklm->iklm", forth, last.weight[:count].double()).float()
    last.bias[:count] = (forth @ last.bias[:count].double()).float()
    first.weight.copy_(torch.einsum("oikl,ij->ojkl", first.weight.double(), back))
    latents = torch.einsum("ij,njkl->nikl", forth.float(), latents)
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def sharpen_decoder(folder: Path, steps: int = 1500) -> AutoencoderKL:
    """Train the decoder further on the fixed latents of what `train_vae` left. About 5 minutes.

    Only pictures get sharper; latents, and so every model trained on them, stay valid.
    """
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(memory_format=torch.channels_last)
    pictures = read_tensors(folder / "data.safetensors")["pictures"]

    def loss_at(step: int) -> Tensor:
        rows = rng_at("decoder", step).integers(0, len(pictures), 16)
        pixels = to_unit(pictures[rows]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
        rebuilt = vae.decode(latents).sample
        return F.mse_loss(rebuilt, pixels) + 0.25 * F.l1_loss(rebuilt, pixels)

    optimise(Stage("decoder", steps, 2e-3, average_decay=0.99), folder, {"decoder": vae.decoder}, loss_at)
    vae.save_pretrained(folder / "vae-sharp")
    return vae


@torch.no_grad()
def encode_data(folder: Path) -> None:
    """All training pictures as scaled latents, `latents.safetensors` (float16 [N, 8, 16, 16]); about 3 minutes."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(memory_format=torch.channels_last)
    pictures = read_tensors(folder / "data.safetensors")["pictures"]
    latents = []
    for start in range(0, len(pictures), 100):
        clean = vae.encode(to_unit(pictures[start : start + 100])).latent_dist.mode()
        latents.append(((clean - vae.config.shift_factor) * vae.config.scaling_factor).half())
        if start % 10_000 == 0:
            print(f"stage=encode pictures={start}/{len(pictures)}", flush=True)
    write_tensors(folder / "latents.safetensors", {"latents": torch.cat(latents)})


# --- flow matching ----------------------------------------------------------------------------------------------------


def shifted_logit_normal(rng: np.random.Generator, size: int, shift: float) -> Tensor:
    """Flow-matching times in (0, 1), 1 = noise, moved toward noise as the sampler's grid is."""
    u = 1 / (1 + np.exp(-rng.normal(size=size)))
    return torch.from_numpy(shift * u / (1 + (shift - 1) * u)).float()


def train_flow(folder: Path, steps: int = 3300, compiled: bool = True, half_batch: int = 64) -> Painter:
    """Flow matching of transformer and VLM together; half of the contexts hold a picture. About 70 minutes."""
    corpus, painter = Corpus.read(folder), fresh_painter(compiled)
    stage = Stage("flow", steps, 1.5e-3, average_decay=0.998, muon=True)

    def loss_at(step: int) -> Tensor:
        rng = rng_at("flow", step)
        losses = []
        for rows, tokens, pictures in corpus.draw(rng, half_batch):
            context, mask = painter.plain(tokens) if pictures is None else painter.privileged(tokens, pictures)
            clean = corpus.latents[rows].float()
            noise, t = noise_of(rng, clean.shape), shifted_logit_normal(rng, len(rows), parts.SHIFT)
            z = torch.lerp(clean, noise, t.view(-1, 1, 1, 1))
            losses.append(F.mse_loss(painter(z, t, context, mask), noise - clean))
        return sum(losses[1:], losses[0]) / len(losses)

    optimise(stage, folder, {"painter": painter}, loss_at)
    return painter


# --- step distillation ------------------------------------------------------------------------------------------------


def sampler_times(nfe: int) -> Tensor:
    """The scheduler's own times [nfe + 1], from 1 (noise) to 0, as the pipeline sets them."""
    scheduler = parts.make_scheduler()
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(nfe))
    return scheduler.sigmas


def euler(painter: Painter, z: Tensor, times: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """Walk z from times[0] to times[-1] in Euler steps."""
    for now, after in pairwise(times):
        z = z + (after - now) * painter(z, now.expand(len(z)), context, mask)
    return z


def distill(
    folder: Path, rounds: int = 12, updates: int = 24, compiled: bool = True, substeps: int = 6, size: int = 64
) -> Painter:
    """Teach the model to take the parent's `substeps` Euler steps of each sampler interval in one. About 8 minutes.

    Regression on chords: at a state that the *student's own* 4-step walk visits, the parent's many small steps say
    where the interval ends; the student's velocity there is pulled to the chord's slope. The VLM stays as it is.
    Chords of the last 12 rounds are trained on; a resumed stage collects them anew.
    """
    parent = fresh_painter(compiled)
    parent.load_state_dict(_strip(read_tensors(folder / "flow.safetensors"), "painter."))
    parent.requires_grad_(False)
    student = fresh_painter(compiled)
    student.load_state_dict(parent.state_dict())
    student.vlm.requires_grad_(False)
    corpus, times = Corpus.read(folder), sampler_times(parts.NFE)
    fine = [torch.lerp(a, b, torch.linspace(0, 1, substeps + 1)) for a, b in pairwise(times)]
    memory: list[list[tuple[Tensor, ...]]] = []

    @torch.no_grad()
    def chords(round_: int) -> list[tuple[Tensor, ...]]:
        """(state, time, slope, context, mask) batches at the student's own states: one batch a context kind a step."""
        rng, found = rng_at("chords", round_), []
        for _ in range(2):
            for rows, tokens, pictures in corpus.draw(rng, size):
                context, mask = parent.plain(tokens) if pictures is None else parent.privileged(tokens, pictures)
                z = noise_of(rng, (len(rows), *corpus.latents.shape[1:]))
                for k in range(parts.NFE):
                    slope = (euler(parent, z, fine[k], context, mask) - z) / (times[k + 1] - times[k])
                    found.append((z, times[k], slope, context, mask))
                    z = euler(student, z, times[k : k + 2], context, mask)
        return found

    def loss_at(step: int) -> Tensor:
        if step % updates == 0 or not memory:
            memory.append(chords(step // updates))
            del memory[:-12]
        rng = rng_at("distill", step)
        losses = []
        for kind in range(2):  # one batch with text contexts, one with pictures: their lengths differ
            batch = memory[rng.integers(len(memory))]
            place = rng.integers(len(batch) // (2 * parts.NFE)) * 2 * parts.NFE + kind * parts.NFE
            z, t, slope, context, mask = batch[place + rng.integers(parts.NFE)]
            losses.append(F.mse_loss(student(z, t.expand(len(z)), context, mask), slope))
        return sum(losses[1:], losses[0]) / len(losses)

    stage = Stage("distill", rounds * updates, 6e-4, warm_up=20, average_decay=0.98, save_every=updates)
    optimise(stage, folder, {"transformer": student.transformer}, loss_at)
    return student


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


# --- the folder -------------------------------------------------------------------------------------------------------


def assemble(folder: Path, target: Path) -> None:
    """Write the trained parts as the pocket checkpoint: bfloat16 weights, the parent's transformer beside them."""
    trained = _strip(read_tensors(folder / "flow.safetensors"), "painter.")
    painter = fresh_painter(compiled=False)
    painter.load_state_dict(trained)
    painter.to(torch.bfloat16).transformer.save_pretrained(target / "parent" / "transformer")
    transformer = parts.make_transformer()
    transformer.load_state_dict(_strip(read_tensors(folder / "distill.safetensors"), "transformer."))
    vae = AutoencoderKL.from_pretrained(folder / "vae-sharp").to(torch.bfloat16)
    parts.save_pipeline(target, transformer.to(torch.bfloat16), vae, painter.vlm, parts.make_tokenizer())
    write_text(target / "README.md", (Path(__file__).parent / "card.md").read_text(encoding="utf-8"))
