"""Checkpoints of one file, as image interfaces use them, written as diffusers folders.

They are recognised by their tensors' names and converted by diffusers. Such a file holds weights
and neither configs nor a scheduler, so a diffusers folder of the same model stands beside it
(`config`): nothing is guessed from names.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dopsd.files import atomic_path, read_tensors, tensor_names
from dopsd.models.hub import Checkpoint, quiet_libraries, reason_of

log = logging.getLogger(__name__)

# What files of other endings are.
OTHER_FORMATS = {
    ".gguf": "a GGUF of quantized weights, which cannot be trained on",
    ".ckpt": "a pickle, which can run code",
    ".pt": "a pickle, which can run code",
    ".pth": "a pickle, which can run code",
    ".bin": "a pickle, which can run code",
    ".onnx": "a compiled graph",
}


@dataclass(frozen=True)
class Layout:
    """The names of a model's tensors in files of its authors or of ComfyUI.

    family, pipeline: as in the registry of families. reader: the class of diffusers that reads such
    files. marks: parts of names, all of which they have. parts: folders of a diffusers checkpoint
    that the file holds.
    """

    family: str
    pipeline: str
    reader: str
    marks: tuple[str, ...]
    parts: tuple[str, ...]


LAYOUTS = (
    Layout(
        "sdxl",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLPipeline",
        ("model.diffusion_model.label_emb.", "conditioner.embedders.1.", "first_stage_model."),
        ("unet", "vae", "text_encoder", "text_encoder_2"),
    ),
    Layout(
        "zimage",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        ("cap_embedder.", "noise_refiner."),
        ("transformer",),
    ),
    Layout(
        "flux2_klein",
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        ("double_blocks.0.", "single_stream_modulation."),
        ("transformer",),
    ),
)
ADAPTER_MARKS = ("lora_", ".lokr_", ".hada_")
# Other files by a part of their tensors' names, in the order in which they are tried.
OTHERS = (
    ("model.diffusion_model.label_emb.", "an SDXL without its text encoders or VAE"),
    ("double_blocks.0.", "a FLUX.1 or another relative of FLUX.2-klein"),
    ("cond_stage_model.", "a Stable Diffusion 1 or 2"),
    ("joint_blocks.0.", "a Stable Diffusion 3"),
)


def refuse_file(path: Path) -> None:
    """Raise ValueError for a file where a diffusers folder is expected, saying what it is and what
    to do."""
    if what := OTHER_FORMATS.get(path.suffix.lower()):
        raise ValueError(
            f"{path} is {what}: take the .safetensors file or the diffusers folder of the model."
        )
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} is a file: give a diffusers folder or a hub id.")
    raise ValueError(
        f"{path} is a single file of {layout_of(path).family}, which holds no configs and no "
        "scheduler: name a diffusers folder or hub id of the same model that does, in a recipe as "
        f"model.config, or write a diffusers folder: dopsd import {path} --config OWNER/NAME --out "
        "FOLDER."
    )


def layout_of(file: Path) -> Layout:
    """Which model a single file holds. Raises ValueError, naming what else it is, for one that is
    not read."""
    names = tensor_names(file)
    if any(mark in name for mark in ADAPTER_MARKS for name in names):
        raise ValueError(f"{file} is a LoRA: give it with --lora, or as lora.init_from.")
    for layout in LAYOUTS:
        if all(any(mark in name for name in names) for mark in layout.marks):
            return layout
    known = ", ".join(layout.family for layout in LAYOUTS)
    for mark, what in OTHERS:
        if any(mark in name for name in names):
            raise ValueError(f"{file} is {what}; single files are read of {known}.")
    first = ", ".join(sorted(names)[:3]) or "no tensors"
    raise ValueError(f"{file} holds no model that is known ({first}); they are {known}.")


def folder_of(file: Path, config: str, cache: Path) -> Path:
    """The file as a diffusers folder under `cache`, converted the first time. Raises ValueError as
    `convert` does, and where there is no such file."""
    if not file.is_file():
        raise ValueError(
            f"model.config stands beside a single file, and model.name_or_path {file} is none: "
            "leave it out."
        )
    if file.suffix.lower() != ".safetensors":
        refuse_file(file)
    status = file.stat()
    key = f"{file.stem}-{status.st_size}-{status.st_mtime_ns}-{Path(config).name}"
    folder = cache / key
    if not folder.is_dir():
        log.info("Converting %s to %s, once.", file, folder, extra={"screen": True})
        convert(file, config, folder)
    return folder


def import_model(file: Path, config: str | None, folder: Path) -> None:
    """`convert`, for a folder that does not exist yet. config None: raises ValueError that says
    what the file is and what to give."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist.")
    if config is None:
        refuse_file(file)
    if folder.exists():
        raise ValueError(
            f"{folder} exists and is not overwritten: choose another folder with --out."
        )
    convert(file, str(config), folder)


