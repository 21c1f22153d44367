"""Metrics of pocket images from pixels: attributes, sharpness, speckle, and errors of things.

An image is read as the nearest rendering over all named scenes and jitters (search.py). Images are
uint8 [N, 64, 64, 3] everywhere.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from dopsd.pocket.metrics.pixels import blurred, gradient, grown, rmse
from dopsd.pocket.metrics.search import (
    GRID,
    HIGHEST,
    LOWEST,
    UNLIKE,
    VALUES,
    Reading,
    allowed,
    backgrounds,
    bank,
    candidates,
    nearest,
    object_table,
)
from dopsd.pocket.world.captions import Stated
from dopsd.pocket.world.outlines import OUTLINES
from dopsd.pocket.world.scenes import (
    COLOURS,
    HORIZON,
    PLACES,
    SIZE,
    SIZES,
    Scene,
    Thing,
    backdrop,
    layers,
    render,
    unnamed_style,
)

SHARPEST = 97  # percentile of the gradient in thing_sharp
BATCH = 8  # images that are searched at once
VISIBLE = 0.12  # RGB distance from the background beyond which a pixel belongs to the object
# In pixels, between the radii of small things (< 14.8) and big ones (> 17.4), over 400 seeds.
THING_RADIUS = 16.2
CONTOUR = 2  # pixels along the outline that are left out for the colour: they may be ink
NOT_A_NOUN = 0.1  # share of a silhouette's area by which it may differ from a named outline


@dataclass(frozen=True)
class Attributes:
    """Which stated attributes the images show.

    share: of all stated attributes, those that are shown. all_right: share of the images with
    statements that show all of them. chance: expected `share` of a uniform guess. right, chances:
    [N, 6] in the order of VALUES, 1 or 0 and the guess's probability, NaN where nothing is stated.
    """

    share: float
    all_right: float
    chance: float
    right: np.ndarray
    chances: np.ndarray

    @property
    def per_image(self) -> np.ndarray:
        """The share of its stated attributes that each image shows, [N]; NaN without any."""
        stated = ~np.isnan(self.right)
        with np.errstate(invalid="ignore"):
            return np.nansum(self.right, axis=1) / stated.sum(1)


@dataclass(frozen=True)
class ImageMeasures:
    """The results of one search. readings: regardless of the statements. sharpness, speckle:
    [N]."""

    attributes: Attributes
    sharpness: np.ndarray
    speckle: np.ndarray
    readings: list[Reading]


def read(images: np.ndarray, stated: Sequence[Stated] | None = None) -> list[Reading]:
    """The nearest rendering of each image, with `stated` among the scenes that agree with it.

    It is nearest in RMSE after a blur like the image's (BLURS); otherwise an unsharp image would be
    read in duller colours. `Reading.rmse` is that of the sharp rendering.
    """
    statements = [{}] * len(images) if stated is None else stated
    readings: list[Reading] = []
    for start in range(0, len(images), BATCH):
        part, stated_here = images[start : start + BATCH], statements[start : start + BATCH]
        pixels = torch.from_numpy(np.ascontiguousarray(part)).float().div(255).permute(0, 3, 1, 2)
        small = avg_pool2d(pixels, 2).flatten(2)
        names, shades, behind = backgrounds(small, stated_here)
        errors, jitters = object_table(small, behind)
        for k in range(len(part)):
            scenes = candidates(errors[k], jitters[k], stated_here[k], names[k], shades[k])
            readings.append(nearest(part[k] / np.float32(255), scenes))
    return readings


def measure(images: np.ndarray, stated: Sequence[Stated]) -> ImageMeasures:
    """Readings, attributes, sharpness and speckle from one search, and a second one where the
    reading contradicts the statement."""
    readings = read(images, None)
    consistent = list(readings)
    wrong = [k for k, r in enumerate(readings) if not _is_consistent(r.scene, stated[k])]
    for k, reading in zip(wrong, read(images[wrong], [stated[k] for k in wrong]), strict=True):
        consistent[k] = reading
    crispness = [_crispness(p, render(r.scene)) for p, r in zip(images, consistent, strict=True)]
    sharp, speckled = np.array(crispness).reshape(-1, 2).T
    return ImageMeasures(_attributes(images, readings, stated), sharp, speckled, readings)


def attributes(images: np.ndarray, stated: Sequence[Stated]) -> Attributes:
    """Which stated attributes the images show. A class noun ("tree") is right for any of its
    kinds."""
    return _attributes(images, read(images), stated)


def sharpness(images: np.ndarray, stated: Sequence[Stated]) -> np.ndarray:
    """Edge strength relative to the nearest consistent rendering, [N] in [0, 1].

    It is min(1, G95 / G95 of the rendering), G95 being the 95th percentile of the gradient (central
    differences, norm over x, y and RGB) within 2 pixels of the rendering's strong edges.
    """
    return measure(images, stated).sharpness


def speckle(images: np.ndarray, stated: Sequence[Stated]) -> np.ndarray:
    """Mean |Laplacian| of the RGB mean where the nearest consistent rendering is flat (3 pixels
    from edges), [N]."""
    return measure(images, stated).speckle


def thing_error(images: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
    """RMSE in [0, 1], [N], between each image and its true scene inside the object's mask grown by
    2 pixels.

    It is the minimum over shifts of the image by up to 2 pixels each way: the exact position does
    not count.
    """
    return np.array(
        [
            _shifted_errors(p, render(s)[None], _objects_mask([s]))[0]
            for p, s in zip(images, scenes, strict=True)
        ]
    )


def thing_hit(
    images: np.ndarray, scenes: Sequence[Scene], distractor_seeds: Sequence[int]
) -> np.ndarray:
    """Whether each image is nearer to its scene's thing than to every distractor, bool [N]:
    `Thing.from_seed`, or `unnamed_style` where the scene is in one.

    The error is that of thing_error, but over the union of all candidates' masks, so that a small
    candidate has no advantage. An image of another random thing hits with probability
    1 / (1 + distractors).
    """
    hits = []
    for image, scene in zip(images, scenes, strict=True):
        mask, rivals = _rivals(scene, tuple(distractor_seeds))
        errors = _shifted_errors(image, rivals, mask)
        hits.append(errors[0] < errors[1:].min())
    return np.array(hits)


@functools.lru_cache(maxsize=64)  # a benchmark's scenes are the same at every call
def _rivals(scene: Scene, distractor_seeds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The mask of all candidates, and the scene followed by its distractors, uint8
    [1 + distractors, 64, 64, 3]."""
    if scene.thing:
        others = [replace(scene, thing=Thing.from_seed(seed)) for seed in distractor_seeds]
    else:
        others = [replace(scene, look=unnamed_style(seed)) for seed in distractor_seeds]
    rivals = [scene, *others]
    return _objects_mask(rivals), np.stack([render(rival) for rival in rivals])


