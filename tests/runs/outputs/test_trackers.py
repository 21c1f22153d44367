"""Trackers: a run with each of them, their own files read back, and a resumed run that goes on in
the same place."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.runs.resolve import resolve
from dopsd.runs.train import train

STEPS = 5


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves the test's folder."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)


def recipe_for(concept: Path, output: Path, tracker: str, steps: int = STEPS) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(concept)},
            "method": {"name": "sft"},
            "lora": {"rank": 2},
            "train": {"max_steps": steps},
            "sample": {"every": 2, "prompts": "a toy"},
            "health": {"every": STEPS, "prompts": ["a big red star", "a toy"]},
            "save": {"every": 2, "keep_last": None},
            "track": {"to": tracker, "project": "lessons"},
            "output_dir": str(output),
            "run_name": "tracked",
        }
    )


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def told_to_tensorboard(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


def test_tensorboard_holds_the_losses_the_previews_and_the_health(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "tensorboard")
    for _ in train(recipe):
        pass
    found = told_to_tensorboard(recipe.run_folder)
    told = {event.step: event.value for event in found.Scalars("train/loss")}
    assert told == pytest.approx(losses(recipe.run_folder)) and len(told) == STEPS
    assert [event.step for event in found.Images("previews")] == [0, 2, 4, 5]
    assert [event.value for event in found.Scalars("health/drift")] == pytest.approx(
        [json.loads((recipe.run_folder / "health.jsonl").read_text())["drift"]["value"]]
    )
    assert (recipe.run_folder / "samples/step-000005/grid.png").exists()


def test_after_a_resume_tensorboard_shows_each_step_once(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "tensorboard")
    run = train(recipe)
    for report in run:
        if report.step == 3:
            break
    run.close()
    for _ in train(recipe, resume="latest"):  # from step 2: step 3 is told again
        pass
    told = [
        (event.step, event.value)
        for event in told_to_tensorboard(recipe.run_folder).Scalars("train/loss")
    ]
    assert [step for step, _ in told] == [1, 2, 3, 4, 5]
    assert dict(told) == pytest.approx(losses(recipe.run_folder))


def test_trackio_holds_the_losses_and_the_previews(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "trackio")
    for _ in train(recipe):
        pass
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("lessons")
    rows = SQLiteStorage.get_logs("lessons", name)
    told = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert told == pytest.approx(losses(recipe.run_folder)) and len(told) == STEPS
    assert [row["step"] for row in rows if "previews" in row] == [0, 2, 4, 5]


def wandb_history(file: Path) -> Iterator[dict]:
    """The history rows of an offline run: protobuf records in LevelDB's log format (blocks of 32
    KiB; a header is crc, length and kind: 1 whole, 2 first, 3 middle, 4 last) after seven bytes of
    wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's end too short for a header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }


def test_wandb_holds_the_losses_and_the_previews(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "wandb")
    for _ in train(recipe):
        pass
    (file,) = tmp_path.rglob("*.wandb")
    rows = list(wandb_history(file))
    told = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert told == pytest.approx(losses(recipe.run_folder)) and len(told) == STEPS
    assert [row["_step"] for row in rows if any("previews" in key for key in row)] == [0, 2, 4, 5]


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(
    concept, tmp_path, monkeypatch
):
    monkeypatch.setattr("dopsd.runs.outputs.trackers.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"wandb, which is not installed: pip install 'dopsd\[wandb\]'"
    ):
        resolve(recipe_for(concept, tmp_path, "wandb"))


def test_a_tracker_that_cannot_start_is_a_sentence(concept, tmp_path):
    (tmp_path / "tracked").mkdir()
    (tmp_path / "tracked" / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"tensorboard could not start .*Remove it from track\.to"):
        next(train(recipe_for(concept, tmp_path, "tensorboard")))
