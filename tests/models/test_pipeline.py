"""The way from requests to images: the text encoder is released, prompts are encoded once, images
come in the order of the requests."""

import gc
import weakref

import pytest
import torch

from dopsd.models.pipeline import (
    EncodedRequest,
    ImagePipeline,
    ImageRequest,
    generate_images,
    sample,
)


@pytest.fixture(scope="module")
def pipeline(pocket) -> ImagePipeline:
    return ImagePipeline(pocket)


def request_for(pocket, prompt: str, seed: int, side: int = 16) -> ImageRequest:
    return ImageRequest(prompt, seed, (pocket.channels, side, side))


def test_each_prompt_is_encoded_once_and_the_text_encoder_is_released(
    pocket, pipeline, monkeypatch
):
    prompts, encoders = [], []
    load = type(pocket).load_text_encoder

    def watched(family, *arguments, **keywords):
        text_encoder = load(family, *arguments, **keywords)
        encoders.append(weakref.ref(text_encoder))
        context = text_encoder.context
        text_encoder.context = lambda texts, *rest: prompts.extend(texts) or context(texts, *rest)
        return text_encoder

    monkeypatch.setattr(type(pocket), "load_text_encoder", watched)
    requests = [request_for(pocket, prompt, seed) for seed, prompt in enumerate("aba")]
    encoded = pipeline.encode(requests)
    gc.collect()
    assert prompts == ["a", "b"] and [each.request for each in encoded] == requests
    assert len(encoders) == 1 and encoders[0]() is None
    assert encoded[0].context is encoded[2].context is not encoded[1].context
    assert pipeline.encode([]) == [] and len(encoders) == 1


def test_requests_of_one_shape_are_sampled_together_and_images_keep_their_order(pocket, pipeline):
    denoiser, batches = pipeline.load_denoiser(), []

    def velocity(z, t, context):
        batches.append(tuple(z.shape))
        return denoiser(z, t, context)

    sides = (16, 24, 16)
    encoded = pipeline.encode(
        [request_for(pocket, "a star", seed, side) for seed, side in enumerate(sides)]
    )
    images = pipeline.generate(velocity, encoded, nfe=1)
    assert batches == [(2, pocket.channels, 16, 16), (1, pocket.channels, 24, 24)]
    scale = pocket.vae_scale_factor
    assert [image.shape for image in images] == [(s * scale, s * scale, 3) for s in sides]
    for image, each in zip(images, encoded, strict=True):
        (alone,) = pipeline.generate(denoiser, [each], nfe=1)
        assert (image.int() - alone.int()).abs().max() <= 1


def test_progress_counts_images_in_chunks(pocket, pipeline, monkeypatch):
    side = 16 * pocket.vae_scale_factor
    monkeypatch.setattr("dopsd.diffusion.sampling.MAX_PIXELS", 2 * side**2)
    (encoded,) = pipeline.encode([request_for(pocket, "a star", 0)])
    done = []
    generate_images(
        lambda z, t, context: torch.zeros_like(z),
        pipeline.vae,
        lambda height, width: pocket.schedule(1, height, width),
        [encoded.with_seed(seed) for seed in range(3)],
        pipeline.device,
        lambda count, total: done.append((count, total)),
    )
    assert done == [(2, 3), (3, 3)]


def test_a_request_on_another_seed_keeps_its_context(pocket, pipeline):
    (encoded,) = pipeline.encode([request_for(pocket, "a star", 0)])
    other = encoded.with_seed(7)
    assert other == EncodedRequest(request_for(pocket, "a star", 7), encoded.context)


def test_a_size_that_the_model_cannot_generate_is_refused_before_weights_are_loaded(
    pocket, monkeypatch
):
    monkeypatch.setattr(type(pocket), "load_text_encoder", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="both sides must be multiples of"):
        sample("pocket", ["a star"], width=pocket.multiple + 1)
