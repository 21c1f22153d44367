"""Whole runs of full fine-tuning on pocket: resumed, loaded by diffusers, compared, inspected, and
refused."""

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
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import Recipe, parse_recipe
from dopsd.data.cache import prepare
from dopsd.data.folder import read_folder
from dopsd.data.loader import Loader
from dopsd.diffusion.sampling import noise_for
from dopsd.models import load_family
from dopsd.models.folder import tuning_metadata, write_model
from dopsd.pocket import CHECKPOINT as POCKET
from dopsd.runs.comparison.compare import compare
from dopsd.runs.memory import forecast
from dopsd.runs.resolve import resolve
from dopsd.runs.session import Session
from dopsd.runs.train import train
from dopsd.training.checkpoint import checkpoint_path
from dopsd.training.loop import Plan, train_steps
from dopsd.training.memory_meter import LiveBytes

CPU = torch.device("cpu")
PROMPTS = ["a toy at the left", "a big red star on night in inked style"]
CHANGES = {
    "lora.rank=8": "adapter: full has no LoRA: leave out lora.rank",
    "lora.init_from=a.safetensors": "leave out lora.init_from",
    "model.quantize=nf4": "model.quantize freezes them",
    "adapter=most": "adapter is 'most': input should be 'lora' or 'full'",
}


def recipe_for(
    concept: Path, output: Path, name: str, method: str = "sft", model=None, **train_settings
) -> Recipe:
    return parse_recipe(
        {
            "model": {"name_or_path": "pocket", "memory": "high"} | (model or {}),
            "data": {"folder": str(concept)},
            "method": {"name": method, "nfe": 2},
            "adapter": "full",
            "train": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-4} | train_settings,
            "sample": {"every": 0, "prompts": PROMPTS[0], "unrelated": 0},
            "health": {"every": 0},
            "save": {"every": 1},
            "output_dir": str(output),
            "run_name": name,
        }
    )


def finish(recipe: Recipe) -> Path:
    for _ in train(recipe):
        pass
    return recipe.result()


def dopsd(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "dopsd.cli", *map(str, arguments)])


@pytest.mark.parametrize(
    ("method", "dtype"), [("dopsd", "bf16"), pytest.param("sft", "fp32", marks=pytest.mark.slow)]
)
def test_a_killed_and_resumed_full_run_equals_the_uninterrupted_run_bitwise(
    method, dtype, concept, tmp_path
):
    straight, broken = (
        recipe_for(concept, tmp_path, name, method, {"dtype": dtype}, max_steps=4)
        for name in ("straight", "broken")
    )
    file = tmp_path / "broken.yaml"
    broken.save_as(file)
    finish(straight)
    child = dopsd("train", file)
    deadline = time.monotonic() + 240
    while not (broken.run_folder / "checkpoints" / "step-000002").exists():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not broken.result().exists(), "the child finished before it was killed"
    steps_after_resume = [report.step for report in train(broken, resume="latest")]
    assert steps_after_resume[-1] == 4 and steps_after_resume[0] > 1
    left, right = (r.run_folder / "checkpoints" / "step-000004" for r in (straight, broken))
    for name in sorted(file.stem for file in left.glob("*.safetensors")):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (left, right))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    masters, saved = load_file(left / "student.safetensors"), weights_of(broken.result())
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    # SFT has no teacher of its own: its teacher is the checkpoint that it began with.
    assert (left / "teacher.safetensors").exists() == (method == "dopsd")
    assert {t.dtype for t in saved.values()} == {
        torch.bfloat16 if dtype == "bf16" else torch.float32
    }
    assert all(torch.equal(tensor, masters[name].to(tensor)) for name, tensor in saved.items())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


