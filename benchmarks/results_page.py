"""docs/results.md: the claim, the paper's comparisons, preflight, the gates of the pocket model.

`python benchmarks/write_pages.py` writes it from benchmarks/results.
"""

import json
from collections.abc import Sequence
from textwrap import fill

import numpy as np
from claim_page import sections as claim_sections
from claim_page import summary
from paper_tables import sections
from preflight import section

from dopsd.evaluation.statistics import bootstrap
from dopsd.pocket import CHECKPOINT as POCKET
from dopsd.pocket.benchmark import OF_THE_THING

INTRODUCTION = """# Results on pocket

Written by `python benchmarks/write_pages.py` from the JSON files in `benchmarks/results`; commands,
seeds and run times are on the page [reproduce](reproduce.md). Everything here is measured on
*pocket*, a model of 2 M parameters whose images are drawn by this repository, so that scores are
read from pixels. No model of full size and no GPU has been measured.

{summary}

**Scores.** A *thing* is an object that no word describes; a model learns it from four images.
thing_error (lower is better): RMSE in [0, 1] between the generated image and the true scene inside
the object, on 24 unseen scenes. thing_hit: share of images nearer to their thing than to 63 others.
thing_sharp: strength of edges over the true scenes', at most 1. An unnamed style has the same
scores, of what is drawn in it. sharpness, speckle (lower is better) and attributes (share of the
prompt's attributes shown): on unrelated prompts. bleed: by how much thing_error falls when the
prompt gives another name, or none. Definitions: [words](words.md).
"""


def page() -> str:
    """The whole page."""
    said = " ".join(["**What the numbers say.**", *summary()])
    introduction = INTRODUCTION.format(summary=fill(said, 100, break_on_hyphens=False))
    lines = [introduction, *claim_sections(), "", *sections(), *section()]
    return "\n".join([*lines, *_gate_lines()]).rstrip() + "\n"


def _gate_lines() -> list[str]:
    gates = json.loads((POCKET / "gates.json").read_text(encoding="utf-8"))
    lines = [
        "## The pocket model's gates",
        "",
        "By `python -m dopsd.pocket gates`; 256 captions, 12 held-out things of 24 scenes, one",
        "training of the model. The many-step model (parent) runs with classifier-free guidance",
        f"{gates['many_step_guidance']:g}, as it was distilled. Intervals: 95% bootstrap.",
        "",
        "| gate | measured | wanted | |",
        "|---|---|---|---|",
    ]
    for gate in gates["gates"]:
        verdict = "passed" if gate["passed"] else "**missed**"
        measured = f"{gate['value']:.3f} [{gate['low']:.3f}, {gate['high']:.3f}]"
        lines.append(f"| {gate['name']} | {measured} | {gate['wanted']} | {verdict} |")
    sides = {
        "student": "pocket",
        "teacher": "teacher that sees the target",
        "teacher_sees_another": "teacher that sees another image",
    }
    lines += ["", f"| model | {' | '.join(OF_THE_THING)} |", "|---|" + "---|" * len(OF_THE_THING)]
    for side, name in sides.items():
        cells = " | ".join(f"{gates[side][metric]:.3f}" for metric in OF_THE_THING)
        lines.append(f"| {name} | {cells} |")
    return [*lines, ""]


def interval(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """Mean and 95% bootstrap interval of values, as a cell of a table."""
    mean, low, high = bootstrap(np.asarray(values, dtype=float))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
