"""Scenes of the pocket world, and how they are drawn.

An image shows one object on a background. Named scenes can be fully described in words; *things*
(an outline and a texture without a name) and *unnamed styles* can only be specified by an image.
Scenes jitter continuously, and captions leave attributes out (captions.py), so that a prompt never
determines the image.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from dopsd.pocket.world.outlines import OUTLINES, Points

SIZE = 64  # pixels, both sides
SUPERSAMPLE = 4

Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (0.85, 0.12, 0.12),
    "orange": (0.96, 0.55, 0.10),
    "yellow": (0.96, 0.88, 0.15),
    "green": (0.10, 0.55, 0.15),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.12, 0.20, 0.80),
    "purple": (0.52, 0.12, 0.62),
    "pink": (0.97, 0.55, 0.75),
}
SIZES = {"small": 12.0, "big": 18.0}  # radius in pixels
PLACES = {
    "middle": (32, 32),
    "left": (20, 32),
    "right": (44, 32),
    "top": (32, 20),
    "bottom": (32, 44),
}
# Upper and lower colour; the horizon is at row HORIZON.
BACKGROUNDS: dict[str, tuple[Colour, Colour]] = {
    "paper": ((0.94, 0.93, 0.89), (0.94, 0.93, 0.89)),
    "slate": ((0.42, 0.45, 0.48), (0.42, 0.45, 0.48)),
    "night": ((0.06, 0.06, 0.14), (0.06, 0.06, 0.14)),
    "mint": ((0.70, 0.92, 0.80), (0.70, 0.92, 0.80)),
    "beach": ((0.62, 0.80, 0.94), (0.87, 0.77, 0.56)),
    "dusk": ((0.36, 0.22, 0.38), (0.16, 0.15, 0.20)),
}
HORIZON = 38
PATTERNS = ("plain", "stripes", "dots", "checks", "halves", "rings")


@dataclass(frozen=True)
class Look:
    """How a surface is drawn. frequency: pattern periods per object radius; angle in radians;
    ink_width in pixels."""

    pattern: str = "plain"
    second: Colour = (1.0, 1.0, 1.0)
    frequency: float = 2.0
    angle: float = 0.0
    ink: Colour = (0.05, 0.05, 0.05)
    ink_width: float = 0.0


STYLES: dict[str, Look] = {
    "flat": Look(),
    "inked": Look(ink_width=2.5),
    "striped": Look(pattern="stripes", second=(1.0, 1.0, 1.0), frequency=1.25, angle=math.pi / 4),
}


@dataclass(frozen=True)
class Jitter:
    """What varies and is never captioned: offset in pixels, size factor, rotation in radians,
    brightness factors of object and background."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    turn: float = 0.0
    shade: float = 1.0
    shade_behind: float = 1.0


@dataclass(frozen=True)
class Scene:
    """What an image shows. `noun` names an outline of OUTLINES; a thing has its own outline,
    colours and pattern."""

    noun: str = "circle"
    colour: str = "red"
    size: str = "big"
    place: str = "middle"
    background: str = "paper"
    style: str = "flat"
    thing: "Thing | None" = None
    look: Look | None = None  # an unnamed style, drawn instead of `style`
    jitter: Jitter = field(default_factory=Jitter)


@dataclass(frozen=True)
class Thing:
    """An object without a name: a random outline with a random two-colour texture."""

    outline: Points
    colour: Colour
    look: Look

    @staticmethod
    def from_seed(seed: int) -> "Thing":
        rng = np.random.default_rng([7, seed])
        angles = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        radius = np.ones_like(angles)
        for harmonic in (2, 3, 4, 5):
            radius += rng.uniform(-0.20, 0.20) * np.cos(
                harmonic * angles + rng.uniform(0, 2 * math.pi)
            )
        radius /= radius.max() / 1.1
        first, second = _two_colours(rng)
        look = Look(
            pattern=str(rng.choice(PATTERNS[1:])),
            second=second,
            frequency=float(rng.uniform(0.9, 1.5)),
            angle=float(rng.uniform(0, math.pi)),
        )
        outline = tuple(
            (float(r * math.sin(a)), float(-r * math.cos(a)))
            for r, a in zip(radius, angles, strict=True)
        )
        return Thing(outline, first, look)


def unnamed_style(seed: int) -> Look:
    """A drawing style that only an image can specify: a coloured contour and a pattern in a second
    colour."""
    rng = np.random.default_rng([11, seed])
    ink, second = _two_colours(rng)
    return Look(
        pattern=str(rng.choice(PATTERNS)),
        second=second,
        frequency=float(rng.uniform(0.9, 1.5)),
        angle=float(rng.uniform(0, math.pi)),
        ink=ink,
        ink_width=float(rng.uniform(2.0, 2.5)),
    )


