"""The pocket model's training data: rendered scenes, tokenized captions, and batches of them."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
BEFORE_IMAGE = 3  # tokens of the prompt before an image: <|im_start|>, user, newline


def rng_at(stage: str, step: int, rank: int = 0) -> np.random.Generator:
    """The random generator of one step, a function of (seed, stage, step, process)."""
    return np.random.default_rng([SEED, *stage.encode(), step, *([rank] if rank else [])])


def make_data(folder: Path) -> None:
    """Render the training images and tokenize their captions into `<folder>/data.safetensors`
    (about 1 GB, 2 minutes).

    Rows are NAMED scenes, then THINGS groups of GROUP scenes, then STYLES groups. Seeds of things
    and styles are 0 to N - 1; everything held out has seeds from 1,000,000.
    """
    tokenizer = parts.make_tokenizer()
    rng = np.random.default_rng([SEED, 1])
    images, prompts = [], []
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
            prompts.append(plain_prompt(caption))
        if (row + 1) % 10_000 == 0:
            print(f"stage=data images={row + 1}/{total}", flush=True)

    tokens = tokenizer(
        prompts, padding="max_length", max_length=parts.CAPTION_TOKENS, return_tensors="pt"
    ).input_ids
    assert tokens.shape[1] == parts.CAPTION_TOKENS, "a caption is longer than the pocket context"
    write_tensors(
        folder / "data.safetensors",
        {
            "images": torch.from_numpy(np.stack(images)),
            "plain": tokens.to(torch.int16).view(total, CAPTIONS, parts.CAPTION_TOKENS),
        },
    )


def plain_prompt(caption: str) -> str:
    """The student's prompt, as the chat template formats it."""
    return f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"


def with_image_tokens(tokens: Tensor, tower: parts.VisionTower) -> Tensor:
    """Tokens [B, 32] of plain prompts -> [B, tower.prompt_tokens], with an image in front of the
    caption: the teacher's prompt."""
    image = torch.tensor(_image_tokens(tower)).expand(len(tokens), -1)
    joined = torch.cat([tokens[:, :BEFORE_IMAGE], image, tokens[:, BEFORE_IMAGE:]], dim=1)
    missing = tower.prompt_tokens - joined.shape[1]
    assert missing >= 0 or not joined[:, missing:].any(), "a prompt with an image is too long"
    return F.pad(joined, (0, missing))


@functools.cache
def _image_tokens(tower: parts.VisionTower) -> list[int]:
    image = "<|vision_start|>" + "<|image_pad|>" * tower.tokens + "<|vision_end|>"
    return parts.make_tokenizer()(image).input_ids


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

        The first vision tower's prompts are padded to 32 or to 64 tokens, as the transformer pads
        them: a batch holds only captions that need 32, or only those that need 64, in their true
        proportion over many draws.
        """
        rows, tokens = self.captions(rng, size, named_share)
        tokens[torch.from_numpy(rng.random(size) < unconditional_share)] = self.unconditional_ids
        yield rows, tokens, None
        short, long = self._by_padding
        length, pairs = (
            (32, short) if rng.random() < len(short) / (len(short) + len(long)) else (64, long)
        )
        rows, captions = np.divmod(pairs[rng.integers(len(pairs), size=size)], CAPTIONS)
        tokens = with_image_tokens(self.plain_ids[rows, captions].long(), parts.FIRST_TOWER)
        yield rows, tokens[:, :length], self.images[self._other_scene(rng, rows)]

    def captions(
        self, rng: np.random.Generator, size: int, named_share: float = 0.9
    ) -> tuple[np.ndarray, Tensor]:
        """Rows of which `named_share` are named scenes, and the tokens [size, 32] of one of the
        captions of each."""
        caption = torch.from_numpy(rng.integers(0, CAPTIONS, size))
        named = rng.integers(0, NAMED, round(size * named_share))
        other = rng.integers(NAMED, len(self.latents), size - len(named))
        rows = np.concatenate([named, other])
        return rows, self.plain_ids[rows, caption].long()

    def with_images(
        self, rng: np.random.Generator, size: int, target_share: float = 1.0
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """Rows, tokens [size, 96] of captions with an image, and the images uint8.

        The first `target_share` of the images are the rows' own (the target), 30% of these named
        scenes; the others show the same thing or style in another scene.
        """
        targets = round(size * target_share)
        rows, _ = self.captions(rng, targets, named_share=0.3)
        others = rng.integers(NAMED, len(self.latents), size - targets)
        seen = np.concatenate([rows, self._other_scene(rng, others)])
        rows = np.concatenate([rows, others])
        caption = torch.from_numpy(rng.integers(0, CAPTIONS, size))
        tokens = with_image_tokens(self.plain_ids[rows, caption].long(), parts.TOWER)
        return rows, tokens, self.images[seen]

    def _other_scene(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        """For each row of a thing or style, another row of its group."""
        group = (rows - NAMED) // GROUP * GROUP + NAMED
        return group + (rows - group + rng.integers(1, GROUP, len(rows))) % GROUP

    @functools.cached_property
    def _by_padding(self) -> tuple[np.ndarray, np.ndarray]:
        """Captions of things and styles that fit 32 tokens with an image of the first tower, and
        those that need 64, as row * CAPTIONS + caption."""
        image = parts.FIRST_TOWER.tokens + 2
        padding = self.plain_ids[..., parts.CAPTION_TOKENS - image :] == 0  # <|endoftext|>
        fits = padding.all(-1).flatten().numpy()
        pairs = np.arange(NAMED * CAPTIONS, len(self.latents) * CAPTIONS)
        return pairs[fits[pairs]], pairs[~fits[pairs]]


def noise_of(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
