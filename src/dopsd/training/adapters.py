"""LoRA on a denoiser's network, through peft. The only room that knows peft."""

import re
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

ADAPTER = "student"


@dataclass(frozen=True)
class Coverage:
    """What the adapters reach: adapted and all linear layers inside the network's blocks, and their
    weights."""

    adapted: int
    linears: int
    adapted_weights: int
    linear_weights: int
    parameters: int  # of the adapters

    def __str__(self) -> str:
        share = self.adapted_weights / self.linear_weights
        return (
            f"{self.adapted} of {self.linears} block linears ({share:.0%} of their weights), "
            f"{self.parameters / 1e6:.2f} M adapter parameters"
        )


def coverage(network: nn.Module, targets: str, rank: int) -> Coverage:
    """What LoRA of this rank on `targets` (a regular expression over module names) would reach.
    Works on meta tensors too. A block linear is one inside a module list. Raises ValueError when
    the targets match nothing."""
    linears = {
        n: m
        for n, m in network.named_modules()
        if isinstance(m, nn.Linear) and re.search(r"\.\d+\.", n)
    }
    adapted = {name: module for name, module in linears.items() if re.fullmatch(targets, name)}
    if not adapted:
        raise ValueError(
            f"the LoRA targets {targets!r} match no linear layer; try one like {next(iter(linears), '-')}."
        )
    return Coverage(
        adapted=len(adapted),
        linears=len(linears),
        adapted_weights=sum(m.weight.numel() for m in adapted.values()),
        linear_weights=sum(m.weight.numel() for m in linears.values()),
        parameters=sum(rank * (m.in_features + m.out_features) for m in adapted.values()),
    )


def lora_sizes(
    network: nn.Module, targets: str, rank: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Sizes of A and B that LoRA would have on each target. Works on meta tensors too."""
    linears = {
        n: m
        for n, m in network.named_modules()
        if isinstance(m, nn.Linear) and re.fullmatch(targets, n)
    }
    return {name: ((rank, m.in_features), (m.out_features, rank)) for name, m in linears.items()}


def add_lora(
    network: nn.Module, targets: str, rank: int, alpha: float, seed: int
) -> dict[str, nn.Parameter]:
    """Put LoRA on the targets, freeze everything else, and return the trainable parameters by name
    (float32).

    A is drawn from `seed`, B is zero, so the network starts unchanged. Raises ValueError when
    nothing matches.
    """
    coverage(network, targets, rank)
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type] - peft divides by r, and any number will do
            target_modules=targets,
            lora_dropout=0.0,
            bias="none",
        )
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    return trainable


def lora_pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Trainable tensors by name -> (A [r, in], B [out, r]) by the path of the module they adapt."""
    a_mark, b_mark = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"
    return {
        name.removesuffix(a_mark): (tensor, tensors[name.removesuffix(a_mark) + b_mark])
        for name, tensor in tensors.items()
        if name.endswith(a_mark)
    }


def base_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with every B zero: under them the network is the base."""
    return {n: torch.zeros_like(t) if ".lora_B." in n else t.detach() for n, t in tensors.items()}


def unmoved_modules(tensors: dict[str, Tensor]) -> list[str]:
    """The modules whose B is still all zero."""
    return [path for path, (_, b) in lora_pairs(tensors).items() if not b.detach().any()]
