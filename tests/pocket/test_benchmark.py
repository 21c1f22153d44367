"""The exam's questions in other words: what a model that cannot tell words apart would score on
them."""

from dataclasses import replace

import numpy as np
import torch

from dopsd.pocket.benchmark import Sheet, caption, sit
from dopsd.pocket.world.captions import NAMES

THING = 1_000_100


def test_other_words_never_say_the_things_own_name(pocket_text_encoder):
    sheet = Sheet.write(THING, pocket_text_encoder, unrelated_count=1)
    own = NAMES[THING % len(NAMES)]
    said = [[word for word in prompt.split() if word in NAMES] for prompt in sheet.others]
    assert all(own not in words for words in said) and said[1::2] == [[]] * 12
    assert len({words[0] for words in said[::2]}) == 12
    for scene, prompt, words in zip(sheet.scenes, sheet.others, said, strict=True):
        assert prompt.replace(f"{words[0]} " if words else "\n", "") == caption(
            scene, THING
        ).replace(f"{own} ", "")


def test_a_model_for_which_all_names_are_one_bleeds_all_that_it_learned(
    pocket, pocket_text_encoder
):
    sheet = Sheet.write(THING, pocket_text_encoder, unrelated_count=1)
    deaf = replace(sheet, others_context=sheet.scene_context)
    cpu = torch.device("cpu")
    found = sit(
        deaf,
        pocket.load_denoiser(cpu, torch.float32),
        pocket.load_vae(cpu, torch.float32),
        pocket.schedule(1, 16, 16),
        (pocket.channels, 16, 16),
    )
    np.testing.assert_array_equal(found.others_error, found.thing_error)
