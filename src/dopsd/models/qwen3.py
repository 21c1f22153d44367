"""Qwen3 and Qwen3-VL: prompts as the pipelines read them, and the twin that sees images.

Shared by the families whose text encoder is a Qwen3. Images go through the PIL processor: no
torchvision is needed.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessorPil,
    Qwen3VLModel,
)
from transformers.utils import ModelOutput

from dopsd.diffusion.batch import Context
from dopsd.files import shorten
from dopsd.models.base import Size, fingerprint_of
from dopsd.models.hub import Checkpoint

log = logging.getLogger(__name__)

# Their hidden states, of all layers, are in memory together: 2.5 GB of an 8 B encoder at 512 tokens
TEXTS_AT_ONCE = 16
PRIVILEGED_TOKENS = 1024  # of prompt and image together, as D-OPSD's reference code
# What gives the language weights their shapes, in the configs of Qwen3 and of Qwen3-VL.
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
MOST_GAP = (
    0.05  # of the two ways to read a text alone; in bfloat16 rounding makes about a hundredth
)
CURE = "Set model.vlm to the Qwen3-VL of the same size, or use a method without a teacher that sees pictures."
# Of the image in them at most: 768 x 768 pixels at Qwen3-VL's size, as the reference code
IMAGE_TOKENS = 576

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Reading:
    """How a pipeline reads prompts with its Qwen3. layers: the hidden states that lie side by side
    in a token; thinking: whether the template leaves room for thoughts; length: the pipeline's
    limit; padded: to that, the network being fed what stands on the padding too."""

    layers: tuple[int, ...]
    thinking: bool
    padded: bool
    length: int


class QwenTextEncoder:
    """Prompts as a pipeline reads them; with images, through the Qwen3-VL twin of its text encoder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        reading: Reading,
        vlm: str | None,
        suffix: str,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """vlm: what the teacher sees images with, None where nobody asks; suffix: of the teacher's
        prompt."""
        self.reading, self.suffix = reading, suffix
        part = checkpoint.part("text_encoder")
        with checkpoint.reading("tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder / "tokenizer")
        with checkpoint.reading("text_encoder"):
            encoder = AutoModel.from_pretrained(part, dtype=dtype)
        self.encoder = encoder.to(device).eval()
        self.encoder.requires_grad_(False)
        self.vlm = self.processor = None
        if vlm is not None:
            twin, theta = twin_of(vlm), self.encoder.config.rope_parameters["rope_theta"]
            seeing = load_vlm(Qwen3VLModel, twin, dtype, theta)
            transplant(
                self.encoder, seeing, vlm
            )  # before the VLM moves, so that no second copy goes along
            self.vlm = seeing.to(device)
            self.processor = load_processor(twin)
            self.text_gap = self._text_gap()
            log.info("vlm=%s language_weights=replaced text_only_gap=%.2e", vlm, self.text_gap)
            if self.text_gap > MOST_GAP:
                raise ValueError(
                    f"the VLM {vlm} reads a text without a picture otherwise than the checkpoint's text encoder, by "
                    f"{self.text_gap:.0%}: its config differs in more than sizes. {CURE}"
                )
        marks = [
            fingerprint_of(self.encoder),
            str(dtype),
            self.tokenizer.chat_template or "",
            str(reading),
        ]
        if self.vlm is not None:
            marks += [
                suffix,
                str(theta),
                fingerprint_of(self.vlm.visual),
                json.dumps(self.processor.to_dict(), default=str, sort_keys=True),
            ]
        self.fingerprint = hashlib.sha256("|".join(marks).encode()).hexdigest()[:16]

    @torch.no_grad()
    def context(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        references: Sequence[Sequence[Image.Image]] | None = None,
    ) -> Context:
        assert references is None, (
            "a family that takes references adds them to what this reader answers"
        )
        if images is not None:
            return Context.stack(
                [self._privileged(p, i) for p, i in zip(prompts, images, strict=True)]
            )
        texts = [templated(self.tokenizer, prompt, self.reading.thinking) for prompt in prompts]
        rows = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = slice(start, start + TEXTS_AT_ONCE)
            tokens = self._tokens(texts[part], self.reading.length)
            _refuse_long(prompts[part], tokens.attention_mask.sum(1).tolist(), self.reading.length)
            tokens = tokens.to(self.encoder.device)
            mask = tokens.attention_mask.bool()
            answer = self.encoder(
                input_ids=tokens.input_ids,
                attention_mask=mask,
                output_hidden_states=True,
                use_cache=False,
            )
            fed = torch.ones_like(mask) if self.reading.padded else mask
            rows += [state[kept] for state, kept in zip(self._states(answer), fed, strict=True)]
        return Context.stack([Context(row[None], (len(row),)) for row in rows])

    def _tokens(self, texts: Sequence[str], length: int) -> BatchEncoding:
        """Padded to `length` where the pipeline pads, else to the longest."""
        if self.reading.padded:
            return self.tokenizer(
                list(texts), padding="max_length", max_length=length, return_tensors="pt"
            )
        return self.tokenizer(list(texts), padding=True, return_tensors="pt")

    def _states(self, answer: ModelOutput) -> Tensor:
        return torch.cat([answer.hidden_states[layer] for layer in self.reading.layers], dim=-1)

    def _privileged(self, prompt: str, image: Image.Image) -> Context:
        assert self.vlm is not None and self.processor is not None, (
            "this reader was loaded without its VLM"
        )
        patches = self.processor(images=[image], return_tensors="pt").to(self.vlm.device)
        count = image_tokens(self.processor, image.size)
        text = with_image(
            self.tokenizer, with_suffix(prompt, self.suffix), count, self.reading.thinking
        )
        limit = _limit(self.reading, count)
        tokens = self._tokens([text], limit).to(self.vlm.device)
        ids = tokens.input_ids
        _refuse_long(
            [prompt], [int(tokens.attention_mask.sum())], limit, f", {count} of them the picture's"
        )
        kinds = (ids == self.vlm.config.image_token_id).int()
        # padding keeps its place after the prompt, as in the text encoder; by itself the VLM would
        # put it at 0
        places, _ = self.vlm.get_rope_index(ids, kinds, patches["image_grid_thw"])
        states = self._states(
            self.vlm(
                input_ids=ids,
                attention_mask=tokens.attention_mask,
                position_ids=places,
                pixel_values=patches["pixel_values"],
                image_grid_thw=patches["image_grid_thw"],
                mm_token_type_ids=kinds,
                output_hidden_states=True,
                use_cache=False,
            )
        )
        return Context(states, (ids.shape[1],))

    @torch.no_grad()
    def _text_gap(self) -> float:
        """Largest difference of the two text-only states as a share of the largest state: 0 but for
        rounding."""
        assert self.vlm is not None
        text = templated(self.tokenizer, "a picture of a red house", self.reading.thinking)
        ids = self.tokenizer([text], return_tensors="pt").input_ids.to(self.encoder.device)
        plain = self._states(self.encoder(input_ids=ids, output_hidden_states=True))
        seeing = self._states(self.vlm.language_model(input_ids=ids, output_hidden_states=True))
        return ((plain.float() - seeing.float()).abs().max() / plain.float().abs().max()).item()


def templated(tokenizer: PreTrainedTokenizerBase, content: str, thinking: bool) -> str:
    """One user turn and the start of an answer, as the pipelines write it."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )


def with_suffix(prompt: str, suffix: str) -> str:
    """The teacher's prompt: a caption and what is said after it."""
    return f"{prompt} {suffix}" if suffix else prompt


def with_image(
    tokenizer: PreTrainedTokenizerBase, prompt: str, count: int, thinking: bool = True
) -> str:
    """One user turn, an image of `count` tokens first, then the prompt; templated once. The image's
    marks are written here, as Qwen3-VL's template writes them: the text encoder's own template
    knows no images."""
    return templated(tokenizer, image_marks(count) + prompt, thinking)


def image_marks(count: int) -> str:
    """What stands in a prompt for an image of `count` tokens."""
    return f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"


def image_tokens(processor: Qwen2VLImageProcessorPil, size: tuple[int, int]) -> int:
    """Of an image of (width, height) pixels."""
    return processor.get_number_of_image_patches(size[1], size[0]) // processor.merge_size**2


def twin_of(vlm: str) -> Checkpoint:
    """The VLM that the teacher sees images with."""
    return Checkpoint(vlm, called=f"the teacher's VLM {vlm}")


def count_tokens(
    checkpoint: Checkpoint,
    reading: Reading,
    prompts: Sequence[str],
    suffix: str = "",
    vlm: str = "",
    sizes: Sequence[Size] | None = None,
) -> list[int]:
    """That QwenReader would answer for each prompt, or, with sizes, for each prompt with an image
    of that size beside it, suffix and all. Raises ValueError over the limit. Reads the tokenizer
    and configs, no weights."""
    with checkpoint.reading("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder / "tokenizer")
    if sizes is None:
        texts = [templated(tokenizer, prompt, reading.thinking) for prompt in prompts]
        limits = [reading.length] * len(texts)
    else:
        twin = twin_of(vlm)
        refuse_other_size(checkpoint, twin)
        processor = load_processor(twin)
        counts = [image_tokens(processor, size) for size in sizes]
        told = [with_suffix(prompt, suffix) for prompt in prompts]
        texts = [
            with_image(tokenizer, *pair, reading.thinking)
            for pair in zip(told, counts, strict=True)
        ]
        limits = [_limit(reading, count) for count in counts]
    lengths = [
        len(ids) for ids in tokenizer(texts, verbose=False).input_ids
    ]  # too long is said below
    for prompt, length, limit in zip(prompts, lengths, limits, strict=True):
        _refuse_long([prompt], [length], limit)
    return limits if reading.padded else lengths


def text_width(checkpoint: Checkpoint) -> int:
    """Numbers in a hidden state of the text encoder."""
    with checkpoint.reading("text_encoder"):
        return AutoConfig.from_pretrained(checkpoint.folder / "text_encoder").hidden_size


def refuse_other_size(checkpoint: Checkpoint, twin: Checkpoint) -> None:
    """Raise ValueError where a VLM's language weights could not be replaced by the text encoder's,
    by their configs; `transplant` looks at the weights themselves."""
    with checkpoint.reading("text_encoder"):
        mine = AutoConfig.from_pretrained(checkpoint.folder / "text_encoder").to_dict()
    with twin.reading("config.json"):
        theirs = AutoConfig.from_pretrained(twin.folder).to_dict()
    if theirs["model_type"] != "qwen3_vl":
        raise ValueError(f"{twin.name} is a {theirs['model_type']}, not a Qwen3-VL. {CURE}")
    language = theirs["text_config"]
    if differing := [
        f"{key} {language[key]}, not {mine[key]}" for key in SIZES if language[key] != mine[key]
    ]:
        raise ValueError(
            f"{twin.name} does not match the checkpoint's text encoder: {', '.join(differing)}. {CURE}"
        )


def _limit(reading: Reading, count: int) -> int:
    """Tokens of prompt and image together. What is padded keeps the pipeline's length beside the
    image."""
    return reading.length + count if reading.padded else PRIVILEGED_TOKENS


def _refuse_long(
    prompts: Sequence[str], lengths: Sequence[int], limit: int, of_them: str = ""
) -> None:
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > limit:
            raise ValueError(
                f'the caption "{shorten(prompt, 60)}" makes {length} tokens{of_them}; the limit is {limit}. Shorten it.'
            )


def load_vlm(
    kind: type[Model], checkpoint: Checkpoint, dtype: torch.dtype, theta: float | None = None
) -> Model:
    """A Qwen3-VL of one of transformers' classes, frozen, on the CPU; theta: of the language
    model's rotary positions, where they are to be other weights' (Qwen3 was trained at 1e6,
    Qwen3-VL at 5e6). Raises ValueError where there is none."""
    part = checkpoint.part()
    with checkpoint.reading("the model"):
        config = AutoConfig.from_pretrained(part)
        if theta is not None:
            config.text_config.rope_parameters["rope_theta"] = theta
        return kind.from_pretrained(part, config=config, dtype=dtype).eval().requires_grad_(False)


def load_processor(checkpoint: Checkpoint) -> Qwen2VLImageProcessorPil:
    """The VLM's own image processor, its largest image limited to PICTURE_TOKENS."""
    with checkpoint.reading("preprocessor_config.json"):
        processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint.folder)
        most = IMAGE_TOKENS * (processor.patch_size * processor.merge_size) ** 2
        size = {edge: min(processor.size[edge], most) for edge in ("shortest_edge", "longest_edge")}
        return Qwen2VLImageProcessorPil.from_pretrained(checkpoint.folder, size=size)


def transplant(encoder: torch.nn.Module, vlm: Qwen3VLModel, name: str) -> None:
    """Replace the VLM's language weights by the text encoder's. Raises ValueError, listing the
    first keys that differ in name or shape: with one of them wrong the teacher would speak another
    language than the transformer learned."""
    mine, theirs = encoder.state_dict(), vlm.language_model.state_dict()
    differing = [
        f"{key} ({'missing' if key not in source else 'shape'})"
        for key in sorted(mine.keys() | theirs.keys())
        for source in (mine if key not in mine else theirs,)
        if key not in source or mine[key].shape != theirs[key].shape
    ]
    if differing:
        listed = ", ".join(differing[:5]) + (
            f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        )
        raise ValueError(
            f"the VLM {name} does not match the checkpoint's text encoder in {listed}. {CURE}"
        )
    vlm.language_model.load_state_dict(
        mine, assign=True
    )  # shares the tensors: one copy in memory serves both
