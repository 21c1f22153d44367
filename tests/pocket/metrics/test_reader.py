"""The image reader is right on rendered images, whose scenes are known."""

from dataclasses import replace

import numpy as np
import pytest

from dopsd.pocket.metrics.reader import (
    VALUES,
    attributes,
    measure,
    read,
    sharpness,
    speckle,
    thing_error,
    thing_hit,
    thing_sharp,
)
from dopsd.pocket.world.captions import Stated, stated_of
from dopsd.pocket.world.outlines import CLASSES
from dopsd.pocket.world.scenes import Scene, Thing, draw_scene, render, unnamed_style

DISTRACTORS = range(5000, 5063)


def drawn(
    count: int, seed: int, thing: bool = False, style: bool = False
) -> tuple[list[Scene], np.ndarray, list[Stated]]:
    """Scenes with drawn jitter, their images and what their captions state."""
    rng = np.random.default_rng(seed)
    scenes = [
        draw_scene(
            rng,
            Thing.from_seed(2000 + k) if thing else None,
            unnamed_style(2000 + k) if style else None,
        )
        for k in range(count)
    ]
    return (
        scenes,
        np.stack([render(scene) for scene in scenes]),
        [stated_of(scene, rng) for scene in scenes],
    )


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    """Images under a Gaussian of sigma pixels, independent of the one in the reader."""
    taps = np.arange(-8, 9)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    soft = images.astype(float)
    for axis in (1, 2):
        padded = np.pad(soft, [(8, 8) if a == axis else (0, 0) for a in range(4)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 17, axis)
        soft = windows @ (weights / weights.sum())
    return (soft + 0.5).astype(np.uint8)


def rmse(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one / 255.0 - other / 255.0).mean()))


@pytest.fixture(scope="module")
def named() -> tuple[list[Scene], np.ndarray, list[Stated]]:
    return drawn(200, seed=0)


@pytest.fixture(scope="module")
def true_measures(named):
    _, images, stated = named
    return measure(images, stated)


def test_rendered_images_have_the_stated_attributes(true_measures):
    assert true_measures.attributes.share >= 0.995
    assert true_measures.attributes.all_right >= 0.98


def test_the_search_ends_nearly_as_close_to_the_image_as_the_true_scene(true_measures):
    # The true scene has an RMSE of 0.
    excess = np.array([reading.rmse for reading in true_measures.readings])
    assert np.median(excess) < 0.003
    assert np.percentile(excess, 98) < 0.01
    assert excess.max() < 0.02


def test_blurred_images_are_read_like_sharp_ones(named):
    _, images, stated = named
    assert attributes(blurred(images[:100], 1.2), stated[:100]).share >= 0.97


def test_things_are_read_by_their_silhouette():
    _, images, stated = drawn(60, seed=1, thing=True)
    assert attributes(images, stated).share >= 0.99
    assert attributes(blurred(images, 1.2), stated).share >= 0.97


def test_unnamed_styles_are_read_except_colours_hidden_by_thick_ink():
    _, images, stated = drawn(60, seed=2, style=True)
    right = attributes(images, stated).right
    assert np.nanmean(np.delete(right, list(VALUES).index("colour"), axis=1)) >= 0.985
    assert np.nanmean(right[:, list(VALUES).index("colour")]) >= 0.9


def test_images_of_other_scenes_are_right_at_the_rate_of_chance(named, true_measures):
    _, images, stated = named
    shuffled = attributes(images[:80], stated[1:81])
    assert shuffled.share == pytest.approx(shuffled.chance, abs=0.1)
    assert shuffled.per_image.shape == (80,)


def test_a_class_noun_accepts_its_kinds_and_no_others():
    kinds = ("pine", "oak", "poplar", "hut", "circle")
    images = np.stack([render(Scene(kind)) for kind in kinds])
    scores = attributes(images, [{"noun": "tree"}] * len(kinds))
    assert scores.right[:, 0].tolist() == [1, 1, 1, 0, 0]
    assert scores.chance == pytest.approx(3 / 13)


def test_blank_images_and_empty_captions_are_measured():
    blank, noise = np.zeros((64, 64, 3)), np.random.default_rng(0).uniform(0, 255, (64, 64, 3))
    measures = measure(np.stack([blank, noise]).astype(np.uint8), [{}, {"size": "big"}])
    assert np.isnan(measures.attributes.per_image).tolist() == [True, False]
    assert np.isfinite(measures.sharpness).all() and np.isfinite(measures.speckle).all()


