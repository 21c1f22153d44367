"""Every method on every family: two steps are finite and move only the student; LoRA adapts what
`check` reports; a combination that does not run has a reason."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_klein import write_klein
from torch._subclasses.fake_tensor import FakeTensorMode

from dopsd.diffusion.batch import Batch, Replay
from dopsd.methods import METHODS, SFT, Retention, WithRetention, missing
from dopsd.models import FAMILIES, family_class, load_family
from dopsd.models.base import Family, network_on_meta
from dopsd.pocket import CHECKPOINT as POCKET
from dopsd.training.adapters import add_lora, coverage
from dopsd.training.loop import Plan, train_steps
from dopsd.training.roles import Teacher, make_roles

CPU = torch.device("cpu")
RANK = 2
CELLS = 8
PROMPTS = ("a red star", "a cat on the left")
# Settings without a default.
REQUIRED = {"dreambooth": {"class_prompt": "a toy"}, "pso_online": {"reward": "red"}}
# Linear layers of the blocks that no token passes: they map the time to scales and shifts, and
# LoRA does not adapt them.
OF_THE_TIME = r"adaLN_modulation|time_emb_proj"


@pytest.fixture(scope="module")
def opened(sdxl, dmd2_lora, tmp_path_factory) -> Callable[[str], Family]:
    """A tiny checkpoint by family, and by kind where a family has several."""
    folders: dict[str, Callable[[], tuple[Path, str | None]]] = {
        "zimage": lambda: (POCKET, None),
        "flux2_klein": lambda: (write_klein(tmp_path_factory.mktemp("klein") / "model"), None),
        "sdxl": lambda: (sdxl("turbo"), None),
        "sdxl distilled by a LoRA": lambda: (sdxl("base"), str(dmd2_lora)),
    }
    assert {name.split()[0] for name in folders} == set(FAMILIES), (
        "a family without a tiny checkpoint"
    )

    @cache
    def of(name: str) -> Family:
        folder, distilled_by = folders[name]()
        return load_family(str(folder), distilled_by=distilled_by)

    return of


@pytest.fixture(scope="module")
def batch_of(opened) -> Callable[[str, bool], Batch]:
    """Two images with everything that any method may need."""

    @cache
    def of(name: str, seeing: bool) -> Batch:
        family = opened(name)
        rng = torch.Generator().manual_seed(0)
        text_encoder = family.load_text_encoder(CPU, torch.float32, images=seeing)
        side = CELLS * family.vae_scale_factor
        images = [Image.new("RGB", (side, side), color) for color in ("red", "blue")]
        latents, worse = (
            torch.randn(2, family.channels, CELLS, CELLS, generator=rng) for _ in range(2)
        )
        plain = Batch(latents, text_encoder.context(PROMPTS), PROMPTS, torch.ones(2))
        seen = text_encoder.context(PROMPTS, images) if seeing else None
        replay = Replay(plain.context, latents)
        return replace(plain, privileged=seen, rejected=worse, prior=plain, replay=replay)

    return of


class Same:
    def __init__(self, batch: Batch):
        self._batch = batch

    def batch(self, index: int) -> Batch:
        return self._batch


CELLS_OF_THE_MATRIX = [(family, method) for family in FAMILIES for method in METHODS]


DMD2 = [("sdxl distilled by a LoRA", method) for method in METHODS]


@pytest.mark.parametrize(("name", "method"), [*CELLS_OF_THE_MATRIX, *DMD2])
def test_two_steps_are_finite_and_only_the_student_moves(name, method, opened, batch_of):
    family, settings = (
        opened(name),
        METHODS[method].model_validate({"nfe": 2} | REQUIRED.get(method, {})),
    )
    if why := missing(settings, family.teacher_contexts):
        assert "privileged" in settings.needs and not family.teacher_contexts and len(why) > 20
        return
    batch = batch_of(name, "privileged" in settings.needs)
    denoiser = family.load_denoiser(CPU, torch.float32)
    student = add_lora(denoiser.network, family.lora_targets, RANK, RANK, seed=0)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    teacher = Teacher(student, settings.decay)
    roles = make_roles(
        denoiser,
        student,
        teacher,
        lambda nfe, h, w: family.schedule(nfe or family.default_nfe, h, w),
        score=lambda clean, prompts: clean.flatten(1).mean(1),
    )
    optimizer = torch.optim.AdamW(student.values(), weight_decay=0.0)
    plan = Plan(max_steps=2, learning_rate=1e-3)
    for report in train_steps(roles, settings, Same(batch), student, optimizer, teacher, CPU, plan):
        assert (
            math.isfinite(report.log["loss"])
            and math.isfinite(report.grad_norm)
            and not report.skipped
        )
    moved = {
        name
        for name, tensor in denoiser.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert moved <= {f"network.{name}" for name in student}
    assert {name for name in moved if ".lora_B." in name} == {
        f"network.{name}" for name in student if ".lora_B." in name
    }


@pytest.mark.parametrize("states", ["samples", "walk", "step"])
@pytest.mark.parametrize("name", FAMILIES)
def test_retention_is_0_at_the_base_and_has_a_gradient_away_from_it(name, states, opened, batch_of):
    family = opened(name)
    denoiser = family.load_denoiser(CPU, torch.float32)
    student = add_lora(denoiser.network, family.lora_targets, RANK, RANK, seed=0)
    roles = make_roles(
        denoiser,
        student,
        Teacher(student, 1.0),
        lambda nfe, h, w: family.schedule(nfe or family.default_nfe, h, w),
    )
    objective = WithRetention(SFT(nfe=2), Retention(weight=1.0, states=states))

    def error() -> float:
        total = 0.0
        for piece in objective.losses(roles, batch_of(name, False), torch.Generator()):
            if piece.over == "replay":
                piece.surrogate.backward()
                total += piece.surrogate.item()
        return total

    assert error() == 0
    for weight in student.values():
        weight.data += 0.01
        weight.grad = None
    assert error() > 0 and all(weight.grad.any() for weight in student.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_targets_match_every_linear_layer_that_tokens_pass_and_as_many_as_check_reports(
    name, opened
):
    family = opened(name)
    network = network_on_meta(family)
    reported = coverage(network, family.lora_targets, RANK)
    linears = [
        n
        for n, m in network.named_modules()
        if isinstance(m, torch.nn.Linear) and re.search(r"\.\d+\.", n)
    ]
    for_tokens = [n for n in linears if not re.search(OF_THE_TIME, n)]
    reached = [n for n in for_tokens if re.fullmatch(family.lora_targets, n)]
    assert len(reached) >= 0.95 * len(for_tokens)
    student = add_lora(
        family.load_denoiser(CPU, torch.float32).network, family.lora_targets, RANK, RANK, seed=0
    )
    assert len(student) == 2 * reported.adapted == 2 * len(reached)
    assert sum(parameter.numel() for parameter in student.values()) == reported.parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_empty_components_have_the_shapes_of_loaded_ones(name, opened):
    def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in module.state_dict().items()}

    family, side = opened(name), CELLS * opened(name).vae_scale_factor
    vae, latents = (
        family.load_vae(CPU, torch.float32),
        torch.zeros(1, family.channels, CELLS, CELLS),
    )
    assert vae.pixels(latents).shape == (1, 3, side, side)
    loaded = shapes(vae.autoencoder), shapes(family.load_denoiser(CPU, torch.float32))
    with FakeTensorMode():
        empty = family.empty_vae(tiled=False)
        assert empty.pixels(torch.zeros(latents.shape)).shape == (1, 3, side, side)
        assert (shapes(empty.autoencoder), shapes(family.empty_denoiser())) == loaded


def test_every_combination_runs_or_is_refused_with_a_reason():
    cells = {
        (f, m): missing(METHODS[m], family_class(f).teacher_contexts)
        for f in FAMILIES
        for m in METHODS
    }
    closed = {cell: why for cell, why in cells.items() if why}
    assert closed.keys() == {("sdxl", "dopsd")}
    assert "read no image" in closed["sdxl", "dopsd"]
