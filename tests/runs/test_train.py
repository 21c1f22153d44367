"""Whole runs on pocket: resumed, exported to diffusers, previewed, and refused where another run
would be overwritten."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from latents import sample_latents
from PIL import Image
from safetensors.torch import load_file

from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.diffusion.sampling import noise_for
from dopsd.models import load_family
from dopsd.models.pipeline import sample
from dopsd.runs.check import check
from dopsd.runs.resolve import resolve
from dopsd.runs.train import train

PROMPTS = ["a toy at the left", "a big red star on night in inked style"]


def recipe_for(
    concept: Path, output: Path, name: str, method: str = "dopsd", **train_settings
) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"},
            "data": {"folder": str(concept)},
            "method": {"name": method},
            "lora": {"rank": 4, "alpha": 8},
            "train": {"max_steps": 6, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 2}
            | train_settings,
            "sample": {"every": 0, "prompts": PROMPTS[0]},
            "save": {"every": 1},
            "output_dir": str(output),
            "run_name": name,
        }
    )


def dopsd(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dopsd.cli", *map(str, arguments)], env=environment
    )


def rows(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl without times."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in metrics]


@pytest.mark.parametrize("method", ["dopsd", "sft"])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_run_bitwise(method, concept, tmp_path):
    straight, broken = (
        recipe_for(concept, tmp_path, name, method) for name in ("straight", "broken")
    )
    file = tmp_path / "broken.yaml"
    broken.save_as(file)
    for _ in train(straight):
        pass
    child = dopsd("train", file)
    deadline = time.monotonic() + 120
    while not (broken.run_folder / "checkpoints" / "step-000003").exists():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (broken.run_folder / "broken.safetensors").exists(), (
        "the child finished before it was killed"
    )
    assert dopsd("train", file, "--resume", "latest").wait() == 0
    assert rows(straight.run_folder) == rows(broken.run_folder)
    for name in ("student", "teacher", "optimizer"):
        left, right = (
            load_file(r.run_folder / "checkpoints" / "step-000006" / f"{name}.safetensors")
            for r in (straight, broken)
        )
        assert left.keys() == right.keys() and all(
            torch.equal(left[key], right[key]) for key in left
        )


def test_the_loss_of_an_accumulated_step_is_the_mean_of_its_micro_batches(concept, tmp_path):
    """The first step of two micro-batches logs the mean of two single steps on the same images."""
    recipe = recipe_for(
        concept, tmp_path, "accumulated", "sft", max_steps=2, gradient_accumulation_steps=2
    )
    separate = recipe_for(concept, tmp_path, "separate", "sft", max_steps=4, learning_rate=1e-12)
    accumulated = [report.log["loss"] for report in train(recipe)]
    single = [report.log["loss"] for report in train(separate)]
    assert accumulated[0] == pytest.approx((single[0] + single[1]) / 2, rel=1e-6)


OPEN_WITH_DIFFUSERS = """
import sys, torch
from diffusers import ZImagePipeline
folder, lora, noise, target = sys.argv[1:]
assert "dopsd" not in sys.modules
pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipeline.load_lora_weights(lora)
prompts = torch.load(noise)
latents = pipeline(prompts["prompts"], height=64, width=64, num_inference_steps=2,
                   guidance_scale=0.0, latents=prompts["noise"], output_type="latent",
                   return_dict=False)[0]
