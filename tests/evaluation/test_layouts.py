"""The folders that GenEval's and DPG-Bench's scorers read, opened as those scorers do."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dopsd.data.prompts import Question
from dopsd.evaluation.image_sets import Gallery, Picture
from dopsd.evaluation.layouts import LAYOUTS

ROWS = ({"prompt": "a photo of a bench", "tag": "single_object", "include": [{"class": "bench", "count": 1}]},
        {"prompt": "a photo of a cow", "tag": "single_object", "include": [{"class": "cow", "count": 1}]})  # fmt: skip


@pytest.fixture()
def gallery(tmp_path: Path) -> Gallery:
    pictures = []
    for row in range(2):
        for seed in range(4):
            path = tmp_path / f"{row}_{seed}.png"
            Image.new("RGB", (16, 16), (60 * row, 60 * seed, 7)).save(path)
            pictures.append(Picture(path, ROWS[row]["prompt"], row=row, seed=seed))
    return Gallery("base", tuple(pictures), 4)


def test_geneval_finds_each_prompts_row_and_samples(gallery, tmp_path):
    questions = [Question(row["prompt"], row=row) for row in ROWS]
    LAYOUTS["geneval"](gallery, questions, tmp_path / "out")
    for number, folder in enumerate(sorted((tmp_path / "out").iterdir())):
        assert folder.name == f"{number:05}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == ROWS[number]
        samples = sorted((folder / "samples").iterdir())
        assert [path.name for path in samples] == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert [Image.open(path).getpixel((0, 0)) for path in samples] == [(60 * number, 60 * k, 7) for k in range(4)]


def test_dpg_bench_cuts_its_four_pictures_out_of_one(gallery, tmp_path):
    questions = [
        Question(row["prompt"], name=name) for row, name in zip(ROWS, ("partiprompts1", "whoops2"), strict=True)
    ]
    LAYOUTS["dpg"](gallery, questions, tmp_path / "out")
    for row, name in enumerate(("partiprompts1", "whoops2")):
        sheet = Image.open(tmp_path / "out" / f"{name}.png")
        boxes = [(0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 16, 32), (16, 16, 32, 32)]  # compute_dpg_bench.py's
        for seed, box in enumerate(boxes):
            assert (np.asarray(sheet.crop(box)) == (60 * row, 60 * seed, 7)).all()


def test_dpg_bench_needs_four(gallery, tmp_path):
    three = Gallery("base", gallery.pictures[:3], 4)
    with pytest.raises(ValueError, match="four square pictures a prompt"):
        LAYOUTS["dpg"](three, [Question("a", name="a")], tmp_path / "out")
