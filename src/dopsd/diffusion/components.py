"""Interfaces of a model's parts: text encoder, VAE, denoiser."""

from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor, nn

from dopsd.diffusion.batch import Context


class TextEncoder(Protocol):
    """Reads prompts (and images: those that a prompt is about, and the teacher's) before training,
    then leaves memory."""

    fingerprint: (
        str  # changes whenever the same prompt would give another context; part of cache keys
    )

    def context(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        references: Sequence[Sequence[Image.Image]] | None = None,
    ) -> Context:
        """Contexts of prompts [B]; with images [B], what the teacher sees. references [B]: the
        images that each prompt edits, as the user has them, of the same number and sizes in every
        row; None where the family takes none. Raises ValueError for a prompt (plus image) over the
        family's limit, nothing being cut in silence, and for a reference that the pipeline would
        refuse."""
        ...


class VAE(Protocol):
    """The autoencoder."""

    fingerprint: str
    vae_scale_factor: int  # pixels along a side of a latent cell

    def latents(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in [-1, 1] -> clean latents [B, C, h, w] float32, shift and scale
        applied."""
        ...

    def pixels(self, latents: Tensor) -> Tensor:
        """The way back: float32 [B, 3, H, W] in about [-1, 1]."""
        ...


class Denoiser(nn.Module):
    """The network, in the house's clock. `network` is the diffusers module that adapters are put
    on."""

    network: nn.Module

    def forward(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        """z [B, C, h, w] float32, t [B] in [0, 1] (1 = noise) -> velocity (noise - clean), float32,
        like z."""
        raise NotImplementedError
