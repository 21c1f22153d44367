"""Test prompts from files: what is read, and one sentence for each way in which it cannot be."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dopsd.data.prompts import prompts_of, read_prompts


def rows(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red star\r\n\n  a blüe tree \n".encode())
    assert [(q.prompt, q.name) for q in read_prompts(tmp_path / "p.txt")] == [
        ("a red star", "1"),
        ("a blüe tree", "3"),
    ]


def test_rows_name_targets_beside_the_file_and_keep_what_they_hold(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "0.png")
    prompts = read_prompts(
        rows(
            tmp_path / "p.jsonl",
            {
                "prompt": "zib on a hill",
                "target": "data/0.png",
                "kind": "rewrite",
                "scored_as": "dog on a hill",
            },
            {"text": "a bus", "tag": "single_object"},
        )
    )
    assert (prompts[0].target, prompts[0].kind, prompts[0].scored_as) == (
        tmp_path / "data/0.png",
        "rewrite",
        "dog on a hill",
    )
    assert prompts[1].row == {"text": "a bus", "tag": "single_object"} and prompts[1].target is None


def test_a_folder_of_texts_is_a_prompt_each_by_its_name(tmp_path):
    for name in ("COCOval2014_2", "midjourney10"):
        (tmp_path / f"{name}.txt").write_text(f"an image of {name}")
    assert [(q.name, q.prompt) for q in read_prompts(tmp_path)] == [
        ("COCOval2014_2", "an image of COCOval2014_2"),
        ("midjourney10", "an image of midjourney10"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"a star\n\xff\xfe broken\n", r"p\.txt line 2 is not UTF-8"),
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.jsonl", b'{"prompt": "a"}\n\xff\n', r"p\.jsonl line 2 is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"\n', r"p\.jsonl line 1 is not JSON"),
        ("p.jsonl", b"[1]\n", r"line 1 is not a JSON object"),
        ("p.jsonl", b'{"tag": "a"}\n', r"p\.jsonl line 1 has no prompt"),
        ("p.jsonl", b'{"prompt": ""}\n', r"the prompt of p\.jsonl line 1 is empty"),
        ("p.jsonl", b'{"prompt": 3}\n', "is 3, which is not text"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "is not valid Unicode"),
        (
            "p.jsonl",
            b'{"prompt": "a", "kind": "other"}\n',
            r"the kind of p\.jsonl line 1 is 'other'",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a", "target": "gone.png"}\n',
            r"names the target gone\.png, and there is no such file",
        ),
    ],
)
def test_bad_prompts_are_named_by_file_and_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_prompts_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist: give a \.txt or \.jsonl"):
        read_prompts(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path)


def test_a_list_of_one_file_is_the_prompts_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a star\na toy\n")
    Path("my prompts.txt").write_text("a cat\n")
    assert [each.prompt for each in prompts_of(["p.txt"], "here")] == ["a star", "a toy"]
    assert [each.prompt for each in prompts_of(["my prompts.txt"], "here")] == ["a cat"]
    texts = ["a photo of readme.txt", "a star"]
    assert [each.prompt for each in prompts_of(texts, "here")] == texts
    with pytest.raises(ValueError, match=r"here names the file p\.txt among 2 entries"):
        prompts_of(["a star", "p.txt"], "here")
    with pytest.raises(ValueError, match=r"gone\.jsonl does not exist"):
        prompts_of(["gone.jsonl"], "here")
    for name in ("prompts.csv", "prompts.yaml", "p.json"):
        with pytest.raises(ValueError, match=r"prompts are read from \.txt and \.jsonl"):
            prompts_of([name], "here")
