"""From the looks of claim.jsonl to the numbers of claim.json: curves, equal learning, the end of
the long run, what was expected, and the default that the rule picks.

The rule was written before any of these numbers was measured.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from claim_arms import ARMS, IN_STYLES, MAIN, RATES, REGIMES, SWEEP_THINGS, UNRELATED, VARIANTS
from claim_expected import EXPECTED, Expectation
from claim_rows import GOAL, Curve, Rows, goal_of

from dopsd.evaluation.curves import equal_learning, values_at
from dopsd.evaluation.statistics import Interval, bootstrap

ERROR = "thing_error"
SHOWN = (ERROR, "thing_hit", "thing_sharp", "sharpness", "attributes", "bleed", "drift")
COSTS = ("forwards", "seconds")
KEPT_SHARPNESS, LOST_ATTRIBUTES, HIT = 0.95, 0.03, 0.5  # the gates, at the end of the long run
DEARER = 1.25  # times the fewest forwards
USUAL_RATE = 1e-3  # of an arm that is not swept

Cells = Sequence[tuple[int, int]]  # (concept, seed)


# Learning rates


def chosen_rate(rows: Rows, arm: str) -> float:
    """Of an arm's swept rates the one that keeps most at the goal, among those that reach it on
    every thing; if none does, the one with the lowest thing_error. USUAL_RATE before the sweep."""
    owner = ARMS[arm].rate_of or arm
    curves = {rate: _swept(rows, owner, rate) for rate in RATES}
    measured = {rate: each for rate, each in curves.items() if each}
    if not measured:
        return USUAL_RATE
    goals = [goal_of(rows, "sweep", "identity", thing) for thing in SWEEP_THINGS]
    scores = {
        rate: np.mean([_kept_at(curve, goal) for curve, goal in zip(each, goals, strict=True)])
        for rate, each in measured.items()
        if all(_reaches(curve, goal) for curve, goal in zip(each, goals, strict=True))
    }
    if scores:
        return max(scores, key=lambda rate: scores[rate])
    return min(measured, key=lambda rate: np.mean([c[-1].mean(ERROR) for c in measured[rate]]))


def _swept(rows: Rows, arm: str, rate: float) -> list[Curve]:
    """The sweep's curves of a rate, one a thing; none where one is not measured."""
    curves = [rows.curve("sweep", "identity", arm, thing, 0, rate) for thing in SWEEP_THINGS]
    return curves if all(curves) else []


# Curves


def _reaches(curve: Curve, goal: float | None) -> bool:
    return goal is not None and any(look.mean(ERROR) <= goal for look in curve)


def _kept_at(curve: Curve, goal: float | None) -> float:
    """What is kept where the goal is first reached, or at the end: the mean of the share of
    sharpness and of 1 + the change of attributes."""
    at = _values(curve, goal)
    return float(np.mean([at("sharpness"), 1 + at("attributes")]))


def _values(curve: Curve, level: float | None) -> Callable[[str], float]:
    """The metrics where thing_error first is `level`; at the end where it never is."""
    if not _reaches(curve, level):
        return curve[-1].mean
    assert level is not None
    return lambda metric: float(values_at(curve, ERROR, level, metric).mean())


