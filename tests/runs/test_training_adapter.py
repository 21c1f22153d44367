"""`dopsd adapter train`: an SFT run on images that the model generated, and a LoRA file for
`model.training_adapter`."""

import json
from pathlib import Path

from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.models.lora import read_lora
from dopsd.runs.training_adapter import adapter_recipe


def test_an_adapter_is_trained_on_images_that_the_model_generates(tmp_path, pocket):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a big red star on night\na small blue hut at the left\n")
    command = [
        "adapter",
        "train",
        str(prompts),
        "--images",
        "2",
        "--steps",
        "2",
        "--rank",
        "2",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    file = tmp_path / "pocket-dedistill" / "pocket-dedistill.safetensors"
    assert read_lora(file, pocket)
    (rows,) = (
        path.read_text().splitlines()
        for path in (tmp_path / "cache" / "generated").glob("*/metadata.jsonl")
    )
    assert sorted(json.loads(row)["text"] for row in rows) == sorted(
        prompts.read_text().splitlines() * 2
    )
    recipe = adapter_recipe(
        "pocket",
        prompts.read_text().splitlines(),
        2,
        {"run_name": "b", "output_dir": str(tmp_path)},
    )
    # The learning rate is the one that pocket recommends for SFT.
    assert recipe.method.name == "sft" and recipe.train.learning_rate == 1e-3
    assert len(list(Path(recipe.data.folder).glob("*.png"))) == 4


def test_unreadable_prompt_files_are_refused_with_one_sentence(tmp_path):
    for name, content in (
        ("none.txt", None),
        ("empty.txt", b"\n"),
        ("bytes.txt", b"a star\n\xff\n"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        result = CliRunner().invoke(
            app, ["adapter", "train", str(tmp_path / name), "--out", str(tmp_path / "runs")]
        )
        assert result.exit_code == 2 and name in "".join(result.output.split()), result.output
    assert not (tmp_path / "runs").exists()
