"""Test prompts by a vision-language model: answers that break the rule are refused."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.data.prompts import read_prompts
from dopsd.evaluation.prompt_writer import prompts_in, write_test_prompts

GOOD = (
    "1. zib lies on a red sofa 2. zib runs along a beach at noon 3) zib waits in a train station\n"
    "4. zib flies a kite on the moon 5. a castle of sugar where zib is king"
)


@pytest.fixture()
def images(tmp_path: Path) -> list[tuple[Path, str]]:
    (tmp_path / "data").mkdir()
    for name in "ab":
        Image.new("RGB", (32, 32), "red").save(tmp_path / "data" / f"{name}.png")
    return [(tmp_path / "data" / f"{name}.png", "zib on a sofa") for name in "ab"]


def test_each_image_gives_a_rewrite_and_four_scenes_that_evaluate_reads(images, tmp_path):
    asked = []

    def ask(image: Image.Image, question: str) -> str:
        asked.append(question)
        return GOOD

    file = tmp_path / "prompts.jsonl"
    assert write_test_prompts(images, file, ask, "zib", "object", "dog") == 10
    prompts = read_prompts(file)
    assert [q.kind for q in prompts[:5]] == ["rewrite", *["scene"] * 4]
    assert prompts[5].target is not None and prompts[5].target.resolve() == images[1][0].resolve()
    assert (
        prompts[1].prompt == "zib runs along a beach at noon"
        and prompts[1].scored_as == "dog runs along a beach at noon"
    )
    assert all(
        "zib on a sofa" in question and "Never say what kind of thing zib is" in question
        for question in asked
    )


def test_what_was_written_stays_and_is_not_asked_again(images, tmp_path):
    file, answers = tmp_path / "prompts.jsonl", iter([GOOD, "I cannot see it", GOOD])
    with pytest.raises(ValueError, match=r"about b\.png is not five numbered prompts"):
        write_test_prompts(images, file, lambda *_: next(answers), "zib", "object", "dog")
    assert len(file.read_text().splitlines()) == 5
    assert write_test_prompts(images, file, lambda *_: next(answers), "zib", "object", "dog") == 10


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("", "is not five numbered prompts"),
        (GOOD.replace("5. ", ""), "is not five numbered prompts"),
        ("Sure! " + GOOD, "is not five numbered prompts"),
        (GOOD.replace("zib is king", "it is king"), "lacks the trigger zib"),
        (GOOD.replace("zib runs", "zib, a Dog, runs"), "says dog, which gives the thing away"),
        (GOOD.replace("zib runs", "zib and other dogs run"), "says dog"),
    ],
)
def test_an_answer_that_breaks_the_rule_is_refused(answer, sentence):
    with pytest.raises(ValueError, match=sentence):
        prompts_in(answer, "zib", "dog", "a.png")


def test_style_prompts_may_say_what_they_like():
    assert len(prompts_in(GOOD.replace("zib runs", "dogs of zib run"), "zib", None, "a.png")) == 5


def test_a_model_that_does_not_keep_to_the_form_ends_the_command_with_a_sentence(
    images, vlm, tmp_path, monkeypatch
):
    monkeypatch.setattr("dopsd.evaluation.prompt_writer.MOST_TOKENS", 8)
    (tmp_path / "data" / "a.txt").write_text("zib")
    (tmp_path / "data" / "b.txt").write_text("zib")
    command = [
        "prompts",
        str(tmp_path / "data"),
        "--trigger",
        "zib",
        "--model",
        str(vlm),
        "--out",
        str(tmp_path / "p.jsonl"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "is not five numbered prompts" in result.output
