"""Whole runs on a tiny FLUX.2-klein: trained on editing pairs, its LoRA gives the same images in
diffusers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from latents import sample_latents
from PIL import Image
from tiny_klein import TEXT, write_klein, write_vlm
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.diffusion.sampling import noise_for
from dopsd.files import read_metadata, read_tensors
from dopsd.models import load_family
from dopsd.runs.check import check
from dopsd.runs.comparison.compare import compare
from dopsd.runs.memory import forecast_run
from dopsd.runs.preflight import preflight
from dopsd.runs.resolve import resolve
from dopsd.runs.train import train

# Loads a LoRA with diffusers alone and saves the latents of its pipeline.
DIFFUSERS = """
import sys
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

torch.set_num_threads(1)
folder, lora, reference, noise, out = sys.argv[1:]
pipeline = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipeline.load_lora_weights(lora)
last = {}
store = lambda pipe, index, time, tensors: last.update(tensors) or tensors
start = torch.load(noise, weights_only=True)
pipeline(prompt="make it red", image=[Image.open(reference)], height=64, width=64,
         num_inference_steps=4, latents=start, output_type="latent", callback_on_step_end=store)
torch.save(last["latents"].mT.reshape(start.shape), out)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_klein(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Four editing rows: two with a square reference, one with a wide one, one with both."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in {
        "a": (64, 64),
        "b": (64, 64),
        "c": (96, 64),
        "square": (70, 70),
        "wide": (110, 64),
    }.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(
            folder / f"{name}.png"
        )
    rows = [
        ("a", ["square"], "make it red"),
        ("b", ["square"], "make it blue"),
        ("c", ["wide"], "wider"),
        ("a", ["square", "wide"], "join them"),
    ]
    lines = [
        {"target": f"{t}.png", "references": [f"{r}.png" for r in refs], "text": text}
        for t, refs, text in rows
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe_of(model: Path, folder: Path, out: Path, /, **changes) -> Recipe:
    """changes: section -> keys."""
    tree = {
        "model": {"name_or_path": str(model), "memory": "high"},
        "data": {"folder": str(folder), "resolution": 64},
        "method": {"name": "dopsd"},
        "lora": {"rank": 4, "alpha": 12},
        "train": {"max_steps": 3, "batch_size": 2, "learning_rate": 0.02},
        "sample": {"every": 0, "unrelated": 1},
        "health": {"every": 0},
        "output_dir": str(out),
        "run_name": "edited",
    }
    return parse_recipe(
        {
            key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value
            for key, value in tree.items()
        }
    )


@pytest.fixture(scope="module")
def run(model, pairs, tmp_path_factory) -> Recipe:
    """A D-OPSD run on the pairs, finished."""
    recipe = recipe_of(model, pairs, tmp_path_factory.mktemp("runs"))
    assert all(
        np.isfinite(report.log["loss"]) and report.log["loss"] > 0 for report in train(recipe)
    )
    return recipe


def test_the_lora_file_holds_exactly_the_linear_layers_of_the_blocks(run, model):
    file = run.run_folder / "edited.safetensors"
    # diffusers' converter gives the names of its modules for those of the original model
    read = Flux2KleinPipeline.lora_state_dict(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in read.items()}
    metadata = read_metadata(file)
    network = Flux2Transformer2DModel.from_pretrained(model / "transformer")
    expected = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name:
            expected[f"transformer.{name}.lora_A.weight"] = module.in_features
            expected[f"transformer.{name}.lora_B.weight"] = module.out_features
    assert len(expected) == 2 * (2 * 12 + 3 * 2) and shapes.keys() == expected.keys()
    for name, shape in shapes.items():
        assert shape[1 if ".lora_A." in name else 0] == expected[name]
    keys = ("teacher_context", "nfe", "method")
    assert [metadata[key] for key in keys] == ["edit", "4", "dopsd"]


def test_the_cache_forecast_counts_references_and_the_image_that_the_teacher_sees(run):
    forecast = check(resolve(run)).cache
    files = list((run.output_dir / "cache").rglob("*.safetensors"))
    tensors = [tensor for file in files for tensor in read_tensors(file).values()]
    assert len(files) == forecast.files
    assert sum(tensor.nbytes for tensor in tensors) == forecast.bytes


def test_diffusers_in_a_fresh_process_generates_what_dopsd_generates(run, model, pairs, tmp_path):
    file, reference = run.run_folder / "edited.safetensors", pairs / "square.png"
    noise = noise_for([3], 16, 4, 4)
    torch.save(noise.start, tmp_path / "noise.pt")
    command = [DIFFUSERS, model, file, reference, tmp_path / "noise.pt", tmp_path / "out.pt"]
    subprocess.run([sys.executable, "-c", *map(str, command)], check=True, capture_output=True)
    of_diffusers = torch.load(tmp_path / "out.pt", weights_only=True)
    family, prompts = load_family(str(model)), ["make it red"]
    of_dopsd = sample_latents(family, prompts, noise, file, references=[reference])
    of_base = sample_latents(family, prompts, noise, references=[reference])
    assert (of_dopsd - of_diffusers).abs().max() <= 1e-4
    assert (of_dopsd - of_base).abs().max() > 0.01


def test_previews_report_and_model_card_show_the_references(run):
    samples = run.run_folder / "samples"
    listing = json.loads((samples / "step-000003" / "preview.json").read_text())
    assert [each["prompt"] for each in listing["images"]][:4] == [
        "make it red",
        "join them",
        "make it blue",
        "wider",
    ]
    sizes = [Image.open(samples / "step-000003" / f"student_{i}_{i}.png").size for i in range(5)]
    # The bucket sizes that the rows are trained in.
    assert sizes == [(64, 64)] * 3 + [(80, 48)] + [(64, 64)]
    assert len(list((samples / "step-000003").glob("teacher_*"))) == 5
    assert Image.open(samples / "data-1.png").size[0] > 3 * 60  # two references and the target
    page = (run.run_folder / "report.html").read_text(encoding="utf-8")
    assert "edited from references" in page and "join them" in page
    assert "prompt=prompt, image=" in (run.run_folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "sft"}, "model": {"memory": "low"}},
        {"model": {"teacher_context": "vlm", "offload": True}},
        {
            "data": {"caption_dropout": 0.5, "repeats": 2},
            "model": {"teacher_suffix": "as it is", "memory": "low"},
        },
    ],
)
def test_every_way_to_train_on_pairs_changes_the_student(model, pairs, tmp_path, changes):
    recipe = recipe_of(model, pairs, tmp_path, **changes)
    reports = list(train(recipe))
    assert len(reports) == 3 and all(np.isfinite(report.log["loss"]) for report in reports)
    file = recipe.run_folder / "edited.safetensors"
    assert all(tensor.any() for tensor in read_tensors(file).values())
    teacher_context = (
        "none" if recipe.method.name == "sft" else recipe.model.teacher_context or "edit"
    )
    assert read_metadata(file)["teacher_context"] == teacher_context


