"""docs/model_and_cost.md: does D-OPSD depend on the model, and what does it cost?

`python benchmarks/write_pages.py` writes it from benchmarks/results; each table names the
command that measured it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from claim_page import read_claim
from results_page import interval

from dopsd.evaluation.statistics import spearman
from dopsd.pocket.benchmark import METRICS

RESULTS = Path(__file__).parent / "results"
HEAD = """# Does D-OPSD depend on the model, and what does it cost?

Written by `python benchmarks/write_pages.py` from the JSON files in `benchmarks/results`. All of it
is measured on pocket (2 M parameters, 2 CPU cores): a large model may differ.
"""
DEPENDENCE = """## Does it depend on the model?

It depends on one ability: generating a subject that stands in the model's context. The student is
pulled to what the same model generates when it sees the image, and learns that, no more.
`dopsd list` says which model families have a teacher that sees images; `dopsd preflight` says
whether it can show *your* images.
"""
TRAINING = """## What does training cost?

One batch of 4 images, forward and backward, LoRA rank 16, activations kept. Forwards: of the
network, a backward counted as two. D-OPSD's reference code runs one backward for all steps; here
each step has its own. The reward model of `pso_online` is not in the rows. Seconds: the median of a
few batches, to be read as ratios. Memory: live tensor bytes, the same on every machine. By
`python benchmarks/step_cost.py --threads 1 --repeats 3 --json benchmarks/results/step_cost.json`.
"""
SAMPLING = """## What does it cost afterwards?

Sampling costs what it did: the result is a LoRA file, used with as many forwards as before. Scores
at each number of forwards, on one thing, one training each (mean, mean difference to the base model
at the same number, and after ± half of its 95% interval over prompts):
"""
WORDS = """
thing_error, speckle and bleed: lower is better. bleed: by how much thing_error falls when the
prompt gives another name, or none. The teacher sees an image; the many-step model runs under
guidance, two forwards a step. By
`dopsd compare recipes/pocket-identity-dopsd.yaml recipes/pocket-identity-sft.yaml --nfe 1,2,4,8`
with `--json benchmarks/results/step_budgets.json`, on thing 1000700.
"""
TOO_LONG = """## How long is too long?

The recipe, far beyond its length, on thing {thing}; one training each, with health checks on the
way ([health](health.md)). By `python benchmarks/long_run.py`.
"""
NAMES = {
    "sft": "SFT",
    "dopsd": "D-OPSD",
    "pso rollout": "PSO",
    "pso forward": "PSO, `form: forward`",
    "pso_online": "PSO online, all but the last step noisy",
}
AT_ONCE = ", one backward for all steps"


def page() -> str:
    """The whole page."""
    lines = [HEAD, *_dependence(), *_training_cost(), *_sampling_cost(), *_too_long()]
    return "\n".join(lines).rstrip() + "\n"


def _dependence() -> list[str]:
    rows = read_claim()["dependence"]
    if not rows:
        return [DEPENDENCE, "Not measured on the packaged checkpoint yet.", ""]
    by_teacher = np.array([row["base"] - row["teacher"] for row in rows])
    by_dopsd = np.array([row["base"] - row["dopsd"] for row in rows])
    rank = spearman(by_teacher, by_dopsd)
    return [
        DEPENDENCE,
        "| | |",
        "|---|---|",
        f"| thing_error that the teacher removes, {len(rows)} things | {interval(by_teacher)} |",
        f"| thing_error that D-OPSD removes | {interval(by_dopsd)} |",
        f"| rank correlation of the two over things | {rank.value:.2f} "
        f"[{rank.low:.2f}, {rank.high:.2f}] |",
        "",
        "By `benchmarks/claim.py run`. The closed gap, and how well preflight predicts what is",
        "learned, are in [results](results.md).",
        "",
    ]


def _training_cost() -> list[str]:
    rows = _read("step_cost.json")
    sft = next(row for row in rows if row["method"] == "sft")
    lines = [
        TRAINING,
        "| method | steps of the rollout | forwards an image | seconds | over SFT "
        "| peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = NAMES[row["method"]] + (AT_ONCE if row["variant"] == "one_backward" else "")
        ratio = row["seconds"] / sft["seconds"]
        lines.append(
            f"| {name} | {row['nfe'] or '-'} | {row['forwards']} | {row['seconds']:.2f} "
            f"| {ratio:.1f} | {row['peak_bytes'] / 1e6:.1f} |"
        )
    return [*lines, ""]


def _sampling_cost() -> list[str]:
    models = _read("step_budgets.json")
    metrics = _measured(next(iter(models["base"]["nfe"].values())))
    lines = [
        SAMPLING,
        f"| model | NFE | {' | '.join(metrics)} |",
        "|---|---|" + "---|" * len(metrics),
    ]
    for name, model in models.items():
        shown = "many-step model" if model["kind"] == "many_step" else name
        for nfe, scores in model["nfe"].items():
            lines.append(f"| {shown} | {nfe} | {_score_cells(scores, name == 'base')} |")
    return [*lines, WORDS]


def _too_long() -> list[str]:
    runs = _read("long_run.json")
    lines = [TOO_LONG.format(thing=runs["thing"])]
    for method in ("dopsd", "sft"):
        run = runs[method]
        metrics = _measured(run["after"]["base"])
        lines += [
            f"**{method}**, {run['steps']} steps where the recipe says {run['recipe_steps']}. "
            + run["advice"],
            "",
            f"| after step | {' | '.join(metrics)} |",
            "|---|" + "---|" * len(metrics),
        ]
        for label, scores in run["after"].items():
            mark = " (advised)" if label == str(run["advised"]) else ""
            lines.append(f"| {label}{mark} | {_score_cells(scores, label == 'base')} |")
        lines.append("")
    return lines


def _score_cells(scores: dict[str, Any], is_base: bool) -> str:
    return " | ".join(_score(scores[metric], metric, is_base) for metric in _measured(scores))


def _measured(scores: dict[str, Any]) -> list[str]:
    return [metric for metric in METRICS if metric in scores]


def _score(score: dict[str, Any] | None, metric: str, is_base: bool) -> str:
    if score is None or (is_base and metric == "bleed"):
        return "-"
    by = score["difference"]
    change = "" if is_base else f" {by['value']:+.3f}±{(by['high'] - by['low']) / 2:.3f}"
    return f"{score['value']:.3f}{change}" if metric != "bleed" else change.strip()


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))
