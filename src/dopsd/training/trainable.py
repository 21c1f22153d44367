"""What trains: LoRA, or every weight of the network, with the frozen tensors that make the network
the base model.

Weights are float32 whatever the network computes in. Under full fine-tuning of a bf16 network they
are masters beside it: an update below a 512th of a bf16 weight would be rounded away, in its master
it adds up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dopsd.training.adapters import add_lora, base_tensors


@dataclass(frozen=True)
class Student:
    """weights: what trains, float32, by name in the network; optimizer, checkpoint and teacher see
    these. base: tensors under which the network is the base model. publish: to be called when
    weights have changed, so that the network computes with them."""

    weights: dict[str, nn.Parameter]
    base: Mapping[str, Tensor]
    publish: Callable[[], None]


@dataclass(frozen=True)
class AllWeights:
    """What full fine-tuning reaches."""

    parameters: int

    def __str__(self) -> str:
        return f"every weight of the network, {self.parameters / 1e6:.2f} M"


def lora_student(network: nn.Module, targets: str, rank: int, alpha: float, seed: int) -> Student:
    """LoRA on the targets, see `add_lora`."""
    weights = add_lora(network, targets, rank, alpha, seed)
    return Student(weights, base_tensors(dict(weights)), publish=lambda: None)


def full_student(network: nn.Module, home: torch.device) -> Student:
    """Every parameter of the network trains; a frozen copy of them stays at `home`.

    A float32 parameter is its own master. Of any other the master is a copy, to which its gradient
    moves as soon as backward has it, so that pieces and micro-batches add up in float32 too.
    """
    network.requires_grad_(True)
    working = dict(network.named_parameters())
    base = {name: parameter.detach().to(home, copy=True) for name, parameter in working.items()}
    weights = {name: _master_of(parameter) for name, parameter in working.items()}

    @torch.no_grad()
    def publish() -> None:
        for name, parameter in working.items():
            if parameter is not weights[name]:
                parameter.copy_(weights[name])

    return Student(weights, base, publish)


def _master_of(working: nn.Parameter) -> nn.Parameter:
    if working.dtype == torch.float32:
        return working
    master = nn.Parameter(working.detach().float())
    working.register_post_accumulate_grad_hook(partial(_hand_over, master))
    return master


def _hand_over(master: nn.Parameter, working: Tensor) -> None:
    assert working.grad is not None
    gradient = working.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    working.grad = None
