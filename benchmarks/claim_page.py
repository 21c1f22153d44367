"""The claim's sections of docs/results.md, written from claim.json; no number is typed here."""

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from claim_arms import RATES, REGIMES, SWEEP_FORWARDS, SWEEP_THINGS
from claim_verdict import (
    COSTS,
    DEARER,
    GOAL,
    HIT,
    KEPT_SHARPNESS,
    LOST_ATTRIBUTES,
    SHOWN,
    USUAL_RATE,
)

from dopsd.pocket.curves import BATCH, RANK

CLAIM = Path(__file__).parent / "results" / "claim.json"
RULE = f"""### The rule and what was expected

Both were written before any of these numbers was measured.

**Gates**, means at the end of the long run: at least {KEPT_SHARPNESS:g} of the base model's
sharpness, attributes lower by at most {LOST_ATTRIBUTES:g}, thing_hit at least {HIT:g}.

**The default** is picked among the main arms and the best variant, on the trainings that all of
them have: of the arms that meet the gates, those that reach equal learning with at most {DEARER:g}
times the fewest forwards; of these the one that keeps most (the mean of what is kept at equal
learning and at the end, of the share of sharpness and 1 plus the change of attributes); of those
that its 95% interval does not tell from it, the one with the fewest forwards. The best variant is
picked by the same rule among the variants, on three things.

**Equal learning** is where thing_error has closed {GOAL:.0%} of the gap between the base model and
the teacher that sees the target; for a pair of arms, the lowest thing_error that both reach. Values
are interpolated between looks. A first look that is already beyond counts as it is, and D-OPSD is
not looked at before step 80 (it passes a trough of sharpness near step 15).

**The learning rate** of a main arm is the one of {", ".join(f"{rate:g}" for rate in RATES)} that
keeps most at equal learning on {len(SWEEP_THINGS)} other things, within {SWEEP_FORWARDS[-1]}
forwards; where none gets there, the one with the lowest thing_error. A variant takes the rate of
the arm it varies; an arm that was not swept has {USUAL_RATE:g}.
"""
ABOUT = """sharpness: share of the base model's; attributes: difference to the base model's; bleed:
by how much thing_error falls under other names; drift: how far the image that one step from noise
implies has moved, in units of a latent's deviation. Forwards of the network in training, a backward
counted as two; seconds on one core."""


def read_claim() -> dict[str, Any]:
    """The numbers of `claim.py write`."""
    return json.loads(CLAIM.read_text(encoding="utf-8"))


def sections() -> list[str]:
    """For docs/results.md."""
    claim = read_claim()
    lines = ["## The claim", "", _set_up(claim), "", _rule(), *_expected(claim)]
    if claim["weights"]:
        lines += [*_verdict(claim), ""]
        for name, regime in claim["regimes"].items():
            if regime["arms"]:
                lines += _regime(name, regime)
        lines += _rates(claim)
    return [*lines, *_missing(claim)]


def summary() -> list[str]:
    """What the numbers say, in sentences, for the top of the page."""
    claim = read_claim()
    arms = claim["regimes"]["identity"]["arms"]
    if not arms:
        return ["The claim is not measured on the packaged checkpoint yet."]
    lines = []
    if claim["missing"]:
        missing = len(claim["missing"])
        lines.append(f"Preliminary: {missing} trainings of the plan are missing (listed below).")
    if "sft" in arms:
        lines.append(_kept_sentence("SFT as usual", arms["sft"]))
    if claim["default"]:
        default = arms[claim["default"]]
        lines.append(
            _kept_sentence(f"The default that the rule picks, {default['title']},", default)
        )
    else:
        lines.append("No arm that was measured meets the gates, so no default is picked.")
    for each in claim["expected"]:
        if each["at"] == "equal learning":
            lines.append(_sentence(each))
    return lines


def _set_up(claim: dict[str, Any]) -> str:
    identity, style = REGIMES["identity"], REGIMES["style"]
    sentences = [
        "Looks along trainings: `python benchmarks/claim.py sweep`, `run`, `write`; rows in",
        "`benchmarks/results/claim.jsonl`, numbers in `claim.json`. Machine: 2 CPU cores, a",
        f"training on each. LoRA rank {RANK}, batch {BATCH}, NFE {claim['nfe'] or 'not measured'}.",
        f"Identity: {identity.images} images of a thing, to {identity.forwards[-1]} forwards.",
        f"Style: {style.images} images in an unnamed style, to {style.forwards[-1]}. What is kept:",
        f"{claim['prompts']} unrelated prompts, others for each thing. Intervals: 95% bootstrap",
        "over things, each with all its seeds: they cover the choice of things and prompts.",
    ]
    return fill(" ".join(sentences), 100)


def _rule() -> str:
    """RULE with its paragraphs wrapped again, for the numbers in it differ in length."""
    paragraphs = [fill(each, 100, break_on_hyphens=False) for each in RULE.split("\n\n")]
    return "\n\n".join(paragraphs) + "\n"


def _verdict(claim: dict[str, Any]) -> list[str]:
    sentences = [fill(each, 100, break_on_hyphens=False) for each in summary()]
    lines = ["### Verdict", "", *sentences]
    best = claim["best_variant"]
    arms = claim["regimes"]["identity"]["arms"]
    lines.append(
        f"The best variant is {arms[best]['title']}."
        if best
        else "No variant meets the gates, or not all of them are measured: none is the best."
    )
    return lines


