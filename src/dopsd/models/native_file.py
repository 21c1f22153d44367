"""A network as one safetensors file under the original model's names, as ComfyUI's "Load Diffusion
Model" opens it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dopsd.files import read_tensors, shorten, write_tensors
from dopsd.models import load_family
from dopsd.models.base import Family
from dopsd.models.folder import is_model, network_dtype, tuning_metadata
from dopsd.models.lora import model_for, read_lora
from dopsd.models.lora_names import ModuleNames
from dopsd.models.lora_source import as_loras
from dopsd.models.pipeline import ImagePipeline

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


def native_tensors(tensors: Mapping[str, Tensor], names: ModuleNames) -> dict[str, Tensor]:
    """A network's parameters by diffusers' names as those of the original model, fused where they
    are fused there. Raises ValueError for a module that the table does not have."""
    modules: dict[str, dict[str, Tensor]] = {}
    native = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module:
            modules.setdefault(module, {})[leaf] = tensor
        else:
            native[name] = tensor
    try:
        rows = names.native_rows(modules)
    except KeyError as error:
        raise ValueError(f"the module {shorten(error.args[0])} has no native name.") from error
    for module, parts in rows.items():
        for leaf in modules[parts[0]]:
            whole = torch.cat([modules[part][leaf] for part in parts])
            if names.swapped(parts[0]):
                whole = whole.roll(len(whole) // 2, dims=0)
            last = names.weights.get(module.rpartition(".")[2], leaf) if leaf == "weight" else leaf
            native[f"{module}.{last}"] = whole
    return native


def in_scaled_fp8(tensors: Mapping[str, Tensor], quantized: set[str]) -> dict[str, Tensor]:
    """Weights of the named modules as float8 with one scale each, in ComfyUI's layout: `weight` is
    multiplied by `scale_weight`. The mark `scaled_fp8` of two elements asks for products in full
    precision."""
    written = {"scaled_fp8": torch.zeros(2, dtype=FP8)}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module not in quantized or module == name:
            written[name] = tensor
            continue
        scale = (tensor.float().abs().amax() / FP8_MAX).clamp(min=1e-12)
        written[name] = (tensor.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        written[f"{module}.scale_weight"] = scale
    return written


def quantizable_modules(family: Family, modules: Mapping[str, Tensor]) -> set[str]:
    """Native names of the modules whose weights may be in 8 bits (`Family.quantizable`)."""
    names = {name.rpartition(".")[0] for name in modules}
    wanted = [name for name in names if re.fullmatch(family.quantizable, name)]
    return set(family.module_names.native_rows(wanted))


def export_single_file(
    source: Path | Sequence[str],
    path: Path,
    name_or_path: str | None = None,
    strength: float = 1.0,
    distilled_by: str | None = None,
    fp8: bool = False,
) -> None:
    """Write the network of a model folder, or of a model with LoRAs added, as one file in the
    checkpoint's own dtype, reopen it and compare.

    source: a diffusers folder, or LoRAs as `sample` takes them. name_or_path, strength,
    distilled_by: of LoRAs. fp8: the layers that may be quantized as scaled float8. Raises
    ValueError where the file exists or does not hold the network.
    """
    if path.exists():
        raise ValueError(f"{path} exists and is not overwritten: choose another with --out.")
    if isinstance(source, Path) and is_model(source):
        family = load_family(str(source))
        part = family.checkpoint.part(family.export_prefix)
        tensors = {
            name: tensor
            for file in sorted(part.glob("*.safetensors"))
            for name, tensor in read_tensors(file).items()
        }
        about = tuning_metadata(source)
    else:
        loras = as_loras(source, strength)
        model = model_for(loras, name_or_path, distilled_by)
        family = load_family(model.name_or_path, distilled_by=model.distilled_by)
        for lora in loras:
            read_lora(lora.path, family)  # refused before gigabytes are loaded
        pipeline = ImagePipeline(family, network_dtype(family))
        tensors, about = pipeline.load_denoiser(loras).network.state_dict(), {}
    native = native_tensors(tensors, family.module_names)
    if fp8:
        native = in_scaled_fp8(native, quantizable_modules(family, tensors))
    spec = {"modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": family.architecture}
    write_tensors(path, native, {"format": "pt", **spec, **about})
    _refuse_other_tensors(path, native)


def _refuse_other_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a safetensors file does not hold exactly these tensors. Reads one
    tensor at a time."""
    with safe_open(path, framework="pt") as file:
        if missing := tensors.keys() ^ set(file.keys()):
            raise ValueError(
                f"{path} was written with other names ({min(missing)}): do not use it."
            )
        for name, tensor in tensors.items():
            saved = file.get_tensor(name)
            if saved.dtype != tensor.dtype or not torch.equal(
                saved.view(torch.uint8), tensor.detach().cpu().contiguous().view(torch.uint8)
            ):
                raise ValueError(f"{path}: {name} reads back changed: do not use this file.")
