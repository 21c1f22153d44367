"""Out-of-domain things have the pixels that their kind promises, and datasets take them by seed."""

import json

import numpy as np
from PIL import Image

from dopsd.pocket.world.datasets import CONCEPT_FILE, Concept, concept_of, write_concept
from dopsd.pocket.world.out_of_domain import CORNERS, KINDS, OUT_OF_WORLD, kind_of, thing_of
from dopsd.pocket.world.scenes import Scene, Thing, layers

SEEDS = range(OUT_OF_WORLD, OUT_OF_WORLD + len(KINDS))


def test_a_seed_in_the_domain_gives_the_ordinary_thing():
    assert (
        thing_of(1_000_003) == Thing.from_seed(1_000_003) and kind_of(1_000_003) == "of the world"
    )


def test_a_rim_widens_with_its_grade_and_has_a_third_colour():
    inked = [layers(Scene(thing=thing_of(seed)))[2].sum() for seed in SEEDS[:3]]
    assert 0 < inked[0] < inked[1] < inked[2]
    look = thing_of(SEEDS[0]).look
    other_colours = (thing_of(SEEDS[0]).colour, look.second)
    assert min(np.linalg.norm(np.subtract(look.ink, c)) for c in other_colours) >= 0.5


def test_stars_have_the_number_of_corners_of_their_kind():
    for corners, seed in zip(CORNERS, SEEDS[3:6], strict=True):
        radii = np.hypot(*np.array(thing_of(seed).outline).T)
        assert sum(radii > np.roll(radii, 1)) == corners


def test_letters_differ_and_fill_about_half_of_their_square():
    masks = [np.sum(layers(Scene(thing=thing_of(seed))), axis=0) > 0.5 for seed in SEEDS[6:]]
    for index, mask in enumerate(masks):
        assert 0.3 < mask.sum() / (36 * 36) < 0.7
        assert all((mask != other).sum() > 100 for other in masks[:index])


def test_a_concept_dataset_of_such_a_thing_is_written_and_recognised(tmp_path):
    write_concept(tmp_path, SEEDS[8])
    assert concept_of(tmp_path) == Concept("thing", SEEDS[8])
    assert json.loads((tmp_path / CONCEPT_FILE).read_text()) == {"thing": SEEDS[8]}
    assert Image.open(tmp_path / "3.png").size == (64, 64)
