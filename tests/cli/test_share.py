"""`dopsd export` and `upload`: other forms of a result, and what a stranger gets of a run."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.files import read_metadata
from dopsd.models import family_class, hub
from dopsd.models.lora import read_lora
from dopsd.models.lora_deltas import LowRank
from dopsd.runs.outputs.lora_export import write_lora

MODULE, CAPTION, PROMPT = "layers.0.attention.to_q", "my secret dog", "a star"


@pytest.fixture()
def run_folder(tmp_path: Path, monkeypatch) -> Path:
    """What a finished run leaves, its prompts the captions of the data and an unrelated one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "zib"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"model: {{name_or_path: pocket}}\ndata: {{folder: {tmp_path}/images, trigger: zib}}\n"
        f"method: {{name: sft}}\nrun_name: zib\noutput_dir: {tmp_path}/runs\n"
        f"health: {{prompts: [{PROMPT}, a moon]}}\n"
    )
    metadata = {"base_model": "pocket", "ss_steps": "7", "nfe": "4", "dopsd_version": "0"}
    pairs = {MODULE: LowRank(torch.randn(2, 128), torch.randn(128, 2))}
    write_lora(folder / "zib.safetensors", pairs, family_class("zimage"), "comfyui", metadata)
    samples = folder / "samples" / "step-000007"
    samples.mkdir(parents=True)
    images = [{"prompt": CAPTION, "seed": 0}, {"prompt": PROMPT, "seed": 1}]
    (samples / "preview.json").write_text(json.dumps({"images": images}))
    for role in ("base", "student", "teacher"):
        for index in (0, 1):
            Image.new("RGB", (8, 8)).save(samples / f"{role}_{index}_{index}.png")
    for other in ("env.json", "run.log", "report.html", "metrics.jsonl"):
        (folder / other).write_text(f"{tmp_path} {CAPTION}")
    return folder


def run(*words: str):
    result = CliRunner().invoke(app, [*words])
    return result.exit_code, " ".join(result.output.split())


def files_in(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths}


def test_the_upload_holds_what_a_stranger_needs_and_no_path_or_caption(run_folder, tmp_path):
    code, printed = run("upload", str(run_folder), "--folder", "up")
    assert code == 0, printed
    samples = "samples/step-000007"
    assert files_in(Path("up")) == {
        "zib.safetensors",
        "README.md",
        f"{samples}/base_1_1.png",
        f"{samples}/student_1_1.png",
    }
    text = Path("up/README.md").read_text()
    assert CAPTION not in text and str(tmp_path) not in text and PROMPT in text
    card = ModelCard(text).data.to_dict()
    assert card["license"] == "apache-2.0" and card["instance_prompt"] == "zib"
    assert "base_model" not in card, "pocket is no name on the hub"
    shown = re.findall(r"!\[\w+]\(([^)]+)\)", text)
    shown += [each["output"]["url"] for each in card["widget"]]
    assert len(shown) == 3 and all(Path("up", name).is_file() for name in shown)
    code, printed = run("upload", str(run_folder), "--folder", "up")
    assert code == 2 and "is not overwritten" in printed


def test_captions_are_uploaded_on_request(run_folder):
    assert run("upload", str(run_folder), "--folder", "up", "--captions")[0] == 0
    assert CAPTION in Path("up/README.md").read_text()


def test_a_repository_gets_the_folder_with_its_owner_as_author(run_folder, monkeypatch):
    seen = {}

    def upload(folder: Path, repo: str, private: bool) -> str:
        seen.update(repo=repo, private=private, files=files_in(folder))
        seen["author"] = read_metadata(folder / "zib.safetensors")["modelspec.author"]
        return "address"

    monkeypatch.setattr(hub, "upload", upload)
    code, printed = run("upload", str(run_folder), "owner/zib", "--private")
    assert code == 0 and printed.endswith("address")
    assert (seen["repo"], seen["private"], seen["author"]) == ("owner/zib", True, "owner")
    assert "zib.safetensors" in seen["files"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("upload", "runs/zib"), "give a repository (owner/name), or --folder"),
        (("upload", "runs/zib", "a b"), "is no name on the hub"),
        (("upload", "runs", "--folder", "up"), "it has no config.yaml"),
        (("export", "runs/zib"), "give --format (diffusers, comfyui, kohya, peft)"),
        (("export", "runs/zib", "--format", "a1111"), "is not one of diffusers"),
        (("export", "runs/zib", "--format", "peft", "--fp8"), "--fp8 is for --single-file"),
        (("export", "gone.safetensors", "--format", "peft"), "is not a readable safetensors"),
    ],
)
def test_what_cannot_be_exported_or_uploaded_is_answered_in_a_sentence(words, sentence, run_folder):
    code, printed = run(*words)
    assert code == 2 and sentence in printed


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya", "peft"])
def test_every_form_is_the_same_lora(form, run_folder):
    code, printed = run("export", "runs/zib", "--format", form)
    assert code == 0, printed
    (left,) = (p for p in Path().iterdir() if p.name.startswith("zib-"))
    kind = family_class("zimage")
    before = read_lora(run_folder / "zib.safetensors", kind)
    after = read_lora(left, kind)
    torch.testing.assert_close(after[MODULE].dense(), before[MODULE].dense())
    file = left / "adapter_model.safetensors" if left.is_dir() else left
    assert read_metadata(file)["base_model"] == "pocket"


def test_a_lora_is_exported_into_the_whole_network(run_folder):
    code, printed = run("export", "runs/zib", "--single-file", "--out", "whole.safetensors")
    assert code == 0 and "ComfyUI/models/diffusion_models" in printed
    tensors = load_file("whole.safetensors")
    assert "layers.0.attention.qkv.weight" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
