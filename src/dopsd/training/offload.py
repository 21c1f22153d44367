"""Frozen weights of the blocks stay in main memory; each block is lent a copy on the device while
it works.

A block is what diffusers compiles and checkpoints as one: an instance of the classes in a network's
`_repeated_blocks`. With gradient checkpointing a block is run again before its backward pass, which
lends the weights again; autograd lets go of them when that block is done. Without it, all copies
would stay alive until the end of the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def offload_blocks(network: nn.Module, device: torch.device) -> int:
    """Keep what is frozen in the blocks where it is, put everything else on the device, and let
    every block borrow. Returns the bytes that stay away from the device."""
    away: dict[int, Tensor] = {}
    names: list[str] = network._repeated_blocks  # type: ignore[assignment] - of every diffusers transformer and UNet
    for block in [module for module in network.modules() if type(module).__name__ in names]:
        away |= {id(p): p for p in _borrow(block, device).values()}
    for tensor in (*network.parameters(), *network.buffers()):
        if id(tensor) not in away:
            tensor.data = tensor.data.to(device)
    return sum(tensor.nbytes for tensor in away.values())


class _Call(nn.Module):
    """A block's own forward as a module that `functional_call` can lend tensors to."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.work = block, block.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.work(*args, **kwargs)


def _borrow(block: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    frozen = {name: p for name, p in block.named_parameters() if not p.requires_grad}
    if device.type == "cuda":
        for parameter in frozen.values():
            parameter.data = parameter.data.pin_memory()  # so that copies do not wait
    call = _Call(block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        lent = {
            f"block.{name}": p.to(device, copy=True, non_blocking=True)
            for name, p in frozen.items()
        }
        return functional_call(call, lent, args, kwargs)

    block.forward = forward
    return frozen
