"""Folders of pocket images with captions, as a user would bring them: a new thing, a new style, or
pairs of a chosen and a rejected image."""

import json
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from dopsd.files import write_json, write_jsonl, write_text
from dopsd.pocket.world.captions import NAMES, caption_of, stated_of
from dopsd.pocket.world.out_of_domain import thing_of
from dopsd.pocket.world.scenes import Scene, draw_scene, render, unnamed_style

HELD_OUT = 1_000_000  # things, styles and captions with seeds from here on were not in training
CONCEPT_FILE = "pocket.json"  # holds the concept's kind and seed
STATED_OF = {  # what the captions of each kind of concept state
    "thing": ("size", "place", "background"),
    "style": ("size", "colour", "noun", "place", "background"),
}


class Concept(NamedTuple):
    """What no word describes and only images can teach: a thing, or a style of drawing."""

    kind: Literal["thing", "style"]
    seed: int

    @property
    def name(self) -> str:
        """The made-up name that its captions give it."""
        return NAMES[self.seed % len(NAMES)]

    def draw_scenes(self, rng: np.random.Generator, count: int) -> list[Scene]:
        """Random scenes of the thing, or of named objects in the style."""
        if self.kind == "thing":
            thing = thing_of(self.seed)
            return [draw_scene(rng, thing=thing) for _ in range(count)]
        look = unnamed_style(self.seed)
        return [draw_scene(rng, look=look) for _ in range(count)]

    def caption(self, scene: Scene, name: str | None) -> str:
        """The full caption of one of its scenes. name: the concept's, another, or None to leave it
        out: a thing is then "a toy", and no style is mentioned."""
        stated = {attribute: getattr(scene, attribute) for attribute in STATED_OF[self.kind]}
        is_thing = self.kind == "thing"
        return caption_of(
            stated, thing=is_thing, style=not is_thing and name is not None, name=name
        )

    def write(self, folder: Path, rng: np.random.Generator, images: int) -> None:
        """Draw scenes into a folder, with captions in .txt files of the same stem."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, scene in enumerate(self.draw_scenes(rng, images)):
            Image.fromarray(render(scene)).save(folder / f"{index}.png")
            write_text(folder / f"{index}.txt", self.caption(scene, self.name) + "\n")
        write_json(folder / CONCEPT_FILE, {self.kind: self.seed})


def write_concept(folder: Path, seed: int, images: int = 4) -> None:
    """Draw `images` scenes of thing `seed`, with captions."""
    Concept("thing", seed).write(folder, np.random.default_rng([HELD_OUT, seed, 1]), images)


def write_style_concept(folder: Path, seed: int, images: int = 4) -> None:
    """Draw `images` named scenes in the unnamed style `seed`, with captions."""
    Concept("style", seed).write(folder, np.random.default_rng([HELD_OUT, seed, 4]), images)


def write_pairs(folder: Path, seed: int, count: int) -> None:
    """Draw `count` preference pairs and their metadata.jsonl: chosen is the caption's scene,
    rejected is another scene."""
    rng = np.random.default_rng([HELD_OUT, seed, 5])
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        scene, other = draw_scene(rng), draw_scene(rng)
        names = {"chosen": f"{index}-chosen.png", "rejected": f"{index}-rejected.png"}
        for name, shown in zip(names.values(), (scene, other), strict=True):
            Image.fromarray(render(shown)).save(folder / name)
        rows.append(names | {"text": caption_of(stated_of(scene, rng))})
    write_jsonl(folder / "metadata.jsonl", rows)


def concept_of(folder: Path) -> Concept | None:
    """The concept of a folder that holds one; None for other folders."""
    file = folder / CONCEPT_FILE
    if not file.is_file():
        return None
    ((kind, seed),) = json.loads(file.read_text(encoding="utf-8")).items()
    return Concept(kind, int(seed))
