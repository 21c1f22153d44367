"""The training data of the pocket model is consistent."""

import numpy as np
import pytest
import torch

from dopsd.pocket.build import architecture as parts
from dopsd.pocket.build import corpus
from dopsd.pocket.world.captions import caption_of, stated_of, vocabulary
from dopsd.pocket.world.outlines import OUTLINES
from dopsd.pocket.world.scenes import Thing, draw_scene

ATTRIBUTES = 6  # size, colour, noun, place, background, style


def prompts(texts: list[str], length: int) -> torch.Tensor:
    tokenizer = parts.make_tokenizer()
    return tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids


def small_corpus() -> corpus.Corpus:
    """Nine rows: three named scenes (set `corpus.NAMED`), and two groups of three."""
    captions = [["a toy", "a zib small toy in the middle on beach", "a toy", "a toy"]] * 9
    texts = [corpus.plain_prompt(caption) for row in captions for caption in row]
    return corpus.Corpus(
        torch.zeros(9, 8, 16, 16),
        torch.arange(9).view(9, 1, 1, 1).expand(9, 64, 64, 3),
        prompts(texts, parts.CAPTION_TOKENS).view(9, corpus.CAPTIONS, -1),
        torch.zeros(parts.CAPTION_TOKENS, dtype=torch.long),
    )


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
        with_image = len(tokenizer(corpus.plain_prompt(caption)).input_ids) + parts.TOWER.tokens + 2
        assert with_image <= parts.TOWER.prompt_tokens
    assert np.mean(omitted) >= 2


def test_a_thing_is_a_function_of_its_seed():
    assert Thing.from_seed(5) == Thing.from_seed(5)
    assert Thing.from_seed(5) != Thing.from_seed(6)


@pytest.mark.parametrize("tower", [parts.FIRST_TOWER, parts.TOWER])
def test_image_tokens_are_inserted_where_the_chat_template_puts_an_image(tower):
    tokenizer = parts.make_tokenizer()
    captions = ["a star", "a big red heart at the left on night in striped style"]

    def messages(caption, image):
        content = [{"type": "image"}] * image + [{"type": "text", "text": caption}]
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
        )

    plain = prompts([messages(each, 0) for each in captions], parts.CAPTION_TOKENS)
    pads = "<|image_pad|>" * tower.tokens
    seeing = [messages(each, 1).replace("<|image_pad|>", pads) for each in captions]
    expected = prompts(seeing, tower.prompt_tokens)
    assert torch.equal(corpus.with_image_tokens(plain, tower), expected)


def test_the_first_towers_batches_are_padded_as_diffusers_pads_them(monkeypatch):
    """To the next multiple of 32 tokens. A batch that is padded further would train the teacher on
    inputs that it never gets when sampling."""
    monkeypatch.setattr(corpus, "NAMED", 3)
    data, lengths = small_corpus(), []
    for step in range(60):
        for _, tokens, _ in data.draw(corpus.rng_at("padding", step), 4):
            needed = -(-(tokens != 0).sum(1) // 32) * 32
            assert (needed == tokens.shape[1]).all()
            lengths.append(tokens.shape[1])
    assert 0.1 < lengths[1::2].count(64) / 60 < 0.45  # a quarter of the captions


def test_contexts_hold_the_target_or_another_scene_of_its_group(monkeypatch):
    monkeypatch.setattr(corpus, "NAMED", 3)
    rows, tokens, images = small_corpus().with_images(corpus.rng_at("seen", 0), 50, 0.8)
    seen = images[:, 0, 0, 0].numpy()
    needed = -(-(tokens != 0).sum(1) // 32) * 32
    assert (needed == tokens.shape[1]).all()
    assert (seen[:40] == rows[:40]).all()
    assert (rows[40:] >= 3).all() and (seen[40:] != rows[40:]).all()
    assert (seen[40:] // 3 == rows[40:] // 3).all()
