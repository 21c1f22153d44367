"""A complete model as a diffusers folder: a tuned network with the other parts of its checkpoint.

`dopsd.json` in it records how it was tuned, as a LoRA file's metadata does; software that opens the
folder needs no dopsd.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from dopsd.files import atomic_path, read_tensors, write_json
from dopsd.models import load_family
from dopsd.models.base import Family
from dopsd.models.lora import model_for, read_lora
from dopsd.models.pipeline import ImagePipeline

ABOUT, TUNED = "dopsd.json", "tuned"


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
        shutil.copytree(
            source, temporary, ignore=shutil.ignore_patterns(family.export_prefix, ".*")
        )
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
            # The original checkpoint's model card does not describe the tuned model.
            (temporary / "README.md").unlink(missing_ok=True)
            write_json(temporary / ABOUT, _about(temporary) | {TUNED: dict(tuned)})
        load_family(str(temporary))
        _refuse_other_tensors(part, network)


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
    lora: Path,
    folder: Path,
    strength: float = 1.0,
    distilled_by: str | None = None,
) -> None:
    """Write the model as a diffusers folder with the LoRA added to its weights; opening it needs no
    LoRA file.

    name_or_path: None: the model in the LoRA file's metadata (`model_for`). Raises ValueError
    where the folder exists, or for a LoRA that does not fit.
    """
    if folder.exists():
        raise ValueError(
            f"{folder} exists and is not overwritten: choose another folder with --out."
        )
    model = model_for(lora, name_or_path, distilled_by)
    family = load_family(model.name_or_path, distilled_by=model.distilled_by)
    read_lora(lora, family)  # refused before gigabytes are loaded
    network = ImagePipeline(family).load_denoiser(lora, strength).network
    write_model(folder, network, family)
