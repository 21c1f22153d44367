"""The cache writes what is missing, reuses what is whole, and is keyed by content."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dopsd import files
from dopsd.data.cache import (
    Row,
    forecast_cache,
    prepare,
    read_context,
    read_latents,
)
from dopsd.data.examples import Example
from dopsd.diffusion.batch import Context
from dopsd.files import read_tensors
from dopsd.images import cover_crop, open_image, to_pixels


class LetterEncoder:
    """One token per letter of the prompt, then one for the image; batches are padded."""

    def __init__(self, fingerprint: str = "letters-1"):
        self.fingerprint = fingerprint
        self.calls: list[tuple[list[str], list[Image.Image] | None]] = []

    def context(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        references: None = None,
    ) -> Context:
        self.calls.append((list(prompts), None if images is None else list(images)))
        images = [None] * len(prompts) if images is None else images
        return Context.stack([self._one(p, i) for p, i in zip(prompts, images, strict=True)])

    def _one(self, prompt: str, image: Image.Image | None) -> Context:
        values = [float(ord(letter)) for letter in prompt]
        if image is not None:
            values.append(float(int(hashlib.sha256(image.tobytes()).hexdigest()[:4], 16)))
        tokens = torch.tensor(values)[None, :, None].expand(1, -1, 3).to(torch.bfloat16)
        pooled = torch.tensor([[float(len(prompt)), 1.0]])
        return Context(tokens, (len(values),), {"pooled": pooled})


class MeanVAE:
    """Latents are means of 8 x 8 pixels."""

    def __init__(self, fingerprint: str = "means-1"):
        self.fingerprint = fingerprint
        self.calls: list[tuple[int, ...]] = []

    def latents(self, pixels: Tensor) -> Tensor:
        self.calls.append(tuple(pixels.shape))
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def pixels(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


class Preparation:
    """A folder of examples and one way to prepare them, with fresh encoders each time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.text_encoder, self.vae = LetterEncoder(), MeanVAE()
        sizes = [(80, 80), (130, 65), (64, 64), (65, 130), (100, 101), (90, 90)]
        self.examples = [
            self.example(f"{i}.png", f"caption {'x' * i}", size, i) for i, size in enumerate(sizes)
        ]

    def example(self, name: str, caption: str, size: tuple[int, int], seed: int) -> Example:
        noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(self.folder / name)
        return Example(self.folder / name, caption)

    def prepare(self, **changes) -> tuple[Row, ...]:
        self.text_encoder = LetterEncoder(changes.pop("text_encoder", "letters-1"))
        self.vae = MeanVAE(changes.pop("vae", "means-1"))
        settings = {
            "resolution": 64,
            "multiple": 16,
            "privileged": True,
            "device": "cpu",
            "batch_size": 2,
        } | changes
        return prepare(
            self.examples, self.folder / "cache", self.text_encoder, self.vae, **settings
        )

    def encoded_counts(self) -> tuple[int, int, int]:
        """How many images, captions and pairs the last `prepare` encoded."""
        captions = sum(
            len(prompts) for prompts, images in self.text_encoder.calls if images is None
        )
        pairs = sum(
            len(prompts) for prompts, images in self.text_encoder.calls if images is not None
        )
        return sum(shape[0] for shape in self.vae.calls), captions, pairs

    def leftovers(self) -> list[Path]:
        return [
            path
            for path in (self.folder / "cache").rglob("*")
            if path.is_file() and path.suffix != ".safetensors"
        ]


@pytest.fixture
def preparation(tmp_path) -> Preparation:
    return Preparation(tmp_path)


