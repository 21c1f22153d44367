"""Offload: the frozen weights of the network's blocks stay in main memory; each block gets a copy
on the device while it runs.

A block is an instance of the classes in a network's `_repeated_blocks`, which diffusers compiles
and checkpoints as units. With gradient checkpointing a block runs again right before its backward,
with a new copy, and autograd releases the copy when that block is done. Without checkpointing all
copies would stay in memory until the end of the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def offload_blocks(network: nn.Module, device: torch.device) -> int:
    """Make every block copy its frozen weights to the device when it runs, and move everything else
    there. Returns the bytes that stay in main memory."""
    offloaded: dict[int, Tensor] = {}
    class_names: list[str] = network._repeated_blocks  # type: ignore[assignment] - diffusers' own
    for block in [module for module in network.modules() if type(module).__name__ in class_names]:
        offloaded |= {id(p): p for p in _copy_when_called(block, device).values()}
    for tensor in (*network.parameters(), *network.buffers()):
        if id(tensor) not in offloaded:
            tensor.data = tensor.data.to(device)
    return sum(tensor.nbytes for tensor in offloaded.values())


class _Call(nn.Module):
    """A block with its original forward as a module, for `functional_call`."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.block_forward = block, block.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block_forward(*args, **kwargs)


def _copy_when_called(block: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Replace the block's forward. Returns its frozen parameters by name."""
    frozen = {name: p for name, p in block.named_parameters() if not p.requires_grad}
    if device.type == "cuda":
        for parameter in frozen.values():
            parameter.data = parameter.data.pin_memory()  # else copies would block the host
    call = _Call(block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        copies = {
            f"block.{name}": p.to(device, copy=True, non_blocking=True)
            for name, p in frozen.items()
        }
        return functional_call(call, copies, args, kwargs)

    block.forward = forward
    return frozen
