"""Optimizers by their names in a recipe; those of other packages are imported when one is made."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from dopsd.training.quantize import adamw_8bit

Name = Literal["adamw", "adamw_8bit", "adafactor", "lion", "prodigy", "schedule_free_adamw"]

# Of optimizers that are not in torch or in what dopsd needs anyway: package, module and extra.
PACKAGES = {
    "adamw_8bit": ("bitsandbytes", "bitsandbytes", "quantize"),
    "lion": ("lion-pytorch", "lion_pytorch", "optimizers"),
    "prodigy": ("prodigyopt", "prodigyopt", "optimizers"),
    "schedule_free_adamw": ("schedulefree", "schedulefree", "optimizers"),
}
LEAST_PRODIGY_RATE = 0.1  # it multiplies the rate that is estimated; 1 is the authors' value


def refuse_unready(
    name: Name, learning_rate: float, lr_schedule: Literal["constant", "cosine"]
) -> None:
    """Raise ValueError where an optimizer's package is not installed, or it cannot work with these
    settings."""
    if name in PACKAGES and find_spec(PACKAGES[name][1]) is None:
        package, _, extra = PACKAGES[name]
        raise ValueError(
            f"train.optimizer: {name} needs {package}, which is not installed: pip install "
            f"'dopsd[{extra}]'."
        )
    if name == "prodigy" and learning_rate < LEAST_PRODIGY_RATE:
        raise ValueError(
            f"train.learning_rate is {learning_rate:g}, and train.optimizer: prodigy estimates the "
            "rate itself and multiplies it by that: set train.learning_rate: 1."
        )
    if name == "schedule_free_adamw" and lr_schedule != "constant":
        raise ValueError(
            f"train.optimizer: schedule_free_adamw takes the place of a schedule, and "
            f"train.lr_schedule is {lr_schedule}: leave it out."
        )


def make_optimizer(
    name: Name,
    weights: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    foreach: bool | None,
) -> torch.optim.Optimizer:
    """The optimizer over these weights. foreach: whether AdamW runs fused by lists; None: as torch
    decides."""
    if name == "adamw":
        return torch.optim.AdamW(
            weights, lr=learning_rate, weight_decay=weight_decay, foreach=foreach
        )
    if name == "adamw_8bit":
        return adamw_8bit(weights, learning_rate, weight_decay)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        # Without its own schedule and its scaling by the size of a weight, which for a LoRA that
        # starts at zero would be hardly any step.
        return Adafactor(
            weights,
            lr=learning_rate,
            weight_decay=weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    if name == "lion":
        from lion_pytorch import Lion  # pyright: ignore[reportMissingImports]

        return Lion(weights, lr=learning_rate, weight_decay=weight_decay)
    if name == "prodigy":
        from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports]

        # As its authors advise for diffusion models.
        return Prodigy(
            weights,
            lr=learning_rate,
            weight_decay=weight_decay,  # pyright: ignore[reportArgumentType] - its default is 0
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    from schedulefree import AdamWScheduleFree  # pyright: ignore[reportMissingImports]

    return AdamWScheduleFree(weights, lr=learning_rate, weight_decay=weight_decay)


@contextmanager
def stepping(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A block that computes a gradient and steps. For a schedule-free optimizer the weights are
    those that gradients are taken at inside it, and the averaged ones, which are deployed, outside.
    """
    module = sys.modules.get("schedulefree")  # not imported where no such optimizer was made
    if module is None or not isinstance(optimizer, module.AdamWScheduleFree):
        yield
        return
    schedule_free: Any = optimizer
    schedule_free.train()
    try:
        yield
    finally:
        schedule_free.eval()
