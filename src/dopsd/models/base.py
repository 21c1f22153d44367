"""The noun: what the house needs of a model family. One file a family implements it; nobody
branches on a name."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE, Denoiser, TextEncoder
from dopsd.diffusion.flow import Schedule, Space
from dopsd.models.hub import Checkpoint

Size = tuple[int, int]  # (width, height) in pixels, as in Pillow


@dataclass(frozen=True)
class TeacherVision:
    """How a teacher is to see images. context: one of the family's `teacher_contexts`; vlm: a hub
    id or folder, where it sees through one; suffix: words after the caption in its prompt. None:
    the family's default."""

    context: str | None = None
    vlm: str | None = None
    suffix: str | None = None


@dataclass(frozen=True)
class Usage:
    """How diffusers generates with a checkpoint, for a model card: lines of imports, lines between
    opening the pipeline and loading a LoRA, and the arguments of a call beside the prompt."""

    arguments: str
    imports: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


def plain_usage(nfe: int) -> Usage:
    """Of a pipeline that needs nothing but its number of steps."""
    return Usage(f"num_inference_steps={nfe}, guidance_scale=0.0")


class Family(Protocol):
    """A checkpoint of one family, opened but not loaded: traits, and three workers on demand."""

    name: ClassVar[str]
    repo: ClassVar[str]  # the usual checkpoint on the hub
    teacher_contexts: ClassVar[
        tuple[str, ...]
    ]  # ways a teacher can see an image, the default first; empty = none
    vae_scale_factor: ClassVar[int]  # pixels per latent cell
    multiple: ClassVar[int]  # image sides are multiples of this many pixels
    native_space: ClassVar[Space]  # of the network's own answer
    lora_targets: ClassVar[str]  # regular expression over the network's module names
    quantizable: ClassVar[
        str
    ]  # likewise: the linears that may be put in few bits; all others stay as they are
    export_prefix: ClassVar[
        str
    ]  # the network's folder in a checkpoint, and diffusers' word for it in LoRA names

    distillable: ClassVar[
        bool
    ]  # whether a base checkpoint can be made a few-step one by a file, model.distilled_by
    base_version: ClassVar[
        str
    ]  # in the words of ss_base_model_version, by which interfaces sort LoRA files

    architecture: str  # in the words of modelspec.architecture
    licence: str
    hub_licence: str  # its identifier in the hub's list; "other" where it has none there
    checkpoint: Checkpoint
    teacher_context: str | None  # the one of `teacher_contexts` that was asked for
    default_nfe: int
    unrelated_prompts: tuple[
        str, ...
    ]  # of the checkpoint's own world, for health; empty: any prompt will do
    distilled: bool  # whether the checkpoint is a few-step one
    resolution: int  # of the checkpoint's usual square image, in pixels
    channels: int  # of the latents

    def load_text_encoder(
        self, device: torch.device, dtype: torch.dtype, images: bool
    ) -> TextEncoder:
        """The text encoder; with `images`, also what reads the teacher's image."""
        ...

    def load_vae(self, device: torch.device, dtype: torch.dtype, tiled: bool = False) -> VAE:
        """The autoencoder; tiled: decodes large images in overlapping tiles, with less memory."""
        ...

    def empty_vae(self, tiled: bool) -> VAE:
        """The autoencoder from its config, without weights; called where tensors have shapes and no
        storage."""
        ...

    def empty_denoiser(self) -> Denoiser:
        """The denoiser from its config, without weights; called where tensors have shapes and no
        storage."""
        ...

    def count_tokens(
        self, prompts: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[int]:
        """Of each prompt as the text encoder would see it; with image sizes, as the teacher's.
        Raises ValueError for a prompt over the limit. Reads the tokenizer and configs, no weights.
        """
        ...

    def blank_context(
        self,
        prompts: Sequence[str],
        sizes: Sequence[Size] | None = None,
        references: Sequence[Sequence[Size]] | None = None,
    ) -> Context:
        """Zeros in the shape of what the text encoder would answer, likewise."""
        ...

    @property
    def reference_size(self) -> Callable[[Size], Size] | None:
        """The size that an image to edit is brought to, which raises ValueError for one that the
        pipeline would refuse; None: prompts of this family come without images."""
        ...

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> Denoiser: ...

    def schedule(self, nfe: int, height: int, width: int) -> Schedule:
        """The pipeline's own times for `nfe` forwards at a latent size of height x width cells."""
        ...

    def usage(self, nfe: int) -> Usage:
        """What to write to generate with `nfe` forwards in diffusers."""
        ...

    def settle(self, folder: Path) -> None:
        """Make a copy of the checkpoint's folder, which holds this family's network as it is
        loaded, say which sampler the network is for where the checkpoint itself does not."""
        ...

    def lora_in_own_form(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA's tensors in any public form as `<export_prefix>.<module>.lora_A.weight` /
        `.lora_B.weight`, with their alpha multiplied in. Raises ValueError or KeyError for a form
        that is not known."""
        ...

    def lora_in_public_form(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The way out: A [r, in] and B [out, r] by module path, with the scale in B, as the tensors
        of a file that the family's usual loaders read at strength 1."""
        ...

    def starting_points(self, method: str) -> dict[str, Any]:
        """Recipe keys (`section.key`) whose value should differ from the general default for this
        checkpoint and method."""
        ...


def network_on_meta(family: Family) -> nn.Module:
    """The denoiser's network from its config, its weights on the meta device: names and shapes
    without storage."""
    with torch.device("meta"):
        return family.empty_denoiser().network


def fingerprint_of(module: nn.Module) -> str:
    """A short hash of a module's weights: shapes, dtypes, and a sample of every tensor's bytes."""
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(
            f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode() + sample.numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def fitted_size(family: Family, path: Path, size: Size) -> Size:
    """What an image to edit is brought to. Raises ValueError where the family edits none, or none
    of this shape."""
    if family.reference_size is None:
        raise ValueError(
            f"{path} is a picture to edit, and {family.name} edits none: leave the references out."
        )
    try:
        return family.reference_size(size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def latent_size(family: Family, height: int, width: int) -> tuple[int, int]:
    """An image size in pixels as latent cells. Raises ValueError where the family cannot generate
    it."""
    if height % family.multiple or width % family.multiple:
        raise ValueError(
            f"{width} x {height} pixels: both sides must be multiples of {family.multiple}."
        )
    return height // family.vae_scale_factor, width // family.vae_scale_factor