def test_rows_hold_what_the_encoders_return_for_each_example_alone_without_padding(preparation):
    rows = preparation.prepare()
    assert [row.example for row in rows] == preparation.examples
    assert {row.size for row in rows} == {(64, 64), (96, 48), (48, 96)}
    for row in rows:
        crop = cover_crop(open_image(row.example.path), row.size)
        assert torch.equal(read_latents(row.latents), MeanVAE().latents(to_pixels(crop)[None])[0])
        for path, images in ((row.context, None), (row.privileged, [crop])):
            expected, cached = (
                LetterEncoder().context([row.example.caption], images),
                read_context(path),
            )
            assert (
                torch.equal(cached.tokens, expected.tokens)
                and cached.tokens.dtype == torch.bfloat16
            )
            assert cached.lengths == expected.lengths
            assert torch.equal(cached.extras["pooled"], expected.extras["pooled"])
    tensors = read_tensors(rows[0].latents)
    assert tensors["latents"].dtype == torch.float32 and tensors["latents"].shape == (3, 8, 8)


def test_the_privileged_image_is_the_crop_that_is_trained_on(preparation):
    rows = preparation.prepare()
    seen = {
        p: i
        for prompts, images in preparation.text_encoder.calls
        if images
        for p, i in zip(prompts, images, strict=True)
    }
    for row in rows:
        expected = cover_crop(open_image(row.example.path), row.size)
        assert np.array_equal(np.asarray(seen[row.example.caption]), np.asarray(expected))


def test_encoders_run_in_small_batches_of_one_size_without_gradient(preparation):
    preparation.prepare(batch_size=3)
    assert sorted(preparation.vae.calls) == [
        (1, 3, 48, 96),
        (1, 3, 64, 64),
        (1, 3, 96, 48),
        (3, 3, 64, 64),
    ]
    assert all(len(prompts) <= 3 for prompts, _ in preparation.text_encoder.calls)


def test_without_privileged_no_pair_is_encoded(preparation):
    rows = preparation.prepare(privileged=False)
    assert all(row.privileged is None for row in rows) and preparation.encoded_counts() == (6, 6, 0)


def test_a_second_run_reuses_every_file(preparation):
    first = preparation.prepare()
    assert preparation.encoded_counts() == (6, 6, 6)
    assert preparation.prepare() == first and preparation.encoded_counts() == (0, 0, 0)


def test_progress_counts_files_and_begins_with_the_reused_ones(preparation):
    message: list[tuple[int, int]] = []
    preparation.prepare(privileged=False)
    preparation.prepare(progress=lambda done, total: message.append((done, total)))
    assert message[0] == (12, 18) and message[-1] == (18, 18) and message == sorted(message)


def test_examples_with_one_caption_share_its_context(preparation):
    preparation.examples = [
        replace(example, caption="a sks cat") for example in preparation.examples
    ]
    assert len({row.context for row in preparation.prepare()}) == 1
    assert preparation.encoded_counts() == (6, 1, 6)


def test_a_changed_caption_is_encoded_again_and_the_image_is_not(preparation):
    preparation.prepare()
    preparation.examples[2] = replace(preparation.examples[2], caption="another")
    rows = preparation.prepare()
    assert preparation.encoded_counts() == (0, 1, 1)
    assert read_context(rows[2].context).tokens.shape == (1, len("another"), 3)


def test_a_changed_image_under_the_same_name_is_encoded_again(preparation):
    before = preparation.prepare()
    preparation.example("2.png", "", (64, 64), seed=99)
    after = preparation.prepare()
    assert (
        preparation.encoded_counts() == (1, 0, 1)
        and after[2].latents != before[2].latents
        and after[2].context == before[2].context
    )


