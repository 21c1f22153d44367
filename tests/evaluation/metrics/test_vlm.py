"""VLM grades: only an answer of the asked form is a grade; images are shown in pairs."""

import math

import pytest
import torch
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from dopsd.evaluation.metrics.vlm import ObjectReward, StyleReward, grade_of
from dopsd.images import as_bytes, to_pil
from dopsd.models.hub import Checkpoint
from dopsd.models.qwen3_vl import load_processor

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("answer", "grade"), [("4", 4), ("1", 1), (" 3 ", 3), ("2.", 2), ("2\n", 2)]
)
def test_one_digit_is_a_grade(answer, grade):
    assert grade_of(answer) == grade


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "0",
        "5",
        "44",
        "4 4",
        "4/4",
        "4, 3",
        "3.5",
        "-2",
        "+2",
        "4:",
        "4 out of 4",
        "The grade is 4",
        "four",
        "4 it is the very same one",
        "Grade: 3",
        "**4**",
        "`4`",
        "[4]",
        '{"grade": 4}',
        "³",
        "４",
        "٤",
        "4..",
        "N/A",
        "4\n3",
        "<think>4</think>",
        "I cannot compare these pictures.",
        "Same instance",
        "4\x00",
        "nan",
    ],
)
def test_anything_else_is_none_and_is_logged(answer, caplog):
    assert math.isnan(grade_of(answer))
    assert "which is no grade" in caplog.text


def test_a_random_model_gives_no_grade(vlm):
    answers = ObjectReward(str(vlm), CPU)(torch.rand(2, 3, 64, 64), torch.rand(3, 96, 64))
    assert answers.shape == (2,) and torch.isnan(answers).all()


@torch.no_grad()
def test_the_target_comes_first_in_the_question_and_the_answer_is_the_models_own(vlm):
    reward = StyleReward(str(vlm), CPU)
    target, image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = Qwen3VLForConditionalGeneration.from_pretrained(vlm, dtype=torch.float32).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(vlm), load_processor(Checkpoint(str(vlm)))
    images = to_pil(as_bytes(torch.stack([target, image])))
    patches = processor(images=images, return_tensors="pt")
    marks = "<|vision_start|>" + "<|image_pad|>" * 64 + "<|vision_end|>"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": marks + marks + reward.question}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    ids = tokenizer([text], return_tensors="pt").input_ids
    kinds = (ids == model.config.image_token_id).int()
    logits = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **patches
    ).logits
    first = tokenizer.decode(logits[0, -1:].argmax(-1), skip_special_tokens=True)
    assert reward.captioner.answer(images, reward.question, 1) == " ".join(first.split())
