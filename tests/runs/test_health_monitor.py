"""What ends a run by its health checks."""

import json

import pytest

from dopsd.config.recipe import parse_recipe
from dopsd.runs.train import train


def tree(concept, folder, **sections) -> dict:
    return {
        "model": {"name_or_path": "pocket", "memory": "high"},
        "data": {"folder": str(concept)},
        "method": {"name": "sft"},
        "lora": {"rank": 2},
        "train": {"max_steps": 5},
        "sample": {"every": 0, "prompts": "a star", "unrelated": 0},
        "health": {"every": 1, "prompts": ["a star", "a ring"]},
        "stop": {"plateau": 2},
        "output_dir": str(folder),
        "run_name": "run",
        **sections,
    }


def test_a_run_at_its_plateau_ends_as_at_its_last_step(concept, tmp_path, monkeypatch):
    """The rule is asked at each check with what the run has written, and here says yes at the
    third."""
    asked = []

    def third_time(checks, metrics, patience):
        asked.append(([row["step"] for row in checks], len(metrics), patience))
        return "the loss is flat" if len(checks) == 3 else None

    monkeypatch.setattr("dopsd.runs.health_monitor.plateau", third_time)
    recipe = parse_recipe(tree(concept, tmp_path))
    assert [report.step for report in train(recipe)] == [1, 2, 3]
    assert asked == [([1], 1, 2), ([1, 2], 2, 2), ([1, 2, 3], 3, 2)]
    assert recipe.result().is_file()
    assert json.loads((recipe.run_folder / "checkpoints/step-000003/state.json").read_text())
    page = (recipe.run_folder / "report.html").read_text(encoding="utf-8")
    assert "Finished at step 3 of 5, by stop.plateau" in page


@pytest.mark.parametrize("health", [{"every": 0}, {}])
def test_a_plateau_needs_health_checks(concept, tmp_path, health):
    with pytest.raises(ValueError, match=r"stop\.plateau looks at health checks"):
        parse_recipe(tree(concept, tmp_path, health=health))
