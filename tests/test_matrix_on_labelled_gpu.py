"""Methods x families x adapter kinds on a GPU that is only a label (see fake_gpu.py).

Training there leaves the CPU's weights bit for bit and draws no random numbers on the device, and
generated images are the CPU's. This finds tensors on the wrong device without a GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
from fake_gpu import CPU, GPU, FakeGpu, label_of
from PIL import Image
from safetensors.torch import load_file
from tiny_klein import write_klein
from torch import Tensor, nn

from dopsd.config.recipe import parse_recipe
from dopsd.diffusion.batch import Batch, Replay
from dopsd.diffusion.components import Denoiser
from dopsd.diffusion.sampling import generate, noise_for
from dopsd.methods import METHODS, Retention, WithRetention, missing
from dopsd.models import load_family
from dopsd.models.base import Family
from dopsd.pocket.benchmark import ManyStepModel
from dopsd.runs.train import train
from dopsd.training.adapters import base_tensors
from dopsd.training.loop import Plan, train_steps
from dopsd.training.offload import offload_blocks
from dopsd.training.roles import Teacher, make_roles
from dopsd.training.trainable import Student, full_student, lora_student

KINDS = ("zimage", "flux2_klein", "sdxl turbo", "sdxl dmd2", "sdxl distilled by a LoRA")
ADAPTERS = ("lora", "full", "lora with offload")
REQUIRED = {"dreambooth": {"class_prompt": "a toy"}, "pso_online": {"reward": "red"}}
# Quick tests: on each family every method with LoRA, and the other adapter kinds with one method
QUICK_KINDS = ("zimage", "flux2_klein", "sdxl turbo")
QUICK = {(kind, method, "lora") for kind in QUICK_KINDS for method in METHODS}
QUICK |= {(kind, "sft", adapter) for kind in QUICK_KINDS for adapter in ADAPTERS}
QUICK |= {("sdxl dmd2", "pso", "lora")}
SIDE = 8  # of the latents
PROMPTS = ("a red star", "a cat on the left")


@pytest.fixture(scope="module")
def family_of(sdxl, dmd2_lora, tmp_path_factory) -> Callable[[str], Family]:
    """A family opened on a tiny checkpoint, by kind."""

    @cache
    def opened(kind: str) -> Family:
        if kind == "zimage":
            return load_family("pocket")
        if kind == "flux2_klein":
            return load_family(str(write_klein(tmp_path_factory.mktemp("klein") / "model")))
        if kind == "sdxl distilled by a LoRA":
            return load_family(str(sdxl("base")), distilled_by=str(dmd2_lora))
        return load_family(str(sdxl(kind.split()[1])))

    return opened


@pytest.fixture(scope="module")
def batch_of(family_of) -> Callable[[str], Batch]:
    """Two examples with every part that a method may need, on the CPU as the loader gives them."""

    @cache
    def batch(kind: str) -> Batch:
        family, rng = family_of(kind), torch.Generator().manual_seed(0)
        has_teacher = bool(family.teacher_contexts)
        encoder = family.load_text_encoder(CPU, torch.float32, images=has_teacher)
        side = SIDE * family.vae_scale_factor
        images = [Image.new("RGB", (side, side), color) for color in ("red", "blue")]
        latents, rejected = (
            torch.randn(2, family.channels, SIDE, SIDE, generator=rng) for _ in range(2)
        )
        plain = Batch(latents, encoder.context(PROMPTS), PROMPTS, torch.ones(2))
        privileged = encoder.context(PROMPTS, images) if has_teacher else None
        parts = {"rejected": rejected, "prior": plain, "replay": Replay(plain.context, latents)}
        return replace(plain, privileged=privileged, **parts)

    return batch


class SameBatch:
    def __init__(self, batch: Batch):
        self._batch = batch

    def batch(self, index: int) -> Batch:
        return self._batch


def loaded(family: Family, adapter: str, device: torch.device) -> tuple[Denoiser, Student]:
    """The denoiser on the device and what trains of it, as a run puts them together."""
    offload = adapter == "lora with offload"
    denoiser = family.load_denoiser(CPU if offload else device, torch.float32)
    if adapter == "full":
        return denoiser, full_student(denoiser.network, device)
    student = lora_student(denoiser.network, family.lora_targets, rank=2, alpha=2, seed=0)
    with torch.no_grad():
        for weight in student.weights.values():
            weight.add_(0.01)  # or B would be 0, and A would have no gradient in the first step
    if offload:
        denoiser.network.enable_gradient_checkpointing()  # as in runs under offload
        offload_blocks(denoiser.network, device)
        student = replace(student, base=base_tensors(dict(student.weights)))
    return denoiser, student


def trained_weights(
    family: Family, method: str, adapter: str, batch: Batch, device: torch.device
) -> Mapping[str, Tensor]:
    """What an optimizer step leaves, moved to the CPU."""
    settings = METHODS[method].model_validate({"nfe": 2} | REQUIRED.get(method, {}))
    denoiser, student = loaded(family, adapter, device)
    teacher = Teacher(student.weights, settings.decay, student.base if adapter == "full" else None)

    def schedule(nfe: int | None, height: int, width: int):
        return family.schedule(nfe or family.default_nfe, height, width)

    def score(clean: Tensor, prompts: object) -> Tensor:
        return clean.flatten(1).mean(1)

    roles = make_roles(denoiser, student.weights, teacher, schedule, score, student.base)
    # Two algorithms of the optimizer would round differently, and torch's choice is the device's
    optimizer = torch.optim.AdamW(student.weights.values(), weight_decay=0.0, foreach=False)
    objective = WithRetention(settings, Retention(weight=1.0))
    plan = Plan(max_steps=1, learning_rate=1e-3)
    batches = SameBatch(batch)
    for report in train_steps(
        roles, objective, batches, student.weights, optimizer, teacher, device, plan
    ):
        assert not report.skipped
    assert all(_is_at_home(p, device) for p in student.weights.values())
    return {name: weight.detach().to(CPU) for name, weight in student.weights.items()}


def _is_at_home(parameter: nn.Parameter, device: torch.device) -> bool:
    return label_of(parameter) is (GPU if device.type == "cuda" else CPU)


def cells() -> list:
    every = [(k, method, adapter) for k in KINDS for method in METHODS for adapter in ADAPTERS]
    return [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in every]


@pytest.mark.parametrize(("kind", "method", "adapter"), cells())
def test_training_on_a_gpu_leaves_the_weights_of_the_cpu(
    kind, method, adapter, family_of, batch_of
):
    family = family_of(kind)
    if missing(METHODS[method], family.teacher_contexts):
        pytest.skip("the family has no teacher that sees images")
    batch = batch_of(kind)
    on_cpu = trained_weights(family, method, adapter, batch, CPU)
    with FakeGpu() as gpu:
        on_gpu = trained_weights(family, method, adapter, batch, GPU)
    assert not gpu.drawn, "another GPU would draw other numbers"
    different = [name for name, weight in on_cpu.items() if not torch.equal(weight, on_gpu[name])]
    assert not different


@pytest.mark.parametrize("kind", ("zimage", "flux2_klein", "sdxl turbo", "sdxl dmd2"))
def test_images_are_generated_on_a_gpu_as_on_the_cpu(kind, family_of):
    family = family_of(kind)

    def images(device: torch.device) -> Tensor:
        encoder = family.load_text_encoder(device, torch.float32, images=False)
        denoiser, vae = (
            load(device, torch.float32) for load in (family.load_denoiser, family.load_vae)
        )
        noise = noise_for(range(2), family.channels, SIDE, SIDE)
        schedule = family.schedule(2, SIDE, SIDE)
        with torch.no_grad():
            return generate(denoiser, vae, schedule, encoder.context(PROMPTS), noise)

    on_cpu = images(CPU)
    with FakeGpu() as gpu:
        on_gpu = images(GPU)
        assert on_gpu.device == CPU
    assert not gpu.drawn
    assert torch.equal(on_gpu, on_cpu)


def test_the_many_step_model_of_pocket_answers_on_a_gpu():
    family = load_family("pocket")
    with FakeGpu():
        encoder = family.load_text_encoder(GPU, torch.float32, images=False)
        model = ManyStepModel(family.checkpoint.folder, encoder.context([""]), GPU)
        z = torch.randn(2, family.channels, SIDE, SIDE).to(GPU)
        assert model(z, torch.ones(2, device=GPU), encoder.context(PROMPTS)).device == GPU


def test_the_fake_gpu_refuses_what_a_gpu_refuses():
    with FakeGpu() as gpu:
        there, here = torch.ones(2, device="cuda"), torch.ones(2)
        assert there.device == GPU and (there + 1).is_cuda and not here.is_cuda
        assert (there * torch.tensor(2.0)).is_cuda, "a 0-d CPU tensor may meet any device"
        for mixed in (lambda: there + here, lambda: there * here.view(1, 2), lambda: here @ there):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        assert there.cpu().numpy().sum() == 2
        assert not gpu.drawn
        torch.rand_like(there)
        assert gpu.drawn == ["aten.rand_like.default"]


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, {"offload": True}], ids=["resident", "offload"])
def test_a_whole_run_on_a_gpu_writes_the_lora_of_the_cpu(model, concept, tmp_path):
    """From images to the file, with caching, previews, health and export."""

    def lora(name: str) -> Mapping[str, Tensor]:
        recipe = parse_recipe(
            {
                "model": {"name_or_path": "pocket", "dtype": "fp32", "memory": "low"} | model,
                "data": {"folder": str(concept)},
                "method": {"name": "dopsd", "nfe": 2},
                "lora": {"rank": 2},
                "train": {"max_steps": 1},
                "sample": {"every": 1, "prompts": ["a red star"], "unrelated": 0},
                "health": {"prompts": ["a red star", "a blue ring"]},
                "output_dir": str(tmp_path),
                "run_name": name,
            }
        )
        assert len(list(train(recipe))) == 1
        return load_file(recipe.run_folder / f"{name}.safetensors")

    on_cpu = lora("cpu")
    with FakeGpu() as gpu:
        on_gpu = lora("gpu")
    assert not gpu.drawn
    assert on_cpu.keys() == on_gpu.keys()
    assert all(torch.equal(on_cpu[key], on_gpu[key]) for key in on_cpu)
