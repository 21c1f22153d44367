"""The opening of a run's report: where the run stands, in sentences, and the files it left."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from dopsd.config.schema import INTERMEDIATE
from dopsd.evaluation.early_stopping import advise
from dopsd.runs.outputs.record import RunRecord, ShownPreview

State = Literal["running", "stopped", "finished"]


def verdict_of(record: RunRecord, state: State) -> str:
    """Progress, few-step health, and where the student's previews stand between base and
    teacher."""
    sentences = [f"{_progress(record, state)}; {_health(record)}."]
    if record.previews and record.step:
        sentences.append(_position(record.previews[-1]))
    return " ".join(filter(None, sentences))


def _progress(record: RunRecord, state: State) -> str:
    planned = f" of {record.max_steps}" if record.max_steps else ""
    if state == "finished":
        if record.max_steps and record.step < record.max_steps:
            return f"Finished at step {record.step}{planned}, by {_early_end(record)}"
        return f"Finished: {record.step}{planned} steps"
    if state == "stopped":
        return f"Stopped at step {record.step}{planned}"
    return f"Running: step {record.step}{planned} when this page was written"


def _early_end(record: RunRecord) -> str:
    """What can have ended a run before train.max_steps."""
    settings = record.settings
    by_plateau = bool(settings.get("stop", {}).get("plateau"))
    by_seconds = bool(settings.get("train", {}).get("max_seconds")) or not by_plateau
    ends = ["the limit of train.max_seconds"] * by_seconds + ["stop.plateau"] * by_plateau
    return " or ".join(ends)


def _health(record: RunRecord) -> str:
    if not record.health:
        return "few-step health was not measured"
    row = record.health[-1]
    metrics = metrics_of(row)
    unhealthy = [
        f"{name} ({metric['value']:.2f}, limit {metric['limit']:.2f})"
        for name, metric in metrics.items()
        if not metric["healthy"]
    ]
    when = f" at step {row['step']}" if row["step"] != record.step else ""
    if not unhealthy:
        return f"few-step health is good{when} in all {len(metrics)} metrics"
    advice = advise(record.health)
    last_healthy = f", last healthy at step {advice.step}" if advice and advice.step else ""
    return f"few-step health is bad{when} in {', '.join(unhealthy)}{last_healthy}"


def metrics_of(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics in a row of health.jsonl."""
    return {name: value for name, value in row.items() if name not in ("step", "healthy")}


def _position(preview: ShownPreview) -> str:
    """How far the student's images are from the base's, in words; with a teacher, as a share of
    the teacher's distance on the prompts that are the captions of the images it sees."""
    distance = _distance(preview, "student", "base", range(len(preview.prompts)))
    captions = [
        index
        for index, prompt in enumerate(preview.prompts)
        if (seen := prompt.get("teacher_image")) and seen["caption"] == prompt["prompt"]
    ]
    if "teacher" not in preview.images or not captions:
        return f"In the previews the student's images are {distance:.3f} from the base model's."
    goal = _distance(preview, "base", "teacher", captions)
    left = _distance(preview, "student", "teacher", captions)
    if goal == 0:
        return "In the previews the teacher's images are those of the base model."
    share = 1 - left / goal
    return (
        f"On your captions the student's previews are {abs(share):.0%} "
        f"{'nearer to' if share >= 0 else 'further from'} the teacher's images than the base "
        f"model's are ({left:.3f} against {goal:.3f})."
    )


def _distance(preview: ShownPreview, left: str, right: str, prompts: range | list[int]) -> float:
    """Root mean square difference of two roles' pixel values in [0, 1], mean over prompts."""
    pairs = [(preview.images[left][index], preview.images[right][index]) for index in prompts]
    differences = [(np.asarray(a, float) - np.asarray(b, float)) / 255 for a, b in pairs]
    return float(np.mean([np.sqrt(np.square(difference).mean()) for difference in differences]))


def files_of(record: RunRecord, state: State) -> list[tuple[str, str]]:
    """(name, use) of the weights that the run left, how to load them, and how to go on."""
    is_lora = record.settings.get("adapter", "lora") == "lora"
    ending = ".safetensors" if is_lora else ""
    final = record.folder / f"{record.name}{ending}"
    healthy = record.folder / INTERMEDIATE / f"{record.name}-healthy{ending}"
    saved = sorted((record.folder / INTERMEDIATE).glob(f"{record.name}-step*{ending}"))[-1:]
    usable = [final] if state == "finished" and final.exists() else saved
    spare = (
        [healthy]
        if healthy.exists() and not (record.health and record.health[-1]["healthy"])
        else []
    )
    kind = "LoRA" if is_lora else "model"
    labelled = [(kind, path) for path in usable]
    labelled += [(f"last healthy {kind}", path) for path in spare]
    rows = [(label, path.relative_to(record.folder).as_posix()) for label, path in labelled]
    if rows and is_lora:
        name = rows[0][1]
        rows += [
            ("diffusers", f'pipeline.load_lora_weights(".", weight_name="{name}")'),
            ("ComfyUI", f"copy {name} into models/loras and load it with strength 1"),
        ]
    elif rows:
        rows.append(("diffusers", f'DiffusionPipeline.from_pretrained("{rows[0][1]}")'))
    if state == "stopped":
        rows.append(("to go on", "dopsd train RECIPE --resume latest"))
    return rows