OPEN_WITH_DIFFUSERS = """
import sys, torch
from diffusers import ZImagePipeline
folder, noise, target = sys.argv[1:]
assert "dopsd" not in sys.modules
pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
prompts = torch.load(noise)
latents = pipeline(prompts["prompts"], height=64, width=64, num_inference_steps=2,
                   guidance_scale=0.0, latents=prompts["noise"], output_type="latent",
                   return_dict=False)[0]
torch.save(latents, target)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Recipe:
    """A D-OPSD run with a health check, at a learning rate that visibly changes the images."""
    from dopsd.pocket.world.datasets import write_concept

    folder = tmp_path_factory.mktemp("finished")
    write_concept(folder / "concept", 1_000_100)
    # Without this file no benchmark is run on the concept, which would take long.
    (folder / "concept" / "pocket.json").unlink()
    tree = recipe_for(
        folder / "concept", folder, "whole", "dopsd", max_steps=3, learning_rate=3e-4
    ).model_dump()
    recipe = parse_recipe(
        tree | {"health": {"every": 3}, "data": tree["data"] | {"trigger": "zib"}}
    )
    finish(recipe)
    return recipe


def test_diffusers_alone_generates_the_same_from_the_saved_folder(finished, tmp_path, pocket):
    noise = noise_for([3, 4], pocket.channels, 16, 16)
    of_dopsd = sample_latents(load_family(str(finished.result())), PROMPTS, noise)
    of_base = sample_latents(pocket, PROMPTS, noise)
    torch.save({"prompts": PROMPTS, "noise": noise.start}, tmp_path / "noise.pt")
    files = [finished.result(), tmp_path / "noise.pt", tmp_path / "out.pt"]
    subprocess.run([sys.executable, "-c", OPEN_WITH_DIFFUSERS, *map(str, files)], check=True)
    assert (of_dopsd - of_base).abs().max() > 0.01, "nothing was trained"
    assert (of_dopsd - torch.load(tmp_path / "out.pt")).abs().max() <= 1e-4


def test_the_saved_folder_copies_every_other_component_from_the_checkpoint(finished):
    folder = finished.result()
    for part in ("vae", "text_encoder", "tokenizer", "scheduler", "vlm"):
        for file in (POCKET / part).iterdir():
            assert (folder / part / file.name).read_bytes() == file.read_bytes()
    metadata = tuning_metadata(folder)
    assert metadata["method"] == "dopsd" and metadata["base_model"] == "pocket"
    assert "ss_network_dim" not in metadata
    settings = json.loads((folder / "dopsd.json").read_text())
    assert settings["nfe"] == 2 and not (folder / "README.md").exists()
    card = (finished.run_folder / "README.md").read_text()
    assert "All weights of the network" in card and 'from_pretrained("whole"' in card
    assert "load_lora" not in card


def test_intermediate_models_are_deleted_together_with_their_checkpoints(finished):
    models = sorted(path.name for path in (finished.run_folder / "intermediate").iterdir())
    assert [name for name in models if name != "whole-healthy"] == [
        "whole-step000001",
        "whole-step000002",
    ]
    assert len(list((finished.run_folder / "checkpoints").iterdir())) == 2


def test_compare_and_inspect_accept_a_full_fine_tuned_model(finished, tmp_path):
    before = finished.result().stat().st_mtime_ns
    comparison = compare(
        [finished], tmp_path / "page.html", lambda *_: None, [finished.result("-step000001")]
    )
    assert list(comparison.numbers) == ["base", "base, other noise", "whole", "whole-step000001"]
    assert finished.result().stat().st_mtime_ns == before, "a finished run is not trained again"
    result = CliRunner().invoke(app, ["inspect", str(finished.result())])
    assert result.exit_code == 0 and "every weight" in result.output and "zimage" in result.output


def test_previews_show_an_unchanged_base_and_a_changed_student(finished):
    folder = finished.run_folder / "samples" / "step-000003"
    images = [(folder / f"{role}_0_0.png").read_bytes() for role in ("base", "student")]
    assert images[0] != images[1]
    first = finished.run_folder / "samples" / "step-000000"
    assert (
        images[0]
        == (first / "base_0_0.png").read_bytes()
        == (first / "student_0_0.png").read_bytes()
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dopsd", "sft"])
def test_full_fine_tuning_lowers_its_own_loss(method, concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "moved", method, max_steps=24, learning_rate=1e-4)
    recipe = parse_recipe(recipe.model_dump() | {"save": {"every": 0}})
    losses = [report.log["loss"] for report in train(recipe)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


@pytest.mark.slow
def test_offloading_teacher_and_base_changes_no_loss(concept, tmp_path):
    losses = [
        [
            report.log["loss"]
            for report in train(
                recipe_for(concept, tmp_path, name, "dopsd", model | {"memory": "low"})
            )
        ]
        for name, model in (("resident", {}), ("offloaded", {"offload": True}))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("change", CHANGES)
def test_check_refuses_settings_that_full_fine_tuning_cannot_use(change, concept, tmp_path):
    file = tmp_path / "recipe.yaml"
    recipe_for(concept, tmp_path, "refused").save_as(file)
    result = CliRunner().invoke(app, ["check", str(file), "--set", change])
    assert result.exit_code == 2 and CHANGES[change] in " ".join(result.output.split()), (
        result.output
    )


def test_check_refuses_a_gpu_that_is_too_small_and_names_the_remedy(concept, tmp_path):
    file = tmp_path / "recipe.yaml"
    recipe_for(concept, tmp_path, "large").save_as(file)
    result = CliRunner().invoke(app, ["check", str(file), "--card", "1.01"])
    assert result.exit_code == 2
    assert "too much for a card of 1.01 GiB. Set model.offload: true" in result.output
    assert not (tmp_path / "large").exists()


def test_a_lora_run_cannot_be_resumed_as_full_fine_tuning(concept, tmp_path):
    recipe = recipe_for(concept, tmp_path, "begun", max_steps=1)
    begun = parse_recipe(recipe.model_dump() | {"adapter": "lora"})
    begun.save_as(begun.run_folder / "config.yaml")
    checkpoint_path(begun.run_folder, 1).mkdir(parents=True)
    with pytest.raises(ValueError, match="begun with adapter = lora, now it is full"):
        next(train(recipe, resume="latest"))


def test_a_saved_model_that_reads_back_differently_is_refused_and_removed(pocket, tmp_path):
    network = pocket.load_denoiser(CPU, torch.float32).network
    original = network.save_pretrained

    def save_with_an_error(folder):
        original(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors["x_pad_token"] = tensors["x_pad_token"] + 1
        save_file(tensors, file, {"format": "pt"})

    network.save_pretrained = save_with_an_error
    with pytest.raises(
        ValueError, match="x_pad_token reads back with other values than were written"
    ):
        write_model(tmp_path / "model", network, pocket)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("method", "dtype"), [("dopsd", "bf16"), pytest.param("sft", "fp32", marks=pytest.mark.slow)]
)
def test_the_memory_forecast_of_full_fine_tuning_is_within_a_tenth_of_the_measured_peak(
    method, dtype, concept, tmp_path, pocket_text_encoder
):
    recipe = recipe_for(concept, tmp_path, "measured", method, {"dtype": dtype})
    family = load_family("pocket")
    network_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    examples = read_folder(concept).examples
    rows = prepare(
        examples,
        tmp_path / "cache",
        pocket_text_encoder,
        family.load_vae(CPU, torch.float32),
        resolution=family.resolution,
        multiple=family.multiple,
        privileged=method == "dopsd",
        device=CPU,
    )
    session = Session.open(resolve(recipe), False, pocket_text_encoder.context(["a"]))
    tensor_groups = (
        session.network.parameters(),
        session.trainable.values(),
        session.student.base.values(),
        session.teacher.tensors.values(),
    )
    resident = sum(
        {id(tensor): tensor.nbytes for group in tensor_groups for tensor in group}.values()
    )
    plan = Plan(max_steps=2, learning_rate=1e-4)
    with LiveBytes() as meter:
        for _ in train_steps(
            session.roles,
            recipe.method,
            Loader(rows, 2, seed=0),
            session.trainable,
            session.optimizer,
            session.teacher,
            CPU,
            plan,
        ):
            pass
    side = family.resolution, family.resolution
    captions = [example.caption for example in examples]
    memory = forecast(recipe, family, side, captions, network_dtype, low_memory=False)
    assert memory.peak == pytest.approx(resident + meter.peak, rel=0.1)
    assert resident < memory.resident < memory.peak
