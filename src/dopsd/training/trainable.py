"""What trains: LoRA, or every weight of the network; with the frozen tensors of the base model.

Trained weights are float32 whatever the network computes in. Under full fine-tuning of a bf16
network they are master copies: an update below 1/512 of a bf16 weight would be rounded away there,
and adds up in the master copy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dopsd.training.adapters import Init, add_lora, base_tensors


@dataclass(frozen=True)
class Student:
    """The model that trains.

    weights: float32 parameters by name in the network, for optimizer, checkpoint and teacher. base:
    tensors with which the network is the base model. publish: copies the weights to the network
    where those are master copies; to be called after each update.
    """

    weights: dict[str, nn.Parameter]
    base: Mapping[str, Tensor]
    publish: Callable[[], None]


@dataclass(frozen=True)
class AllWeights:
    """Coverage of full fine-tuning: its number of parameters."""

    parameters: int

    def __str__(self) -> str:
        return f"every weight of the network, {self.parameters / 1e6:.2f} M"


def lora_student(
    network: nn.Module, targets: str, rank: int, alpha: float, seed: int, init: Init = "gaussian"
) -> Student:
    """LoRA on the targets; see `add_lora`."""
    weights = add_lora(network, targets, rank, alpha, seed, init)
    return Student(weights, base_tensors(weights), publish=lambda: None)


def full_student(network: nn.Module, base_device: torch.device) -> Student:
    """Every parameter of the network trains. A frozen copy of them stays on `base_device`.

    A float32 parameter is trained itself. Any other has a float32 master copy, to which its
    gradient moves as soon as backward has computed it, so that pieces and micro-batches add up in
    float32.
    """
    network.requires_grad_(True)
    working = dict(network.named_parameters())
    base = {name: p.detach().to(base_device, copy=True) for name, p in working.items()}
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
    working.register_post_accumulate_grad_hook(partial(_move_gradient, master))
    return master


def _move_gradient(master: nn.Parameter, working: Tensor) -> None:
    assert working.grad is not None
    gradient = working.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    working.grad = None
