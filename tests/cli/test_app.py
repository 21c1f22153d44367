"""The command line as a user meets it: exit codes, one sentence for bad input, nothing changed on
disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.methods import METHODS

RECIPE = {
    "model": {"name_or_path": "pocket"},
    "data": {"folder": "images"},
    "method": {"name": "dopsd"},
    "train": {"max_steps": 1},
}


@pytest.fixture()
def desk(concept: Path, tmp_path: Path, monkeypatch) -> Path:
    """A working folder with four good images and a good recipe."""
    monkeypatch.chdir(tmp_path)
    concept.rename(tmp_path / "images")
    write_recipe({})
    return tmp_path


def write_recipe(changes: dict) -> None:
    tree = {
        **RECIPE,
        **{k: {**RECIPE.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))


def no_images():
    shutil.rmtree("images")
    Path("images").mkdir()


def no_captions():
    for file in Path("images").glob("*.txt"):
        file.unlink()


def truncated_image():
    file = Path("images/0.png")
    file.write_bytes(file.read_bytes()[:200])


def copied_model(change) -> None:
    from dopsd.pocket import CHECKPOINT as POCKET

    shutil.copytree(POCKET, "model")
    change()
    write_recipe({"model": {"name_or_path": "./model"}})


def model_without_transformer():
    copied_model(lambda: shutil.rmtree("model/transformer"))


def model_of_another_family():
    copied_model(
        lambda: Path("model/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    )


def base_model():
    def change():
        file = Path("model/scheduler/scheduler_config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 6.0}))

    copied_model(change)


def vlm_of_another_size():
    from dopsd.pocket.build.architecture import make_tokenizer, make_vlm

    vlm = make_vlm(make_tokenizer())
    vlm.config.text_config.hidden_size = 64
    smaller = type(vlm)(vlm.config)
    shutil.copytree(Path(__file__).parents[2] / "src/dopsd/pocket/checkpoint/vlm", "vlm")
    smaller.save_pretrained("vlm")
    write_recipe({"model": {"vlm": "./vlm"}})


def long_caption():
    Path("images/0.txt").write_text("star " * 2000)


def folder_with_another_run():
    Path("runs/recipe").mkdir(parents=True)
    Path("runs/recipe/metrics.jsonl").write_text('{"step": 1}\n')


BAD = {
    "no recipe": (lambda: Path("recipe.yaml").unlink(), "recipe.yaml does not exist"),
    "recipe is no yaml": (lambda: Path("recipe.yaml").write_text("a: [1"), "not valid YAML"),
    "recipe is a list": (lambda: Path("recipe.yaml").write_text("- a"), "must hold sections"),
    "unknown key": (lambda: write_recipe({"lora": {"rnak": 8}}), "did you mean lora.rank?"),
    "word of another tool": (
        lambda: write_recipe({"lora": {"network_dim": 8}}),
        "network_dim is lora.rank here",
    ),
    "unknown method": (
        lambda: write_recipe({"method": {"name": "magic"}}),
        "method.name must be one of dopsd, sft",
    ),
    "rank 0": (lambda: write_recipe({"lora": {"rank": 0}}), "lora.rank is 0"),
    "nfe 0": (lambda: write_recipe({"method": {"nfe": 0}}), "method.nfe is 0"),
    "sample nfe 0": (lambda: write_recipe({"sample": {"nfe": 0}}), "sample.nfe is 0"),
    "no folder": (lambda: shutil.rmtree("images"), "images"),
    "no images": (no_images, "no images in"),
    "no captions": (no_captions, "instance_prompt"),
    "truncated image": (truncated_image, "0.png"),
    "model missing": (
        lambda: write_recipe({"model": {"name_or_path": "./nothing"}}),
        "does not exist",
    ),
    "model lacks a part": (model_without_transformer, "lacks the folder transformer"),
    "model of another family": (model_of_another_family, "FluxPipeline"),
    "base model": (base_model, "many-step base model"),
    "vlm that does not match": (
        vlm_of_another_size,
        "does not match the checkpoint's text encoder",
    ),
    "caption over the limit": (long_caption, "the limit is"),
    "folder with another run": (folder_with_another_run, "already holds a run"),
    "targets that match nothing": (
        lambda: write_recipe({"lora": {"targets": "nope"}}),
        "match no linear layer",
    ),
    "bad size": (lambda: write_recipe({"sample": {"width": 65}}), "multiples of 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_2(case, desk):
    spoil, sentence = BAD[case]
    spoil()
    before = {p: p.read_bytes() for p in desk.rglob("*") if p.is_file() and "cache" not in p.parts}
    result = CliRunner().invoke(app, ["train", "recipe.yaml"])
    assert result.exit_code == 2, result.output
    printed = " ".join(result.output.split())
    assert sentence in printed and "Traceback" not in printed
    assert before == {
        p: p.read_bytes() for p in desk.rglob("*") if p.is_file() and "cache" not in p.parts
    }


def test_dopsd_without_a_teacher_context_is_refused_and_listed(desk, monkeypatch):
    from dopsd.models.zimage import ZImage

    monkeypatch.setattr(ZImage, "teacher_contexts", ())  # a family whose encoders read no image
    result = CliRunner().invoke(app, ["train", "recipe.yaml"])
    assert result.exit_code == 2 and "its text encoders read no image" in " ".join(
        result.output.split()
    )
    assert "no: its text encoders" in " ".join(CliRunner().invoke(app, ["list"]).output.split())


def test_a_base_model_can_be_tuned_on_purpose(desk):
    base_model()
    write_recipe({"model": {"name_or_path": "./model", "allow_base": True}, "lora": {"rank": 2}})
    assert CliRunner().invoke(app, ["check", "recipe.yaml"]).exit_code == 0


def test_set_changes_a_key(desk):
    result = CliRunner().invoke(
        app, ["check", "recipe.yaml", "--set", "lora.rank=3", "--set", "train.learning_rate=2e-4"]
    )
    assert result.exit_code == 0 and "rank 3 on 42 of" in result.output


@pytest.mark.parametrize("change", ["lora.rank", "=3", "lora.rank.x=1"])
def test_a_malformed_set_is_refused(desk, change):
    assert CliRunner().invoke(app, ["check", "recipe.yaml", "--set", change]).exit_code == 2


def test_check_prints_counts_examples_buckets_and_coverage(desk):
    Image.new("RGB", (200, 100), "red").save("images/wide.png")
    Path("images/wide.txt").write_text("a wide one")
    printed = CliRunner().invoke(app, ["check", "recipe.yaml"]).output
    assert "images     5, captions from" in printed
    assert ("4 at 64 x 64" in printed and "1 at 88 x 48" in printed) or "1 at 96 x 48" in printed
    assert "42 of 47 block linears" in printed
    assert "optional   dopsd preflight recipe.yaml" in printed
    assert "next       dopsd train recipe.yaml" in printed


def test_the_commands_that_check_names_keep_the_changes(desk):
    changes = ["--set", "lora.rank=3", "--set", "data.trigger=a zib"]
    printed = CliRunner().invoke(app, ["check", "recipe.yaml", *changes]).output
    for command in ("preflight", "train"):
        wanted = f"dopsd {command} recipe.yaml --set lora.rank=3 --set 'data.trigger=a zib'"
        assert wanted in printed


def test_sample_writes_images(desk):
    result = CliRunner().invoke(
        app, ["sample", "a star", "a heart", "--model", "pocket", "--seed", "7", "--nfe", "2"]
    )
    assert result.exit_code == 0
    assert [Image.open(f"samples/{name}.png").size for name in ("0_7", "1_8")] == [(64, 64)] * 2


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("lora.safetensors", b"not safetensors", "not a readable safetensors file"),
        ("lora.bin", b"pickle", "not a .safetensors file"),
        ("absent.safetensors", None, "not a readable safetensors file"),
    ],
)
def test_a_lora_file_that_cannot_be_read_is_refused(desk, name, content, sentence):
    if content:
        Path(name).write_bytes(content)
    result = CliRunner().invoke(app, ["sample", "a star", "--model", "pocket", "--lora", name])
    assert result.exit_code == 2 and sentence in " ".join(result.output.split())


def test_list_prints_the_support_table(desk):
    result = CliRunner().invoke(app, ["list", "--json", "cells.json"])
    assert result.exit_code == 0 and "zimage" in result.output
    assert json.loads(Path("cells.json").read_text())["zimage"] == dict.fromkeys(METHODS)


def test_compare_refuses_recipes_on_different_data(desk):
    write_recipe({"data": {"folder": "elsewhere"}})
    Path("recipe.yaml").rename("other.yaml")
    write_recipe({})
    result = CliRunner().invoke(app, ["compare", "recipe.yaml", "other.yaml"])
    assert result.exit_code == 2 and "differ in data.folder" in " ".join(result.output.split())


def test_the_real_command_exits_2_without_a_traceback(desk):
    done = subprocess.run(
        [sys.executable, "-m", "dopsd.cli", "train", "nothing.yaml"], capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and "nothing.yaml does not exist" in done.stderr
        and "Traceback" not in done.stderr
    )


def run_cli(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("method", METHODS)
def test_init_writes_a_recipe_that_check_takes_and_that_shows_every_key(method, desk):
    from dopsd.config.recipe import load_recipe
    from dopsd.config.schema import Recipe

    made = run_cli("init", method, "--data", "images", "--out", "new.yaml")
    assert made.exit_code == 0, made.output
    text = Path("new.yaml").read_text()
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()} | {
        "method": METHODS[method]
    }
    for section in sections.values():
        for key in getattr(section, "model_fields", ()):
            assert f"{key}:" in text, key
    if method in ("pso", "pso_online"):
        return  # their forecasts take seconds
    checked = run_cli("check", "new.yaml")
    if method == "dpo":
        assert checked.exit_code == 2 and "learns from pairs, and 4 of 4" in " ".join(
            checked.output.split()
        )
    else:
        assert checked.exit_code == 0 and "images     4" in checked.output
    assert (
        load_recipe(Path("new.yaml")).train.learning_rate == 1e-3
    )  # the pocket checkpoint's own starting point


def test_every_commented_default_of_a_starter_recipe_is_the_default(desk):
    """Taking the # away changes nothing."""
    from dopsd.config.recipe import read_recipe

    run_cli("init", "dopsd", "--data", "images", "--out", "new.yaml")
    text = Path("new.yaml").read_text()
    bare = "\n".join(
        line.replace("  # ", "  ", 1) if line.startswith("  # ") else line
        for line in text.splitlines()
    )
    assert bare != text
    assert read_recipe(bare, "bare", {"run_name": "a"}) == read_recipe(
        text, "starter", {"run_name": "a"}
    )


