"""What the package needs to know of a model family. One file a family implements it, and all other
code branches on these traits, never on a family's name."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE, Denoiser, TextEncoder
from dopsd.diffusion.flow import Schedule, Space
from dopsd.files import shorten
from dopsd.models.hub import Checkpoint
from dopsd.models.lora_names import ModuleNames

Size = tuple[int, int]  # (width, height) in pixels, as in Pillow


@dataclass(frozen=True)
class TeacherVision:
    """How a teacher sees images; None: the family's default.

    context: one of the family's `teacher_contexts`; `prompt`: it sees none and reads a better
    prompt. vlm: hub id or folder of the vision-language model, for a context that uses one. suffix:
    text after the caption in the teacher's prompt.
    """

    context: str | None = None
    vlm: str | None = None
    suffix: str | None = None


class UnfitPrompts(ValueError):
    """Prompts that a text encoder does not take: too long, or with its own marks in them.

    reasons: what is wrong with each, by its position.
    """

    def __init__(self, prompts: Sequence[str], reasons: Mapping[int, str]):
        self.reasons = dict(reasons)
        index, reason = next(iter(reasons.items()))
        more = f" {len(reasons) - 1} more prompts do not fit either." if len(reasons) > 1 else ""
        super().__init__(f'the caption "{shorten(prompts[index], 60)}" {reason}.{more}')


@dataclass(frozen=True)
class Usage:
    """How diffusers generates with a checkpoint, for a model card: lines of imports, lines between
    opening the pipeline and loading a LoRA, and the arguments of a call beside the prompt."""

    arguments: str
    imports: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


def plain_usage(nfe: int) -> Usage:
    """The usage of a pipeline that needs nothing but its number of steps."""
    return Usage(f"num_inference_steps={nfe}, guidance_scale=0.0")


class MethodTraits(Protocol):
    """What a family's recommended settings may depend on; every `methods.Method` has it."""

    @property
    def needs(self) -> Collection[str]:
        """Roles and parts of a batch that the method cannot do without; "privileged": a teacher
        that sees the image."""
        ...

    @property
    def loss_spaces(self) -> Sequence[Space]:
        """The values that its setting `space` can have; empty: it has no such setting."""
        ...


class Family(Protocol):
    """A checkpoint of one family: its traits, known from configs, and its components, loaded on
    demand."""

    name: ClassVar[str]
    repo: ClassVar[str]  # the usual checkpoint on the hub
    teacher_contexts: ClassVar[tuple[str, ...]]  # ways a teacher can see an image, default first
    vae_scale_factor: ClassVar[int]  # pixels along a side of a latent position
    multiple: ClassVar[int]  # image sides are multiples of this many pixels
    native_space: ClassVar[Space]  # what the network predicts
    lora_targets: ClassVar[str]  # regular expression over the network's module names
    quantizable: ClassVar[str]  # likewise: the linear layers that may be quantized
    export_prefix: ClassVar[str]  # the network's folder, and diffusers' prefix of its LoRA keys
    module_names: ClassVar[ModuleNames]  # its modules' names in diffusers and the original model
    # The names behind `diffusion_model.` (or kohya's) that most software reads in a LoRA file.
    comfyui_names: ClassVar[Literal["diffusers", "native", "kohya"]]
    distillable: ClassVar[bool]  # whether model.distilled_by can make a base checkpoint few-step

    base_version: str  # as ss_base_model_version, by which interfaces sort LoRA files
    architecture: str  # as modelspec.architecture
    licence: str
    hub_licence: str  # its identifier in the hub's list; "other" where it has none there
    checkpoint: Checkpoint
    teacher_context: str | None  # the one of `teacher_contexts` that is used
    default_nfe: int
    unrelated_prompts: tuple[str, ...]  # of the checkpoint's domain, for health; empty: any will do
    distilled: bool  # whether the checkpoint is a few-step one
    resolution: int  # side of the checkpoint's usual square image, in pixels
    channels: int  # of the latents

    def load_text_encoder(
        self, device: torch.device, dtype: torch.dtype, images: bool
    ) -> TextEncoder:
        """The text encoder; images: also what encodes the image that a teacher sees."""
        ...

    def load_vae(self, device: torch.device, dtype: torch.dtype, tiled: bool = False) -> VAE:
        """The VAE; tiled: large images are decoded in overlapping tiles, with less memory."""
        ...

    def empty_vae(self, tiled: bool) -> VAE:
        """The VAE from its config, with unloaded weights. Call it where tensors have no storage:
        under `torch.device("meta")` or a FakeTensorMode."""
        ...

    def empty_denoiser(self) -> Denoiser:
        """The denoiser from its config, with unloaded weights; likewise."""
        ...

    def count_tokens(
        self, prompts: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[int]:
        """Tokens of each prompt in the student's context, or with image sizes in the teacher's.
        Raises UnfitPrompts for prompts over the limit or with marks of the text encoder in them.
        Reads the tokenizer and configs, no weights.
        """
        ...

    def blank_context(
        self,
        prompts: Sequence[str],
        sizes: Sequence[Size] | None = None,
        references: Sequence[Sequence[Size]] | None = None,
    ) -> Context:
        """Zeros in the shape of the context that the text encoder would return, likewise."""
        ...

    @property
    def reference_size(self) -> Callable[[Size], Size] | None:
        """From the size of an image to edit to the size that the pipeline resizes it to; the
        function raises ValueError for one that the pipeline would refuse. None: the family edits no
        images."""
        ...

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> Denoiser:
        """The denoiser with its weights."""
        ...

    def schedule(self, nfe: int, height: int, width: int) -> Schedule:
        """The pipeline's own times for `nfe` forwards at a latent height and width."""
        ...

    def usage(self, nfe: int) -> Usage:
        """How to generate with `nfe` forwards in diffusers."""
        ...

    def settle(self, folder: Path) -> None:
        """Complete a copy of the checkpoint's folder that holds this family's network as loaded:
        write its scheduler where it is not the checkpoint's own."""
        ...

    def starting_points(self, method: MethodTraits) -> dict[str, Any]:
        """Recommended settings, as `section.key` to value, where they differ from the general
        defaults for this checkpoint and method."""
        ...


AnyFamily = Family | type[Family]  # for what needs only the traits of the class


def network_on_meta(family: Family) -> nn.Module:
    """The denoiser's network from its config, its weights on the meta device: names and shapes
    without storage."""
    with torch.device("meta"):
        return family.empty_denoiser().network


def fingerprint_of(module: nn.Module) -> str:
    """A short hash of a module's weights: names, shapes, dtypes, and a sample of every tensor."""
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(
            f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode() + sample.numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def fitted_size(family: Family, path: Path, size: Size) -> Size:
    """The size that an image to edit is resized to. Raises ValueError where the family edits no
    images, or none of this shape."""
    if family.reference_size is None:
        raise ValueError(
            f"{path} is an image to edit, and {family.name} edits none: leave the references out."
        )
    try:
        return family.reference_size(size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def latent_size(family: Family, height: int, width: int) -> tuple[int, int]:
    """An image size in pixels as latent (height, width). Raises ValueError where the family cannot
    generate it."""
    if height % family.multiple or width % family.multiple:
        raise ValueError(
            f"{width} x {height} pixels: both sides must be multiples of {family.multiple}."
        )
    return height // family.vae_scale_factor, width // family.vae_scale_factor