def test_a_search_with_stated_attributes_returns_only_consistent_scenes(named):
    _, images, _ = named
    stated = {"noun": "tree", "colour": "blue", "place": "top", "background": "mint"}
    for reading in read(images[:8], [stated] * 8):
        assert reading.scene.noun in CLASSES["tree"]
        assert all(
            getattr(reading.scene, key) == stated[key] for key in ("colour", "place", "background")
        )


def test_a_constrained_search_never_ends_closer_than_a_free_one(named, true_measures):
    _, images, _ = named
    consistent = read(images[:8], [{"noun": "house", "style": "flat"}] * 8)
    for free, bound in zip(true_measures.readings, consistent, strict=False):
        assert bound.rmse >= free.rmse - 1e-3


def test_sharpness_is_one_on_rendered_images_and_falls_with_blur(named, true_measures):
    _, images, stated = named
    assert true_measures.sharpness.mean() > 0.98
    falling = [
        sharpness(blurred(images[:24], sigma), stated[:24]).mean() for sigma in (0.7, 1.2, 2.0)
    ]
    assert 0.93 > falling[0] > falling[1] + 0.1 > falling[2] + 0.2


def test_speckle_rises_with_noise_and_blocks_and_not_with_blur(named, true_measures):
    _, images, stated = named
    images, stated, clean = images[:24], stated[:24], true_measures.speckle[:24]
    rng = np.random.default_rng(0)
    noisy = np.clip(images + rng.normal(0, 6, images.shape), 0, 255).astype(np.uint8)
    blocks = np.kron(rng.normal(0, 6, (24, 16, 16, 3)), np.ones((1, 4, 4, 1)))
    blocky = np.clip(images + blocks, 0, 255).astype(np.uint8)
    assert speckle(noisy, stated).mean() > clean.mean() + 0.02
    assert speckle(blocky, stated).mean() > clean.mean() + 0.005
    assert speckle(blurred(images, 1.2), stated).mean() < clean.mean() + 0.002


def test_thing_error_is_zero_on_rendered_images_and_tolerates_two_pixels():
    scenes, images, _ = drawn(12, seed=3, thing=True)
    assert thing_error(images, scenes).max() < 1e-6
    assert thing_error(np.roll(images, (1, -2), (1, 2)), scenes).mean() < 0.02
    assert thing_error(np.roll(images, 6, 2), scenes).mean() > 0.1


def test_thing_sharp_is_one_on_rendered_images_and_falls_with_blur_wherever_the_thing_is():
    scenes, images, _ = drawn(12, seed=3, thing=True)
    assert (thing_sharp(images, scenes) == 1).all()
    means = [thing_sharp(blurred(images, sigma), scenes).mean() for sigma in (0.6, 1.2, 2.4)]
    assert 1 > means[0] > means[1] > means[2] and means[2] < 0.5
    moved = np.roll(blurred(images, 1.2), 2, 1)
    assert abs(thing_sharp(moved, scenes).mean() - means[1]) < 0.05


def test_the_right_thing_is_a_hit_and_a_random_one_only_by_chance():
    scenes, images, _ = drawn(24, seed=4, thing=True)
    assert thing_hit(images, scenes, DISTRACTORS).all()
    assert thing_hit(blurred(images, 1.2), scenes, DISTRACTORS).mean() > 0.9
    others = [
        Scene(**{**vars(scene), "thing": Thing.from_seed(9000 + k)})
        for k, scene in enumerate(scenes * 3)
    ]
    hits = thing_hit(np.stack([render(scene) for scene in others]), scenes * 3, DISTRACTORS)
    assert hits.sum() <= 6  # 1/64 expected of 72 images; more than 6 hits have a chance below 1e-4


def test_a_style_is_told_from_other_styles_by_what_is_drawn_in_it():
    scenes, images, _ = drawn(24, seed=5, style=True)
    assert thing_hit(images, scenes, DISTRACTORS).mean() > 0.9
    others = [replace(scene, look=unnamed_style(9000 + k)) for k, scene in enumerate(scenes)]
    strange = np.stack([render(scene) for scene in others])
    assert thing_hit(strange, scenes, DISTRACTORS).sum() <= 4
    assert thing_error(images, scenes).max() < 1e-6 < 0.05 < thing_error(strange, scenes).mean()
