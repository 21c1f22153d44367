"""LoRA on a denoiser's network, through peft. The only file that imports peft."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dopsd.training.seeds import adapter_seed

ADAPTER = "student"
Init = Literal["gaussian", "kaiming"]


@dataclass(frozen=True)
class Coverage:
    """What LoRA reaches of the linear layers inside the network's blocks: numbers of layers, of
    their weights, and of the adapters' own parameters."""

    adapted: int
    linears: int
    adapted_weights: int
    linear_weights: int
    parameters: int

    def __str__(self) -> str:
        share = self.adapted_weights / self.linear_weights
        return (
            f"{self.adapted} of {self.linears} block linears ({share:.0%} of their weights), "
            f"{self.parameters / 1e6:.2f} M adapter parameters"
        )


def coverage(network: nn.Module, targets: str, rank: int) -> Coverage:
    """What LoRA of this rank on `targets` (a regular expression for whole module names) reaches.

    A block linear is one inside a module list. Works on meta tensors. Raises ValueError where the
    targets match nothing.
    """
    linears = {
        name: module for name, module in _linears(network).items() if re.search(r"\.\d+\.", name)
    }
    adapted = {name: module for name, module in linears.items() if re.fullmatch(targets, name)}
    if not adapted:
        raise ValueError(
            f"the LoRA targets {targets!r} match no linear layer; try one like "
            f"{next(iter(linears), '-')}."
        )
    return Coverage(
        adapted=len(adapted),
        linears=len(linears),
        adapted_weights=sum(module.weight.numel() for module in adapted.values()),
        linear_weights=sum(module.weight.numel() for module in linears.values()),
        parameters=sum(
            rank * (module.in_features + module.out_features) for module in adapted.values()
        ),
    )


def lora_sizes(
    network: nn.Module, targets: str, rank: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of A and B that LoRA would have on each target, by module name. Works on meta
    tensors."""
    return {
        name: ((rank, module.in_features), (module.out_features, rank))
        for name, module in _linears(network).items()
        if re.fullmatch(targets, name)
    }


def _linears(network: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)
    }


def add_lora(
    network: nn.Module,
    targets: str,
    rank: int,
    alpha: float,
    seed: int,
    init: Init = "gaussian",
) -> dict[str, nn.Parameter]:
    """Put LoRA on the targets and freeze everything else. Returns the trainable parameters by name,
    float32.

    A [rank, in] is drawn from `seed` and B is zero, so the network's output does not change. init:
    of A; gaussian: normal with standard deviation 1 / rank, as in diffusers' scripts and the
    reference codes of D-OPSD and PSO; kaiming: uniform within 1 / sqrt(in), peft's own default.
    Raises ValueError where the targets match nothing.
    """
    coverage(network, targets, rank)
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapter_seed(seed))
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type] - an int in peft's annotation only
            target_modules=targets,
            init_lora_weights="gaussian" if init == "gaussian" else True,
            lora_dropout=0.0,
            bias="none",
        )
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    return trainable


def lora_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [r, in], B [out, r]) by the name of the module they adapt, from tensors by their names in
    the network."""
    a_suffix, b_suffix = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"
    return {
        name.removesuffix(a_suffix): (tensor, tensors[name.removesuffix(a_suffix) + b_suffix])
        for name, tensor in tensors.items()
        if name.endswith(a_suffix)
    }


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with each B zero: with them the network is the base model."""
    return {
        name: torch.zeros_like(tensor) if ".lora_B." in name else tensor.detach()
        for name, tensor in tensors.items()
    }


def unmoved_modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the modules whose B is still all zero."""
    return [name for name, (_, b) in lora_pairs(tensors).items() if not b.detach().any()]
