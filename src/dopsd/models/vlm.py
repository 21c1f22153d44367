"""A Qwen3-VL that answers questions about images: captions, grades, test prompts."""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from dopsd.models.hub import Checkpoint
from dopsd.models.qwen3_prompts import image_placeholders, templated
from dopsd.models.qwen3_vl import image_tokens, load_processor, load_vlm


class Captioner:
    """A Qwen3-VL that answers by greedy decoding."""

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype):
        """path: a local folder or a hub id. Raises ValueError where it is no Qwen3-VL."""
        checkpoint = Checkpoint(path)
        self.vlm = load_vlm(Qwen3VLForConditionalGeneration, checkpoint, dtype).to(device)
        with checkpoint.reading("tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
        self.processor = load_processor(checkpoint)

    def caption(self, image: Image.Image, question: str, most_tokens: int) -> str:
        """The answer to a question about an image, on one line."""
        return self.answer([image], question, most_tokens)

    @torch.no_grad()
    def answer(self, images: Sequence[Image.Image], question: str, most_tokens: int) -> str:
        """The answer, on one line, to a question that follows the images in one user turn."""
        patches = self.processor(images=list(images), return_tensors="pt").to(self.vlm.device)
        counts = [image_tokens(self.processor, image.size) for image in images]
        placeholders = "".join(map(image_placeholders, counts))
        text = templated(self.tokenizer, placeholders + question, thinking=True)
        ids = self.tokenizer([text], return_tensors="pt").input_ids.to(self.vlm.device)
        output = self.vlm.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=patches["pixel_values"],
            image_grid_thw=patches["image_grid_thw"],
            mm_token_type_ids=(ids == self.vlm.config.image_token_id).int(),
            max_new_tokens=most_tokens,
            do_sample=False,
        )
        words = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return " ".join(words.split())