class Measured:
    """The curves of arms in a regime, at the chosen rates."""

    def __init__(self, rows: Rows, regime: str):
        self.regime, self._rows = regime, rows
        self.concepts, self.seeds = REGIMES[regime].concepts, REGIMES[regime].seeds
        rates = {arm: chosen_rate(rows, arm) for arm in ARMS}
        self._curves = {
            (arm, concept, seed): rows.curve("run", regime, arm, concept, seed, rates[arm])
            for arm in ARMS
            for concept in self.concepts
            for seed in self.seeds
        }

    def curve(self, arm: str, concept: int, seed: int) -> Curve:
        """The looks of a training; empty where it is not measured."""
        return self._curves[arm, concept, seed]

    def goal(self, concept: int) -> float | None:
        return goal_of(self._rows, "run", self.regime, concept)

    def cells(self, *arms: str) -> Cells:
        """The (concept, seed) that all arms have."""
        every = [(concept, seed) for concept in self.concepts for seed in self.seeds]
        return [cell for cell in every if all(self.curve(arm, *cell) for arm in arms)]

    def table(self, cells: Cells, value: Callable[[int, int], float]) -> np.ndarray:
        """Values of cells as [concepts, seeds], NaN elsewhere: concepts are resampled, each with
        all its seeds."""
        table = np.full((len(self.concepts), len(self.seeds)), np.nan)
        for concept, seed in cells:
            row, column = self.concepts.index(concept), self.seeds.index(seed)
            table[row, column] = value(concept, seed)
        return table

    def interval(self, cells: Cells, value: Callable[[int, int], float]) -> Interval:
        table = self.table(cells, value)
        return bootstrap(table[~np.isnan(table).all(1)])

    def at(self, arm: str, where: str, other: str, concept: int, seed: int):
        """The metrics of an arm at a place of its curve; see Expectation."""
        curve = self.curve(arm, concept, seed)
        if where == "the end":
            return curve[-1].mean
        if where == "the goal":
            return _values(curve, self.goal(concept))
        level = equal_learning([curve, self.curve(other, concept, seed)], ERROR)
        return _values(curve, level)

    def lead(self, metric: str, better: str, worse: str, where: str) -> Interval:
        """What `better` has more than `worse`, in the cells that both have."""

        def difference(concept: int, seed: int) -> float:
            ours = self.at(better, where, worse, concept, seed)(metric)
            return ours - self.at(worse, where, better, concept, seed)(metric)

        return self.interval(self.cells(better, worse), difference)


# The rule


def passes(measured: Measured, arm: str, cells: Cells) -> bool:
    """Whether an arm's means meet the gates at the end of the long run."""
    end = {
        metric: measured.interval(
            cells, lambda c, s, m=metric: measured.curve(arm, c, s)[-1].mean(m)
        )
        for metric in ("sharpness", "attributes", "thing_hit")
    }
    return (
        end["sharpness"].value >= KEPT_SHARPNESS
        and end["attributes"].value >= -LOST_ATTRIBUTES
        and end["thing_hit"].value >= HIT
    )


def pick(rows: Rows, arms: Sequence[str]) -> str | None:
    """The arm that the rule picks of `arms`, on the cells that all of them have; None where no arm
    meets the gates.

    Of the arms that meet the gates, those that reach the goal with at most DEARER times the fewest
    forwards; of these the one that keeps most, the mean of what is kept at the goal and at the end;
    of those whose paired difference to it is within its 95% interval, the one with the fewest
    forwards.
    """
    measured = Measured(rows, "identity")
    cells = measured.cells(*arms)
    able = [arm for arm in arms if cells and passes(measured, arm, cells)]
    if not able:
        return None

    def forwards(arm: str) -> float:
        return float(np.mean([measured.at(arm, "the goal", arm, *c)("forwards") for c in cells]))

    def kept(arm: str, concept: int, seed: int) -> float:
        curve = measured.curve(arm, concept, seed)
        return (_kept_at(curve, measured.goal(concept)) + _kept_at(curve[-1:], None)) / 2

    cost = {arm: forwards(arm) for arm in able}
    cheap = [arm for arm in able if cost[arm] <= DEARER * min(cost.values())]
    best = max(cheap, key=lambda arm: np.mean([kept(arm, *cell) for cell in cells]))
    equal = [
        arm
        for arm in cheap
        if measured.interval(cells, lambda c, s, a=arm: kept(best, c, s) - kept(a, c, s)).low <= 0
    ]
    return min(equal, key=lambda arm: cost[arm])


def best_variant(rows: Rows) -> str | None:
    """The variant that the rule picks, once all of them are measured on three things."""
    measured = Measured(rows, "identity")
    first = [(concept, 0) for concept in measured.concepts[:3]]
    complete = all(measured.curve(arm, *cell) for arm in VARIANTS for cell in first)
    return pick(rows, list(VARIANTS)) if complete else None


# Everything for claim.json


