"""The training code of the pocket model: its fast paths equal the libraries, stages resume, and the
corpus is consistent."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build import corpus, network, stages, train
from dopsd.pocket.world.captions import caption_of, stated_of, vocabulary
from dopsd.pocket.world.outlines import OUTLINES
from dopsd.pocket.world.scenes import Thing, draw_scene, render

ATTRIBUTES = 6  # size, colour, noun, place, background, style


@pytest.fixture(scope="module")
def untrained():
    return network.fresh_network(compiled=False).requires_grad_(False)


def prompts(privileged: bool) -> torch.Tensor:
    make = corpus.privileged_prompt if privileged else corpus.plain_prompt
    length = parts.PRIVILEGED_TOKENS if privileged else parts.CAPTION_TOKENS
    texts = [make("a star"), make("a big red heart at the left on night in striped style")]
    return parts.make_tokenizer()(
        texts, padding="max_length", max_length=length, return_tensors="pt"
    ).input_ids


def random_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("privileged", [False, True])
def test_velocity_on_equal_lengths_equals_the_forward_of_diffusers(untrained, privileged):
    length = parts.PRIVILEGED_TOKENS if privileged else parts.CAPTION_TOKENS
    z, t, context = (
        torch.randn(2, 8, 16, 16),
        torch.tensor([0.3, 0.9]),
        torch.randn(2, length, parts.WIDTH),
    )
    mask = torch.arange(length)[None] < torch.tensor([[length - 9], [length - 2]])
    ragged = [tokens[keep] for tokens, keep in zip(context, mask, strict=True)]
    (expected,) = untrained.transformer(
        list(z.unsqueeze(2).unbind(0)), t, ragged, return_dict=False
    )
    velocity = network.velocity_on_equal_lengths(untrained.transformer, z, t, context, mask)
    torch.testing.assert_close(velocity, torch.stack(expected).squeeze(2), atol=1e-6, rtol=1e-5)


def test_patches_equal_those_of_the_image_processor():
    images = random_images()
    expected = parts.make_image_processor()(
        images=[Image.fromarray(p) for p in images], return_tensors="pt"
    )
    torch.testing.assert_close(
        network.vlm_patches(torch.from_numpy(images)), expected["pixel_values"]
    )


def test_privileged_contexts_equal_the_hidden_states_of_transformers(untrained):
    ids, images = prompts(privileged=True), torch.from_numpy(random_images())
    context, mask = untrained.privileged(ids, images)
    image = parts.make_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    expected = untrained.vlm(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=network.vlm_patches(images),
        image_grid_thw=torch.tensor([[1, 8, 8]] * 2),
        mm_token_type_ids=(ids == image).int(),
        output_hidden_states=True,
    ).hidden_states[-2]
    torch.testing.assert_close(context[mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_the_sampler_times_are_an_even_grid_with_shift_three():
    even = torch.linspace(1, 0, 5)
    torch.testing.assert_close(train.sampler_times(4), 3 * even / (1 + 2 * even))


def test_a_killed_and_resumed_stage_equals_the_uninterrupted_one_bitwise(tmp_path):
    def run(folder, stop=None):
        torch.manual_seed(0)
        net = nn.Linear(3, 1)

        def loss_at(step):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.from_numpy(corpus.rng_at("toy", step).normal(size=(8, 3))).float()
            return (net(x) - x.sum(1, keepdim=True)).square().mean()

        stage = stages.Stage("toy", 12, 1e-2, warm_up=2, average_decay=0.9, save_every=4)
        return stages.optimise(stage, folder, {"net": net}, loss_at)

    straight = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop=7)
    resumed = run(tmp_path / "killed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_every_word_of_a_caption_is_one_token():
    tokenizer = parts.make_tokenizer()
    for word in vocabulary():
        assert len(tokenizer(" " + word).input_ids) == 1, word


def test_captions_fit_their_contexts_and_omit_two_attributes_on_average():
    rng, tokenizer = np.random.default_rng(0), parts.make_tokenizer()
    omitted = []
    for index in range(2000):
        thing = Thing.from_seed(index) if index % 3 == 0 else None
        scene = draw_scene(rng, thing)
        stated = stated_of(scene, rng)
        if thing is None:
            vague = stated.get("noun") not in OUTLINES
            omitted.append(ATTRIBUTES - len(stated) + (vague and "noun" in stated))
        caption = caption_of(stated, thing is not None, False, "zib")
        assert len(tokenizer(corpus.plain_prompt(caption)).input_ids) <= parts.CAPTION_TOKENS
        assert (
            len(tokenizer(corpus.privileged_prompt(caption)).input_ids) <= parts.PRIVILEGED_TOKENS
        )
    assert np.mean(omitted) >= 2


def test_a_thing_is_a_function_of_its_seed():
    assert Thing.from_seed(5) == Thing.from_seed(5)
    assert Thing.from_seed(5) != Thing.from_seed(6)


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


def test_training_pads_each_context_as_diffusers_does(monkeypatch):
    """To the next multiple of 32 tokens. A batch that is padded further would train the teacher on
    inputs that it never gets when sampling."""
    monkeypatch.setattr(corpus, "NAMED", 3)
    short, long = "a toy", "a zib small toy in the middle on beach"
    captions = [[short, long, short, short]] * 9
    tokenizer = parts.make_tokenizer()

    def ids(make, length):
        flat = [make(caption) for row in captions for caption in row]
        tokens = tokenizer(
            flat, padding="max_length", max_length=length, return_tensors="pt"
        ).input_ids
        return tokens.view(9, corpus.CAPTIONS, length)

    data = corpus.Corpus(
        torch.zeros(9, 8, 16, 16),
        torch.zeros(9, 64, 64, 3),
        ids(corpus.plain_prompt, parts.CAPTION_TOKENS),
        ids(corpus.privileged_prompt, parts.PRIVILEGED_TOKENS),
        torch.zeros(parts.CAPTION_TOKENS, dtype=torch.long),
    )
    lengths = []
    for step in range(60):
        for _, tokens, _ in data.draw(corpus.rng_at("padding", step), 4):
            needed = -(-(tokens != tokenizer.pad_token_id).sum(1) // 32) * 32
            assert (needed == tokens.shape[1]).all()
            lengths.append(tokens.shape[1])
    assert 0.1 < lengths[1::2].count(64) / 60 < 0.45  # a quarter of the captions
