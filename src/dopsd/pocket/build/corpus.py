"""The pocket model's training data: rendered scenes, tokenized captions, and batches of them."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dopsd.files import read_tensors, write_tensors
from dopsd.pocket.build import architecture as parts
from dopsd.pocket.world.captions import NAMES, caption_of, stated_of
from dopsd.pocket.world.scenes import Thing, draw_scene, render, unnamed_style

SEED = 20261120
NAMED = 48_000  # scenes of named parts
THINGS, STYLES = 12_000, 5_000  # with GROUP scenes each
GROUP = 3
CAPTIONS = 4  # for each scene, each leaving out other attributes


def rng_at(stage: str, step: int) -> np.random.Generator:
    """The random generator of one step, a function of (seed, stage, step)."""
    return np.random.default_rng([SEED, *stage.encode(), step])


def make_data(folder: Path) -> None:
    """Render the training images and tokenize their captions into `<folder>/data.safetensors`
    (about 1 GB, 2 minutes).

    Rows are NAMED scenes, then THINGS groups of GROUP scenes, then STYLES groups. Seeds of things
    and styles are 0 to N - 1; everything held out has seeds from 1,000,000.
    """
    tokenizer = parts.make_tokenizer()
    rng = np.random.default_rng([SEED, 1])
    images, plain, privileged = [], [], []
    total = NAMED + GROUP * (THINGS + STYLES)
    for row in range(total):
        group = (row - NAMED) // GROUP
        thing = Thing.from_seed(group) if NAMED <= row < NAMED + GROUP * THINGS else None
        look = unnamed_style(group - THINGS) if row >= NAMED + GROUP * THINGS else None
        scene = draw_scene(rng, thing, look)
        images.append(render(scene))
        for _ in range(CAPTIONS):
            name = str(rng.choice(NAMES)) if rng.random() < 0.5 else None
            caption = caption_of(stated_of(scene, rng), thing is not None, look is not None, name)
            plain.append(plain_prompt(caption))
            privileged.append(privileged_prompt(caption))
        if (row + 1) % 10_000 == 0:
            print(f"stage=data images={row + 1}/{total}", flush=True)

    def ids(prompts: list[str], length: int) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
        assert tokens.input_ids.shape[1] == length, "a caption is longer than the pocket context"
        return tokens.input_ids.to(torch.int16).view(total, CAPTIONS, length)

    write_tensors(
        folder / "data.safetensors",
        {
            "images": torch.from_numpy(np.stack(images)),
            "plain": ids(plain, parts.CAPTION_TOKENS),
            "privileged": ids(privileged, parts.PRIVILEGED_TOKENS),
        },
    )


def plain_prompt(caption: str) -> str:
    """The student's prompt, as the chat template formats it."""
    return f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"


def privileged_prompt(caption: str) -> str:
    """The teacher's prompt: the image's tokens, then the caption."""
    image = "<|vision_start|>" + "<|image_pad|>" * parts.IMAGE_TOKENS + "<|vision_end|>"
    return plain_prompt(image + caption)


def to_unit(images: Tensor) -> Tensor:
    """uint8 [B, 64, 64, 3] to float32 [B, 3, 64, 64] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Corpus:
    """The training data: latents, images for the teacher's contexts, tokenized captions.

    unconditional_ids: of the empty caption, for classifier-free guidance.
    """

    latents: Tensor
    images: Tensor
    plain_ids: Tensor
    privileged_ids: Tensor
    unconditional_ids: Tensor

    @staticmethod
    def read(folder: Path) -> "Corpus":
        data = read_tensors(folder / "data.safetensors")
        latents = read_tensors(folder / "latents.safetensors")["latents"]
        unconditional = parts.make_tokenizer()(
            plain_prompt(""), padding="max_length", max_length=parts.CAPTION_TOKENS
        )
        return Corpus(
            latents,
            data["images"],
            data["plain"],
            data["privileged"],
            torch.tensor(unconditional.input_ids),
        )

    def draw(
        self,
        rng: np.random.Generator,
        size: int,
        named_share: float = 0.9,
        unconditional_share: float = 0.0,
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor | None]]:
        """Two batches: (rows, tokens, None) with captions, and (rows, tokens, images) with captions
        and another image of the same thing or style. `unconditional_share` of the first get the
        empty caption.

        The transformer pads each context to a multiple of 32 tokens, so the second batch holds only
        captions that need 32, or only those that need 64, in their true proportion over many draws.
        """
        caption = torch.from_numpy(rng.integers(0, CAPTIONS, size))
        named = rng.integers(0, NAMED, round(size * named_share))
        other = rng.integers(NAMED, len(self.latents), size - len(named))
        rows = np.concatenate([named, other])
        tokens = self.plain_ids[rows, caption].long()
        tokens[torch.from_numpy(rng.random(size) < unconditional_share)] = self.unconditional_ids
        yield rows, tokens, None
        short, long = self._by_padding
        length, pairs = (
            (32, short) if rng.random() < len(short) / (len(short) + len(long)) else (64, long)
        )
        rows, captions = np.divmod(pairs[rng.integers(len(pairs), size=size)], CAPTIONS)
        group = (rows - NAMED) // GROUP * GROUP + NAMED
        partner = group + (rows - group + rng.integers(1, GROUP, size)) % GROUP
        yield rows, self.privileged_ids[rows, captions, :length].long(), self.images[partner]

    @functools.cached_property
    def _by_padding(self) -> tuple[np.ndarray, np.ndarray]:
        """Captions of things and styles that fit 32 tokens with their image, and those that need
        64, as row * CAPTIONS + caption."""
        padding = self.privileged_ids[..., 32:] == 0  # <|endoftext|>
        fits = padding.all(-1).flatten().numpy()
        pairs = np.arange(NAMED * CAPTIONS, len(self.latents) * CAPTIONS)
        return pairs[fits[pairs]], pairs[~fits[pairs]]


def noise_of(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