def numbers(rows: Rows, missing: Sequence[Any]) -> dict[str, Any]:
    """What the pages are written from; a function of the rows alone."""
    best = best_variant(rows)
    arms = [*MAIN, best] if best else list(MAIN)
    return {
        "weights": rows.all[0]["weights"] if rows.all else None,
        "nfe": rows.all[0]["nfe"] if rows.all else None,
        "prompts": UNRELATED,
        "goal": GOAL,
        "rates": {arm: _rate(rows, arm) for arm in ARMS},
        "regimes": {regime: _regime(rows, regime) for regime in REGIMES},
        "expected": [_outcome(rows, each) for each in EXPECTED],
        "best_variant": best,
        "default": pick(rows, arms),
        "dependence": _dependence(rows),
        "missing": list(missing),
    }


def _rate(rows: Rows, arm: str) -> dict[str, Any]:
    owner = ARMS[arm].rate_of or arm
    swept = {rate: curves for rate in RATES if (curves := _swept(rows, owner, rate))}
    ends = {
        f"{rate:g}": {m: float(np.mean([c[-1].mean(m) for c in curves])) for m in SHOWN + COSTS}
        for rate, curves in swept.items()
    }
    return {"rate": chosen_rate(rows, arm), "of": owner, "swept": ends if owner == arm else {}}


def _regime(rows: Rows, regime: str) -> dict[str, Any]:
    measured = Measured(rows, regime)
    names = list(ARMS) if regime == "identity" else list(IN_STYLES)
    references = {}
    for of in ("base", "floor", "teacher, target", "teacher, another"):
        found = [rows.reference("run", regime, concept, of) for concept in measured.concepts]
        have = [row for row in found if row is not None]
        metrics = [m for m in (*SHOWN, "others_error") if have and have[0].get(m) is not None]
        references[of] = {m: _list(bootstrap(np.array([r[m] for r in have]))) for m in metrics}
    return {
        "images": REGIMES[regime].images,
        "concepts": len(measured.concepts),
        "seeds": len(measured.seeds),
        "references": references,
        "arms": {arm: _arm(measured, arm) for arm in names if measured.cells(arm)},
    }


def _arm(measured: Measured, arm: str) -> dict[str, Any]:
    cells = measured.cells(arm)
    curves = [measured.curve(arm, *cell) for cell in cells]
    with_goal = [
        cell for cell in cells if _reaches(measured.curve(arm, *cell), measured.goal(cell[0]))
    ]
    places = {
        place: {
            metric: _list(
                measured.interval(
                    chosen, lambda c, s, m=metric, p=place: measured.at(arm, p, arm, c, s)(m)
                )
            )
            for metric in SHOWN + COSTS
        }
        for place, chosen in (("the end", cells), ("the goal", with_goal))
        if chosen
    }
    looks = [
        {"step": at[0].step}
        | {m: float(np.mean([look.mean(m) for look in at])) for m in SHOWN + COSTS}
        for at in zip(*curves, strict=True)
    ]
    return {
        "title": ARMS[arm].title,
        "cells": len(cells),
        "reached": len(with_goal),
        "passes": passes(measured, arm, cells),
        "places": places,
        "looks": looks,
    }


def _outcome(rows: Rows, each: Expectation) -> dict[str, Any]:
    measured = Measured(rows, each.regime)
    cells = measured.cells(each.better, each.worse)
    lead = measured.lead(each.metric, each.better, each.worse, each.at) if cells else None
    return vars(each) | {"cells": len(cells), "lead": lead and _list(lead)}


def _dependence(rows: Rows) -> list[dict[str, float]]:
    """thing_error of base, teacher and D-OPSD (at the end, seed 0) on each thing."""
    measured, found = Measured(rows, "identity"), []
    for concept, seed in measured.cells("dopsd"):
        base = rows.reference("run", "identity", concept)
        teacher = rows.reference("run", "identity", concept, "teacher, target")
        if seed == 0 and base and teacher:
            tuned = measured.curve("dopsd", concept, seed)[-1].mean(ERROR)
            errors = {"base": base[ERROR], "teacher": teacher[ERROR], "dopsd": tuned}
            found.append({"thing": concept} | errors)
    return found


def _list(interval: Interval) -> list[float | None]:
    """For JSON, without infinities: the interval of one value is open."""
    return [float(each) if np.isfinite(each) else None for each in interval]
