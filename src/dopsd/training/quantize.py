"""Frozen linear layers in 4 or 8 bits, and AdamW's moments in 8, through bitsandbytes. The only
room that knows it."""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Denoiser

Kind = Literal["nf4", "int8"]
BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # a weight; nf4 keeps a float32 scale for each 64


@torch.no_grad()
def quantize(
    denoiser: Denoiser,
    targets: str,
    kind: Kind,
    device: torch.device,
    context: Context,
    channels: int,
    now: Tensor,
) -> float:
    """Put the linears whose names match `targets` in `kind`, in place, and move the denoiser to the
    device. Returns how far that moves its velocity on a small canvas of noise at the time now [1]:
    |after - before| / |before|.

    The denoiser comes on the CPU, so that the device never holds it whole. Raises ValueError
    without bitsandbytes.
    """
    z = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    before = denoiser(z, now, context.to("cpu"))
    network = denoiser.network
    dtype = next(network.parameters()).dtype
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and re.fullmatch(targets, name):
            network.set_submodule(name, _in_few_bits(module, kind, dtype))
    setattr(
        network, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True
    )  # how peft knows
    denoiser.to(device)
    after = denoiser(z.to(device), now.to(device), context.to(device)).cpu()
    return ((after - before).norm() / before.norm()).item()


def adamw_8bit(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW whose moments take a byte each (tensors under 4096 numbers keep float32)."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(list(parameters), lr=lr, weight_decay=weight_decay)


def saved_bytes(network: nn.Module, targets: str, kind: Kind) -> int:
    """What `quantize` would take off the network's weights. Works on meta tensors too."""
    weights = [
        m.weight
        for n, m in network.named_modules()
        if isinstance(m, nn.Linear) and re.fullmatch(targets, n)
    ]
    return int(sum(weight.numel() * (weight.element_size() - BYTES[kind]) for weight in weights))


def _in_few_bits(linear: nn.Linear, kind: Kind, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    bnb: Any = bitsandbytes  # its constructors are not typed

    has_bias = linear.bias is not None
    if kind == "nf4":
        small = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, has_bias, compute_dtype=dtype, quant_type="nf4"
        )
        small.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        small = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, has_bias, has_fp16_weights=False
        )
        small.weight = bnb.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        )
    if has_bias:
        small.bias = linear.bias
    return small
