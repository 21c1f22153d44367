"""The report page of a run: report.html in its folder, rewritten while it trains."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from PIL import Image

from dopsd.evaluation.early_stopping import advise
from dopsd.evaluation.pages import Panel, Section, write_page
from dopsd.evaluation.plots import Curve, Metrics, plot_curve, steps_per_point
from dopsd.runs.outputs import definitions
from dopsd.runs.outputs.record import RunRecord, ShownPreview, read_run
from dopsd.runs.outputs.verdict import State, files_of, metrics_of, verdict_of

ROLES = {
    "base": "the model before tuning",
    "teacher": "the model with a training image beside the prompt: what the student learns from",
    "student": "the tuned model",
}
NOT_DRAWN = ("step", "loss", "learning_rate", "images", "seconds", "skipped")
# A metric at one step of the sampler, or in one range of the time t
STEP_METRIC = re.compile(r"(.+)_at_(\d+|t[\d.]+-[\d.]+)")


def write_report(folder: Path, state: State) -> Path:
    """Write `report.html` of a run folder. Raises ValueError where `read_run` does; what the
    folder does not hold yet is left out of the page."""
    record = read_run(folder)
    sections = [
        *_preview_sections(record),
        *_health_sections(record),
        _curve_section(record.metrics),
        *_data_sections(record),
        _sampler_section(record.previews),
        Section("Recipe", text=record.recipe),
        Section(
            "Environment", rows=[(key, str(value)) for key, value in record.environment.items()]
        ),
        Section("Refused images", rows=record.refused),
    ]
    return write_page(
        folder / "report.html",
        record.name,
        verdict_of(record, state),
        "",
        sections,
        files_of(record, state),
        _facts(record),
    )


def _facts(record: RunRecord) -> dict[str, object]:
    seconds = [row["seconds"] or 0.0 for row in record.metrics]
    total = sum(seconds)
    facts = {
        "method": record.settings["method"]["name"],
        "base model": record.settings["model"]["name_or_path"],
        "licence of the base": record.environment.get("licence_of_base"),
        "steps skipped": sum(1 for row in record.metrics if row.get("skipped")) or None,
        "images": record.environment.get("images"),
        "images seen, with repeats": sum(int(row["images"] or 0) for row in record.metrics),
        "training time": f"{total:.0f} s" if total < 600 else f"{total / 60:.0f} min",
        "a step (median)": f"{median(seconds):.3g} s" if seconds else None,
        "device": record.environment.get("device"),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _preview_sections(record: RunRecord) -> list[Section]:
    """A panel for each prompt: what the teacher saw, teacher and base, the student step by step."""
    if not record.previews:
        return [Section("Previews", sentences=record.unreadable)]
    last = record.previews[-1]
    panels = [_prompt_panel(record, index) for index in range(len(last.prompts))]
    about = {role: ROLES[role] for role in last.images}
    about["distance in the verdict"] = (
        f"{definitions.DISTANCE} between two images on the same noise, mean over the previews"
    )
    sentences = ["Images of one prompt start from the same noise.", *record.unreadable]
    return [Section("Previews", sentences=sentences, definitions=about, panels=panels)]


def _prompt_panel(record: RunRecord, index: int) -> Panel:
    last = record.previews[-1]
    prompt = last.prompts[index]
    images: list[tuple[str, Image.Image]] = []
    if index in record.teacher_images:
        seen = prompt.get("teacher_image") or {"name": ""}
        images.append(
            (f"your image {seen['name']}, seen by the teacher", record.teacher_images[index])
        )
    if "teacher" in last.images:
        images.append((f"teacher, step {last.step}", last.images["teacher"][index]))
    images.append(("base", last.images["base"][index]))
    images += [
        (f"student, step {preview.step}", preview.images["student"][index])
        for preview in record.previews
        if index < len(preview.prompts)
    ]
    rows = tuple((label, (image,)) for label, image in images)
    return Panel(f"{prompt['prompt']} (seed {prompt['seed']})", ("",), rows)


def _health_sections(record: RunRecord) -> list[Section]:
    """The last health check as a table, and each metric over the run."""
    if not record.health:
        return []
    row = record.health[-1]
    metrics = metrics_of(row)
    table = [
        (
            name,
            *(f"{metric[key]:.3g}" for key in ("value", "error", "limit", "floor")),
            "healthy" if metric["healthy"] else "unhealthy",
        )
        for name, metric in metrics.items()
    ]
    meanings = {name: definitions.HEALTH.get(name, "") for name in metrics}
    curves = []
    if len(record.health) > 1:
        values = [
            {"step": check["step"]}
            | {name: check[name]["value"] for name in metrics if name in check}
            for check in record.health
        ]
        curves = [plot_curve(name, values, [name]) for name in metrics]
    advice = advise(record.health)
    assert advice is not None, "there is a health check"
    return [
        Section(
            "Few-step health",
            sentences=[
                "The student against the base model (1 = the same) on prompts unrelated to the "
                f"data, after step {row['step']}.",
                advice.sentence,
            ],
            header=("metric", "value", "standard error", "limit", "noise floor", "verdict"),
            rows=table,
            definitions=meanings | definitions.HEALTH_COLUMNS,
            curves=[curve for curve in curves if curve],
        )
    ]


def _curve_section(metrics: Metrics) -> Section:
    """Loss, metrics at the sampler's steps together, and every other metric of the method."""
    names = [name for name in dict.fromkeys(name for row in metrics for name in row)]
    by_step: dict[str, list[str]] = {}
    for name in names:
        if match := STEP_METRIC.fullmatch(name):
            by_step.setdefault(match[1], []).append(name)
    curves: list[Curve | None] = [plot_curve("loss", metrics, ["loss"], definitions.LOSS)]
    for metric, group in by_step.items():
        group.sort(key=lambda name: (len(name), name))
        over = "noise level" if metric in definitions.AT_TIMES else "step"
        meaning = definitions.AT_TIMES.get(metric, definitions.AT_STEPS)
        curves.append(plot_curve(f"{metric} at each {over}", metrics, group, meaning))
    curves += [
        plot_curve(name, metrics, [name], definitions.TRAINING.get(name, ""))
        for name in sorted(names, key=lambda name: name != "grad_norm")
        if name not in NOT_DRAWN and not STEP_METRIC.fullmatch(name)
    ]
    group = steps_per_point(len(metrics))
    thinned = [f"Each point is the mean of {group} steps."] if group > 1 else []
    return Section("Training", sentences=thinned, curves=[curve for curve in curves if curve])