def _two_colours(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Two random colours at least 0.6 apart in RGB, so that a texture is visible."""
    while True:
        first, second = rng.uniform(0, 1, (2, 3))
        if np.linalg.norm(first - second) >= 0.6:
            return tuple(map(float, first)), tuple(map(float, second))  # type: ignore[return-value]


def draw_jitter(rng: np.random.Generator) -> Jitter:
    """A random jitter, small enough for metrics/reader.py to recover the scene."""
    return Jitter(
        dx=float(rng.uniform(-3, 3)),
        dy=float(rng.uniform(-3, 3)),
        scale=float(rng.uniform(0.9, 1.1)),
        turn=float(rng.uniform(-0.12, 0.12)),
        shade=float(rng.uniform(0.88, 1.06)),
        shade_behind=float(rng.uniform(0.9, 1.06)),
    )


def draw_scene(
    rng: np.random.Generator, thing: Thing | None = None, look: Look | None = None
) -> Scene:
    """A random scene: of named parts, of the given thing, or in the given unnamed style."""

    def pick(options) -> str:
        return str(rng.choice(list(options)))

    return Scene(
        noun=pick(OUTLINES),
        colour=pick(COLOURS),
        size=pick(SIZES),
        place=pick(PLACES),
        background=pick(BACKGROUNDS),
        style=pick(STYLES),
        thing=thing,
        look=look,
        jitter=draw_jitter(rng),
    )


def layers(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage of the object's first colour, second colour and ink: three disjoint float32
    [64, 64] in [0, 1]."""
    look = _look_of(scene)
    alpha, contour = _coverage(_outline_of(scene), scene, look.ink_width)
    fill = alpha - contour
    share = _pattern(look, scene)
    return fill * (1 - share), fill * share, contour


def render(scene: Scene) -> np.ndarray:
    """The image of a scene, uint8 [64, 64, 3]."""
    look = _look_of(scene)
    first, second, ink = layers(scene)
    colour = scene.thing.colour if scene.thing else COLOURS[scene.colour]
    behind = backdrop(scene.background) * scene.jitter.shade_behind
    image = behind * (1 - first - second - ink)[..., None]
    image += first[..., None] * np.array(colour) * scene.jitter.shade
    image += second[..., None] * np.array(look.second) * scene.jitter.shade
    image += ink[..., None] * np.array(look.ink)
    return _to_bytes(image)


def backdrop(name: str) -> np.ndarray:
    """The background alone, float64 [64, 64, 3] in [0, 1]."""
    upper, lower = BACKGROUNDS[name]
    image = np.empty((SIZE, SIZE, 3))
    image[:HORIZON], image[HORIZON:] = upper, lower
    return image


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _outline_of(scene: Scene) -> Points:
    return scene.thing.outline if scene.thing else OUTLINES[scene.noun]


def _look_of(scene: Scene) -> Look:
    if scene.thing:
        return scene.thing.look
    return scene.look or STYLES[scene.style]


def _frame(scene: Scene) -> tuple[float, float, float, float]:
    """Centre x, centre y and radius in pixels; rotation in radians."""
    x, y = PLACES[scene.place]
    jitter = scene.jitter
    return x + jitter.dx, y + jitter.dy, SIZES[scene.size] * jitter.scale, jitter.turn


def _coverage(outline: Points, scene: Scene, ink_width: float) -> tuple[np.ndarray, np.ndarray]:
    """The share of each pixel inside the outline, and the share under its contour (inside only),
    float32 [64, 64]."""
    cx, cy, radius, turn = _frame(scene)
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    corners = [
        ((cx + x * cos - y * sin) * SUPERSAMPLE, (cy + x * sin + y * cos) * SUPERSAMPLE)
        for x, y in outline
    ]
    big = Image.new("L", (SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE))
    ImageDraw.Draw(big).polygon(corners, fill=255)
    alpha = np.asarray(big.reduce(SUPERSAMPLE), dtype=np.float32) / 255
    if not ink_width:
        return alpha, np.zeros_like(alpha)
    line = Image.new("L", big.size)
    width = round(2 * ink_width * SUPERSAMPLE)
    ImageDraw.Draw(line).line(
        [*corners, corners[0], corners[1]], fill=255, width=width, joint="curve"
    )
    contour = np.minimum(np.asarray(line), np.asarray(big))
    reduced = Image.fromarray(contour).reduce(SUPERSAMPLE)
    return alpha, np.asarray(reduced, dtype=np.float32) / 255


# Pixel coordinates, two samples a pixel along each side.
_GRID = (np.mgrid[0 : 2 * SIZE, 0 : 2 * SIZE].astype(np.float32) + 0.5) / 2


def _pattern(look: Look, scene: Scene) -> np.ndarray | float:
    """Share of the second colour at each pixel, in the object's own frame. float32 [64, 64]."""
    if look.pattern == "plain":
        return 0.0
    cx, cy, radius, turn = _frame(scene)
    cos, sin = math.cos(turn + look.angle) / radius, math.sin(turn + look.angle) / radius
    x, y = _GRID[1] - cx, _GRID[0] - cy
    u, v = x * cos + y * sin, y * cos - x * sin
    wave = 2 * math.pi * look.frequency
    if look.pattern == "stripes":
        second = np.sin(wave * u) > 0
    elif look.pattern == "checks":
        second = (np.sin(wave * u) > 0) ^ (np.sin(wave * v) > 0)
    elif look.pattern == "dots":
        second = np.cos(wave * u) + np.cos(wave * v) > 0.7
    elif look.pattern == "halves":
        second = u > 0
    else:
        second = np.sin(wave * np.hypot(u, v)) < 0
    return second.reshape(SIZE, 2, SIZE, 2).mean((1, 3), dtype=np.float32)
