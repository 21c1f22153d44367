"""What a run folder holds, read for its report; folders of earlier versions are read as well."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from dopsd.images import open_image
from dopsd.runs.outputs.folder import read_rows, with_current_keys
from dopsd.runs.outputs.previews import read_preview, teacher_image_file

ROLES = ("base", "teacher", "student")
MAX_PREVIEWS = 12  # steps whose previews a report shows, or it grows with the length of the run


@dataclass(frozen=True)
class ShownPreview:
    """The previews after some step: for each prompt its row of preview.json, and for each role the
    images in the same order."""

    step: int
    prompts: tuple[Mapping[str, Any], ...]
    images: Mapping[str, tuple[Image.Image, ...]]


@dataclass(frozen=True)
class RunRecord:
    """A run folder's files. Absolute folders in settings and recipe are cut to their names."""

    folder: Path
    settings: Mapping[str, Any]
    recipe: str  # the text of config.yaml
    metrics: Sequence[Mapping[str, Any]]  # a row for each step
    health: Sequence[Mapping[str, Any]]  # a row for each health check
    environment: Mapping[str, Any]
    data: Mapping[str, Any] | None  # counts, captions, hash
    refused: Sequence[tuple[str, str]]  # (name of an image, why it was left out)
    max_steps: int | None
    previews: Sequence[ShownPreview]  # evenly spaced, the first and the last among them
    unreadable: Sequence[str]  # why previews are missing, a sentence each
    teacher_images: Mapping[int, Image.Image]  # by number of the prompt
    data_images: Sequence[Image.Image]

    @property
    def name(self) -> str:
        return self.settings["run_name"]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises ValueError where config.yaml is missing, or a file other than a
    preview is broken; what is not there yet is empty."""
    settings, recipe = _read_settings(folder / "config.yaml")
    environment = _read_environment(folder / "env.json")
    refused = environment.pop("refused", [])
    data = environment.pop("data", None)
    planned = environment.pop("max_steps", settings.get("train", {}).get("max_steps"))
    data_folder = f"{Path(settings['data']['folder'])}/"
    previews, unreadable = _read_previews(folder / "samples")
    prompts = previews[-1].prompts if previews else ()
    files = {index: teacher_image_file(folder, index) for index in range(len(prompts))}
    return RunRecord(
        folder,
        _without_folders(settings),
        recipe,
        read_rows(folder / "metrics.jsonl"),
        read_rows(folder / "health.jsonl"),
        environment,
        None if data is None else with_current_keys(data),
        [(name, reason.replace(data_folder, "")) for name, reason in refused],
        planned,
        previews,
        unreadable,
        {index: open_image(file) for index, file in files.items() if file.is_file()},
        [open_image(file) for file in sorted((folder / "samples").glob("data-*.png"))],
    )


def _read_settings(path: Path) -> tuple[dict[str, Any], str]:
    """The recipe of a run, and its text with absolute folders (places on a machine) cut."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is no run folder: {path.name} is missing.")
    text = path.read_text(encoding="utf-8")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        settings = None
    needed = {"run_name", "model", "data", "method"}
    if not isinstance(settings, dict) or not needed <= settings.keys():
        raise ValueError(f"{path} is not the recipe of a run.")
    shown = _without_folders(settings)
    if shown != settings:
        text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    return settings, text


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, str) and Path(value).is_absolute():
        return f"…/{Path(value).name}"
    return value


def _read_environment(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return with_current_keys(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def _read_previews(samples: Path) -> tuple[list[ShownPreview], list[str]]:
    """By step, and why some are missing. preview.json is written last, so a folder without it was
    left unfinished and is passed over."""
    folders = sorted(path.parent for path in samples.glob("step-*/preview.json"))
    if len(folders) > MAX_PREVIEWS:
        last, gaps = len(folders) - 1, MAX_PREVIEWS - 1
        folders = [folders[round(index * last / gaps)] for index in range(MAX_PREVIEWS)]
    previews, unreadable = [], []
    for folder in folders:
        try:
            previews.append(_read_one(folder))
        except ValueError as error:  # one broken image does not take the report of the run
            reason = str(error).replace(f"{folder}/", "")
            unreadable.append(f"The previews in {folder.name} are left out: {reason}")
    return previews, unreadable


def _read_one(folder: Path) -> ShownPreview:
    preview = read_preview(folder)
    images = {}
    for role in ROLES:
        if role in preview["rows"]:
            files = [
                folder / f"{role}_{index}_{prompt['seed']}.png"
                for index, prompt in enumerate(preview["images"])
            ]
            images[role] = tuple(open_image(file) for file in files)
    return ShownPreview(int(folder.name.removeprefix("step-")), tuple(preview["images"]), images)
