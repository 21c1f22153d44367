"""Atomic writes with the default mode, JSONL rows and logs, optimizer states bit for bit."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from dopsd.files import (
    append_jsonl,
    atomic_path,
    load_optimizer_tensors,
    optimizer_tensors,
    read_jsonl,
    read_tensors,
    shorten,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "notes.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "step") as temporary:
        write_json(temporary / "state.json", {"step": 1})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_path(tmp_path / "step") as temporary:
        write_json(temporary / "state.json", {"step": 1})
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["state.json"]


@pytest.fixture(params=[0o022, 0o077], ids=["umask 022", "umask 077"])
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_has_the_mode_that_the_umask_gives(tmp_path, umask):
    """safetensors and diffusers write their files 0600, and a copy keeps the mode of its source."""
    write_text(tmp_path / "a.txt", "text")
    write_json(tmp_path / "a.json", {})
    write_jsonl(tmp_path / "a.jsonl", [{}])
    append_jsonl(tmp_path / "b.jsonl", [{}])
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    tiny_vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)
    with atomic_path(tmp_path / "model") as temporary:
        tiny_vae.save_pretrained(temporary / "vae")
        (temporary / "copy.txt").write_text("from a cache")
        (temporary / "copy.txt").chmod(0o400)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 8
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


def test_views_are_written_as_independent_tensors(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "a.safetensors", {"rows": whole, "column": whole[:, 1]})
    back = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(back["column"], whole[:, 1]) and torch.equal(back["rows"], whole)


def test_an_unreadable_tensors_file_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file"):
        read_tensors(tmp_path / "a.safetensors")


def rows_of(path: Path, **options) -> list[dict]:
    return [row for _, row in read_jsonl(path, **options)]


def test_rows_read_back_as_written_whatever_text_they_hold(tmp_path):
    rows = [{"text": "forêt 森\u2028\r\n", "value": None}, {"text": "\ud800 \udcff"}, {}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    append_jsonl(tmp_path / "a.jsonl", rows)
    assert rows_of(tmp_path / "a.jsonl") == rows * 2
    assert "forêt 森" in (tmp_path / "a.jsonl").read_bytes().splitlines()[0].decode()


def test_rows_come_with_their_line_numbers_and_blank_lines_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "\xff"}', "line 2 is not UTF-8"),
        (b'{"a": ', "line 2 is not JSON"),
        (b'{"a": 1} {"b": 2}', "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 2 is not JSON"),
        (b"[1]", "line 2 is not a JSON object"),
        (b"null", "line 2 is not a JSON object"),
    ],
    ids=range(7),
)
def test_a_line_that_is_no_row_is_named(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path / "a.jsonl")


def test_a_file_that_is_not_there_is_an_error_and_a_log_without_rows_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read \(No such file"):
        rows_of(tmp_path / "a.jsonl")
    assert rows_of(tmp_path / "a.jsonl", is_log=True) == []


ROWS = [{"step": 1, "drift": {"value": 0.5}}, {"step": 2, "drift": {"value": 0.25}}]


@pytest.mark.parametrize("length", range(len(json.dumps(ROWS[1])) + 1))
def test_a_log_that_was_cut_at_any_byte_keeps_its_whole_rows_and_goes_on(length, tmp_path):
    """Cut after the first of two closing braces, the line ends like a row and is none."""
    path = tmp_path / "health.jsonl"
    append_jsonl(path, ROWS)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:length])
    whole = ROWS if length == len(second) - 1 else ROWS[:1]
    assert rows_of(path, is_log=True) == whole
    append_jsonl(path, [{"step": 3}])
    if (
        length != len(second) - 2
    ):  # the cut line before the new row would be taken for a damaged one
        assert rows_of(path, is_log=True) == [*whole, {"step": 3}]


def test_a_damaged_row_of_a_log_is_not_taken_for_a_cut_one(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"step": 1}\n{"step": }\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        rows_of(tmp_path / "a.jsonl", is_log=True)
    (tmp_path / "a.jsonl").write_bytes(b'{"step": 1}\n{"ste\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        rows_of(tmp_path / "a.jsonl")


def test_a_write_that_fails_leaves_the_rows_before(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "a.jsonl", [{"a": 2}, {"a": object()}])
    assert rows_of(tmp_path / "a.jsonl") == [{"a": 1}]


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(ValueError, match=r"log\.jsonl cannot be written \("):
        append_jsonl(tmp_path / "folder" / "log.jsonl", [{}])


def test_long_values_are_shortened_for_messages():
    assert shorten("x" * 200) == "x" * 200 and len(shorten("x" * 201)) == 200
    assert len(shorten(["y" * 1000] * 1000)) <= 200


@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)]
)
def test_an_optimizer_continues_bitwise_after_a_round_trip(kind, tmp_path):
    def take_step(
        parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, seed: int
    ) -> None:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    uninterrupted = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = kind([uninterrupted])
    take_step(uninterrupted, optimizer, 0)
    write_tensors(tmp_path / "o.safetensors", optimizer_tensors(optimizer))
    resumed = torch.nn.Parameter(uninterrupted.detach().clone())
    resumed_optimizer = kind([resumed])
    load_optimizer_tensors(resumed_optimizer, read_tensors(tmp_path / "o.safetensors"))
    take_step(uninterrupted, optimizer, 1)
    take_step(resumed, resumed_optimizer, 1)
    assert torch.equal(uninterrupted, resumed)
