"""Interfaces of a model's parts: text encoder, VAE, denoiser."""

from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor, nn

from dopsd.diffusion.batch import Context


class TextEncoder(Protocol):
    """Encodes prompts, and images where the family can; used before training, then released.

    fingerprint: part of cache keys; differs whenever the same prompt would give another context.
    """

    fingerprint: str

    def context(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        references: Sequence[Sequence[Image.Image]] | None = None,
    ) -> Context:
        """Contexts of B prompts.

        images: one for each prompt; then the contexts are the teacher's, which sees them.
        references: for each prompt the images that it edits, not resized, of the same number and
        sizes in every row. Raises ValueError for a prompt (with its image) over the family's limit,
        since nothing is truncated, and for a reference that the pipeline would refuse.
        """
        ...


class VAE(Protocol):
    """The autoencoder.

    fingerprint: part of cache keys. vae_scale_factor: pixels along one side of a latent cell.
    """

    fingerprint: str
    vae_scale_factor: int

    def latents(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in [-1, 1] -> clean latents [B, C, h, w] float32, shifted and scaled
        as the denoiser expects them."""
        ...

    def pixels(self, latents: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] -> pixels [B, 3, H, W] float32, about in [-1, 1]."""
        ...


class Denoiser(nn.Module):
    """The network as a velocity on the path of `flow`.

    network: the diffusers module, which adapters are put on.
    """

    network: nn.Module

    def forward(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        """z [B, C, h, w] float32, t [B] in [0, 1] (1 = noise) -> velocity (noise - clean), float32,
        like z."""
        raise NotImplementedError
