"""`dopsd sample` and `fuse`: which model is taken, and that nothing is overwritten."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.cli.generate import free_path
from dopsd.models import load_family


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_lora(path: str, metadata: dict[str, str]) -> None:
    family = load_family("pocket")
    layer = family.empty_denoiser().network.get_submodule("layers.0.attention.to_q")
    key = f"{family.export_prefix}.layers.0.attention.to_q"
    a, b = torch.ones(2, layer.in_features) / 8, torch.ones(layer.out_features, 2) / 8
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, path, metadata)


def run(*words: str):
    result = CliRunner().invoke(app, [*words])
    return result, " ".join(result.output.split())


def test_the_model_is_the_one_that_the_lora_file_names_and_is_printed():
    write_lora("a.safetensors", {"base_model": "pocket"})
    result, printed = run("sample", "a star", "--lora", "a.safetensors", "--nfe", "1")
    assert result.exit_code == 0 and "model: pocket, as a.safetensors says" in printed
    result, printed = run("fuse", "a.safetensors")
    assert result.exit_code == 0 and "model: pocket, as a.safetensors says" in printed
    assert Path("fused/model_index.json").is_file()


def test_several_loras_are_added_with_a_strength_each():
    write_lora("a.safetensors", {"base_model": "pocket"})
    write_lora("b.safetensors", {})
    loras = ("--lora", "a.safetensors@0.5", "--lora", "b.safetensors@0.25")
    for words in (("sample", "a star", *loras, "--nfe", "1", "--out", "both"),):
        assert run(*words)[0].exit_code == 0
    one = ("--lora", "a.safetensors", "--strength", "0.75", "--nfe", "1", "--out", "one")
    assert run("sample", "a star", *one)[0].exit_code == 0
    both, alone = (Path(folder, "0_0.png").read_bytes() for folder in ("both", "one"))
    assert both == alone, "the two files hold the same LoRA"
    assert run("fuse", "a.safetensors@0.5", "b.safetensors@0.25")[0].exit_code == 0
    result, printed = run("sample", "a star", "--lora", "a.safetensors", "--lora", "a.safetensors")
    assert result.exit_code == 2 and "a.safetensors is given twice" in printed


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "a", "--nfe", "1", "--nfe", "2"),
        ("compare", "a.yaml", "--report", "a.html", "--report", "b.html"),
        ("adapter", "train", "a.txt", "--model", "pocket", "--model", "other"),
    ],
)
def test_an_option_of_one_value_is_not_taken_twice(words):
    result, printed = run(*words)
    assert result.exit_code == 2 and "is given twice, and takes one value" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sample", "a star"], "give it with --model"),
        (["sample", "a star", "--lora", "b.safetensors"], "does not record which model"),
        (["fuse", "b.safetensors"], "does not record which model"),
        (["sample", "a star", "--lora", "c.safetensors"], "local model called folder"),
    ],
)
def test_without_a_model_nothing_is_generated(words, sentence):
    write_lora("b.safetensors", {"x": "y"})
    write_lora("c.safetensors", {"base_model": "folder"})
    result, printed = run(*words)
    assert result.exit_code == 2 and sentence in printed
    assert not Path("samples").exists() and not Path("fused").exists()


def test_images_are_not_overwritten():
    for number, name in enumerate(("0_7.png", "0_7-2.png", "0_7-3.png"), start=1):
        result, printed = run("sample", "a star", "--model", "pocket", "--seed", "7", "--nfe", "1")
        assert result.exit_code == 0 and printed.endswith(f"samples/{name}")
        assert len(list(Path("samples").iterdir())) == number
    assert Image.open("samples/0_7-3.png").size == (64, 64)


def test_a_free_name_is_the_next_number():
    assert free_path(Path("a.b.png")) == Path("a.b.png")
    for name in ("a.b.png", "a.b-2.png"):
        Path(name).touch()
    assert free_path(Path("a.b.png")) == Path("a.b-3.png")


@pytest.mark.parametrize(
    "words", [["sample", "a", "--lora", "run"], ["fuse", "run"], ["inspect", "run"]]
)
def test_a_folder_of_several_lora_files_is_answered_with_their_names(words):
    write_lora("run/run.safetensors", {"base_model": "pocket"})
    write_lora("run/run-step000001.safetensors", {"base_model": "pocket"})
    result, printed = run(*words)
    assert result.exit_code == 2
    assert "run holds 2 .safetensors files" in printed
    Path("empty").mkdir()
    printed = run("inspect", "empty")[1]
    assert "empty is a folder without a LoRA file (.safetensors)." in printed


def test_inspect_shows_the_result_in_a_run_folder():
    write_lora("runs/star/star.safetensors", {"base_model": "pocket"})
    Path("runs/star/config.yaml").write_text(
        "model: {name_or_path: pocket}\ndata: {folder: images}\n"
        "method: {name: sft}\nrun_name: star\n"
    )
    result, printed = run("inspect", "runs/star")
    assert result.exit_code == 0 and "result runs/star/star.safetensors" in printed
    Path("runs/star/star.safetensors").unlink()
    result, printed = run("inspect", "runs/star")
    assert result.exit_code == 2 and "has not finished: it holds no star.safetensors." in printed
