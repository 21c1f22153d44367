"""Pages that scripts write are what the numbers beside them say: nobody typed a number in."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("script", "page"), [("claim", "results.md"), ("model_and_cost", "model_and_cost.md")])
def test_the_page_is_what_its_script_writes(script: str, page: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    written = importlib.import_module(script).page()
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == written, f"run benchmarks/{script}.py again"
