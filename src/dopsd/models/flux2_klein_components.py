"""FLUX.2-klein's components: denoiser and VAE in this package's conventions."""

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import Denoiser
from dopsd.models.vae import KLVAE


def reference_key(index: int) -> str:
    """The name of the context's extra that holds a reference's latents, [B, channels, h, w]."""
    return f"reference_{index}"


class KleinDenoiser(Denoiser):
    """Flux2Transformer2DModel, whose time and velocity are already those of this package.

    References in the context are further image tokens. The network has no mask, so rows of
    different prompt lengths are run one by one.
    """

    def __init__(self, network: Flux2Transformer2DModel):
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, t: Tensor, context: Context) -> Tensor:
        if len(set(context.lengths)) > 1:
            rows = range(len(z))
            return torch.cat([self(z[i : i + 1], t[i : i + 1], context.row(i)) for i in rows])
        dtype, device = next(self.network.parameters()).dtype, z.device
        references = [context.extras[reference_key(i)] for i in range(len(context.extras))]
        image_ids = [Flux2KleinPipeline._prepare_latent_ids(z[:1])]
        if references:
            first_rows = [reference[:1] for reference in references]
            image_ids.append(Flux2KleinPipeline._prepare_image_ids(first_rows))
        image_tokens = torch.cat([each.flatten(2).mT for each in (z, *references)], dim=1)
        prediction = self.network(
            hidden_states=image_tokens.to(dtype),
            encoder_hidden_states=context.tokens.to(dtype),
            # Rounded as the pipeline rounds it: 0 ... 1000 in the network's dtype, then divided.
            timestep=(t.to(z) * 1000).to(dtype) / 1000,
            img_ids=torch.cat(image_ids, dim=1).to(device),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(context.tokens[:1]).to(device),
            return_dict=False,
        )[0]
        velocity = prediction[:, : z.shape[-2] * z.shape[-1]].float()
        return velocity.mT.reshape(z.shape)


class KleinVAE(KLVAE):
    """AutoencoderKLFlux2, its latents in patches of 2 x 2, normalised to mean 0 and variance 1 by
    the running statistics of its batch norm."""

    def __init__(self, vae: AutoencoderKLFlux2, tiled: bool = False):
        super().__init__(vae, tiled)
        self.vae_scale_factor *= 2
        self._mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
        self._std = torch.sqrt(
            vae.bn.running_var.float().view(1, -1, 1, 1) + vae.config.batch_norm_eps
        )

    def latents(self, pixels: Tensor) -> Tensor:
        patches = Flux2KleinPipeline._patchify_latents(super().latents(pixels))
        return (patches - self._mean) / self._std

    def pixels(self, latents: Tensor) -> Tensor:
        raw = latents.to(self._mean) * self._std + self._mean
        return super().pixels(Flux2KleinPipeline._unpatchify_latents(raw))
