"""VLM-J: a Qwen3-VL says how much of a target image's thing, or of its style, another image shows:
4 ... 1.

The levels are those of D-OPSD's evaluation; the questions are our own words.
"""

import logging
import math
import re

import torch
from torch import Tensor

from dopsd.images import as_bytes, to_pil
from dopsd.models.vlm import Captioner

log = logging.getLogger(__name__)

MOST_TOKENS = 8
OBJECT = (
    "Look at the main object or character of the first picture, and look for it in the second. Pose, place, light and "
    "background may differ; judge its shape, colours, markings and details only.\n"
    "4: it is the very same one.\n3: mostly the same, with small differences in details.\n"
    "2: similar in part, with clear differences.\n1: another one, or it is missing.\n"
    "Answer with one digit, 4, 3, 2 or 1, and nothing else."
)
STYLE = (
    "Compare how the two pictures are made: technique, lines, colours, light and texture. What they show may differ "
    "and does not count.\n"
    "4: the style is highly consistent.\n3: mostly consistent, with small deviations.\n"
    "2: slightly consistent.\n1: not consistent.\n"
    "Answer with one digit, 4, 3, 2 or 1, and nothing else."
)


class VlmReward:
    """Asks about each image beside the target; an answer that is no grade is NaN, and is logged."""

    question: str

    def __init__(self, model: str, device: torch.device):
        self.captioner = Captioner(
            model, device, torch.bfloat16 if device.type == "cuda" else torch.float32
        )

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """images [B, 3, H, W] and one target [3, h, w] in [0, 1] -> [B] in 1 ... 4."""
        first = to_pil(as_bytes(target[None]))[0]
        answers = [
            self.captioner.answer([first, image], self.question, MOST_TOKENS)
            for image in to_pil(as_bytes(images))
        ]
        return torch.tensor([grade_of(answer) for answer in answers])


class ObjectReward(VlmReward):
    question = OBJECT


class StyleReward(VlmReward):
    question = STYLE


def grade_of(answer: str) -> float:
    """The grade in an answer: one digit of 1 to 4, with blanks or a full stop at most. Anything
    else is NaN: a reward that does not keep to its form is not guessed at."""
    if found := re.fullmatch(r"\s*([1-4])\.?\s*", answer, flags=re.ASCII):
        return float(found[1])
    log.warning("The VLM answered %r, which is no grade.", answer[:80])
    return math.nan
