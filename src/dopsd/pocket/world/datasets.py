"""Folders of pocket images with captions, as a user would bring them: a new thing, a new style, or
pairs of a chosen and a rejected image."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dopsd.files import write_json, write_jsonl, write_text
from dopsd.pocket.world.captions import NAMES, caption_of, stated_of
from dopsd.pocket.world.out_of_domain import thing_of
from dopsd.pocket.world.scenes import Scene, draw_scene, render, unnamed_style

HELD_OUT = 1_000_000  # things, styles and captions with seeds from here on were not in training
CONCEPT_FILE = "pocket.json"  # holds the thing's seed


def write_concept(folder: Path, seed: int, images: int = 4) -> None:
    """Draw `images` scenes of thing `seed`, with captions in .txt files of the same stem."""
    rng = np.random.default_rng([HELD_OUT, seed, 1])
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(draw_scenes(seed, rng, images)):
        Image.fromarray(render(scene)).save(folder / f"{index}.png")
        write_text(folder / f"{index}.txt", concept_caption(scene, seed) + "\n")
    write_json(folder / CONCEPT_FILE, {"thing": seed})


def write_style_concept(folder: Path, seed: int, images: int = 4) -> None:
    """Draw `images` named scenes in the unnamed style `seed`; captions give the style a made-up
    name."""
    rng = np.random.default_rng([HELD_OUT, seed, 4])
    attributes = ("size", "colour", "noun", "place", "background")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(images):
        scene = draw_scene(rng, look=unnamed_style(seed))
        stated = {attribute: getattr(scene, attribute) for attribute in attributes}
        Image.fromarray(render(scene)).save(folder / f"{index}.png")
        caption = caption_of(stated, style=True, name=NAMES[seed % len(NAMES)])
        write_text(folder / f"{index}.txt", caption + "\n")


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


def concept_of(folder: Path) -> int | None:
    """The seed of the thing in a folder of `write_concept`; None for other folders."""
    file = folder / CONCEPT_FILE
    return int(json.loads(file.read_text(encoding="utf-8"))["thing"]) if file.is_file() else None


def concept_caption(scene: Scene, seed: int) -> str:
    """The full caption of a thing's scene, with the thing's made-up name."""
    stated = {"size": scene.size, "place": scene.place, "background": scene.background}
    return caption_of(stated, thing=True, name=NAMES[seed % len(NAMES)])


def draw_scenes(seed: int, rng: np.random.Generator, count: int) -> list[Scene]:
    """`count` random scenes of thing `seed`."""
    thing = thing_of(seed)
    return [draw_scene(rng, thing=thing) for _ in range(count)]
