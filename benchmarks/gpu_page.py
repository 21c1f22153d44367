"""The page of gpu.py's results: parity, steps, the claim, and what is missing."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gpu_claim import ERROR, KEPT, SEEDS

from dopsd.evaluation.curves import Look, difference_at_equal_learning, sentence_of
from dopsd.evaluation.pages import SAME_NOISE, Panel, Section, write_page
from dopsd.evaluation.plots import plot_against
from dopsd.images import open_image
from dopsd.pocket.demo import NAMES

OURS, OTHER = "ours", "sft"
Rows = Mapping[str, dict[str, Any]]
PARITY = ["side", "NFE", "dtype", "latents: largest", "mean", "their std", "image: largest", "mean"]
PARITY_TERMS = {
    "latents": "difference of dopsd's last latents and diffusers', and the standard deviation of "
    "the latents themselves",
    "image": "difference of the decoded images in grey levels (0 to 255); dopsd decodes in "
    "float32, diffusers in the dtype of its pipeline",
}
STEPS = ["method, side", "memory", "NFE", "forwards", "seconds", "peak GiB", "reserved GiB"]
STEPS += ["forecast GiB", "peak / forecast", "MFU", "of a product"]
STEP_TERMS = {
    "seconds": "of an optimizer step on one image, the median",
    "forwards": "of the network, a backward counted as two",
    "memory": "high: activations kept; low: recomputed, because the forecast of high does not fit",
    "peak": "of live tensors during a step, what the forecast counts; reserved: what torch took",
    "MFU": "FLOPs of the step's matrix products, without recomputation, a second, over the card's "
    "dense bfloat16 peak by its data sheet",
    "of a product": "the same over what one large matrix product reaches on this card",
}
LOOKS = ["arm, step", "dino", "sharpness", "clip", "training", "health"]
LOOK_TERMS = {
    "dino": "distance to the real images on the object's prompts, 0 to 2; lower: more learned",
    "sharpness": "mean of the steepest 5% of gradients, on prompts unrelated to the object",
    "clip": "agreement with those prompts",
    "health": "of the few steps, at that look (docs/health.md)",
}


def write_gpu_page(folder: Path, content: Mapping[str, Any], left: Sequence[str]) -> None:
    """Write `folder/report.html`. left: the measurements for which there was no time."""
    rows, machine = content["rows"], content["machine"]
    done = {key: row for key, row in rows.items() if "failed" not in row}
    failed = [[key, row["failed"]] for key, row in rows.items() if "failed" in row]
    curves = curves_of(done)
    sections = [
        Section("Parity with diffusers", (), PARITY, list(_parity(done)), PARITY_TERMS),
        Section("Training steps", (), STEPS, list(_steps(done, machine)), STEP_TERMS),
        _claim_section(curves, done, folder),
        Section("Not measured", rows=[*failed, *([key, "no time yet"] for key in left)]),
    ]
    facts = {
        "device": machine["device"],
        "memory": f"{machine['memory_gib']:.0f} GiB",
        "model": machine["model"],
        "weights": "random, of the model's shapes" if machine["weights"] == "random" else "its own",
        "versions": f"dopsd {machine['dopsd']}, torch {machine['torch']}, diffusers "
        f"{machine['diffusers']}",
    }
    intro = "Written by benchmarks/gpu.py; the numbers are in results.json beside this page."
    title = f"{machine['model']} on {machine['device']}"
    write_page(
        folder / "report.html", title, claim_sentence(curves, done), intro, sections, (), facts
    )


def claim_sentence(curves: Mapping[str, list[Look]], done: Rows) -> str:
    """What the arms keep at equal learning, or why that is not known."""
    if set(curves) != {OURS, OTHER}:
        return "The claim was not measured: it needs own weights, --data and time for both arms."
    if ERROR not in curves[OURS][0].values:
        return f"The claim is not shown, for want of dino: {done['claim base']['notes'][ERROR]}"
    sentences = [
        sentence_of(
            difference_at_equal_learning(curves[OURS], curves[OTHER], ERROR, metric),
            metric,
            NAMES[OURS],
            NAMES[OTHER],
        )
        for metric in KEPT
        if metric in curves[OURS][0].values
    ]
    return " ".join([*sentences, "Intervals are over prompts: one training of each."])


def _parity(done: Rows) -> Iterator[list[str]]:
    for key, row in done.items():
        if key.startswith("parity"):
            latents, image = row["latents"], row["image"]
            numbers = [f"{latents[name]:.2g}" for name in ("max", "mean", "std")]
            grey = [str(image["max"]), f"{image['mean']:.2f}"]
            yield [key.partition(" ")[2], str(row["nfe"]), row["dtype"], *numbers, *grey]


def _steps(done: Rows, machine: Mapping[str, Any]) -> Iterator[list[str]]:
    for key, row in done.items():
        if key.startswith("step"):
            rate = row["flops"] / row["seconds"]
            peak, forecast = row["peak_gib"], row["forecast_gib"]
            yield [
                key.partition(" ")[2],
                row["memory"],
                str(row["nfe"]),
                str(row["forwards"]),
                f"{row['seconds']:.2f}",
                _or_dash(peak, ".1f"),
                _or_dash(row["reserved_gib"], ".1f"),
                f"{forecast:.1f}",
                _or_dash(peak and peak / forecast, ".2f"),
                _or_dash(machine["peak_flops"] and rate / machine["peak_flops"], ".0%"),
                f"{rate / machine['matmul_flops']:.0%}",
            ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def curves_of(done: Rows) -> dict[str, list[Look]]:
    """Arm -> its looks in their order, the base model first; of arms with a look."""
    if "claim base" not in done:
        return {}
    curves: dict[str, list[Look]] = {}
    for row in [row for row in done.values() if "arm" in row]:
        curve = curves.setdefault(row["arm"], [_look(0, done["claim base"])])
        curve.append(_look(row["step"], row))
    return {arm: sorted(curve, key=lambda look: look.step) for arm, curve in curves.items()}


def _look(step: int, row: Mapping[str, Any]) -> Look:
    tables = row["values"].items()
    return Look(step, {metric: np.array(table, dtype=float) for metric, table in tables})


def _claim_section(curves: Mapping[str, list[Look]], done: Rows, folder: Path) -> Section:
    rows = {key: row for key, row in done.items() if key.startswith("claim")}
    notes = [
        f"{metric}: {note}"
        for row in list(rows.values())[:1]
        for metric, note in row["notes"].items()
    ]
    drawn = []
    for metric in KEPT:
        if curves and {ERROR, metric} <= curves[next(iter(curves))][0].values.keys():
            lines = {
                NAMES[arm]: np.array([(_learned(look, curve), look.mean(metric)) for look in curve])
                for arm, curve in curves.items()
            }
            title = f"{metric} kept, over what was learned"
            drawn.append(plot_against(title, lines, "dino distance removed"))
    table = [_look_cells(key, row) for key, row in rows.items()]
    panels = list(_panels(rows, folder))
    return Section("The claim", [*notes, SAME_NOISE], LOOKS, table, LOOK_TERMS, panels, drawn)


def _learned(look: Look, curve: Sequence[Look]) -> float:
    return curve[0].mean(ERROR) - look.mean(ERROR)


def _look_cells(key: str, row: Mapping[str, Any]) -> list[str]:
    look = _look(0, row)
    means = [
        f"{look.mean(metric):.3f}" if metric in look.values else "-" for metric in (ERROR, *KEPT)
    ]
    training = f"{row['seconds']:.0f} s" if "seconds" in row else "-"
    healthy = {True: "healthy", False: "not healthy"}
    health = healthy[row["health"]["healthy"]] if "health" in row else "-"
    return [key.partition(" ")[2], *means, training, health]


def _panels(rows: Rows, folder: Path) -> Iterator[Panel]:
    """The base model and the last look of each arm: the object, and prompts unrelated to it."""
    last: dict[str, Mapping[str, Any]] = {}
    for key, row in rows.items():
        if key != "claim base, other noise":
            last[NAMES.get(row.get("arm", ""), "untouched")] = row
    first = 0
    titles = ("The object", "Prompts that have nothing to do with it")
    for index, title in enumerate(titles if last else ()):
        prompts = tuple(next(iter(last.values()))["prompts"][index])
        places = [SEEDS * (first + k) for k in range(len(prompts))]
        shown = tuple(
            (name, tuple(open_image(folder / row["images"][place]) for place in places))
            for name, row in last.items()
        )
        yield Panel(title, prompts, shown)
        first += len(prompts)
