"""Pages that scripts write are what the numbers beside them say: nobody typed a number in."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("script", "page"), [("claim", "results.md"), ("model_and_cost", "model_and_cost.md")]
)
def test_the_page_is_what_its_script_writes(script: str, page: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    written = importlib.import_module(script).page()
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == written, (
        f"run benchmarks/{script}.py again"
    )


def test_the_readmes_comparison_is_what_was_measured():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for model, row in json.loads((RESULTS / "table1.json").read_text(encoding="utf-8")).items():
        if model != "teacher":
            found = row["nfe"]["4"]
            cells = (
                f"{found[m]['value']:.3f}"
                for m in ("thing_error", "thing_hit", "sharpness", "attributes")
            )
            row = f"| {' | '.join(cells)} |"
            assert f"({model}) {row}" in page or f"| {model} {row}" in page, model


def test_every_full_size_recipe_says_the_memory_that_was_forecast_for_it():
    rows = json.loads((RESULTS / "forecast.json").read_text(encoding="utf-8"))
    files = {
        path.stem: path
        for path in (ROOT / "recipes").glob("*.yaml")
        if not path.stem.startswith("pocket")
    }
    assert {row["recipe"] for row in rows} == files.keys(), "run benchmarks/forecast.py again"
    for row in rows:
        header = " ".join(
            files[row["recipe"]].read_text(encoding="utf-8").replace("#", " ").split()
        )
        peak = f"{row['peak_gib']:.1f}"
        words = {
            "low": f"a step takes {peak} GiB at model.memory: low",
            "high": f"and {peak} at high",
        }
        assert words[row["memory"]] in header, row