def thing_sharp(images: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
    """Edge strength relative to the true scene, [N] in [0, 1]: the 97th percentile of the gradient
    over that of the true image, at most 1. Position does not count, so that a blur of the thing is
    seen whatever its error is."""

    def strongest(image: np.ndarray) -> float:
        return float(np.percentile(gradient(image / 255.0), SHARPEST))

    return np.array(
        [
            min(1.0, strongest(image) / strongest(render(scene)))
            for image, scene in zip(images, scenes, strict=True)
        ]
    )


def _is_consistent(scene: Scene, stated: Stated) -> bool:
    return all(getattr(scene, attribute) in allowed(attribute, stated) for attribute in stated)


def _attributes(
    images: np.ndarray, readings: Sequence[Reading], stated: Sequence[Stated]
) -> Attributes:
    right = np.full((len(readings), len(VALUES)), np.nan)
    chances = right.copy()
    for k, (reading, statement) in enumerate(zip(readings, stated, strict=True)):
        shown = _shown(images[k] / np.float32(255), reading)
        for column, attribute in enumerate(VALUES):
            if attribute in statement:
                values = allowed(attribute, statement)
                right[k, column] = getattr(shown, attribute) in values
                chances[k, column] = len(values) / len(VALUES[attribute])
    states_any = ~np.isnan(right).all(1)
    all_right = (right[states_any] != 0).all(1)
    return Attributes(
        _mean(right[~np.isnan(right)]),
        _mean(all_right),
        _mean(chances[~np.isnan(right)]),
        right,
        chances,
    )


def _mean(values: np.ndarray) -> float:
    """The mean, NaN (without a warning) for an empty array."""
    return float(values.mean()) if values.size else float("nan")


def _shown(image: np.ndarray, reading: Reading) -> Scene:
    """The scene whose attributes the image shows: its reading, or, if that is far off, what the
    silhouette suggests."""
    nearest = blurred(render(reading.scene) / np.float32(255), reading.blur)
    if rmse(image, nearest) < UNLIKE:
        return reading.scene
    visible = _visible(image, reading.scene)
    if not visible.any():
        return reading.scene
    small = torch.from_numpy(
        visible.reshape(SIZE // 2, 2, SIZE // 2, 2).mean((1, 3), dtype=np.float32)
    ).flatten()
    rows, products = bank()
    area = products["oo"].sum(0)
    unlike = area - 2 * rows[0] @ small + small.square().sum()
    best = int(unlike.argmin())
    sizes = (len(OUTLINES), len(SIZES), len(PLACES), len(GRID))
    noun, size, place, _ = (int(k) for k in np.unravel_index(best, sizes))
    y, x = np.nonzero(visible)
    radius = np.hypot(y - y.mean(), x - x.mean()).max()
    if unlike[best] > NOT_A_NOUN * area[best]:  # an outline without a name: the extent decides
        size = list(SIZES).index("big" if radius > THING_RADIUS else "small")
    named = {a: VALUES[a][k] for a, k in (("noun", noun), ("size", size), ("place", place))}
    inside = ~grown(~visible, CONTOUR)
    return replace(
        reading.scene, colour=_commonest_colour(image[inside if inside.any() else visible]), **named
    )


def _visible(image: np.ndarray, scene: Scene) -> np.ndarray:
    """Pixels unlike the scene's background, bool [64, 64]; near the horizon, any blend of its
    halves counts as background."""
    behind = backdrop(scene.background) * scene.jitter.shade_behind
    upper, across = behind[0, 0], behind[-1, 0] - behind[0, 0]
    rows = slice(HORIZON - 4, HORIZON + 4)
    blend = np.clip((image[rows] - upper) @ across / max(across @ across, 1e-6), 0, 1)
    behind[rows] = upper + blend[..., None] * across
    return np.linalg.norm(image - behind, axis=2) > VISIBLE


def _commonest_colour(pixels: np.ndarray) -> str:
    """The named colour that most pixels [n, 3] show, in the shade that suits it best."""
    shades = np.linspace(LOWEST[4], HIGHEST[4], 7)
    shaded = np.array(list(COLOURS.values()))[:, None] * shades[:, None]
    near = np.linalg.norm(pixels[:, None, None] - shaded, axis=-1) < 0.06
    return VALUES["colour"][int(near.sum(0).max(1).argmax())]


def _crispness(image: np.ndarray, rendering: np.ndarray) -> tuple[float, float]:
    """(sharpness, speckle) of an image beside a rendering, both uint8 [64, 64, 3]."""
    ours, ideal = gradient(image / 255.0), gradient(rendering / 255.0)
    near = grown(ideal > 0.25 * ideal.max(), 2)
    sharp = min(1.0, float(np.percentile(ours[near], 95) / np.percentile(ideal[near], 95)))
    grey = image.mean(2) / 255.0
    laplacian = (
        grey[2:, 1:-1] + grey[:-2, 1:-1] + grey[1:-1, 2:] + grey[1:-1, :-2] - 4 * grey[1:-1, 1:-1]
    )
    flat = ~grown(ideal > 0.02, 3)
    flat[[0, 1, -2, -1]] = flat[:, [0, 1, -2, -1]] = False
    return sharp, float(np.abs(laplacian)[flat[1:-1, 1:-1]].mean())


def _objects_mask(scenes: Sequence[Scene]) -> np.ndarray:
    """Pixels that the object of any of the scenes touches, grown by 2 pixels, bool [64, 64]."""
    return grown(np.any([np.sum(layers(scene), axis=0) > 0 for scene in scenes], axis=0), 2)


def _shifted_errors(image: np.ndarray, renderings: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """RMSE inside the mask of an image to renderings [R, 64, 64, 3], least over shifts up to 2
    pixels, [R]."""
    padded = np.pad(image / 255.0, ((2, 2), (2, 2), (0, 0)), mode="edge")
    shifted = [
        padded[dy : dy + SIZE, dx : dx + SIZE][mask].ravel() for dy in range(5) for dx in range(5)
    ]
    ideals = (renderings[:, mask] / 255.0).reshape(len(renderings), -1)
    moved = np.stack(shifted)
    squared = np.square(moved).sum(1)[:, None] - 2 * moved @ ideals.T + np.square(ideals).sum(1)
    return np.sqrt(np.maximum(squared.min(0), 0) / ideals.shape[1])
