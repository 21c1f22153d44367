"""Prompts of pipelines whose text encoder is a Qwen3: chat template, image placeholders, token
counts and limits."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from dopsd.models.base import Size
from dopsd.models.hub import Checkpoint
from dopsd.models.prompt_limits import refuse_unfit
from dopsd.models.qwen3_vl import image_tokens, load_processor, refuse_other_size, teacher_vlm

# Of prompt and image together, as D-OPSD's reference code.
PRIVILEGED_TOKENS = 1024


@dataclass(frozen=True)
class Reading:
    """How a pipeline encodes prompts with its Qwen3.

    layers: the hidden states that are concatenated to one token. thinking: whether the template
    leaves thinking enabled. length: the pipeline's limit in tokens. padded: whether prompts are
    padded to that length and the network reads the padding too.
    """

    layers: tuple[int, ...]
    thinking: bool
    padded: bool
    length: int


def templated(tokenizer: PreTrainedTokenizerBase, content: str, thinking: bool) -> str:
    """One user turn and the start of an answer, as the pipelines write it."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )


def with_suffix(prompt: str, suffix: str) -> str:
    """The teacher's prompt: a caption and the text after it."""
    return f"{prompt} {suffix}" if suffix else prompt


def with_image(
    tokenizer: PreTrainedTokenizerBase, prompt: str, count: int, thinking: bool = True
) -> str:
    """One user turn: an image of `count` tokens, then the prompt. The placeholders are written here
    as Qwen3-VL's template writes them, because the text encoder's own template has no images."""
    return templated(tokenizer, image_placeholders(count) + prompt, thinking)


def image_placeholders(count: int) -> str:
    """The text that stands for an image of `count` tokens."""
    return f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"


def count_tokens(
    checkpoint: Checkpoint,
    reading: Reading,
    prompts: Sequence[str],
    suffix: str = "",
    vlm: str = "",
    sizes: Sequence[Size] | None = None,
) -> list[int]:
    """Tokens that QwenTextEncoder returns for each prompt; with sizes, for each prompt with suffix
    and an image of that size. Raises UnfitPrompts over the limit and for marks in a prompt. Reads
    the tokenizer and configs, no weights."""
    with checkpoint.reading("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder / "tokenizer")
    if sizes is None:
        texts = [templated(tokenizer, prompt, reading.thinking) for prompt in prompts]
        limits = [reading.length] * len(texts)
    else:
        vlm_checkpoint = teacher_vlm(vlm)
        refuse_other_size(checkpoint, vlm_checkpoint)
        processor = load_processor(vlm_checkpoint)
        counts = [image_tokens(processor, size) for size in sizes]
        texts = [
            with_image(tokenizer, with_suffix(prompt, suffix), count, reading.thinking)
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        limits = [token_limit(reading, count) for count in counts]
    # verbose=False: a prompt that is too long is refused below, not warned about.
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
    refuse_unfit(tokenizer, prompts, lengths, limits)
    return limits if reading.padded else lengths


def text_width(checkpoint: Checkpoint) -> int:
    """Width of the text encoder's hidden states."""
    with checkpoint.reading("text_encoder"):
        return AutoConfig.from_pretrained(checkpoint.folder / "text_encoder").hidden_size


def token_limit(reading: Reading, image_count: int) -> int:
    """Limit of prompt and image together. A padded prompt keeps the pipeline's length beside the
    image."""
    return reading.length + image_count if reading.padded else PRIVILEGED_TOKENS
