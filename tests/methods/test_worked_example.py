"""The method shown in docs/add_a_method.md runs, and does what the page says of it."""

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
    namespace: dict = {"__name__": "anchored"}
    exec(compile(text, "docs/add_a_method.md", "exec"), namespace)
    return namespace["Anchored"]


def test_the_pages_method_has_a_loss_on_the_images_and_one_to_the_base(anchored):
    student, base, data = Plain(0), Plain(1), batch()
    result = run(anchored(anchor=0.5), roles(student, base=base), data, student)
    assert result.pieces == 1 and result.log["loss"] == pytest.approx(
        result.log["fit"] + 0.5 * result.log["stay"]
    )
    assert result.log["stay"] > 0
    at_rest = run(anchored(anchor=0.5), roles(student, base=student), data, student)
    assert at_rest.log["stay"] == 0


def test_the_pages_method_without_its_anchor_is_sft(anchored):
    student, data = Plain(0), batch()
    result = run(anchored(anchor=0), roles(student, base=Plain(1)), data, student)
    assert same(
        result.gradients, run(SFT(times="uniform"), roles(student), data, student).gradients
    )


def test_the_pages_method_refuses_a_negative_anchor(anchored):
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        anchored(anchor=-1)
