"""A teacher that sees no image: its privilege is a better prompt than the student's (PE-OPSD)."""

import hashlib
from collections.abc import Sequence

from PIL import Image

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import TextEncoder
from dopsd.models.qwen3_prompts import with_suffix

PROMPT = "prompt"  # its name among a family's teacher contexts


class PromptTeacher:
    """A family's text encoder, whose contexts of prompts with images are those of the prompts with
    the teacher's suffix alone."""

    def __init__(self, text_encoder: TextEncoder, suffix: str):
        self._text_encoder, self._suffix = text_encoder, suffix
        identity = f"{text_encoder.fingerprint}|{PROMPT}|{suffix}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def context(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        references: Sequence[Sequence[Image.Image]] | None = None,
    ) -> Context:
        suffix = self._suffix if images is not None else ""
        read = [with_suffix(prompt, suffix) for prompt in prompts]
        return self._text_encoder.context(read, None, references)
