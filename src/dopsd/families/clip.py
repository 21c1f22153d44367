"""CLIP as a measure of whether a picture shows what its prompt says. Loaded only where a recipe names one."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from dopsd.families.checkpoint import Checkpoint


class TextAgreement:
    """A CLIP of transformers, hub id or folder."""

    def __init__(self, path: str, device: torch.device):
        checkpoint = Checkpoint(path, called=f"health.text_model {path}")
        part = checkpoint.part()
        with checkpoint.reading("the model"):
            self._model = CLIPModel.from_pretrained(part, dtype=torch.float32).to(device).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(part)
            self._processor = CLIPImageProcessorPil.from_pretrained(part)

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each picture (uint8 [N, H, W, 3]) and its prompt, float64 [N] in [-1, 1]; long prompts are cut at
        CLIP's own limit."""
        device = self._model.device
        pixels = self._processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        words = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        answer = self._model(
            input_ids=words.input_ids.to(device),
            attention_mask=words.attention_mask.to(device),
            pixel_values=pixels["pixel_values"].to(device),
        )
        return (answer.image_embeds * answer.text_embeds).sum(-1).double().cpu().numpy()
