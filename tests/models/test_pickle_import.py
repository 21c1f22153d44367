"""Pickled weights become safetensors; a pickle that holds more than tensors is refused and not
run."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dopsd.cli.app import app

SHARED = torch.arange(6.0)
WEIGHTS = {
    "a.weight": torch.randn(2, 3, dtype=torch.float16),
    "b": SHARED.view(2, 3).T,
    "again": SHARED[:2],
}


def imported(source: Path, *options: str):
    return CliRunner().invoke(app, ["import", str(source), *options])


@pytest.mark.parametrize("zipped", [True, False])
def test_every_tensor_is_converted(tmp_path, zipped):
    torch.save(WEIGHTS, tmp_path / "unet.bin", _use_new_zipfile_serialization=zipped)
    done = imported(tmp_path / "unet.bin")
    assert done.exit_code == 0, done.output
    tensors = load_file(tmp_path / "unet.safetensors")
    assert tensors.keys() == WEIGHTS.keys() and all(
        torch.equal(tensors[name], WEIGHTS[name]) for name in tensors
    )


class MakesAFolder:
    """Creates a folder when it is unpickled as code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(tmp_path):
    for name, content, words in (
        ("code", MakesAFolder(tmp_path / "ran"), "code in a file is never run"),
        (
            "code beside tensors",
            {"a": SHARED, "b": MakesAFolder(tmp_path / "ran")},
            "code in a file is never run",
        ),
        ("list", [SHARED], "holds a list"),
        ("nested", {"state_dict": WEIGHTS}, "state_dict of type dict"),
        ("nothing", {}, "holds a dict"),
    ):
        torch.save(content, tmp_path / "unet.bin")
        done = imported(tmp_path / "unet.bin")
        assert done.exit_code == 2 and words in " ".join(done.output.split()), (name, done.output)
    assert not (tmp_path / "ran").exists() and os.listdir(tmp_path) == ["unet.bin"]


def test_an_unreadable_source_or_an_existing_target_is_refused(tmp_path):
    for content in (b"", b"hello"):
        (tmp_path / "unet.bin").write_bytes(content)
        done = imported(tmp_path / "unet.bin")
        assert done.exit_code == 2 and "cannot be read as plain weights" in " ".join(
            done.output.split()
        )
    assert imported(tmp_path / "missing.bin").exit_code == 2
    torch.save(WEIGHTS, tmp_path / "unet.bin")
    (tmp_path / "unet.safetensors").write_bytes(b"existing")
    assert imported(tmp_path / "unet.bin").exit_code == 2
    assert (tmp_path / "unet.safetensors").read_bytes() == b"existing"
    assert imported(tmp_path / "unet.bin", "--out", str(tmp_path / "unet.pt")).exit_code == 2
