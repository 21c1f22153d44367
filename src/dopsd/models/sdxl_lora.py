"""LoRA files of SDXL: the keys that only they have, what loaders make of them, how to read and
write them."""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from dopsd.models.lora import Pairs
from dopsd.models.lora_forms import (
    ALPHA,
    AT_STRENGTH_1,
    BAKED,
    BARE,
    IGNORED,
    KOHYA,
    UNKNOWN,
    Loaders,
)

KEY_PATTERN = r"(down_blocks|input_blocks)[._]\d"
LOADERS: Loaders = {
    (KOHYA, ALPHA): (AT_STRENGTH_1, AT_STRENGTH_1),
    ("unet.", BAKED): (AT_STRENGTH_1, UNKNOWN),
    ("unet.", ALPHA): ("error", UNKNOWN),
    ("diffusion_model.", BAKED): (IGNORED, UNKNOWN),
    ("base_model.model.", BAKED): (IGNORED, UNKNOWN),
    (BARE, BAKED): (IGNORED, UNKNOWN),
}
DOWN_AND_UP = (("lora_down", "lora_up"), ("lora_A", "lora_B"))


def in_own_form(tensors: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    """As `Family.lora_in_own_form`, by diffusers' conversion: kohya's names, of the original
    model's modules or of diffusers', and diffusers' own old and new ones. Alphas are multiplied in
    before, because the conversion only passes them on."""
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    for name in [name for name in bare if name.endswith(".alpha")]:
        module, alpha = name.removesuffix("alpha"), bare.pop(name).item()
        down, up = next(pair for pair in DOWN_AND_UP if f"{module}{pair[0]}.weight" in bare)
        rank = len(bare[f"{module}{down}.weight"])
        bare[f"{module}{up}.weight"] = bare[f"{module}{up}.weight"] * (alpha / rank)
    unet_config = SimpleNamespace(layers_per_block=layers_per_block)
    named = StableDiffusionXLLoraLoaderMixin.lora_state_dict(bare, unet_config=unet_config)[0]
    if others := [name for name in named if name.startswith("text_encoder")]:
        raise ValueError(f"it also adapts text encoders ({others[0]}), which is not supported")
    return {
        f"unet.{name.removeprefix('unet.')}": tensor
        for name, tensor in convert_unet_state_dict_to_peft(named).items()
    }


def in_public_form(pairs: Pairs) -> dict[str, Tensor]:
    """kohya's names of diffusers' modules, with alpha = rank: the form that SDXL's interfaces
    read."""
    tensors = {}
    for module, (a, b) in pairs.items():
        path = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{path}.lora_down.weight": a, f"{path}.lora_up.weight": b}
        tensors[f"{path}.alpha"] = torch.tensor(float(len(a)))
    return tensors
