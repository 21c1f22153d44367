"""Where a LoRA is: a file, a folder as PEFT or diffusers writes it, a repository on the hub; with a
strength each where several are used at once."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dopsd.models.hub import adapter_on_hub, is_hub_file, is_hub_id, weights_file
from dopsd.models.lora_scale import CONFIG_NAME, WEIGHTS_NAME

# Names that a folder's LoRA has, those of PEFT and of diffusers, the first one wins.
USUAL_NAMES = (WEIGHTS_NAME, "pytorch_lora_weights.safetensors")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA and the strength it is added with; 1 is as trained."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return str(self.path) if self.strength == 1 else f"{self.path}@{self.strength:g}"


def parse_lora(text: str | Path) -> LoraFile:
    """A LoRA as PATH, or PATH@STRENGTH. Raises ValueError for a strength that is not finite."""
    match = re.fullmatch(r"(.+)@([-+.\w]+)", str(text))
    if not match or Path(text).exists():
        return LoraFile(Path(text))
    try:
        strength = float(match[2])
    except ValueError as error:
        raise ValueError(
            f"{text}: {match[2]} is no strength; write FILE@STRENGTH, such as {match[1]}@0.8."
        ) from error
    refuse_strength(strength)
    return LoraFile(Path(match[1]), strength)


# One LoRA or several, as a caller may give them.
Loras = str | Path | LoraFile | Sequence[str | Path | LoraFile] | None


def as_loras(lora: Loras, strength: float = 1.0) -> tuple[LoraFile, ...]:
    """LoRAs with `strength` multiplied into that of each. Raises ValueError for a strength that is
    not finite, or a file that is given twice."""
    refuse_strength(strength)
    several: Iterable[str | Path | LoraFile]
    several = (lora,) if isinstance(lora, str | Path | LoraFile) else lora or ()
    loras = [each if isinstance(each, LoraFile) else parse_lora(each) for each in several]
    paths = [each.path for each in loras]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"{twice[0]} is given twice: give it once, with the sum of the strengths.")
    return tuple(LoraFile(each.path, each.strength * strength) for each in loras)


def parse_sum(text: str | Path) -> tuple[LoraFile, ...]:
    """LoRAs that are used together, as PATH@STRENGTH+PATH@STRENGTH."""
    whole = str(text)
    return as_loras([whole] if Path(whole).exists() else whole.split("+"))


def is_lora(text: Path) -> bool:
    """Whether a path, or several as `parse_sum` takes them, has the form of a LoRA: not that of a
    recipe or a model folder."""
    path = parse_sum(text)[0].path
    return path.suffix == ".safetensors" or (path / CONFIG_NAME).is_file()


def refuse_strength(strength: float) -> None:
    """Raise ValueError for a strength that is not finite."""
    if not math.isfinite(strength):
        raise ValueError(f"the strength is {strength}; it must be a finite number (1: as trained).")


def find_lora(path: Path) -> Path:
    """The safetensors file of a LoRA that is given as a file, a folder, owner/name or
    owner/name/file on the hub. Raises ValueError where there is none, or more than one."""
    if path.is_dir():
        return _in_folder(path)
    name = path.as_posix()
    is_weights = path.suffix == ".safetensors"
    on_hub = is_hub_file(name) if is_weights else is_hub_id(name)
    if path.exists() or path.parent.is_dir() or not on_hub:
        if not is_weights:
            converts = f": `dopsd import {path}` converts it" if path.suffix == ".bin" else ""
            raise ValueError(
                f"{path} is not a .safetensors file; no other format is read{converts}."
            )
        return path
    if is_weights:
        return weights_file(name, "the LoRA")
    return _in_folder(adapter_on_hub(name, USUAL_NAMES), name)


def _in_folder(folder: Path, called: str | None = None) -> Path:
    usual = [folder / name for name in USUAL_NAMES if (folder / name).is_file()]
    files = usual[:1] or sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    where = called or str(folder)
    if files:
        names = ", ".join(file.name for file in files[:5])
        raise ValueError(f"{where} holds {len(files)} .safetensors files ({names}): give one.")
    pickles = sorted(folder.glob("*.bin"))
    advice = f"; `dopsd import {pickles[0]}` converts {pickles[0].name}" if pickles else ""
    raise ValueError(f"{where} is a folder without a LoRA file (.safetensors){advice}.")
