"""Captions of pocket scenes, which leave attributes out so that no prompt determines the image.

A scene has six attributes (size, colour, noun, place, background, style). Each optional one is
stated with probability STATED; the noun is sometimes only its class ("tree") or "shape". On average
2.4 of the six stay unstated.
"""

from collections.abc import Mapping

import numpy as np

from dopsd.pocket.world.outlines import CLASS_OF, CLASSES, OUTLINES
from dopsd.pocket.world.scenes import BACKGROUNDS, COLOURS, PLACES, SIZES, STYLES, Scene

STATED = 0.58
NOUN_STATED = 0.7

# Made-up names of things and styles. They have no meaning: in training they are drawn at random.
NAMES = (
    "zib",
    "mox",
    "tuva",
    "kelp",
    "orli",
    "dax",
    "fenn",
    "gorm",
    "hux",
    "ivo",
    "jass",
    "lumo",
    "nerf",
    "pim",
    "quon",
    "rilo",
    "sib",
    "tarn",
    "ulo",
    "vex",
    "wim",
    "yort",
    "zann",
    "brug",
)

_PLACE_WORDS = {place: ("in the " if place == "middle" else "at the ") + place for place in PLACES}

# Attribute -> the value that a caption states; a noun may be a class ("tree").
Stated = Mapping[str, str]


def stated_of(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """Draw which attributes of a scene its caption states."""
    stated: dict[str, str] = {}
    for attribute in ("size", "colour", "place", "background", "style"):
        hidden_by_look = (scene.thing and attribute in ("colour", "style")) or (
            scene.look and attribute == "style"
        )
        if rng.random() < STATED and not hidden_by_look:
            stated[attribute] = getattr(scene, attribute)
    if scene.thing is None:
        if rng.random() < NOUN_STATED:
            stated["noun"] = scene.noun
        elif scene.noun in CLASS_OF:
            stated["noun"] = CLASS_OF[scene.noun]
    return stated


def caption_of(
    stated: Stated, thing: bool = False, style: bool = False, name: str | None = None
) -> str:
    """The caption that states these. A thing is called a "toy", an unnamed style "this style";
    either may have a made-up name."""
    words = ["a"]
    if thing and name:
        words.append(name)
    words += [stated[a] for a in ("size", "colour") if a in stated]
    words.append("toy" if thing else stated.get("noun", "shape"))
    if "place" in stated:
        words.append(_PLACE_WORDS[stated["place"]])
    if "background" in stated:
        words += ["on", stated["background"]]
    if style:
        words += ["in", name or "this", "style"]
    elif "style" in stated:
        words += ["in", stated["style"], "style"]
    return " ".join(words)


def stated_in(caption: str) -> dict[str, str]:
    """What a caption states: the inverse of `caption_of`. Other words are ignored."""
    tables = {
        "size": SIZES,
        "colour": COLOURS,
        "noun": {*OUTLINES, *CLASSES},
        "place": PLACES,
        "background": BACKGROUNDS,
        "style": STYLES,
    }
    words = caption.split()
    return {
        attribute: word for attribute, table in tables.items() for word in words if word in table
    }


def vocabulary() -> list[str]:
    """Every word that a caption can contain; each is one token of the tokenizer."""
    words = {"a", "toy", "shape", "in", "at", "on", "the", "this", "style", *NAMES, *CLASSES}
    for table in (OUTLINES, COLOURS, SIZES, PLACES, BACKGROUNDS, STYLES):
        words |= set(table)
    return sorted(words)
