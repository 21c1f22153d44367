"""What diffusers makes of a LoRA file, found by loading it there: into a stand-in network that has
only the file's modules, with weights of zero."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from dopsd.files import shorten
from dopsd.models import PIPELINES
from dopsd.models.base import Family
from dopsd.models.hub import quiet_libraries
from dopsd.models.lora_deltas import Delta

EXACT = "strength 1"
NOTHING = "nothing is loaded, without a message"
TOLERANCE = 1e-3  # relative: files may be in half precision


def loaded_by_diffusers(path: Path, family: type[Family], deltas: Mapping[str, Delta]) -> str:
    """`load_lora_weights` of the family's pipeline on this file, in a few words. deltas: what the
    file means (`read_lora`)."""
    network = _network_of(deltas)
    pipeline = _pipeline_of(family, network)
    diffusers_log = logging.getLogger("diffusers")
    level = diffusers_log.level
    try:
        with quiet_libraries():
            diffusers_log.setLevel(logging.CRITICAL)  # it logs what it then raises
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="loaded")
    # Any content: ValueError, KeyError, RuntimeError, ...
    except Exception as error:
        return f"error: {shorten(' '.join(str(error).split()), 100)}"
    finally:
        diffusers_log.setLevel(level)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for module, delta in deltas.items():
        layer = network.get_submodule(module)
        x = torch.randn(delta.size[1], generator=generator)
        ratios.append(_ratio(_output(layer, x), delta.apply(x)))
    return _in_words(ratios)


def _in_words(ratios: list[float | None]) -> str:
    """ratios: strength of each module as loaded; None: another direction."""
    loaded = [ratio for ratio in ratios if ratio != 0]
    if not loaded:
        return NOTHING
    if None in loaded:
        return "loaded as something else"
    of = "" if len(loaded) == len(ratios) else f"{len(loaded)} of {len(ratios)} modules, "
    strengths = sorted({f"{ratio:.3g}" for ratio in loaded})
    if strengths == ["1"]:
        return f"{of}{EXACT}"
    return f"{of}strength {' to '.join(dict.fromkeys((strengths[0], strengths[-1])))} instead of 1"


def _ratio(got: Tensor, wanted: Tensor) -> float | None:
    if not wanted.any():
        return 1.0
    ratio = float(got.double() @ wanted.double() / (wanted.double() @ wanted.double()))
    if (got - ratio * wanted).norm() > TOLERANCE * wanted.norm() * max(1, abs(ratio)):
        return None
    return 1.0 if abs(ratio - 1) < TOLERANCE else ratio


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer makes of x [in], which for a convolution is one patch of its kernel's size."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        if weight.ndim == 4:
            x = x.reshape(weight.shape[1:])
        return layer(x[None]).flatten()


def _network_of(deltas: Mapping[str, Delta]) -> nn.Module:
    network = _StandIn()
    for name, delta in deltas.items():
        *parents, last = name.split(".")
        place: nn.Module = network
        for parent in parents:
            if parent not in dict(place.named_children()):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(last, _zero_layer(last, *delta.size))
    return network


class _ZeroLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], self.out_features)


class _ZeroConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        """For one patch of the kernel's size."""
        return input.new_zeros(len(input), self.out_channels, 1, 1)


def _zero_layer(name: str, rows: int, columns: int) -> nn.Module:
    """A layer of zeros that takes no memory: a convolution where its name says so."""
    with torch.device("meta"):
        if name.startswith("conv"):
            side = 1 if name == "conv_shortcut" else 3
            layer = _ZeroConv2d(columns // side**2, rows, side, bias=False)
        else:
            layer = _ZeroLinear(columns, rows, bias=False)
    zeros = torch.zeros(()).expand(layer.weight.shape)
    layer.weight = nn.Parameter(zeros, requires_grad=False)
    return layer


class _StandIn(nn.Module, PeftAdapterMixin):
    config = FrozenDict(layers_per_block=2)  # of every SDXL


def _pipeline_of(family: type[Family], network: nn.Module) -> Any:
    """The LoRA loader of the family's pipeline around a network, without its other parts."""
    pipeline = next(name for name, its in PIPELINES.items() if its == family.name)
    loader = next(
        base
        for base in getattr(diffusers, pipeline).__mro__
        if base.__name__.endswith("LoraLoaderMixin")
    )
    parts = {"text_encoder": None, "text_encoder_2": None, family.export_prefix: network}
    return type("_Loader", (loader,), {"hf_device_map": None, "components": parts, **parts})()
