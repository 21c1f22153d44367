"""Captions by a Qwen3-VL, with greedy search by hand as the oracle; written where none was."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.data.captioning import QUESTION, uncaptioned, write_captions
from dopsd.models.hub import Checkpoint
from dopsd.models.qwen3_prompts import with_image
from dopsd.models.qwen3_vl import image_tokens, load_processor

TOKENS = 6


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.jpg", "blue"), ("c.webp", "green")):
        Image.new("RGB", (96, 64), colour).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("a blue one")
    return tmp_path


@torch.no_grad()
def greedy(vlm: Path, image: Image.Image) -> str:
    """One token after the other, each by a whole forward."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(vlm, dtype=torch.float32).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(vlm), load_processor(Checkpoint(str(vlm)))
    patches = processor(images=[image], return_tensors="pt")
    text = with_image(tokenizer, QUESTION, image_tokens(processor, image.size))
    ids = tokenizer([text], return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(TOKENS):
        kinds = (ids == model.config.image_token_id).int()
        logits = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **patches
        ).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return " ".join(tokenizer.decode(ids[0, start:], skip_special_tokens=True).split())


def test_only_images_without_a_caption_get_one_and_it_is_the_models_greedy_answer(vlm, folder):
    result = CliRunner().invoke(
        app, ["caption", str(folder), "--model", str(vlm), "--most-tokens", str(TOKENS)]
    )
    assert result.exit_code == 0, result.output
    assert "2 captions written, 1 left as they were" in result.output
    assert (folder / "b.txt").read_text() == "a blue one"
    for name in ("a.png", "c.webp"):
        expected = greedy(vlm, Image.open(folder / name).convert("RGB"))
        assert (
            expected
            and (folder / name).with_suffix(".txt").read_text(encoding="utf-8") == expected + "\n"
        )


def test_overwrite_captions_every_image(folder):
    todo, captioned = uncaptioned(folder, overwrite=True)
    write_captions(todo, lambda image: "an image")
    assert (len(todo), captioned) == (3, 0)
    assert (folder / "b.txt").read_text() == "an image\n"


def test_an_empty_answer_is_an_error_and_captions_written_before_stay(folder):
    answers = iter(["a red one", ""])
    with pytest.raises(ValueError, match=r"caption of c\.webp"):
        write_captions(uncaptioned(folder)[0], lambda image: next(answers))
    assert (folder / "a.txt").read_text() == "a red one\n" and not (folder / "c.txt").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("metadata", "captions in metadata"),
        ("empty", "no images"),
        ("missing", "is not a folder"),
    ],
)
def test_a_folder_that_cannot_be_captioned_is_refused(fault, message, folder):
    place = folder
    if fault == "metadata":
        (folder / "metadata.jsonl").write_text("{}")
    else:
        place = folder / fault
        if fault == "empty":
            place.mkdir()
    with pytest.raises(ValueError, match=message):
        uncaptioned(place)


def test_a_missing_model_is_one_sentence(folder):
    result = CliRunner().invoke(app, ["caption", str(folder), "--model", str(folder / "nothing")])
    assert result.exit_code == 2 and "does not exist" in result.output
