"""Qwen3 as a text encoder: prompts as the pipelines encode them, and the teacher's prompts with an
image through a Qwen3-VL that shares its language weights."""

import hashlib
import json
import logging
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BatchEncoding, Qwen3VLModel
from transformers.utils import ModelOutput

from dopsd.diffusion.batch import Context
from dopsd.models.base import fingerprint_of
from dopsd.models.hub import Checkpoint
from dopsd.models.prompt_limits import refuse_unfit
from dopsd.models.qwen3_prompts import (
    Reading,
    templated,
    token_limit,
    with_image,
    with_suffix,
)
from dopsd.models.qwen3_vl import (
    ADVICE,
    image_tokens,
    load_processor,
    load_vlm,
    teacher_vlm,
    transplant,
)

log = logging.getLogger(__name__)

# The hidden states of all layers are in memory together: 2.5 GB of an 8 B encoder at 512 tokens.
TEXTS_AT_ONCE = 16
# Between text encoder and VLM on text alone; rounding in bfloat16 makes about a hundredth.
MAX_TEXT_GAP = 0.05


class QwenTextEncoder:
    """Prompts as a pipeline encodes them; with images, through a Qwen3-VL of the same size."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        reading: Reading,
        vlm: str | None,
        suffix: str,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """vlm: the VLM through which a teacher sees images; None: no teacher does. suffix: text
        after the caption in the teacher's prompt. Raises ValueError for a VLM that does not
        match."""
        self.reading, self.suffix = reading, suffix
        part = checkpoint.part("text_encoder")
        with checkpoint.reading("tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder / "tokenizer")
        with checkpoint.reading("text_encoder"):
            encoder = AutoModel.from_pretrained(part, dtype=dtype)
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self.vlm = self.processor = None
        if vlm is not None:
            self._load_vlm(vlm, device, dtype)
        self.fingerprint = self._fingerprint(dtype)

    def _load_vlm(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        checkpoint = teacher_vlm(name)
        vlm = load_vlm(Qwen3VLModel, checkpoint, dtype, self._rope_theta)
        # Before the VLM moves, so that its own language weights never reach the device.
        transplant(self.encoder, vlm, name)
        self.vlm = vlm.to(device)
        self.processor = load_processor(checkpoint)
        self.text_gap = self._text_gap()
        log.info(
            "The teacher sees images through %s, whose language weights are replaced by the text "
            "encoder's; on text alone the two differ by %.1e of the largest state.",
            name,
            self.text_gap,
        )
        if self.text_gap > MAX_TEXT_GAP:
            raise ValueError(
                f"the VLM {name} encodes a text without an image differently from the checkpoint's "
                f"text encoder, by {self.text_gap:.0%}: its config differs in more than sizes. "
                f"{ADVICE}"
            )

    @property
    def _rope_theta(self) -> float:
        return self.encoder.config.rope_parameters["rope_theta"]

    def _fingerprint(self, dtype: torch.dtype) -> str:
        identity = [
            fingerprint_of(self.encoder),
            str(dtype),
            self.tokenizer.chat_template or "",
            str(self.reading),
        ]
        if self.vlm is not None and self.processor is not None:
            identity += [
                self.suffix,
                str(self._rope_theta),
                fingerprint_of(self.vlm.visual),
                json.dumps(self.processor.to_dict(), default=str, sort_keys=True),
            ]
        return hashlib.sha256("|".join(identity).encode()).hexdigest()[:16]

    @torch.no_grad()
    def context(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        references: Sequence[Sequence[Image.Image]] | None = None,
    ) -> Context:
        assert references is None, "a family that edits images adds them to this context itself"
        if images is not None:
            pairs = zip(prompts, images, strict=True)
            return Context.stack([self._privileged(prompt, image) for prompt, image in pairs])
        texts = [templated(self.tokenizer, prompt, self.reading.thinking) for prompt in prompts]
        rows = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = slice(start, start + TEXTS_AT_ONCE)
            tokens = self._tokens(texts[part], self.reading.length)
            lengths = tokens.attention_mask.sum(1).tolist()
            limits = [self.reading.length] * len(lengths)
            refuse_unfit(self.tokenizer, prompts[part], lengths, limits)
            tokens = tokens.to(self.encoder.device)
            mask = tokens.attention_mask.bool()
            output = self.encoder(
                input_ids=tokens.input_ids,
                attention_mask=mask,
                output_hidden_states=True,
                use_cache=False,
            )
            used = torch.ones_like(mask) if self.reading.padded else mask
            rows += [state[each] for state, each in zip(self._states(output), used, strict=True)]
        return Context.stack([Context(row[None], (len(row),)) for row in rows])

    def _tokens(self, texts: Sequence[str], length: int) -> BatchEncoding:
        """Padded to `length` where the pipeline pads, else to the longest."""
        if self.reading.padded:
            return self.tokenizer(
                list(texts), padding="max_length", max_length=length, return_tensors="pt"
            )
        return self.tokenizer(list(texts), padding=True, return_tensors="pt")

    def _states(self, output: ModelOutput) -> Tensor:
        return torch.cat([output.hidden_states[layer] for layer in self.reading.layers], dim=-1)

    def _privileged(self, prompt: str, image: Image.Image) -> Context:
        assert self.vlm is not None and self.processor is not None, "loaded without a VLM"
        # Tokenize prompt and image.
        patches = self.processor(images=[image], return_tensors="pt").to(self.vlm.device)
        count = image_tokens(self.processor, image.size)
        text = with_image(
            self.tokenizer, with_suffix(prompt, self.suffix), count, self.reading.thinking
        )
        limit = token_limit(self.reading, count)
        tokens = self._tokens([text], limit).to(self.vlm.device)
        length = int(tokens.attention_mask.sum())
        refuse_unfit(self.tokenizer, [prompt], [length], [limit], [count])
        # Padding keeps its positions after the prompt, as in the text encoder; by default the VLM
        # would put all of it at position 0.
        token_types = (tokens.input_ids == self.vlm.config.image_token_id).int()
        grid = patches["image_grid_thw"]
        positions, _ = self.vlm.get_rope_index(tokens.input_ids, token_types, grid)
        output = self.vlm(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            position_ids=positions,
            pixel_values=patches["pixel_values"],
            image_grid_thw=grid,
            mm_token_type_ids=token_types,
            output_hidden_states=True,
            use_cache=False,
        )
        return Context(self._states(output), (tokens.input_ids.shape[1],))

    @torch.no_grad()
    def _text_gap(self) -> float:
        """Largest difference between text encoder and VLM on text alone, as a share of the largest
        state: 0 except for rounding."""
        assert self.vlm is not None
        text = templated(self.tokenizer, "a picture of a red house", self.reading.thinking)
        ids = self.tokenizer([text], return_tensors="pt").input_ids.to(self.encoder.device)
        ours = self._states(self.encoder(input_ids=ids, output_hidden_states=True)).float()
        theirs = self._states(self.vlm.language_model(input_ids=ids, output_hidden_states=True))
        return ((ours - theirs.float()).abs().max() / ours.abs().max()).item()
