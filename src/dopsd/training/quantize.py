"""Frozen linear layers in 4 or 8 bits, and AdamW with 8-bit moments, through bitsandbytes. The only
file that imports it."""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Denoiser

Kind = Literal["nf4", "int8"]
# Bytes of a weight; nf4 has a float32 scale for each 64 weights
BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}


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
    """Quantize the linears whose names match `targets`, in place, and move the denoiser to the
    device.

    Returns how far that moves its velocity, |after - before| / |before|, on noise of 16 x 16 latent
    cells at time `now` [1] with `context` (one row). The denoiser comes on the CPU, so that the
    device never holds the unquantized weights.
    """
    z = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    before = denoiser(z, now, context.to("cpu"))
    network = denoiser.network
    dtype = next(network.parameters()).dtype
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and re.fullmatch(targets, name):
            network.set_submodule(name, _quantized(module, kind, dtype))
    # peft chooses its layers by these attributes
    setattr(network, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    denoiser.to(device)
    after = denoiser(z.to(device), now.to(device), context.to(device)).cpu()
    return ((after - before).norm() / before.norm()).item()


def adamw_8bit(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW with moments of one byte each; tensors of fewer than 4096 elements keep float32."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(list(parameters), lr=lr, weight_decay=weight_decay)


def saved_bytes(network: nn.Module, targets: str, kind: Kind) -> int:
    """Bytes that `quantize` saves of the network's weights. Works on meta tensors."""
    weights = [
        m.weight
        for n, m in network.named_modules()
        if isinstance(m, nn.Linear) and re.fullmatch(targets, n)
    ]
    return int(sum(weight.numel() * (weight.element_size() - BYTES[kind]) for weight in weights))


def _quantized(linear: nn.Linear, kind: Kind, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    bnb: Any = bitsandbytes  # its constructors are not typed
    has_bias = linear.bias is not None
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, has_bias, compute_dtype=dtype, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, has_bias, has_fp16_weights=False
        )
        layer.weight = bnb.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        )
    if has_bias:
        layer.bias = linear.bias
    return layer