def convert(file: Path, config: str, folder: Path) -> None:
    """Write a single file as a diffusers folder, in its own dtype, with configs, tokenizers,
    scheduler and whatever else it lacks from another checkpoint of the same model.

    config: a diffusers folder or hub id. Raises ValueError where it is another model, and for a
    file with weights that are missing or quantized.
    """
    layout, dtype = layout_of(file), _dtype_of(file)
    base = Checkpoint(config)
    index = base.folder / "model_index.json"
    if not index.is_file() or layout.pipeline not in index.read_text(encoding="utf-8"):
        raise ValueError(
            f"{config} is no {layout.pipeline} checkpoint, and {file} is a {layout.family}: give a "
            "diffusers folder or hub id of the same model."
        )
    others = [part.parent.name for part in base.folder.glob("*/config.json")]
    for part in sorted(set(others) - set(layout.parts)):
        base.part(part)
    with atomic_path(folder) as temporary:
        shutil.copytree(base.folder, temporary, ignore=_without_weights(base.folder, layout.parts))
        for name, module in _modules(file, layout, base, dtype).items():
            _refuse_missing(module, file)
            try:
                module.save_pretrained(temporary / name)
            except SafetensorError as error:  # raised where no space is left
                raise OSError(str(error)) from error


def _modules(
    file: Path, layout: Layout, base: Checkpoint, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The parts that the file holds, by their folder, as diffusers reads them."""
    import diffusers

    kind = getattr(diffusers, layout.reader)
    with _reading(file, base):
        if layout.reader == layout.pipeline:
            pipeline = kind.from_single_file(
                str(file), config=str(base.folder), torch_dtype=dtype, local_files_only=True
            )
            return {part: getattr(pipeline, part) for part in layout.parts}
        (part,) = layout.parts
        # diffusers strips ComfyUI's prefix of some networks only.
        tensors = {_bare(name): tensor for name, tensor in read_tensors(file).items()}
        module = kind.from_single_file(
            tensors, config=str(base.folder / part), torch_dtype=dtype, local_files_only=True
        )
        return {part: module}


@contextmanager
def _reading(file: Path, base: Checkpoint) -> Iterator[None]:
    """A block in which diffusers reads a single file. Any error becomes a ValueError: weights that
    are missing, or of other shapes than the configs say, raise several kinds."""
    try:
        with quiet_libraries():
            yield
    except Exception as error:
        raise ValueError(
            f"{file} does not fit the configs of {base.name}: it is incomplete, or of another size "
            f"({reason_of(error)})."
        ) from error


def _bare(name: str) -> str:
    """A tensor's name without the prefix that ComfyUI gives networks."""
    return name.removeprefix("model.").removeprefix("diffusion_model.")


def _without_weights(root: Path, parts: Collection[str]) -> Callable[[str, list[str]], list[str]]:
    """For copytree: leaves out the parts' weights, files of whole models beside the index, and what
    belongs to the hub's cache."""

    def ignore(folder: str, names: list[str]) -> list[str]:
        inside = Path(folder).relative_to(root)
        drops_weights = inside == Path(".") or inside.parts[0] in parts
        ends = (".safetensors", ".safetensors.index.json", ".md")
        return [n for n in names if n[0] == "." or (drops_weights and n.endswith(ends))]

    return ignore


def _refuse_missing(module: nn.Module, file: Path) -> None:
    """A weight that the file lacks stays on the meta device."""
    if missing := [name for name, tensor in module.state_dict().items() if tensor.is_meta]:
        raise ValueError(
            f"{file} lacks {len(missing)} weights (first: {missing[0]}): it is incomplete, or of "
            "another size than its config."
        )


def _dtype_of(file: Path) -> torch.dtype:
    """The dtype of most of its weights. Raises ValueError where that is a quantized one."""
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        kinds = Counter(str(tensors.get_slice(name).get_dtype()) for name in names)
    by_name = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    name = kinds.most_common(1)[0][0]
    if name not in by_name or any(key.startswith("F8") for key in kinds):
        raise ValueError(
            f"{file} holds quantized weights ({', '.join(sorted(kinds))}): take the file in bf16, "
            "fp16 or fp32 that it was made from."
        )
    return by_name[name]
