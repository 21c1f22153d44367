"""Outlines that captions can name: polygons in units of the object's radius, y downward."""

import math

import numpy as np

Points = tuple[tuple[float, float], ...]


def _regular(corners: int, turn: float = 0.0) -> Points:
    angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
    return tuple((math.sin(a), -math.cos(a)) for a in angles)


def _star() -> Points:
    radii = [1.1 if k % 2 == 0 else 0.45 for k in range(10)]
    return tuple(
        (r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate(radii)
    )


def _heart() -> Points:
    ts = [2 * math.pi * k / 60 for k in range(60)]
    return tuple(
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in ts
    )


def _moon() -> Points:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.30 * math.pi, 1.70 * math.pi, 40)]
    inner = [
        (0.42 + 0.83 * math.cos(a), 0.83 * math.sin(a))
        for a in np.linspace(1.57 * math.pi, 0.43 * math.pi, 30)
    ]
    return tuple(outer + inner)


def _oval(
    cx: float, cy: float, rx: float, ry: float, start: float = 0.0, stop: float = 2.0, n: int = 40
) -> list:
    return [
        (cx + rx * math.cos(a), cy + ry * math.sin(a))
        for a in np.linspace(start * math.pi, stop * math.pi, n)
    ]


_CROSS: Points = (
    (-0.36, -1.0),
    (0.36, -1.0),
    (0.36, -0.36),
    (1.0, -0.36),
    (1.0, 0.36),
    (0.36, 0.36),
    (0.36, 1.0),
    (-0.36, 1.0),
    (-0.36, 0.36),
    (-1.0, 0.36),
    (-1.0, -0.36),
    (-0.36, -0.36),
)
_PINE: Points = (
    (0.0, -1.1),
    (0.45, -0.4),
    (0.25, -0.4),
    (0.7, 0.2),
    (0.4, 0.2),
    (0.9, 0.75),
    (0.18, 0.75),
    (0.18, 1.1),
    (-0.18, 1.1),
    (-0.18, 0.75),
    (-0.9, 0.75),
    (-0.4, 0.2),
    (-0.7, 0.2),
    (-0.25, -0.4),
    (-0.45, -0.4),
)
_TOWER: Points = (
    (-0.5, -1.1),
    (-0.2, -1.1),
    (-0.2, -0.8),
    (0.2, -0.8),
    (0.2, -1.1),
    (0.5, -1.1),
    (0.5, 1.1),
    (-0.5, 1.1),
)

# Noun of a caption -> outline.
OUTLINES: dict[str, Points] = {
    "circle": _regular(48),
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)),
    "star": _star(),
    "cross": _CROSS,
    "heart": _heart(),
    "moon": _moon(),
    # class nouns, each with three kinds
    "pine": _PINE,
    "oak": (*_oval(0, -0.3, 0.95, 0.75, 0.62, 2.38), (0.17, 1.1), (-0.17, 1.1)),
    "poplar": (*_oval(0, -0.25, 0.42, 0.9, 0.62, 2.38), (0.13, 1.1), (-0.13, 1.1)),
    "hut": (
        (0.0, -1.0),
        (1.0, -0.15),
        (0.75, -0.15),
        (0.75, 0.9),
        (-0.75, 0.9),
        (-0.75, -0.15),
        (-1.0, -0.15),
    ),
    "tower": _TOWER,
    "barn": ((-1.1, 0.8), (-1.1, -0.1), (-0.75, -0.6), (0.75, -0.6), (1.1, -0.1), (1.1, 0.8)),
}
CLASSES: dict[str, tuple[str, ...]] = {
    "tree": ("pine", "oak", "poplar"),
    "house": ("hut", "tower", "barn"),
}
CLASS_OF = {kind: noun for noun, kinds in CLASSES.items() for kind in kinds}