def test_init_overwrites_nothing_and_names_the_methods(desk):
    before = Path("recipe.yaml").read_bytes()
    refused = run_cli("init", "dopsd", "--out", "recipe.yaml")
    assert refused.exit_code == 2 and Path("recipe.yaml").read_bytes() == before
    assert (
        run_cli("init", "magic", "--out", "new.yaml").exit_code == 2
        and not Path("new.yaml").exists()
    )


def test_the_schema_in_the_repository_is_the_one_that_is_printed():
    stored = Path(__file__).parents[2] / "recipes" / "recipe.schema.json"
    assert json.loads(run_cli("schema").output) == json.loads(stored.read_text())


def test_doctor_looks_and_exits_fine(monkeypatch):
    result = run_cli("doctor")
    assert result.exit_code == 0
    assert "torch" in result.output and "offline by HF_HUB_OFFLINE" in result.output


def test_train_prints_an_event_a_line_and_the_result_last_and_logs_the_rest(desk):
    write_recipe(
        {"method": {"name": "sft"}, "health": {"every": 0}, "sample": {"every": 0}, "run_name": "r"}
    )
    done = subprocess.run(
        [sys.executable, "-m", "dopsd", "train", "recipe.yaml", "--set", "model.memory=high"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "look at    runs/r/report.html"
    events = done.stderr.splitlines()
    wanted = ["Loading the network.", "Step 1: checkpoint saved."]
    assert [line for line in events if line in wanted] == wanted
    noise = ("Loading weights", "INFO", "=", "kernels", "Warning", "http")
    assert not [line for line in events if any(word in line for word in noise)]
    log = Path("runs/r/run.log").read_text()
    assert "Step 1: checkpoint saved." in log and "reopened and compared" in log
