"""The folders that GenEval's and DPG-Bench's scorers read, opened as those scorers do."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dopsd.data.prompts import EvaluationPrompt
from dopsd.evaluation.image_sets import GeneratedImage, ImageSet
from dopsd.evaluation.layouts import LAYOUTS

ROWS = (
    {
        "prompt": "a photo of a bench",
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
    },
    {
        "prompt": "a photo of a cow",
        "tag": "single_object",
        "include": [{"class": "cow", "count": 1}],
    },
)


@pytest.fixture()
def image_set(tmp_path: Path) -> ImageSet:
    images = []
    for row in range(2):
        for seed in range(4):
            path = tmp_path / f"{row}_{seed}.png"
            Image.new("RGB", (16, 16), (60 * row, 60 * seed, 7)).save(path)
            images.append(GeneratedImage(path, ROWS[row]["prompt"], row=row, seed=seed))
    return ImageSet("base", tuple(images), 4)


def test_geneval_finds_the_row_and_the_samples_of_each_prompt(image_set, tmp_path):
    questions = [EvaluationPrompt(row["prompt"], row=row) for row in ROWS]
    LAYOUTS["geneval"](image_set, questions, tmp_path / "out")
    for number, folder in enumerate(sorted((tmp_path / "out").iterdir())):
        assert folder.name == f"{number:05}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == ROWS[number]
        samples = sorted((folder / "samples").iterdir())
        assert [path.name for path in samples] == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert [Image.open(path).getpixel((0, 0)) for path in samples] == [
            (60 * number, 60 * k, 7) for k in range(4)
        ]


def test_dpg_bench_cuts_four_images_out_of_one(image_set, tmp_path):
    questions = [
        EvaluationPrompt(row["prompt"], name=name)
        for row, name in zip(ROWS, ("partiprompts1", "whoops2"), strict=True)
    ]
    LAYOUTS["dpg"](image_set, questions, tmp_path / "out")
    for row, name in enumerate(("partiprompts1", "whoops2")):
        grid = Image.open(tmp_path / "out" / f"{name}.png")
        boxes = [
            (0, 0, 16, 16),
            (16, 0, 32, 16),
            (0, 16, 16, 32),
            (16, 16, 32, 32),
        ]  # compute_dpg_bench.py's
        for seed, box in enumerate(boxes):
            assert (np.asarray(grid.crop(box)) == (60 * row, 60 * seed, 7)).all()


def test_dpg_bench_needs_four(image_set, tmp_path):
    three = ImageSet("base", image_set.images[:3], 4)
    with pytest.raises(ValueError, match="four square images a prompt"):
        LAYOUTS["dpg"](three, [EvaluationPrompt("a", name="a")], tmp_path / "out")
