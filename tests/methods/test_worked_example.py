"""The method of docs/add_a_method.md is code: it runs, keeps the rules the page names, and is as
short as it says."""

import re
from pathlib import Path

import pytest

from dopsd.methods import SFT

from .plain import Plain, batch, roles, run, same

PAGE = (Path(__file__).parents[2] / "docs" / "add_a_method.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def anchored():
    (text,) = re.findall(r"```python\n(\"\"\"Anchored.*?)```", PAGE, re.S)
    assert len(text.splitlines()) < 120
    room: dict = {"__name__": "anchored"}
    exec(compile(text, "docs/add_a_method.md", "exec"), room)
    return room["Anchored"]


def test_the_pages_method_pulls_to_the_pictures_and_to_the_base(anchored):
    student, base, data = Plain(0), Plain(1), batch()
    found = run(anchored(anchor=0.5), roles(student, base=base), data, student)
    assert found.pieces == 1 and found.log["loss"] == pytest.approx(
        found.log["fit"] + 0.5 * found.log["stay"]
    )
    assert found.log["stay"] > 0
    at_rest = run(anchored(anchor=0.5), roles(student, base=student), data, student)
    assert at_rest.log["stay"] == 0


def test_the_pages_method_without_its_anchor_is_sft(anchored):
    student, data = Plain(0), batch()
    mine = run(anchored(anchor=0), roles(student, base=Plain(1)), data, student)
    assert same(mine.gradients, run(SFT(times="uniform"), roles(student), data, student).gradients)


def test_the_pages_settings_refuse_what_they_should(anchored):
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        anchored(anchor=-1)
