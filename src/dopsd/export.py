"""The student's adapter as a LoRA file that opens elsewhere, and back.

Keys are `<prefix>.<diffusers module path>.lora_A.weight` / `.lora_B.weight` with the scale baked into B and no alpha:
the one form that diffusers and ComfyUI both read at strength 1 for what the previews showed.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dopsd.files import read_tensors, write_tensors
from dopsd.training.adapters import lora_pairs


def export_lora(
    path: Path, student: Mapping[str, Tensor], scale: float, prefix: str, metadata: Mapping[str, str]
) -> None:
    """Write the adapter, reopen the file, and compare every module's delta with the live one.

    scale: alpha / rank. Raises ValueError when the file does not hold what was trained.
    """
    pairs = lora_pairs(dict(student))
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{prefix}.{module}.lora_A.weight"] = a.detach().float()
        tensors[f"{prefix}.{module}.lora_B.weight"] = b.detach().float() * scale
    write_tensors(path, tensors, {"format": "pt", **metadata})
    saved = read_lora(path, prefix)
    for module, (a, b) in pairs.items():
        delta = (b.detach().cpu().double() @ a.detach().cpu().double()) * scale
        again = saved[module][1].double() @ saved[module][0].double()
        if not torch.allclose(again, delta, rtol=1e-5, atol=1e-8):
            raise ValueError(f"{path}: {module} does not read back as trained; the file is not to be trusted.")


def read_lora(path: Path, prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA file's (A [r, in], B [out, r]) by module path. Raises ValueError for a file in another form."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; dopsd reads no other form of weights.")
    tensors = read_tensors(path)
    pairs = {}
    for name in list(tensors):
        partner = name.replace(".lora_A.weight", ".lora_B.weight")
        if name.startswith(f"{prefix}.") and name != partner and partner in tensors:
            module = name.removeprefix(f"{prefix}.").removesuffix(".lora_A.weight")
            pairs[module] = (tensors.pop(name), tensors.pop(partner))
    if tensors or not pairs:
        example = next(iter(tensors), "nothing")
        raise ValueError(f"{path} is no LoRA of the form {prefix}.<module>.lora_A/B.weight (found {example}).")
    return pairs


@torch.no_grad()
def merge_lora(network: nn.Module, path: Path, prefix: str, strength: float = 1.0) -> None:
    """Add a LoRA file's deltas to the network's weights. Raises ValueError when a module or shape does not fit."""
    for module, (a, b) in read_lora(path, prefix).items():
        try:
            weight = network.get_parameter(f"{module}.weight")
        except AttributeError as error:
            raise ValueError(f"{path} adapts {module}, which this model does not have: another family?") from error
        if weight.shape != (len(b), a.shape[1]):
            raise ValueError(f"{path} adapts {module} as {len(b)} x {a.shape[1]}; here it is {tuple(weight.shape)}.")
        delta = b.double() @ a.double() * strength
        weight.copy_((weight.double().cpu() + delta).to(weight))