def test_a_renamed_image_is_recognised(preparation):
    preparation.prepare()
    preparation.examples[0] = replace(
        preparation.examples[0],
        path=preparation.examples[0].path.rename(preparation.folder / "renamed.png"),
    )
    preparation.prepare()
    assert preparation.encoded_counts() == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"vae": "means-2"}, (6, 0, 0)),
        ({"text_encoder": "letters-2"}, (0, 6, 6)),
        ({"resolution": 96}, (6, 0, 6)),
    ],
)
def test_another_encoder_or_size_is_another_key(preparation, change, counts):
    preparation.prepare()
    preparation.prepare(**change)
    assert preparation.encoded_counts() == counts
    preparation.prepare()
    assert preparation.encoded_counts() == (0, 0, 0), "the first run's files are still there"


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "of another kind"])
def test_a_broken_file_is_rebuilt_and_logged(preparation, caplog, damage):
    rows = preparation.prepare()
    whole = rows[1].latents.read_bytes()
    broken = {
        "cut": whole[:-7],
        "empty": b"",
        "text": b"hello",
        "of another kind": rows[1].context.read_bytes(),
    }
    rows[1].latents.write_bytes(broken[damage])
    with caplog.at_level(logging.WARNING):
        assert preparation.prepare() == rows
    assert preparation.encoded_counts() == (1, 0, 0) and rows[1].latents.read_bytes() == whole
    assert [record.name for record in caplog.records] == ["dopsd.data.cache"] and rows[
        1
    ].latents.name in caplog.text


def test_an_interrupted_write_leaves_no_half_file(preparation, monkeypatch):
    written = []

    def dying_save(tensors, path, metadata):
        path.write_bytes(b"half")
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        real_save(tensors, path, metadata=metadata)

    real_save = files.save_file
    monkeypatch.setattr(files, "save_file", dying_save)
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare()
    whole = list((preparation.folder / "cache").rglob("*.safetensors"))
    assert (
        len(whole) == 2
        and all(read_tensors(path) for path in whole)
        and not preparation.leftovers()
    )
    monkeypatch.undo()
    preparation.prepare()
    assert preparation.encoded_counts() == (4, 6, 6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_nothing_that_would_be_read(preparation, monkeypatch):
    rows = preparation.prepare()
    rows[0].latents.unlink()

    def die(tensors, path, metadata):
        path.write_bytes(b"half")
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(files, "save_file", die)
        files.write_tensors(rows[0].latents, {"latents": torch.ones(1)})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(preparation.leftovers()) == 1 and not rows[0].latents.exists()
    assert preparation.prepare() == rows and preparation.encoded_counts() == (1, 0, 0)


def test_latents_that_are_not_finite_are_refused_with_the_images_name(preparation, monkeypatch):
    monkeypatch.setattr(
        MeanVAE, "latents", lambda self, pixels: torch.full((len(pixels), 1, 2, 2), float("nan"))
    )
    with pytest.raises(ValueError, match=r"latents of .*0\.png are not finite"):
        preparation.prepare()
    assert not list((preparation.folder / "cache").rglob("*.safetensors"))


def test_the_encoders_refusal_of_a_long_prompt_reaches_the_user(preparation, monkeypatch):
    def refuse(self, prompts, images=None, references=None):
        raise ValueError("the caption is over the limit")

    monkeypatch.setattr(LetterEncoder, "context", refuse)
    with pytest.raises(ValueError, match="over the limit"):
        preparation.prepare()


@pytest.mark.parametrize("privileged", [True, False])
@pytest.mark.parametrize("unconditional", [True, False])
def test_the_forecast_of_the_cache_is_what_is_written(privileged, unconditional, tmp_path):
    preparation = Preparation(tmp_path)
    first, second, *others = preparation.examples
    first = replace(first, also=("another", "a third"), rejected=(second.path,))
    preparation.examples = [first, second, *others, first]
    rows = preparation.prepare(privileged=privileged, unconditional=unconditional)

    def blank(letters: int) -> int:
        """Bytes of the letter encoder's context: three bf16 a letter, and two pooled float32."""
        return letters * 3 * 2 + 2 * 4

    forecast = forecast_cache(
        preparation.examples,
        [row.size for row in rows],
        latent_bytes=lambda size: 3 * (size[0] // 8) * (size[1] // 8) * 4,
        context_bytes=lambda caption, references: blank(len(caption)),
        privileged_bytes=(lambda caption, size, _: blank(len(caption) + 1)) if privileged else None,
        unconditional=unconditional,
    )
    written = [path for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert forecast.files == len(written)
    tensors = [tensor for path in written for tensor in read_tensors(path).values()]
    assert forecast.bytes == sum(tensor.nbytes for tensor in tensors)
