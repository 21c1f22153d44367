"""Files are whole or absent, and an optimizer comes back bit for bit."""

import pytest
import torch

from dopsd.files import (
    atomic_path,
    load_optimizer_tensors,
    optimizer_tensors,
    read_tensors,
    write_json,
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


def test_views_are_written_as_independent_tensors(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "a.safetensors", {"rows": whole, "column": whole[:, 1]})
    back = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(back["column"], whole[:, 1]) and torch.equal(back["rows"], whole)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file"):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)]
)
def test_an_optimizer_goes_on_bitwise_after_a_round_trip(kind, tmp_path):
    def stepped(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, seed: int) -> None:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    straight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = kind([straight])
    stepped(straight, optimizer, 0)
    write_tensors(tmp_path / "o.safetensors", optimizer_tensors(optimizer))
    resumed = torch.nn.Parameter(straight.detach().clone())
    fresh = kind([resumed])
    load_optimizer_tensors(fresh, read_tensors(tmp_path / "o.safetensors"))
    stepped(straight, optimizer, 1)
    stepped(resumed, fresh, 1)
    assert torch.equal(straight, resumed)
