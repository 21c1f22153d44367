"""Prompts on stacked tensors equal transformers' Qwen3-VL."""

import numpy as np
import pytest
import torch
from PIL import Image

from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build import corpus, encoder, network

TOWERS = pytest.mark.parametrize("tower", [parts.FIRST_TOWER, parts.TOWER])


def random_images() -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3))
    return torch.from_numpy(pixels.astype(np.uint8))


def plain_tokens() -> torch.Tensor:
    texts = ["a star", "a big red heart at the left on night in striped style"]
    return parts.make_tokenizer()(
        [corpus.plain_prompt(text) for text in texts],
        padding="max_length",
        max_length=parts.CAPTION_TOKENS,
        return_tensors="pt",
    ).input_ids


@TOWERS
def test_patches_equal_those_of_the_image_processor(tower):
    images = random_images()
    expected = parts.make_image_processor(tower)(
        images=[Image.fromarray(each.numpy()) for each in images], return_tensors="pt"
    )
    torch.testing.assert_close(encoder.vlm_patches(images, tower), expected["pixel_values"])


@TOWERS
def test_contexts_equal_the_hidden_states_of_transformers(tower):
    untrained = network.fresh_network(compiled=False, tower=tower).requires_grad_(False)
    plain = plain_tokens()
    context, mask = untrained.plain(plain)
    states = untrained.vlm.language_model(
        input_ids=plain, attention_mask=mask, output_hidden_states=True
    ).hidden_states[-2]
    torch.testing.assert_close(context[mask], states[mask], atol=1e-5, rtol=1e-5)

    tokens, images = corpus.with_image_tokens(plain, tower), random_images()
    context, mask = untrained.privileged(tokens, images)
    image = parts.make_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    states = untrained.vlm(
        input_ids=tokens,
        attention_mask=mask,
        pixel_values=encoder.vlm_patches(images, tower),
        image_grid_thw=torch.tensor([[1, 8, 8]] * 2),
        mm_token_type_ids=(tokens == image).int(),
        output_hidden_states=True,
    ).hidden_states[-2]
    torch.testing.assert_close(context[mask], states[mask], atol=1e-5, rtol=1e-5)
