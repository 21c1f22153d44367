"""How the pocket model was trained: data, autoencoder, flow matching, step distillation. One function a stage.

Run by `python -m dopsd.pocket STAGE`. A stage is killed and resumed at will: its randomness is a function of (seed,
step), and its state (weights, average, optimizer) is saved every few minutes.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor, nn
from transformers import Qwen3VLModel

from dopsd.files import load_optimizer_tensors, optimizer_tensors, read_tensors, write_tensors, write_text
from dopsd.pocket import model as parts
from dopsd.pocket.captions import NAMES, caption_of, stated_of
from dopsd.pocket.world import Thing, draw_scene, render, unnamed_style

SEED = 20261120
NAMED, THINGS, STYLES = 48_000, 12_000, 5_000  # scenes of named parts; things and styles, GROUP scenes each
GROUP = 3
CAPTIONS = 4  # drawn for each scene, each leaving other attributes out


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
    settings = {"lr": stage.learning_rate, "weight_decay": 0.01}
    inner = {n: p for n, p in named.items() if stage.muon and p.ndim == 2 and re.search(r"\.\d+\.", n)}
    outer = [p for n, p in named.items() if n not in inner]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(outer, betas=(0.9, 0.98), **settings)]
    if inner:
        optimizers.append(torch.optim.Muon(inner.values(), adjust_lr_fn="match_rms_adamw", **settings))
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


def rng_at(stage: str, step: int) -> np.random.Generator:
    """The randomness of one step: a function of (seed, stage, step) alone."""
    return np.random.default_rng([SEED, *stage.encode(), step])


# --- data -------------------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Render the training pictures and tokenize their captions into `data.safetensors` (about 1 GB, 2 minutes).

    Rows are NAMED scenes, then THINGS groups of GROUP scenes, then STYLES groups. Things and styles are those of seeds
    0..N-1; everything held out has seeds from 1,000,000.
    """
    tokenizer = parts.make_tokenizer()
    rng = np.random.default_rng([SEED, 1])
    pictures, plain, privileged = [], [], []
    total = NAMED + GROUP * (THINGS + STYLES)
    for row in range(total):
        group = (row - NAMED) // GROUP
        thing = Thing.from_seed(group) if NAMED <= row < NAMED + GROUP * THINGS else None
        look = unnamed_style(group - THINGS) if row >= NAMED + GROUP * THINGS else None
        scene = draw_scene(rng, thing, look)
        pictures.append(render(scene))
        for _ in range(CAPTIONS):
            name = str(rng.choice(NAMES)) if rng.random() < 0.5 else None
            caption = caption_of(stated_of(scene, rng), thing is not None, look is not None, name)
            plain.append(plain_prompt(caption))
            privileged.append(privileged_prompt(caption))
        if (row + 1) % 10_000 == 0:
            print(f"stage=data pictures={row + 1}/{total}", flush=True)

    def ids(prompts: list[str], length: int) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
        assert tokens.input_ids.shape[1] == length, "a caption is longer than the pocket context"
        return tokens.input_ids.to(torch.int16).view(total, CAPTIONS, length)

    write_tensors(
        folder / "data.safetensors",
        {
            "pictures": torch.from_numpy(np.stack(pictures)),
            "plain": ids(plain, parts.CAPTION_TOKENS),
            "privileged": ids(privileged, parts.PRIVILEGED_TOKENS),
        },
    )


def plain_prompt(caption: str) -> str:
    """What the student reads, as the chat template writes it."""
    return f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"


def privileged_prompt(caption: str) -> str:
    """What the teacher reads: the picture's tokens first, then the caption."""
    picture = "<|vision_start|>" + "<|image_pad|>" * parts.PICTURE_TOKENS + "<|vision_end|>"
    return plain_prompt(picture + caption)


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 [B, 64, 64, 3] to float32 [B, 3, 64, 64] in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


# --- autoencoder ------------------------------------------------------------------------------------------------------


def train_vae(folder: Path, steps: int = 1500) -> AutoencoderKL:
    """Squared and absolute error, a little KL; then shift and scale from 2,000 pictures. About 8 minutes."""
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
    with torch.no_grad():
        latents = vae.encode(to_unit(pictures[torch.randperm(len(pictures))[:2000]])).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.save_pretrained(folder / "vae")
    return vae


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


# --- contexts and velocities, for batches of one shape ----------------------------------------------------------------


