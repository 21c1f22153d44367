"""The report page of a run."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from PIL import Image

from dopsd.evaluation.early_stopping import advise
from dopsd.evaluation.pages import Panel, _Section, _write_page
from dopsd.evaluation.plots import POINTS, Metrics, curve_of, curves_of
from dopsd.runs.outputs.folder import read_rows

ROLES = {
    "base": "Base is the untouched model",
    "student": "student is the tuned one",
    "teacher": "teacher is the one that sees a picture beside the prompt",
}


def write_report(run: Path) -> Path:
    """Write `report.html` of a run folder. Raises ValueError when config.yaml or metrics.jsonl is
    missing or broken; whatever else is missing is left out of the page."""
    settings, recipe = _read_settings(run / "config.yaml")
    metrics = _read_metrics(run / "metrics.jsonl")
    path = run / "env.json"
    environment: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    )
    refused, data = environment.pop("refused", []), environment.pop("data", None)
    folder = f"{Path(settings['data']['folder'])}{os.sep}"
    previews = _read_previews(run / "samples")
    group = math.ceil(len(metrics) / POINTS)
    thinning = [f"Each point is the mean of {group} steps."] if group > 1 else []
    sections = [
        *_image_sections(previews),
        *_health_sections(run / "health.jsonl"),
        *_data_sections(run, data),
        _Section("Curves", words=thinning, curves=curves_of(metrics)),
        _Section(
            "Sampler",
            words=[
                _describe_sigmas(sample) for preview in previews[-1:] for sample in preview.rollouts
            ],
        ),
        _Section("Recipe", text=recipe),
        _Section("Environment", rows=[(key, str(value)) for key, value in environment.items()]),
        _Section(
            "Refused pictures", rows=[(name, why.replace(folder, "")) for name, why in refused]
        ),
    ]
    headline = _headline(_without_folders(settings), metrics, environment)
    return _write_page(
        run / "report.html",
        settings["run_name"],
        "What a run did and what it cost.",
        sections,
        headline,
    )


@dataclass(frozen=True)
class _Preview:
    """One folder of samples/: titles say prompt and seed; images of each role are in order; walks:
    the different lists of sigmas they were generated with (they depend on the size)."""

    step: int
    titles: tuple[str, ...]
    images: Mapping[str, tuple[Image.Image, ...]]
    rollouts: tuple[tuple[float, ...], ...]


def _read_settings(path: Path) -> tuple[dict[str, Any], str]:
    """The recipe of a run and its text; absolute folders, which say where a machine keeps things,
    cut to their name."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is no run folder: {path.name} is missing.")
    text = path.read_text(encoding="utf-8")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        settings = None
    if (
        not isinstance(settings, dict)
        or not {"run_name", "model", "data", "method"} <= settings.keys()
    ):
        raise ValueError(f"{path} is not the recipe of a run.")
    shown = _without_folders(settings)
    return settings, text if shown == settings else yaml.safe_dump(
        shown, sort_keys=False, allow_unicode=True
    )


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    return (
        f"…/{Path(value).name}" if isinstance(value, str) and Path(value).is_absolute() else value
    )


def _read_metrics(path: Path) -> Metrics:
    """The whole rows: the last may be cut where a run was killed."""
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path.parent} has no step to report: {path.name} is missing or empty.")
    return rows


def _read_previews(folder: Path) -> list[_Preview]:
    """By step. preview.json is written last, so a folder without it was left unfinished and is
    passed over."""
    previews = []
    for path in sorted(folder.glob("step-*/preview.json")):
        said = json.loads(path.read_text(encoding="utf-8"))
        files = {
            role: list(path.parent.glob(f"{role}_*_*.png"))
            for role in ROLES
            if role in said["rows"]
        }
        if any(len(row) != len(said["images"]) for row in files.values()):
            continue
        for row in files.values():
            row.sort(key=lambda file: int(file.stem.split("_")[1]))
        titles = tuple(f"{image['prompt']} (seed {image['seed']})" for image in said["images"])
        images = {
            role: tuple(Image.open(file).convert("RGB") for file in row)
            for role, row in files.items()
        }
        step = int(path.parent.name.removeprefix("step-"))
        rollouts = tuple(dict.fromkeys(tuple(image["sigmas"]) for image in said["images"]))
        previews.append(_Preview(step, titles, images, rollouts))
    return previews


