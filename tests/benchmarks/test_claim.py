"""benchmarks/claim.py on curves of closed form: equal learning, rates, the rule, resumed, pages."""

import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BASE, TEACHER = 0.4, 0.2
GOAL = 0.28  # three fifths of the way


@pytest.fixture()
def claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import claim
    import claim_page

    monkeypatch.setattr(claim, "ROWS", tmp_path / "claim.jsonl")
    monkeypatch.setattr(claim, "CLAIM", tmp_path / "claim.json")
    monkeypatch.setattr(claim, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(claim, "weights_mark", lambda: "weights")
    monkeypatch.setattr(claim_page, "CLAIM", tmp_path / "claim.json")
    return claim


def straight(loss: float, gain: float = 0.15, scale: float = 1.0) -> Callable[..., Any]:
    """Rows of cells whose thing_error falls by `gain` over the run, in a straight line, while
    sharpness falls by the share `loss` and attributes by half of it."""

    def rows_of(cell: Any, folder: Path | None = None) -> list[dict[str, Any]]:
        about = {"weights": "weights", "nfe": 2, "key": list(cell.key)}
        if cell.arm == "references":
            base = {"thing_error": BASE, "thing_hit": 0.0, "thing_sharp": 0.9, "sharpness": 0.8}
            base |= {"attributes": 0.7, "others_error": 0.4, "drift": 0.0, "speckle": 0.1}
            models = {"base": base, "floor": base, "teacher, another": base}
            models["teacher, target"] = base | {"thing_error": TEACHER}
            return [about | {"of": of, "step": 0} | row for of, row in models.items()]
        rows = []
        for step in (1, 2, 3, 4):
            share = step / 4
            rows.append(
                about
                | {"step": step, "forwards": 2400.0 * step * scale, "seconds": 10.0 * step}
                | {"thing_error": BASE - gain * share, "thing_hit": share, "thing_sharp": 0.6}
                | {"sharpness": 0.8 * (1 - loss * share), "attributes": 0.7 - loss * share / 2}
                | {"others_error": 0.4, "drift": share, "speckle": 0.1, "wall": 12.0 * step}
            )
        return rows

    return rows_of


def measured(claim: ModuleType, plan: Callable[..., Any], loss_of: dict[str, Any]) -> Any:
    """Rows for every cell of a plan; loss_of: arm -> what measures its cells."""
    rows = claim.Rows([])
    for _ in range(2):  # the second time what depends on the first
        left = {c.key: c for c in plan(rows) if c.is_ready and c.key not in rows.keys}
        new = [loss_of.get(cell.arm, straight(0.2))(cell) for cell in left.values()]
        rows = claim.Rows([*rows.all, *(row for each in new for row in each)])
    return rows


def test_what_is_kept_at_the_goal_is_interpolated_between_looks(claim):
    rows = measured(claim, claim.plan_run, {"sft": straight(0.2), "pso": straight(0.2, gain=0.1)})
    arms = claim.numbers(rows, [])["regimes"]["identity"]["arms"]
    place = arms["sft"]["places"]["the goal"]
    share = (BASE - GOAL) / 0.15  # of the run, in closed form
    assert place["sharpness"] == pytest.approx([1 - 0.2 * share] * 3)
    assert place["attributes"] == pytest.approx([-0.1 * share] * 3)
    assert place["forwards"] == pytest.approx([9600 * share] * 3)
    assert arms["sft"]["places"]["the end"]["sharpness"] == pytest.approx([0.8] * 3)
    # An arm that never gets there has no value, and says so.
    assert arms["pso"]["reached"] == 0 and "the goal" not in arms["pso"]["places"]


def test_two_arms_are_compared_at_the_lowest_error_that_both_reach(claim):
    loss_of = {"dopsd": straight(0.06, gain=0.1), "sft": straight(0.3, gain=0.2)}
    outcomes = claim.numbers(measured(claim, claim.plan_run, loss_of), [])["expected"]
    (kept,) = (
        each["lead"]
        for each in outcomes
        if (each["regime"], each["metric"], each["at"]) == ("style", "sharpness", "equal learning")
    )
    # D-OPSD ends at 0.3, which SFT passes half way.
    assert kept == pytest.approx([(1 - 0.06) - (1 - 0.15)] * 3)


def test_the_rate_is_the_one_that_keeps_most_at_the_goal(claim):
    def sft(cell, folder=None):
        by_rate = {3e-4: straight(0.1, gain=0.11), 1e-3: straight(0.15), 3e-3: straight(0.4, 0.2)}
        return by_rate[cell.rate](cell)

    rows = measured(claim, claim.plan_sweep, {"sft": sft})
    assert claim.chosen_rate(rows, "sft") == 1e-3  # 3e-4 does not reach the goal, 3e-3 keeps less
    assert claim.chosen_rate(claim.Rows([]), "sft") == 1e-3


def test_the_rule_takes_of_the_arms_that_meet_the_gates_the_cheap_one_that_keeps_most(claim):
    arms = {"sft": straight(0.2), "sft-retention": straight(0.02), "dopsd-retention": straight(0.0)}
    arms["dopsd-retention"] = straight(0.0, scale=1.3)  # keeps most, for too many forwards
    arms["sft-prior"] = straight(0.04, scale=0.9)
    verdict = claim.numbers(measured(claim, claim.plan_run, arms), [])
    assert verdict["default"] == "sft-retention" and verdict["best_variant"] is None
    passing = {
        name for name, arm in verdict["regimes"]["identity"]["arms"].items() if arm["passes"]
    }
    assert passing == {"sft-retention", "dopsd-retention", "sft-prior"}


def test_a_run_that_was_stopped_goes_on_where_it_ended(claim, monkeypatch):
    calls: list[Any] = []

    def measure_cell(cell, folder):
        calls.append(cell.key)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return straight(0.1)(cell)

    monkeypatch.setattr(claim, "measure_cell", measure_cell)
    monkeypatch.setattr(claim, "VARIANTS", {})
    with pytest.raises(KeyboardInterrupt):
        claim.measure(claim.plan_run, minutes=1e6, workers=1)
    assert len(claim.read_rows().keys) == 4
    claim.measure(claim.plan_run, minutes=1e6, workers=1)
    done = claim.read_rows()
    assert [key for key in calls if calls.count(key) > 1] == [calls[4]] * 2
    assert claim.next_cell(claim.plan_run, done, []) is None
    # Without time nothing begins, and rows of other weights do not count.
    before = len(calls)
    monkeypatch.setattr(claim, "weights_mark", lambda: "others")
    claim.measure(claim.plan_run, minutes=0.0, workers=1)
    assert len(calls) == before and not claim.read_rows().all


def test_the_first_cells_are_the_main_arms_on_the_first_thing(claim):
    cells = list(claim.plan_run(claim.Rows([])))
    first = claim.REGIMES["identity"].concepts[0]
    assert [cell.arm for cell in cells[: 1 + len(claim.MAIN)]] == ["references", *claim.MAIN]
    assert {(cell.concept, cell.seed) for cell in cells[: 1 + len(claim.MAIN)]} == {(first, 0)}


def page_of(claim: ModuleType, rows: Any) -> str:
    page = sys.modules["claim_page"]
    claim.write_json(claim.CLAIM, claim.numbers(rows, []))
    return "\n".join([*page.summary(), *page.sections()])


def test_the_page_is_written_from_the_rows_alone(claim):
    loss_of = {arm: straight(0.0137 * k) for k, arm in enumerate(claim.ARMS, 1)}
    rows = measured(claim, claim.plan_run, loss_of)
    page = page_of(claim, rows)
    assert page == page_of(claim, claim.Rows(list(rows.all)))
    other = {arm: straight(0.0173 * k, gain=0.1631) for k, arm in enumerate(claim.ARMS, 1)}
    changed = page_of(claim, measured(claim, claim.plan_run, other))
    tables = [
        {line: set(re.findall(r"\d\.\d{3}", line)) for line in text.splitlines() if "|" in line}
        for text in (page, changed)
    ]
    same = set(tables[0]) & set(tables[1])
    typed = {number for line in same for number in tables[0][line]}
    # The references, and the rate of arms that were not swept
    assert typed <= {"0.400", "0.200", "0.000", "0.900", "0.800", "0.700", "0.001"}


def test_the_page_says_what_is_missing_and_what_is_not_shown(claim):
    empty = page_of(claim, claim.Rows([]))
    assert "not measured on the packaged checkpoint yet" in empty
    page = page_of(claim, measured(claim, claim.plan_run, {}))
    assert "D-OPSD keeps more sharpness than SFT (identity, at equal learning): not shown" in page
    assert "No arm that was measured meets the gates" in page


def test_every_arm_is_a_recipe(claim, concept: Path, tmp_path: Path):
    for name, arm in claim.ARMS.items():
        recipe = claim.concept_recipe(arm.sections, concept, tmp_path, name)
        assert recipe.objective.forwards_per_step(2, 4) >= 12, name