def _data_sections(record: RunRecord) -> list[Section]:
    """What was trained on: counts, and the first images as cropped, with their captions."""
    data = record.data
    if data is None:
        return []
    rows = [("images", str(data["images"]))]
    if data.get("edited"):
        rows.append(("edited from references", f"{data['edited']}; below, left of the image"))
    rows += [
        ("captions from", data["source"]),
        *((f"at {size}", str(count)) for size, count in data["buckets"].items()),
        ("SHA-256 of images and captions", data["sha256"]),
    ]
    captions = tuple(data["examples"])
    images = tuple(record.data_images[: len(captions)])
    return [
        Section(
            "Data", rows=rows, panels=[Panel("Examples, as cropped", captions, (("", images),))]
        )
    ]


def _sampler_section(previews: Sequence[ShownPreview]) -> Section:
    """The sampler's noise levels; they depend on the size of an image, so there may be several."""
    levels = dict.fromkeys(
        tuple(prompt["sigmas"]) for preview in previews[-1:] for prompt in preview.prompts
    )
    sentences = [
        f"{len(sigmas) - 1} steps for an image, each one forward of the network, at the noise "
        f"levels {' → '.join(f'{sigma:.3g}' for sigma in sigmas)} (1 is pure noise)."
        for sigmas in levels
    ]
    return Section("Sampler", sentences=sentences)
