"""Things out of the pocket world are what their kind says, by pixels, and concept datasets and
exams take them by their seed."""

import json

import numpy as np
from PIL import Image

from dopsd.pocket.world.datasets import CONCEPT_FILE, concept_of, write_concept
from dopsd.pocket.world.out_of_domain import CORNERS, KINDS, OUT_OF_WORLD, kind_of, thing_of
from dopsd.pocket.world.scenes import Scene, Thing, layers

SEEDS = range(OUT_OF_WORLD, OUT_OF_WORLD + len(KINDS))


def test_things_of_the_world_stay_as_they_are():
    assert (
        thing_of(1_000_003) == Thing.from_seed(1_000_003) and kind_of(1_000_003) == "of the world"
    )


def test_a_rim_is_wider_for_its_grade_and_in_a_third_colour():
    inked = [layers(Scene(thing=thing_of(seed)))[2].sum() for seed in SEEDS[:3]]
    assert 0 < inked[0] < inked[1] < inked[2]
    look = thing_of(SEEDS[0]).look
    assert (
        min(
            np.linalg.norm(np.subtract(look.ink, c))
            for c in (thing_of(SEEDS[0]).colour, look.second)
        )
        >= 0.5
    )


def test_stars_have_as_many_corners_as_they_say():
    for corners, seed in zip(CORNERS, SEEDS[3:6], strict=True):
        radii = np.hypot(*np.array(thing_of(seed).outline).T)
        assert sum(radii > np.roll(radii, 1)) == corners


def test_letters_differ_and_fill_about_half_of_their_square():
    masks = [np.sum(layers(Scene(thing=thing_of(seed))), axis=0) > 0.5 for seed in SEEDS[6:]]
    for index, mask in enumerate(masks):
        assert 0.3 < mask.sum() / (36 * 36) < 0.7
        assert all((mask != other).sum() > 100 for other in masks[:index])


def test_a_lesson_of_such_a_thing_is_drawn_and_known_again(tmp_path):
    write_concept(tmp_path, SEEDS[8])
    assert (
        concept_of(tmp_path)
        == SEEDS[8]
        == json.loads((tmp_path / CONCEPT_FILE).read_text())["thing"]
    )
    assert Image.open(tmp_path / "3.png").size == (64, 64)
