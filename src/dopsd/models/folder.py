"""A complete model as a diffusers folder: a tuned network with the other parts of its checkpoint.

`dopsd.json` in it records how it was tuned, as a LoRA file's metadata does; software that opens the
folder needs no dopsd.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dopsd.files import atomic_path, read_tensors, write_json
from dopsd.models import load_family, model_index
from dopsd.models.base import Family
from dopsd.models.lora import model_for, read_lora
from dopsd.models.lora_source import Loras, as_loras
from dopsd.models.pipeline import ImagePipeline

ABOUT, TUNED = "dopsd.json", "tuned"
# What is copied of a checkpoint's folder: at its root, and of its parts.
ROOT_FILES = ("model_index.json", ABOUT, "LICENSE*")
PART_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors")


def write_model(
    folder: Path, network: nn.Module, family: Family, tuned: Mapping[str, str] | None = None
) -> None:
    """Write the checkpoint with this network in place of its own, reopen the folder and compare
    every tensor with the one in memory.

    tuned: metadata of the tuning. The folder is replaced atomically. Raises ValueError where the
    written network is not the one in memory.
    """
    with atomic_path(folder) as temporary:
        source = family.checkpoint.whole()
        shutil.copytree(source, temporary, ignore=_left_out(source, family))
        part = temporary / family.export_prefix
        try:
            network.save_pretrained(part)  # type: ignore[operator] - every diffusers model
        except SafetensorError as error:  # raised where no space is left
            raise OSError(str(error)) from error
        # A part that exists only in half precision gets the plain name, which every loader finds.
        for file in temporary.glob("*/*.fp16.safetensors"):
            plain = file.with_name(file.name.replace(".fp16.", "."))
            if not plain.exists():
                file.rename(plain)
        family.settle(temporary)
        if tuned is not None:
            write_json(temporary / ABOUT, _about(temporary) | {TUNED: dict(tuned)})
        load_family(str(temporary))
        _refuse_other_tensors(part, network)


def _left_out(source: Path, family: Family) -> Callable[[str, list[str]], list[str]]:
    """What of a checkpoint's folder a pipeline does not read, for `copytree`: the network, which is
    replaced; single-file checkpoints and the model card at its root, which are of the untuned
    model; files of other kinds than configs and weights."""
    parts = (model_index(family.checkpoint).keys() | {"vlm"}) - {family.export_prefix}

    def ignored(folder: str, names: list[str]) -> list[str]:
        if Path(folder) != source:
            return [name for name in names if not any(map(PurePath(name).match, PART_FILES))]
        kept = {name for name in names if any(map(PurePath(name).match, ROOT_FILES))}
        return [name for name in names if name not in kept | parts]

    return ignored


def network_dtype(family: Family) -> torch.dtype:
    """The dtype in which a checkpoint's network is stored."""
    part = family.checkpoint.part(family.export_prefix)
    return _stored_dtype(next(iter(sorted(part.glob("*.safetensors")))))


def _stored_dtype(path: Path) -> torch.dtype:
    """The dtype of most tensors of a safetensors file, by its header. Raises ValueError for a file
    that is not readable, or of another kind of number."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    kinds["BF16"] = torch.bfloat16
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            counts = Counter(file.get_slice(name).get_dtype() for name in names)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}).") from error
    kind = counts.most_common(1)[0][0] if counts else "none"
    if kind not in kinds:
        raise ValueError(f"{path} holds {kind}: weights are expected in floating point.")
    return kinds[kind]


def is_model(path: Path) -> bool:
    """Whether a path is a diffusers folder."""
    return (path / "model_index.json").is_file()


def tuning_metadata(folder: Path) -> dict[str, str]:
    """The metadata of a model folder's tuning; empty where dopsd did not tune it."""
    tuned = _about(folder).get(TUNED, {})
    if not isinstance(tuned, dict):
        raise ValueError(f"{folder / ABOUT} is damaged: `{TUNED}` is not a mapping.")
    return {str(key): str(value) for key, value in tuned.items()}


def _about(folder: Path) -> dict:
    file = folder / ABOUT
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).items()) if file.is_file() else {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}).") from error


def _refuse_other_tensors(part: Path, network: nn.Module) -> None:
    live = network.state_dict()
    for file in sorted(part.glob("*.safetensors")):
        for name, tensor in read_tensors(file).items():
            if name not in live or not torch.equal(tensor, live.pop(name).cpu()):
                raise ValueError(
                    f"{file}: {name} reads back with other values than were written; "
                    "do not use the folder."
                )
    if live:
        raise ValueError(f"{part} lacks {next(iter(live))}; do not use the folder.")


def fuse(
    name_or_path: str | None,
    lora: Loras,
    folder: Path,
    strength: float = 1.0,
    distilled_by: str | None = None,
) -> None:
    """Write the model as a diffusers folder with LoRAs added to its weights; opening it needs no
    LoRA file.

    name_or_path: None: the model in the LoRA file's metadata (`model_for`). lora: one or several,
    as `sample` takes them. Raises ValueError
    where the folder exists, or for a LoRA that does not fit.
    """
    if folder.exists():
        raise ValueError(
            f"{folder} exists and is not overwritten: choose another folder with --out."
        )
    loras = as_loras(lora, strength)
    model = model_for(loras, name_or_path, distilled_by)
    family = load_family(model.name_or_path, distilled_by=model.distilled_by)
    for each in loras:
        read_lora(each.path, family)  # refused before gigabytes are loaded
    # In the checkpoint's own dtype: the sum is rounded to it once, on any device.
    network = ImagePipeline(family, network_dtype(family)).load_denoiser(loras).network
    write_model(folder, network, family)