torch.save(latents, target)
"""


@pytest.mark.parametrize("form", ["file", "folder"])
def test_diffusers_alone_generates_the_same_from_the_exported_lora(form, concept, tmp_path, pocket):
    # alpha is twice the rank, so a file that lost its alpha would generate something else.
    recipe = recipe_for(concept, tmp_path, "exported", max_steps=3, learning_rate=0.02)
    for _ in train(recipe):
        pass
    file = recipe.run_folder / "exported.safetensors"
    noise = noise_for([3, 4], pocket.channels, 16, 16)
    of_dopsd = sample_latents(pocket, PROMPTS, noise, lora=file)
    torch.save({"prompts": PROMPTS, "noise": noise.start}, tmp_path / "noise.pt")
    if form == "folder":
        (tmp_path / "lora").mkdir()
        file = file.rename(tmp_path / "lora" / "pytorch_lora_weights.safetensors").parent
    files = [pocket.checkpoint.folder, file, tmp_path / "noise.pt", tmp_path / "out.pt"]
    command = [sys.executable, "-c", OPEN_WITH_DIFFUSERS, *files]
    subprocess.run([str(part) for part in command], check=True)
    of_diffusers = torch.load(tmp_path / "out.pt")
    of_base = sample_latents(pocket, PROMPTS, noise)
    assert (of_dopsd - of_base).abs().max() > 0.01, "the LoRA changes nothing"
    assert (of_dopsd - of_diffusers).abs().max() <= 1e-4


def test_the_first_previews_show_the_base_model_as_student(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "previewed", max_steps=1)
    for _ in train(recipe):
        pass
    folder = recipe.run_folder / "samples" / "step-000000"
    assert (folder / "student_0_0.png").read_bytes() == (folder / "base_0_0.png").read_bytes()
    assert (folder / "teacher_0_0.png").exists()
    images = json.loads((folder / "preview.json").read_text())["images"]
    assert images[0]["sigmas"] == pytest.approx([1, 0.75, 0])
    unrelated = list(load_family("pocket").unrelated_prompts[:2])
    assert [image["prompt"] for image in images[1:]] == unrelated


def test_a_preview_prompt_can_have_its_own_size_and_seed(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "shaped", "sft", max_steps=1)
    prompts = [PROMPTS[0], {"prompt": PROMPTS[1], "seed": 9, "width": 96, "height": 48}]
    recipe = parse_recipe(
        recipe.model_dump() | {"sample": {"every": 0, "prompts": prompts, "unrelated": 0}}
    )
    for _ in train(recipe):
        pass
    folder = recipe.run_folder / "samples" / "step-000000"
    assert Image.open(folder / "base_0_0.png").size == (64, 64)
    (expected,) = sample("pocket", [PROMPTS[1]], seed=9, width=96, height=48)
    assert Image.open(folder / "base_1_9.png").tobytes() == expected.tobytes()
    assert Image.open(folder / "grid.png").size == (64 + 2 + 96, 64 + 2 + 64)


def test_a_folder_that_holds_another_run_is_refused_and_unchanged(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "existing", "sft", max_steps=1)
    for _ in train(recipe):
        pass
    before = {path: path.read_bytes() for path in recipe.run_folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run"):
        next(train(recipe))
    assert before == {
        path: path.read_bytes() for path in recipe.run_folder.rglob("*") if path.is_file()
    }


def test_resuming_without_a_checkpoint_is_refused(concept, tmp_path):
    with pytest.raises(ValueError, match="holds no run yet: leave out --resume"):
        next(train(recipe_for(concept, tmp_path, "new"), resume="latest"))


def test_resuming_with_another_rank_is_refused(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "ranked", "sft", max_steps=1)
    for _ in train(recipe):
        pass
    other = parse_recipe(recipe.model_dump() | {"lora": recipe.lora.model_dump() | {"rank": 2}})
    with pytest.raises(ValueError, match=r"begun with lora\.rank = 4, now it is 2"):
        next(train(other, resume="latest"))


def test_a_run_whose_losses_explode_ends_with_an_error(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "exploding", "sft", learning_rate=1e18, warmup_steps=0)
    with pytest.raises(ValueError, match="None of them was applied"):
        for _ in train(recipe):
            pass


def test_check_counts_the_modules_that_training_adapts(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "checked", max_steps=1)
    run = resolve(recipe)
    checked = check(run)
    for _ in train(recipe):
        pass
    student = load_file(recipe.run_folder / "checkpoints" / "step-000001" / "student.safetensors")
    assert len(student) == 2 * checked.coverage.adapted
    assert run.buckets == {(64, 64): 4} and checked.forwards_per_image == 8


@pytest.mark.parametrize("method", ["dopsd", "sft"])
def test_a_bf16_model_trains_float32_adapters_with_recomputed_activations(
    method, concept, tmp_path
):
    tree = recipe_for(concept, tmp_path, "halved", method, max_steps=2).model_dump()
    recipe = parse_recipe(tree | {"model": tree["model"] | {"dtype": "bf16", "memory": "low"}})
    losses = [report.log["loss"] for report in train(recipe)]
    assert all(0 < loss < 10 for loss in losses)
    student = load_file(recipe.run_folder / "checkpoints" / "step-000002" / "student.safetensors")
    teacher = load_file(recipe.run_folder / "checkpoints" / "step-000002" / "teacher.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in (*student.values(), *teacher.values()))
    assert all(tensor.any() for tensor in student.values())
