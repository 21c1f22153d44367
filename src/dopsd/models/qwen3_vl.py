"""Qwen3-VL: loading, its image processor, and language weights replaced by a text encoder's.

Images go through the processor that needs only Pillow: no torchvision.
"""

from typing import TypeVar

import torch
from transformers import AutoConfig, PreTrainedModel, Qwen2VLImageProcessorPil, Qwen3VLModel

from dopsd.models.hub import Checkpoint

# Keys of the configs of Qwen3 and Qwen3-VL that give the language weights their shapes.
LANGUAGE_SHAPE_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
ADVICE = (
    "Set model.vlm to the Qwen3-VL of the same size, or use a method without a teacher that sees "
    "images."
)
# Of one image at most: 768 x 768 pixels at Qwen3-VL's patch size, as the reference code.
MAX_IMAGE_TOKENS = 576

Model = TypeVar("Model", bound=PreTrainedModel)


def teacher_vlm(name: str) -> Checkpoint:
    """The checkpoint of the VLM through which the teacher sees images."""
    return Checkpoint(name, called=f"the teacher's VLM {name}")


def load_vlm(
    kind: type[Model], checkpoint: Checkpoint, dtype: torch.dtype, theta: float | None = None
) -> Model:
    """A Qwen3-VL as one of transformers' classes, frozen, on the CPU.

    theta: base of the language model's rotary positions, where its weights are to be replaced by
    some trained with another (Qwen3 1e6, Qwen3-VL 5e6). Raises ValueError where there is no such
    model.
    """
    part = checkpoint.part()
    with checkpoint.reading("the model"):
        config = AutoConfig.from_pretrained(part)
        if theta is not None:
            config.text_config.rope_parameters["rope_theta"] = theta
        return kind.from_pretrained(part, config=config, dtype=dtype).eval().requires_grad_(False)


def load_processor(checkpoint: Checkpoint) -> Qwen2VLImageProcessorPil:
    """The VLM's own image processor, its largest image limited to MAX_IMAGE_TOKENS."""
    with checkpoint.reading("preprocessor_config.json"):
        processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint.folder)
        most = MAX_IMAGE_TOKENS * (processor.patch_size * processor.merge_size) ** 2
        size = {edge: min(processor.size[edge], most) for edge in ("shortest_edge", "longest_edge")}
        return Qwen2VLImageProcessorPil.from_pretrained(checkpoint.folder, size=size)


def image_tokens(processor: Qwen2VLImageProcessorPil, size: tuple[int, int]) -> int:
    """Tokens of an image of (width, height) pixels."""
    width, height = size
    return processor.get_number_of_image_patches(height, width) // processor.merge_size**2


def refuse_other_size(checkpoint: Checkpoint, vlm: Checkpoint) -> None:
    """Raise ValueError where the configs already show that the VLM's language weights cannot be
    replaced by the text encoder's; `transplant` compares the weights themselves."""
    with checkpoint.reading("text_encoder"):
        text = AutoConfig.from_pretrained(checkpoint.folder / "text_encoder").to_dict()
    with vlm.reading("config.json"):
        config = AutoConfig.from_pretrained(vlm.folder).to_dict()
    if config["model_type"] != "qwen3_vl":
        raise ValueError(f"{vlm.name} is a {config['model_type']}, not a Qwen3-VL. {ADVICE}")
    language = config["text_config"]
    if differing := [
        f"{key} {language[key]}, not {text[key]}"
        for key in LANGUAGE_SHAPE_KEYS
        if language[key] != text[key]
    ]:
        raise ValueError(
            f"{vlm.name} does not match the checkpoint's text encoder: {', '.join(differing)}. "
            f"{ADVICE}"
        )


def transplant(encoder: torch.nn.Module, vlm: Qwen3VLModel, name: str) -> None:
    """Replace the VLM's language weights by the text encoder's; the two then share tensors.

    Raises ValueError, naming the first keys that differ in name or shape: the denoiser was trained
    on the text encoder's states, and a teacher with other language weights would produce states
    that it cannot read.
    """
    own, language = encoder.state_dict(), vlm.language_model.state_dict()
    differing = [
        f"{key} ({'missing' if key not in source else 'shape'})"
        for key in sorted(own.keys() | language.keys())
        for source in (own if key not in own else language,)
        if key not in source or own[key].shape != language[key].shape
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(
            f"the VLM {name} does not match the checkpoint's text encoder in "
            f"{', '.join(differing[:5])}{more}. {ADVICE}"
        )
    vlm.language_model.load_state_dict(own, assign=True)