class Painter(nn.Module):
    """Transformer and VLM together, for batches whose captions all have the same padded length.

    The library's forward takes ragged lists, whose backward is quadratic in the batch; on equal lengths the same
    arithmetic on stacked tensors is 2.2 times faster here (`tests/test_pocket_train.py` holds the two to be equal).
    """

    def __init__(self, transformer: ZImageTransformer2DModel, vlm: Qwen3VLModel):
        super().__init__()
        self.transformer, self.vlm = transformer, vlm
        self.pad_id = 0  # <|endoftext|>, the first special token
        self.velocity = velocity_on_equal_lengths

    def plain(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 32] -> (context [B, 32, 128], its mask)."""
        mask = ids != self.pad_id
        states = self.vlm.language_model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return states.hidden_states[-2], mask

    def privileged(self, ids: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 64] and pictures uint8 [B, 64, 64, 3] -> (context [B, 64, 128], its mask)."""
        mask = ids != self.pad_id
        states = self.vlm(
            input_ids=ids,
            attention_mask=mask,
            position_ids=_positions(ids.shape[1]).expand(3, len(ids), -1),
            pixel_values=vlm_patches(pictures),
            image_grid_thw=torch.tensor([[1, 8, 8]]).repeat(len(ids), 1),
            output_hidden_states=True,
            use_cache=False,
        )
        return states.hidden_states[-2], mask

    def forward(self, z: Tensor, t: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """z [B, 8, 16, 16], t [B] (1 = noise) -> velocity (noise - clean), same shape as z."""
        return -self.velocity(self.transformer, z, 1 - t, context, mask)


def _positions(length: int) -> Tensor:
    """Qwen3-VL's three rotary positions [3, 1, length] for a prompt that opens with one 4 x 4 picture."""
    before, side = 4, 4  # tokens before the picture; picture tokens a side
    positions = torch.arange(length).repeat(3, 1)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    grid = torch.stack([torch.zeros(side * side, dtype=torch.long), rows.flatten(), columns.flatten()])
    positions[:, before : before + side * side] = grid + before
    after = before + side * side
    positions[:, after:] = torch.arange(length - after) + before + side
    return positions[:, None]


def vlm_patches(pictures: Tensor) -> Tensor:
    """What the picture processor makes of 64 x 64 pictures: [B * 64, 3 * 2 * 8 * 8] normalised patches."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # CLIP's, the processor's own
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    patches = pixels.reshape(len(pictures), 3, 4, 2, 8, 4, 2, 8).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return patches.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(len(pictures) * 64, 384)


def velocity_on_equal_lengths(
    model: ZImageTransformer2DModel, z: Tensor, time: Tensor, context: Tensor, mask: Tensor
) -> Tensor:
    """`ZImageTransformer2DModel.forward` where every context has the same padded length. time: 1 = clean."""
    batch, channels, height, width = z.shape
    length = context.shape[1]
    rows, columns = height // 2, width // 2
    emb = model.t_embedder(time * model.t_scale).type_as(z)
    x = z.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    x = model.all_x_embedder["2-1"](x)
    picture_ids = model.create_coordinate_grid((1, rows, columns), (length + 1, 0, 0), z.device).flatten(0, 2)
    caption_ids = model.create_coordinate_grid((length, 1, 1), (1, 0, 0), z.device).flatten(0, 2)
    x_rope, c_rope = model.rope_embedder(picture_ids)[None], model.rope_embedder(caption_ids)[None]
    for layer in model.noise_refiner:
        x = layer(x, None, x_rope, emb)
    c = torch.where(mask[..., None], model.cap_embedder(context), model.cap_pad_token)
    for layer in model.context_refiner:
        c = layer(c, None, c_rope)
    joint, rope = torch.cat([x, c], 1), torch.cat([x_rope, c_rope], 1)
    for layer in model.layers:
        joint = layer(joint, None, rope, emb)
    out = model.all_final_layer["2-1"](joint, c=emb)[:, : rows * columns]
    out = out.reshape(batch, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, channels, height, width)


# --- flow matching ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """The rendered training data: latents, pictures for the teacher's context, captions as tokens."""

    latents: Tensor
    pictures: Tensor
    plain_ids: Tensor
    privileged_ids: Tensor

    @staticmethod
    def read(folder: Path) -> "Corpus":
        data = read_tensors(folder / "data.safetensors")
        latents = read_tensors(folder / "latents.safetensors")["latents"]
        return Corpus(latents, data["pictures"], data["plain"], data["privileged"])

    def draw(self, rng: np.random.Generator, size: int, named_share: float = 0.75) -> Iterator[tuple[np.ndarray, Tensor, Tensor | None]]:
        """Two halves: (rows, tokens, None) from captions alone, and (rows, tokens, pictures) with another picture
        of the same thing or style beside the caption."""
        caption = torch.from_numpy(rng.integers(0, CAPTIONS, size))
        named = rng.integers(0, NAMED, round(size * named_share))
        other = rng.integers(NAMED, len(self.latents), size - len(named))
        rows = np.concatenate([named, other])
        yield rows, self.plain_ids[rows, caption].long(), None
        rows = rng.integers(NAMED, len(self.latents), size)
        group = (rows - NAMED) // GROUP * GROUP + NAMED
        partner = group + (rows - group + rng.integers(1, GROUP, size)) % GROUP
        yield rows, self.privileged_ids[rows, caption].long(), self.pictures[partner]


def shifted_logit_normal(rng: np.random.Generator, size: int, shift: float) -> Tensor:
    """Flow-matching times in (0, 1), 1 = noise, moved toward noise as the sampler's grid is."""
    u = 1 / (1 + np.exp(-rng.normal(size=size)))
    return torch.from_numpy(shift * u / (1 + (shift - 1) * u)).float()


def noise_of(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def fresh_painter(compiled: bool) -> Painter:
    """Untrained parts, seeded; with `compiled`, the transformer runs through torch.compile (needs a C++ compiler)."""
    torch.manual_seed(SEED)
    painter = Painter(parts.make_transformer(), parts.make_vlm(parts.make_tokenizer()))
    if compiled:
        painter.velocity = torch.compile(velocity_on_equal_lengths)
    return painter


def train_flow(folder: Path, steps: int = 1900, compiled: bool = True) -> Painter:
    """Flow matching of transformer and VLM together; half of the contexts hold a picture. About 40 minutes."""
    painter = fresh_painter(compiled)
    return _match_flow(Stage("flow", steps, 1.5e-3, average_decay=0.997), folder, painter, named_share=0.75)


def train_flow_on(folder: Path, steps: int = 2500, compiled: bool = True) -> Painter:
    """Flow matching continued with Muon and more captions of named scenes. About 45 minutes."""
    painter = fresh_painter(compiled)
    painter.load_state_dict(_strip(read_tensors(folder / "flow.safetensors"), "painter."))
    stage = Stage("flow-on", steps, 1.5e-3, average_decay=0.998, muon=True)
    return _match_flow(stage, folder, painter, named_share=0.9)


def _match_flow(stage: Stage, folder: Path, painter: Painter, named_share: float, half_batch: int = 64) -> Painter:
    corpus = Corpus.read(folder)

    def loss_at(step: int) -> Tensor:
        rng = rng_at(stage.name, step)
        losses = []
        for rows, tokens, pictures in corpus.draw(rng, half_batch, named_share):
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
    folder: Path, rounds: int = 16, updates: int = 24, compiled: bool = True, substeps: int = 6, size: int = 64
) -> Painter:
    """Teach the model to take the parent's `substeps` Euler steps of each sampler interval in one. About 10 minutes.

    Regression on chords: at a state that the *student's own* 4-step walk visits, the parent's many small steps say
    where the interval ends; the student's velocity there is pulled to the chord's slope. The VLM stays as it is.
    """
    parent = fresh_painter(compiled)
    parent.load_state_dict(_strip(read_tensors(folder / "flow-on.safetensors"), "painter."))
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
        for _ in range(4):
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
            del memory[:-6]
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
    trained = _strip(read_tensors(folder / "flow-on.safetensors"), "painter.")
    painter = fresh_painter(compiled=False)
    painter.load_state_dict(trained)
    painter.to(torch.bfloat16).transformer.save_pretrained(target / "parent" / "transformer")
    transformer = parts.make_transformer()
    transformer.load_state_dict(_strip(read_tensors(folder / "distill.safetensors"), "transformer."))
    vae = AutoencoderKL.from_pretrained(folder / "vae-sharp").to(torch.bfloat16)
    parts.save_pipeline(target, transformer.to(torch.bfloat16), vae, painter.vlm, parts.make_tokenizer())
    write_text(target / "README.md", (Path(__file__).parent / "card.md").read_text(encoding="utf-8"))
