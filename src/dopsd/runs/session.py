"""One network under training: its adapter, teacher, optimizer and roles, and how it is exported."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE, Denoiser
from dopsd.methods.base import Roles
from dopsd.models import load_family
from dopsd.models.folder import write_model
from dopsd.models.lora import merge_loras, read_lora
from dopsd.models.lora_source import LoraFile, as_loras
from dopsd.runs.outputs.lora_export import export_lora, start_from_loras
from dopsd.runs.resolve import ResolvedRun
from dopsd.runs.reward import LatentReward
from dopsd.training.deployed_weights import as_deployed, copy_in_main_memory
from dopsd.training.offload import offload_blocks
from dopsd.training.optimizers import make_optimizer
from dopsd.training.quantize import quantize
from dopsd.training.roles import Teacher, make_roles
from dopsd.training.trainable import Student, full_student, lora_student

log = logging.getLogger(__name__)

PROBE_SIDE = 16  # side, in latents, of the small canvas on which a quantized base is compared


@dataclass(frozen=True)
class Session:
    """Network, weights and optimizer of one run.

    low_memory: activations are recomputed and images decoded in tiles. quantization_gap: relative
    change of the base's first velocity by quantization, None where it is not quantized.
    deployed_roles: the roles as they are deployed, for previews and health; other than `roles` only
    where training is on other weights.
    """

    run: ResolvedRun
    low_memory: bool
    quantization_gap: float | None
    network: nn.Module
    student: Student
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    roles: Roles
    deployed_roles: Roles

    @classmethod
    def open(cls, run: ResolvedRun, low_memory: bool, probe: Context) -> "Session":
        """Load the network, make a student of it, and the roles over it.

        probe: the context on which a quantized base is compared with the unquantized one.
        """
        recipe, family, device = run.recipe, run.family, run.device

        # The frozen network; one that is quantized or offloaded is first loaded in main memory.
        kind, gap = recipe.model.quantize, None
        in_main_memory = kind or (recipe.model.offload and recipe.adapter == "lora")
        start_device = torch.device("cpu") if in_main_memory else device
        denoiser, deployed_weights = _load_denoiser(run, start_device)
        if kind:
            first_time = run.schedule(None, PROBE_SIDE, PROBE_SIDE).times[:1]
            gap = quantize(
                denoiser, family.quantizable, kind, device, probe, family.channels, first_time
            )
            log.info("Quantized to %s: the base's first velocity moved by %.1f%%.", kind, 100 * gap)
        if low_memory:
            denoiser.network.enable_gradient_checkpointing()  # type: ignore[operator]

        # What trains, and what trains it.
        student, teacher = make_student(run, denoiser.network)
        optimizer = _make_optimizer(run, student)
        optimizer.register_step_post_hook(lambda *_: student.publish())

        # The three velocities over the one network, and the reward.
        score = LatentReward(run, low_memory) if recipe.method.reward_name else None
        roles = make_roles(denoiser, student.weights, teacher, run.schedule, score, student.base)
        deployed_roles = roles
        if deployed_weights:
            deployed_roles = as_deployed(roles, denoiser, student, teacher, deployed_weights)
        return cls(
            run=run,
            low_memory=low_memory,
            quantization_gap=gap,
            network=denoiser.network,
            student=student,
            teacher=teacher,
            optimizer=optimizer,
            roles=roles,
            deployed_roles=deployed_roles,
        )

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains, float32, by name in the network."""
        return self.student.weights

    def load_vae(self) -> VAE:
        """The VAE, for as long as the caller keeps it."""
        return self.run.family.load_vae(self.run.device, torch.float32, tiled=self.low_memory)

    def export(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the student as a LoRA file or a model folder, reopen it and compare. Raises
        ValueError where it does not hold what was trained."""
        family = self.run.family
        if self.run.recipe.adapter == "full":
            write_model(path, self.network, family, metadata)
        else:
            export_lora(path, self.trainable, self.run.lora_scale, family, metadata)
        log.info("Saved %s, reopened and compared.", path)


def _load_denoiser(run: ResolvedRun, device: torch.device) -> tuple[Denoiser, dict[str, Tensor]]:
    """The denoiser that is trained on, and, where the deployed weights are others, those (else
    none)."""
    family, model = run.family, run.recipe.model
    if model.train_on:
        deployed = copy_in_main_memory(family.load_denoiser(torch.device("cpu"), run.dtype).network)
        return load_family(model.train_on).load_denoiser(device, run.dtype), deployed
    denoiser = family.load_denoiser(device, run.dtype)
    if not model.training_adapter:
        return denoiser, {}
    adapted = {f"{module}.weight" for module in read_lora(model.training_adapter, family)}
    deployed = {
        name: tensor
        for name, tensor in copy_in_main_memory(denoiser.network).items()
        if name in adapted
    }
    merge_loras(denoiser.network, [LoraFile(model.training_adapter)], family)
    return denoiser, deployed


def make_student(run: ResolvedRun, network: nn.Module) -> tuple[Student, Teacher]:
    """Student and teacher on a network, as the recipe says; `model.offload` keeps what is frozen in
    main memory."""
    recipe, decay = run.recipe, run.recipe.method.decay
    if recipe.adapter == "full":
        home = torch.device("cpu") if recipe.model.offload else run.device
        student = full_student(network, home)
        return student, Teacher(student.weights, decay, student.base, home)
    lora = recipe.lora
    student = lora_student(
        network, run.lora_targets, lora.rank, run.lora_alpha, recipe.train.seed, lora.init
    )
    if recipe.model.offload:
        offloaded = offload_blocks(network, run.device)
        log.info("Offloaded: %.2f GiB of frozen weights stay in main memory.", offloaded / 2**30)
    if lora.init_from:
        loras = as_loras(lora.init_from)
        start_from_loras(student.weights, loras, run.family, run.lora_scale)
    return student, Teacher(student.weights, decay)


def _make_optimizer(run: ResolvedRun, student: Student) -> torch.optim.Optimizer:
    settings = run.recipe.train
    return make_optimizer(
        settings.optimizer,
        student.weights.values(),
        settings.learning_rate,
        settings.weight_decay,
        # The fused-by-list form takes a further copy of all weights: too much for a whole model.
        foreach=None if run.recipe.adapter == "lora" else False,
    )
