"""LoRA files of FLUX.2: keys that only they have, what loaders make of them, how to read them."""

from collections.abc import Mapping

from diffusers import Flux2KleinPipeline
from torch import Tensor

from dopsd.models.lora_forms import (
    ALPHA,
    AT_STRENGTH_1,
    BAKED,
    BARE,
    IGNORED,
    IN_METADATA,
    KOHYA,
    Loaders,
)

KEY_PATTERN = r"single_transformer_blocks[._]\d|(double|single)_blocks[._]\d"
LOADERS: Loaders = {
    ("transformer.", BAKED): (AT_STRENGTH_1, AT_STRENGTH_1),
    ("transformer.", IN_METADATA): (
        AT_STRENGTH_1,
        "off by alpha / rank: it does not read the metadata",
    ),
    ("transformer.", ALPHA): (
        "off by alpha / rank: it ignores alpha, without a message",
        AT_STRENGTH_1,
    ),
    (BARE, BAKED): (IGNORED, AT_STRENGTH_1),
    ("base_model.model.", BAKED): (AT_STRENGTH_1, "no"),
    (KOHYA, ALPHA): (
        f"{AT_STRENGTH_1}, with the original model's names",
        "only with the original model's names",
    ),
}


def in_own_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `Family.lora_in_own_form`, by diffusers' conversion. That multiplies alpha in for kohya's
    names only, and knows no prefix but its own and `diffusion_model.`."""
    if not any(name.startswith("lora_unet_") for name in tensors):
        tensors = _with_alpha_multiplied_in(tensors)
    converted: Mapping[str, Tensor] = Flux2KleinPipeline.lora_state_dict(dict(tensors))  # type: ignore[assignment]
    return {
        f"transformer.{name.removeprefix('transformer.')}": tensor
        for name, tensor in converted.items()
    }


def _with_alpha_multiplied_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dotted LoRA names as peft writes them, every alpha multiplied into its B."""
    peft_words = {
        ".lora_down.": ".lora_A.",
        ".lora_up.": ".lora_B.",
        "lora.down.": "lora_A.",
        "lora.up.": "lora_B.",
    }
    renamed = {}
    for name, tensor in tensors.items():
        for other, ours in peft_words.items():
            name = name.replace(other, ours)
        renamed[name] = tensor
    for name in [name for name in renamed if name.endswith(".alpha")]:
        module, alpha = name.removesuffix(".alpha"), renamed.pop(name).item()
        rank = len(renamed[f"{module}.lora_A.weight"])
        renamed[f"{module}.lora_B.weight"] = renamed[f"{module}.lora_B.weight"] * (alpha / rank)
    return renamed
