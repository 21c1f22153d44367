"""Things unlike those of the training data, in grades: a third colour, more corners, letters.

Seeds from OUT_OF_WORLD on give ten kinds in turn, so that data sets and benchmarks need not know of
them.
"""

import math
from dataclasses import replace

import numpy as np

from dopsd.pocket.world.outlines import Points
from dopsd.pocket.world.scenes import Colour, Thing

OUT_OF_WORLD = 3_000_000
RIMS = (2.0, 4.0, 6.0)  # pixels of a rim in a third colour
CORNERS = (7, 10, 14)
# Block letters of two, two, three and four strokes, in units of an object's radius.
LETTERS: dict[str, Points] = {
    "L": ((-0.7, -1.0), (-0.15, -1.0), (-0.15, 0.5), (0.7, 0.5), (0.7, 1.0), (-0.7, 1.0)),
    "T": (
        (-0.9, -1.0),
        (0.9, -1.0),
        (0.9, -0.5),
        (0.27, -0.5),
        (0.27, 1.0),
        (-0.27, 1.0),
        (-0.27, -0.5),
        (-0.9, -0.5),
    ),
    "H": (
        (-0.9, -1.0),
        (-0.35, -1.0),
        (-0.35, -0.25),
        (0.35, -0.25),
        (0.35, -1.0),
        (0.9, -1.0),
        (0.9, 1.0),
        (0.35, 1.0),
        (0.35, 0.25),
        (-0.35, 0.25),
        (-0.35, 1.0),
        (-0.9, 1.0),
    ),
    "E": (
        (-0.75, -1.0),
        (0.75, -1.0),
        (0.75, -0.6),
        (-0.25, -0.6),
        (-0.25, -0.2),
        (0.55, -0.2),
        (0.55, 0.2),
        (-0.25, 0.2),
        (-0.25, 0.6),
        (0.75, 0.6),
        (0.75, 1.0),
        (-0.75, 1.0),
    ),
}
KINDS = (
    *(f"rim of {width:g}" for width in RIMS),
    *(f"{n} corners" for n in CORNERS),
    *(f"letter {c}" for c in LETTERS),
)


def thing_of(seed: int) -> Thing:
    """`Thing.from_seed`; from OUT_OF_WORLD on with the outline or rim of `kind_of`."""
    thing = Thing.from_seed(seed)
    if seed < OUT_OF_WORLD:
        return thing
    rng, kind = np.random.default_rng([17, seed]), (seed - OUT_OF_WORLD) % len(KINDS)
    if kind < len(RIMS):
        return replace(
            thing, look=replace(thing.look, ink=_third_colour(thing, rng), ink_width=RIMS[kind])
        )
    kind -= len(RIMS)
    if kind < len(CORNERS):
        return replace(thing, outline=_star(CORNERS[kind], float(rng.uniform(0.4, 0.6))))
    return replace(thing, outline=list(LETTERS.values())[kind - len(CORNERS)])


def kind_of(seed: int) -> str:
    """How a thing differs from the training world; "of the world" if it does not."""
    return "of the world" if seed < OUT_OF_WORLD else KINDS[(seed - OUT_OF_WORLD) % len(KINDS)]


def _third_colour(thing: Thing, rng: np.random.Generator) -> Colour:
    """A random colour at least 0.5 away in RGB from the thing's two."""
    while True:
        third = rng.uniform(0, 1, 3)
        if (
            min(
                np.linalg.norm(third - np.array(colour))
                for colour in (thing.colour, thing.look.second)
            )
            >= 0.5
        ):
            return tuple(map(float, third))  # type: ignore[return-value]


def _star(corners: int, inner: float) -> Points:
    radii = [1.1 if k % 2 == 0 else inner for k in range(2 * corners)]
    return tuple(
        (r * math.sin(math.pi * k / corners), -r * math.cos(math.pi * k / corners))
        for k, r in enumerate(radii)
    )