def _kept_sentence(who: str, arm: dict[str, Any]) -> str:
    end = arm["places"]["the end"]
    sharp, attributes, hit = (end[name] for name in ("sharpness", "attributes", "thing_hit"))
    verdicts = {
        "sharpness": _bound(sharp, KEPT_SHARPNESS),
        "attributes": _bound(attributes, -LOST_ATTRIBUTES),
        "thing_hit": _bound(hit, HIT),
    }
    judged = ", ".join(f"{name} {verdict}" for name, verdict in verdicts.items())
    return (
        f"{who} ends with {_interval(sharp, 2)} of the base model's sharpness, attributes changed "
        f"by {_interval(attributes, 3)} and thing_hit {_interval(hit, 2)}, over {arm['cells']} "
        f"trainings. Gates: {judged}."
    )


def _bound(interval: Sequence[float | None], least: float) -> str:
    value, low, high = interval
    assert value is not None, "a mean is a number"
    if low is None or high is None:
        return f"{'met' if value >= least else 'missed'} on one thing"
    if low >= least:
        return "met"
    if high < least:
        return "missed"
    return "met by the mean, not by the interval" if value >= least else "missed by the mean"


def _sentence(each: dict[str, Any]) -> str:
    where = f"{each['regime']}, at {each['at']}"
    if each["lead"] is None:
        return f"{each['words']} ({where}): not measured."
    return f"{each['words']} ({where}): {_judged(each)}, {_interval(each['lead'], 3)}."


def _judged(each: dict[str, Any]) -> str:
    _, low, high = each["lead"]
    if low is None:
        return "one thing: no interval"
    if low > 0:
        return "shown"
    return "the other way" if high < 0 else "not shown"


def _expected(claim: dict[str, Any]) -> list[str]:
    lines = [
        "| expected | where | score | lead | trainings | |",
        "|---|---|---|---|---|---|",
    ]
    for each in claim["expected"]:
        where = f"{each['regime']}, {each['at']}"
        lead = _interval(each["lead"], 3) if each["lead"] else "-"
        verdict = _judged(each) if each["lead"] else "not measured"
        lines.append(
            f"| {each['words']} | {where} | {each['metric']} | {lead} | {each['cells']} "
            f"| {verdict} |"
        )
    return [*lines, ""]


def _regime(name: str, regime: dict[str, Any]) -> list[str]:
    titles = {
        "the end": "at the end of the long run",
        "the goal": "at equal learning",
    }
    lines = []
    for place, title in titles.items():
        lines += [
            f"### {name.capitalize()}: {title}",
            "",
            ABOUT if place == "the end" else "Trainings that get there.",
            "",
            f"| arm | trainings | {' | '.join(SHOWN + COSTS)} |",
            "|---|---|" + "---|" * len(SHOWN + COSTS),
        ]
        if place == "the end":
            lines += [_reference_line(of, row) for of, row in regime["references"].items()]
        for arm in regime["arms"].values():
            if place in arm["places"]:
                count = arm["cells"] if place == "the end" else arm["reached"]
                cells = [_cell(metric, arm["places"][place][metric]) for metric in SHOWN + COSTS]
                lines.append(f"| {arm['title']} | {count} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        f"### {name.capitalize()}: the curves",
        "",
        "Means over the trainings of each arm.",
        "",
        f"| arm | step | {' | '.join((*SHOWN, *COSTS))} |",
        "|---|---|" + "---|" * len(SHOWN + COSTS),
    ]
    for arm in regime["arms"].values():
        for look in arm["looks"]:
            cells = [f"{look[metric]:.{_digits(metric)}f}" for metric in SHOWN + COSTS]
            lines.append(f"| {arm['title']} | {look['step']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _reference_line(of: str, row: dict[str, Any]) -> str:
    """A model that needs no training; sharpness and attributes as they are, not relative."""
    cells = [_cell(metric, row[metric]) if metric in row else "-" for metric in SHOWN]
    return f"| {of} (sharpness and attributes as they are) | - | {' | '.join([*cells, '-', '-'])} |"


def _rates(claim: dict[str, Any]) -> list[str]:
    lines = [
        "### Learning rates",
        "",
        "| arm | rate | step-end thing_error | sharpness | attributes | forwards |",
        "|---|---|---|---|---|---|",
    ]
    for arm, rate in claim["rates"].items():
        for value, scores in rate["swept"].items():
            mark = " (kept)" if float(value) == rate["rate"] else ""
            cells = [
                f"{scores[metric]:.{_digits(metric)}f}"
                for metric in ("thing_error", "sharpness", "attributes", "forwards")
            ]
            lines.append(f"| {arm} | {value}{mark} | {' | '.join(cells)} |")
        if not rate["swept"]:
            why = "not swept" if rate["of"] == arm else f"that of {rate['of']}"
            lines.append(f"| {arm} | {rate['rate']:g} ({why}) | - | - | - | - |")
    return [*lines, ""]


def _missing(claim: dict[str, Any]) -> list[str]:
    cells = claim["missing"]
    if not cells:
        return ["Every training of the plan is measured.", ""]
    by_arm: dict[str, int] = {}
    for _, regime, arm, *_ in cells:
        by_arm[f"{regime} {arm}"] = by_arm.get(f"{regime} {arm}", 0) + 1
    listed = ", ".join(f"{arm} ({count})" for arm, count in by_arm.items())
    sentence = f"Trainings of the plan that are missing: {listed}."
    return ["### Not measured yet", "", fill(sentence, 100, break_on_hyphens=False), ""]


def _cell(metric: str, interval: Sequence[float | None]) -> str:
    return _interval(interval, _digits(metric))


def _digits(metric: str) -> int:
    return 0 if metric in COSTS else 3


def _interval(interval: Sequence[float | None], digits: int) -> str:
    value, low, high = interval
    if low is None:
        return f"{value:.{digits}f} (one thing)"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
