"""Trackers: a run with each, their own files read back, and a resumed run that continues in the
same place."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.runs.resolve import resolve
from dopsd.runs.train import train

STEPS = 5


@pytest.fixture(autouse=True)
def stay_in_the_folder_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            "track": {"to": tracker, "project": "concepts"},
            "output_dir": str(output),
            "run_name": "tracked",
        }
    )


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def read_tensorboard(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return events


def test_tensorboard_holds_the_losses_the_previews_and_the_health(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "tensorboard")
    for _ in train(recipe):
        pass
    events = read_tensorboard(recipe.run_folder)
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert logged == pytest.approx(losses(recipe.run_folder)) and len(logged) == STEPS
    assert [event.step for event in events.Images("previews")] == [0, 2, 4, 5]
    assert [event.value for event in events.Scalars("health/drift")] == pytest.approx(
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
    for _ in train(recipe, resume="latest"):  # from step 2: step 3 is logged again
        pass
    logged = [
        (event.step, event.value)
        for event in read_tensorboard(recipe.run_folder).Scalars("train/loss")
    ]
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5]
    assert dict(logged) == pytest.approx(losses(recipe.run_folder))


def test_trackio_holds_the_losses_and_the_previews(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "trackio")
    for _ in train(recipe):
        pass
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("concepts")
    rows = SQLiteStorage.get_logs("concepts", name)
    logged = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert logged == pytest.approx(losses(recipe.run_folder)) and len(logged) == STEPS
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
    deadline, logged, rows = time.monotonic() + 30, {}, []
    # The file is written by a process of wandb's own
    while len(logged) < STEPS and time.monotonic() < deadline:
        rows = list(wandb_history(file))
        logged = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
        time.sleep(0.2)
    assert logged == pytest.approx(losses(recipe.run_folder)) and len(logged) == STEPS
    assert [row["_step"] for row in rows if any("previews" in key for key in row)] == [0, 2, 4, 5]


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(
    concept, tmp_path, monkeypatch
):
    monkeypatch.setattr("dopsd.runs.outputs.trackers.find_spec", lambda name: None)
    message = r"wandb, which is not installed: pip install 'dopsd\[wandb\]'"
    with pytest.raises(ValueError, match=message):
        resolve(recipe_for(concept, tmp_path, "wandb"))


@pytest.fixture
def no_wandb_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb as on a new machine: online, and neither a key nor a netrc file."""
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


def test_wandb_without_a_login_is_refused_before_anything_starts(concept, tmp_path, no_wandb_login):
    with pytest.raises(ValueError, match=r"nobody is logged in: run `wandb login`, or set WANDB_"):
        resolve(recipe_for(concept, tmp_path, "wandb"))


def test_wandb_with_a_key_that_is_none_is_refused_before_anything_starts(
    concept, tmp_path, no_wandb_login, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    with pytest.raises(ValueError, match=r"wandb, whose login is broken: .*40\+ characters"):
        resolve(recipe_for(concept, tmp_path, "wandb"))


def test_a_tracker_that_cannot_start_is_a_sentence_before_anything_is_encoded(concept, tmp_path):
    (tmp_path / "tracked").mkdir()
    (tmp_path / "tracked" / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"tensorboard could not start .*Remove it from track\.to"):
        next(train(recipe_for(concept, tmp_path, "tensorboard")))
    assert not (tmp_path / "cache").exists()


def test_a_run_that_is_refused_before_its_first_step_leaves_nothing_of_its_trackers(
    concept, tmp_path, monkeypatch
):
    def fail(*args, **options):
        raise ValueError("no memory for the encoders")

    monkeypatch.setattr("dopsd.runs.train.encode_run", fail)
    with pytest.raises(ValueError, match="no memory for the encoders"):
        next(train(recipe_for(concept, tmp_path, "tensorboard")))
    assert list((tmp_path / "tracked").iterdir()) == []
