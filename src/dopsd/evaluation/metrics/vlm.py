"""Grades from 4 to 1 by a Qwen3-VL: how well an image shows the object or the style of a target.

The grades are those of D-OPSD's evaluation; the wording of the questions is ours.
"""

import logging
import math
import re

import torch
from torch import Tensor

from dopsd.images import as_bytes, to_pil
from dopsd.models.vlm import Captioner

log = logging.getLogger(__name__)

MAX_TOKENS = 8  # of an answer
OBJECT = (
    "Look at the main object or character of the first picture, and look for it in the second. "
    "Pose, place, light and background may differ; judge its shape, colours, markings and details "
    "only.\n"
    "4: it is the very same one.\n3: mostly the same, with small differences in details.\n"
    "2: similar in part, with clear differences.\n1: another one, or it is missing.\n"
    "Answer with one digit, 4, 3, 2 or 1, and nothing else."
)
STYLE = (
    "Compare how the two pictures are made: technique, lines, colours, light and texture. "
    "What they show may differ and does not count.\n"
    "4: the style is highly consistent.\n3: mostly consistent, with small deviations.\n"
    "2: slightly consistent.\n1: not consistent.\n"
    "Answer with one digit, 4, 3, 2 or 1, and nothing else."
)


class VlmReward:
    """Asks about the target and each image; an answer that is no grade gives NaN and is logged."""

    question: str

    def __init__(self, model: str, device: torch.device):
        self.captioner = Captioner(
            model, device, torch.bfloat16 if device.type == "cuda" else torch.float32
        )

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """images [B, 3, H, W] and one target [3, h, w] in [0, 1] -> grades [B], 1 to 4."""
        first = to_pil(as_bytes(target[None]))[0]
        answers = [
            self.captioner.answer([first, image], self.question, MAX_TOKENS)
            for image in to_pil(as_bytes(images))
        ]
        return torch.tensor([grade_of(answer) for answer in answers])


class ObjectReward(VlmReward):
    question = OBJECT


class StyleReward(VlmReward):
    question = STYLE


def grade_of(answer: str) -> float:
    """The grade of an answer: a digit from 1 to 4, with white space or a full stop at most. Any
    other answer is NaN; its meaning is not guessed."""
    if match := re.fullmatch(r"\s*([1-4])\.?\s*", answer, flags=re.ASCII):
        return float(match[1])
    log.warning("The VLM answered %r, which is no grade.", answer[:80])
    return math.nan