def test_the_memory_forecast_includes_the_references(model, pairs, tmp_path):
    recipe = recipe_of(model, pairs, tmp_path)
    run = resolve(recipe)
    coverage = check(run).coverage
    assert coverage.adapted == coverage.linears == 30 and run.nfe == 4
    with_references = forecast_run(run, torch.float32, low_memory=False).peak
    rows = [{"file_name": f"{name}.png", "text": "x"} for name in ("a", "b", "c", "square", "wide")]
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("a", "b", "c", "square", "wide"):
        (plain / f"{name}.png").write_bytes((pairs / f"{name}.png").read_bytes())
    (plain / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = resolve(recipe_of(model, plain, tmp_path))
    without_references = forecast_run(run, torch.float32, low_memory=False).peak
    assert without_references < 0.95 * with_references


def check_error(recipe: Recipe, tmp_path: Path) -> str:
    """The message with which `dopsd check` refuses a recipe."""
    recipe.save_as(tmp_path / "recipe.yaml")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_check_refuses_what_cannot_be_edited_with_one_sentence(model, pairs, tmp_path):
    pocket = {"name_or_path": "pocket"}
    assert "zimage edits none" in check_error(
        recipe_of(model, pairs, tmp_path, model=pocket), tmp_path
    )
    base = {"name_or_path": str(write_klein(tmp_path / "base", distilled=False))}
    assert "many-step base model" in check_error(
        recipe_of(model, pairs, tmp_path, model=base), tmp_path
    )
    shallow = {"name_or_path": str(write_klein(tmp_path / "shallow", layers=12))}
    assert "after layers 9, 18, 27 of its text encoder; this one has 12" in check_error(
        recipe_of(model, pairs, tmp_path, model=shallow), tmp_path
    )
    other_vlm = {
        "teacher_context": "vlm",
        "vlm": str(write_vlm(tmp_path / "vlm", TEXT | {"num_hidden_layers": 30})),
    }
    assert "num_hidden_layers 30, not 28. Set model.vlm" in check_error(
        recipe_of(model, pairs, tmp_path, model=other_vlm), tmp_path
    )
    unknown = recipe_of(model, pairs, tmp_path, model={"teacher_context": "words"})
    assert (
        "flux2_klein has no teacher context words: model.teacher_context can be edit or vlm"
        in check_error(unknown, tmp_path)
    )
    folder = tmp_path / "small"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    Image.new("RGB", (63, 64)).save(folder / "small.png")
    cases = {
        "small.png: an image to edit is 63 x 64; klein takes": {
            "target": "a.png",
            "references": ["small.png"],
        },
        "names gone.png, and there is no such file": {
            "target": "a.png",
            "references": ["gone.png"],
        },
        "has references and no target": {"references": ["a.png"]},
    }
    for message, row in cases.items():
        (folder / "metadata.jsonl").write_text(json.dumps(row | {"text": "x"}) + "\n")
        assert message in check_error(recipe_of(model, folder, tmp_path), tmp_path)


def test_sample_edits_references_and_refuses_those_it_cannot_edit(model, pairs, tmp_path):
    def sample(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(
            app, ["sample", "make it red", "--out", str(tmp_path / "out"), *arguments]
        )
        return result.exit_code, " ".join(result.output.split())

    square, wide = str(pairs / "square.png"), str(pairs / "wide.png")
    assert sample("--model", str(model), "--reference", wide, "--reference", square)[0] == 0
    # The size of the first reference, rounded as the model needs it.
    assert Image.open(tmp_path / "out" / "0_0.png").size == (96, 64)
    code, message = sample("--model", "pocket", "--reference", square)
    assert code == 2 and "zimage edits none" in message
    code, message = sample("--model", str(model), "--reference", str(tmp_path / "gone.png"))
    assert code == 2 and "gone.png cannot be decoded (No such file" in message.replace(
        "[Errno 2] ", ""
    )


def test_preflight_shows_the_teacher_the_target_beside_the_references(run, tmp_path):
    result = preflight(run, tmp_path / "page.html", lambda what, done, total: None)
    assert {each.caption for each in result.comparisons} == {
        "make it red",
        "make it blue",
        "wider",
        "join them",
    }
    assert all((each.student != each.teacher).any() for each in result.comparisons)
    assert "model.teacher_context: vlm" in result.sentence or result.verdict == "can"


def test_compare_evaluates_a_run_on_editing_pairs(run, tmp_path):
    comparison = compare([run], tmp_path / "page.html", lambda what, done, total: None, nfes=(1,))
    assert list(comparison.numbers) == ["base", "base, other noise", "edited"]
    assert comparison.numbers["edited"]["nfe"]["1"]["bleed"]["value"] != 0