def _image_sections(previews: Sequence[_Preview]) -> list[_Section]:
    """First and last preview, a panel for each prompt; then the student at every step, when there
    are more."""
    if not previews:
        return []
    roles, titles = tuple(previews[-1].images), previews[-1].titles
    ends = {
        f"{'after' if end.step else 'before'}, step {end.step}": end
        for end in (previews[0], previews[-1])
    }
    panels = []
    for column, title in enumerate(titles):
        rows = tuple(
            (when, tuple(end.images[role][column] for role in roles)) for when, end in ends.items()
        )
        panels.append(Panel(title, roles, rows))
    words = f"{', '.join(ROLES[role] for role in roles)}. Pictures of one prompt start from the same noise."
    sections = [
        _Section("Before and after" if len(ends) > 1 else "Preview", words=[words], panels=panels)
    ]
    if len(previews) > 2:
        rows = tuple((f"step {preview.step}", preview.images["student"]) for preview in previews)
        sections.append(
            _Section(
                "The student on its way",
                panels=[Panel("Same prompts and noise, step by step", titles, rows)],
            )
        )
    return sections


def _data_sections(run: Path, data: Mapping[str, Any] | None) -> list[_Section]:
    """What was trained on: counts, and the first images as they were cut, with their captions."""
    if data is None:
        return []
    rows = [
        ("images", str(data["images"])),
        *(
            [("edited from references", f"{data['edited']}; below they stand first")]
            if data.get("edited")
            else []
        ),
        ("captions from", data["source"]),
        *((f"at {size}", str(count)) for size, count in data["buckets"].items()),
        ("hash of pictures and captions", data["sha256"]),
    ]
    captions, files = tuple(data["examples"]), sorted(run.glob("samples/data-*.png"))
    images = tuple(Image.open(file).convert("RGB") for file in files[: len(captions)])
    return [
        _Section(
            "Data",
            rows=rows,
            panels=[Panel("Examples, as they were cut", captions, (("", images),))],
        )
    ]


def _health_sections(path: Path) -> list[_Section]:
    """The last health check as a table, and each measure over the run."""
    rows = read_rows(path)
    if not rows:
        return []
    names = [name for name in rows[-1] if name not in ("step", "healthy")]
    table = [
        (
            name,
            *(f"{rows[-1][name][key]:.3g}" for key in ("value", "error", "limit", "floor")),
            "healthy" if rows[-1][name]["healthy"] else "unhealthy",
        )
        for name in names
    ]
    flat = [{"step": row["step"]} | {name: row[name]["value"] for name in names} for row in rows]
    words = f"Against the untouched model (1 = the same), on unrelated prompts, after step {rows[-1]['step']}."
    header = ("measure", "value", "standard error", "limit", "noise floor", "verdict")
    curves = [curve_of(name, flat, [name]) for name in names] if len(rows) > 1 else []
    advice = advise(rows)
    assert advice is not None
    return [
        _Section(
            "Few-step health",
            words=[words, advice.sentence],
            header=header,
            rows=table,
            curves=curves,
        )
    ]


def _headline(settings: dict[str, Any], metrics: Metrics, environment: dict[str, Any]) -> dict:
    seconds = [row["seconds"] or 0.0 for row in metrics]
    facts = {
        "method": settings["method"]["name"],
        "base model": settings["model"]["name_or_path"],
        "licence of the base": environment.get("licence_of_base"),
        "steps": metrics[-1]["step"],
        "steps skipped": sum(1 for row in metrics if row.get("skipped")) or None,
        "images": environment.get("images"),
        "pictures seen, with repeats": sum(int(row["images"] or 0) for row in metrics),
        "training time": f"{sum(seconds):.0f} s"
        if sum(seconds) < 600
        else f"{sum(seconds) / 60:.0f} min",
        "a step (median)": f"{median(seconds):.3g} s",
        "device": environment.get("device"),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _describe_sigmas(sigmas: Sequence[float]) -> str:
    times = " → ".join(f"{sigma:.3g}" for sigma in sigmas)
    return f"{len(sigmas) - 1} forwards of the network for a picture, at these shares of noise: {times}."
