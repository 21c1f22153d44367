"""The transformer on stacked tensors equals diffusers', and its guidance the attention."""

import pytest
import torch
import torch.nn.functional as F

from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build import network, transformer


@pytest.fixture(scope="module")
def untrained():
    return network.fresh_network(compiled=False).requires_grad_(False)


@pytest.mark.parametrize("length", [32, 96])
def test_the_velocity_equals_the_forward_of_diffusers(untrained, length):
    z, t = torch.randn(2, 8, 16, 16), torch.tensor([0.3, 0.9])
    context = torch.randn(2, length, parts.WIDTH)
    mask = torch.arange(length)[None] < torch.tensor([[length - 9], [length - 2]])
    ragged = [tokens[keep] for tokens, keep in zip(context, mask, strict=True)]
    (expected,) = untrained.transformer(
        list(z.unsqueeze(2).unbind(0)), t, ragged, return_dict=False
    )
    velocity = untrained(z, 1 - t, context, mask)
    torch.testing.assert_close(-velocity, torch.stack(expected).squeeze(2), atol=1e-6, rtol=1e-5)


def test_gaze_is_the_cross_entropy_of_the_heads_that_diffusers_computes(untrained, monkeypatch):
    """The attention weights are taken from diffusers' own forward, where it calls the attention of
    torch."""
    z, t = torch.randn(2, 8, 16, 16), torch.tensor([0.3, 0.9])
    context, mask = torch.randn(2, 96, parts.WIDTH), torch.ones(2, 96, dtype=torch.bool)
    _, gaze = untrained.gazing(z, t, context, mask)
    weights, attend = [], F.scaled_dot_product_attention

    def recording(query, key, value, **keywords):
        weights.append((query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1))
        return attend(query, key, value, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    untrained.transformer(list(z.unsqueeze(2).unbind(0)), 1 - t, list(context), return_dict=False)
    joint = [each for each in weights if each.shape[-1] == 64 + 96]
    places = torch.arange(64)
    own = [
        joint[layer][:, head, places, 64 + transformer.FIRST_IMAGE_TOKEN + places]
        for layer, head in transformer.GUIDED_HEADS
    ]
    torch.testing.assert_close(gaze, -torch.stack(own).log().mean(), atol=1e-5, rtol=1e-5)
