"""Autoencoder and first distillation of the pocket model."""

import numpy as np
import torch

from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build import corpus, train
from dopsd.pocket.world.scenes import draw_scene, render


def test_the_sampler_times_are_an_even_grid_with_shift_three():
    even = torch.linspace(1, 0, 5)
    torch.testing.assert_close(train.sampler_times(4), 3 * even / (1 + 2 * even))


def test_whitening_keeps_images_and_decorrelates_latents():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    vae = parts.make_vae()
    pixels = corpus.to_unit(
        torch.from_numpy(np.stack([render(draw_scene(rng)) for _ in range(64)]))
    )
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        # Almost no posterior noise, so that the latents alone are whitened.
        vae.encoder.conv_out.bias[8:] -= 12
        train.whiten(vae, pixels)
        latents = vae.encode(pixels).latent_dist.mode()
        after = vae.decode(latents).sample
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    covariance = torch.cov(scaled.permute(1, 0, 2, 3).flatten(1))
    # One scale for all channels, which is not 1 where their means differ.
    scale = covariance.diagonal().mean()
    torch.testing.assert_close(covariance / scale, torch.eye(8), atol=0.01, rtol=0)
