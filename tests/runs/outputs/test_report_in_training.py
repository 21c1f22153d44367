"""The report while a run trains: rewritten at every preview, and never before the checkpoint."""

import json
import re
from pathlib import Path

import pytest

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.runs.train import train
from dopsd.training.checkpoint import checkpoints


def recipe_for(concept: Path, output: Path, steps: int = 2, method: str = "sft") -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(concept)},
            "method": {"name": method},
            "lora": {"rank": 2},
            "train": {"max_steps": steps},
            "sample": {"every": 1, "prompts": ["a toy"], "unrelated": 0},
            "health": {"every": 0},
            "save": {"every": 0},
            "output_dir": str(output),
            "run_name": "reported",
        }
    )


def progress_in(run: Path) -> str:
    html = (run / "report.html").read_text(encoding="utf-8")
    return re.search(r'<p class="verdict">(.*?);', html)[1]


def test_the_report_is_rewritten_at_every_preview(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path)
    states = []
    for _ in train(recipe):
        states.append(progress_in(recipe.run_folder))
    assert states == ["Running: step 1 of 2 when this page was written", "Finished: 2 of 2 steps"]


def test_the_report_shows_the_image_that_the_teacher_saw(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, steps=1, method="dopsd")
    for _ in train(recipe):
        pass
    html = (recipe.run_folder / "report.html").read_text(encoding="utf-8")
    (first, *_) = sorted(path.name for path in concept.glob("*.png"))
    assert f"your image {first}, seen by the teacher" in html


def test_a_damaged_preview_loses_nothing_of_a_finished_run(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path)
    for report in train(recipe):
        if report.step == 1:
            (image,) = recipe.run_folder.glob("samples/step-000000/student_*.png")
            image.write_bytes(b"broken")
    assert recipe.result().is_file() and len(checkpoints(recipe.run_folder)) == 1
    html = (recipe.run_folder / "report.html").read_text(encoding="utf-8")
    assert "The previews in step-000000 are left out" in html


def test_the_checkpoint_is_saved_before_the_report(concept, tmp_path, monkeypatch):
    recipe = recipe_for(concept, tmp_path)
    run = train(recipe)
    next(run)
    (recipe.run_folder / "report.html").unlink()
    (recipe.run_folder / "report.html").mkdir()  # no file can be written there
    with pytest.raises(ValueError, match=r"report\.html cannot be written"):
        next(run)
    assert [path.name for path in checkpoints(recipe.run_folder)] == ["step-000002"]


def test_a_run_of_an_earlier_version_is_resumed(concept, tmp_path):
    for _ in train(recipe_for(concept, tmp_path)):
        pass
    run = tmp_path / "reported"
    files = [run / "metrics.jsonl", run / "env.json", *run.glob("samples/*/preview.json")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert '"images"' in text
        file.write_text(text.replace('"images"', '"pictures"'), encoding="utf-8")
    for _ in train(recipe_for(concept, tmp_path, steps=3), resume="latest"):
        pass
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all("images" in row and "pictures" not in row for row in rows)
    assert progress_in(run) == "Finished: 3 of 3 steps"
    assert "student, step 0" in (run / "report.html").read_text(encoding="utf-8")
