"""One network under training: its adapter, teacher, optimizer and roles; how it is previewed and
exported."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dopsd import __version__
from dopsd.config.recipe import Recipe
from dopsd.config.schema import LoraSection
from dopsd.diffusion.batch import Context
from dopsd.diffusion.components import VAE, Denoiser
from dopsd.diffusion.flow import Schedule
from dopsd.evaluation.health import Agreement, Health, HealthCheck
from dopsd.files import sha256_of
from dopsd.methods.base import Roles
from dopsd.models import load_family
from dopsd.models.base import Family
from dopsd.models.folder import write_model
from dopsd.models.lora import merge_lora, read_lora
from dopsd.runs.outputs.lora_export import export_lora, start_from_lora
from dopsd.runs.outputs.previews import Preview, generate_previews
from dopsd.runs.reward import latent_reward
from dopsd.training.deployed_weights import as_deployed, kept
from dopsd.training.offload import offload_blocks
from dopsd.training.quantize import adamw_8bit, quantize
from dopsd.training.roles import Teacher, make_roles
from dopsd.training.trainable import Student, full_student, lora_student

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """Network, weights and optimizer of one run."""

    recipe: Recipe
    family: Family
    accelerator: Accelerator
    low_memory: bool  # activations are recomputed, images decoded in tiles
    data: Mapping[str, str]  # what a LoRA file says of the images it was tuned on
    quantization_gap: (
        float | None
    )  # how far quantizing the base moved its first velocity; None: it was not
    network: nn.Module
    student: Student
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    roles: Roles  # that train
    # As they are deployed, for previews and health: the same, unless training is on other weights
    shown: Roles

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        family: Family,
        accelerator: Accelerator,
        dtype: torch.dtype,
        low_memory: bool,
        data: Mapping[str, str],
        probe: Context,
    ) -> "Session":
        """Load the denoiser, make a student of it, and the roles. probe: what a quantized base is
        compared on."""
        kind, gap = recipe.model.quantize, None
        away = kind or (recipe.model.offload and recipe.adapter == "lora")
        starts_on = torch.device("cpu") if away else accelerator.device
        denoiser, deployed = _load(recipe, family, starts_on, dtype)
        if kind:
            start = family.schedule(family.default_nfe, 16, 16).times[:1]
            gap = quantize(
                denoiser,
                family.quantizable,
                kind,
                accelerator.device,
                probe,
                family.channels,
                start,
            )
            log.info("quantize=%s first_velocity_moved_by=%.3f", kind, gap)
        if low_memory:
            denoiser.network.enable_gradient_checkpointing()  # type: ignore[operator] - every diffusers model has it
        student, teacher = prepare(recipe, family, denoiser.network, accelerator.device)
        optimizer = _optimizer_of(recipe, student)
        optimizer.register_step_post_hook(lambda *_: student.publish())

        def schedule(nfe: int | None, height: int, width: int) -> Schedule:
            return family.schedule(nfe or family.default_nfe, height, width)

        score = (
            latent_reward(recipe, family, accelerator.device, low_memory)
            if recipe.method.reward_name
            else None
        )
        roles = make_roles(denoiser, student.weights, teacher, schedule, score, student.base)
        shown = as_deployed(roles, denoiser, student, teacher, deployed) if deployed else roles
        return cls(
            recipe,
            family,
            accelerator,
            low_memory,
            data,
            gap,
            denoiser.network,
            student,
            teacher,
            optimizer,
            roles,
            shown,
        )

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains, float32, by name in the network."""
        return self.student.weights

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.accelerator.device

    @property
    def deployed_nfe(self) -> int:
        """Forwards of the sampler that previews and users take."""
        return self.recipe.sample.nfe or self.family.default_nfe

    def vae(self) -> VAE:
        """The autoencoder, for as long as the caller keeps it."""
        return self.family.load_vae(self.device, torch.float32, tiled=self.low_memory)

    def preview(self, previews: Sequence[Preview], folder: Path, step: int) -> Path:
        """Paint the previews at the deployed NFE: `samples/step-N/`. The autoencoder is in memory
        only meanwhile."""
        path = folder / "samples" / f"step-{step:06d}"
        generate_previews(
            path,
            previews,
            self.shown,
            self.vae(),
            lambda height, width: self.family.schedule(self.deployed_nfe, height, width),
            self.device,
        )
        return path

    def health_check(self, context: Context, prompts: Sequence[str]) -> HealthCheck:
        """The base model's side of the health measures, generated on these prompts."""
        height, width = self._latent_size
        return HealthCheck(
            self.shown.base,
            self.vae(),
            lambda nfe: self.family.schedule(nfe, height, width),
            self.deployed_nfe,
            context.to(self.device),
            (self.family.channels, height, width),
            agreement=self._agreement(prompts),
        )

    def _agreement(self, prompts: Sequence[str]) -> Agreement | None:
        if self.recipe.health.text_model is None:
            return None
        from dopsd.evaluation.metrics.clip import ClipScore

        reward = ClipScore(self.recipe.health.text_model, self.device, called="health.text_model")
        return lambda images, in_a_row: (
            reward(
                torch.from_numpy(images).permute(0, 3, 1, 2),
                [prompt for prompt in prompts for _ in range(in_a_row)],
            )
            .double()
            .cpu()
            .numpy()
        )

    def health(self, health_check: HealthCheck) -> Health:
        """How the student is now."""
        return health_check.examine(self.shown.student, self.vae())

    def export(self, path: Path, step: int) -> None:
        """The student after `step` steps as a LoRA file or the folder of a model, reopened and
        compared."""
        if self.recipe.adapter == "full":
            write_model(path, self.network, self.family, self.metadata(step))
        else:
            scale = _scale(self.recipe.lora)
            export_lora(path, self.trainable, scale, self.family, self.metadata(step))
        log.info("saved=%s reopened_and_compared=yes", path)

    def metadata(self, step: int) -> dict[str, str]:
        """What a LoRA file (or a model's folder) says of itself: modelspec, the keys that kohya's
        tools show, and ours. No path of a machine, no caption."""
        recipe, family = self.recipe, self.family
        base = Path(recipe.model.name_or_path)
        metadata = {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": family.architecture,
            "modelspec.implementation": "diffusers",
            "modelspec.title": recipe.run_name,
            "modelspec.date": time.strftime("%Y-%m-%d"),
            "modelspec.license": family.licence,
            "modelspec.resolution": f"{self._side}x{self._side}",
            "modelspec.usage_hint": f"{self.deployed_nfe} steps, no guidance",
            "ss_base_model_version": family.base_version,
            "ss_learning_rate": str(recipe.train.learning_rate),
            "ss_optimizer": "AdamW8bit" if recipe.train.optimizer == "adamw_8bit" else "AdamW",
            "ss_steps": str(step),
            "ss_seed": str(recipe.train.seed),
            "ss_output_name": recipe.run_name,
            "dopsd_version": __version__,
            "base_model": base.name if base.exists() else recipe.model.name_or_path,
            "method": recipe.method.name,
            "method_settings": recipe.method.model_dump_json(),
            "teacher_context": str(family.teacher_context)
            if "privileged" in recipe.method.needs
            else "none",
            **self.data,
            "nfe": str(self.deployed_nfe),
            "sigmas": json.dumps(
                family.schedule(self.deployed_nfe, *self._latent_size).times.tolist()
            ),
        }
        if file := recipe.model.distilled_by:
            metadata["distilled_by"] = Path(file).name if Path(file).exists() else file
        if recipe.adapter == "lora":
            metadata |= {
                "modelspec.architecture": f"{family.architecture}/lora",
                "modelspec.usage_hint": f"{self.deployed_nfe} steps, no guidance, strength 1",
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(recipe.lora.rank),
                "ss_network_alpha": str(recipe.lora.rank),  # the true alpha is multiplied into B
            }
        if recipe.model.quantize:
            metadata["base_while_training"] = recipe.model.quantize
        if trained_on := recipe.model.train_on:
            metadata["trained_on"] = (
                Path(trained_on).name if Path(trained_on).exists() else trained_on
            )
        if recipe.model.training_adapter:
            metadata["training_adapter_sha256"] = sha256_of(recipe.model.training_adapter)
        if recipe.data.trigger:
            metadata["modelspec.trigger_phrase"] = recipe.data.trigger
        if recipe.lora.init_from:
            metadata["parent_adapter_sha256"] = sha256_of(recipe.lora.init_from)
        return metadata

    @property
    def _side(self) -> int:
        """Of the largest square that is trained on, in pixels."""
        return max(self.recipe.data.resolution, default=self.family.resolution)

    @property
    def _latent_size(self) -> tuple[int, int]:
        return (
            self._side // self.family.vae_scale_factor,
            self._side // self.family.vae_scale_factor,
        )


def _load(
    recipe: Recipe, family: Family, device: torch.device, dtype: torch.dtype
) -> tuple[Denoiser, dict[str, Tensor]]:
    """The denoiser that is trained on, and the deployed weights where those are others (else none)."""
    model = recipe.model
    if model.train_on:
        deployed = kept(family.load_denoiser(torch.device("cpu"), dtype).network)
        return load_family(model.train_on).load_denoiser(device, dtype), deployed
    denoiser = family.load_denoiser(device, dtype)
    if not model.training_adapter:
        return denoiser, {}
    touched = {f"{module}.weight" for module in read_lora(model.training_adapter, family)}
    deployed = {name: tensor for name, tensor in kept(denoiser.network).items() if name in touched}
    merge_lora(denoiser.network, model.training_adapter, family)
    return denoiser, deployed


def prepare(
    recipe: Recipe, family: Family, network: nn.Module, device: torch.device
) -> tuple[Student, Teacher]:
    """Student and teacher on a network, as the recipe says; `model.offload` keeps what is frozen in
    main memory."""
    home = torch.device("cpu") if recipe.model.offload else device
    if recipe.adapter == "full":
        student = full_student(network, home)
        return student, Teacher(student.weights, recipe.method.decay, student.base, home)
    lora = recipe.lora
    student = lora_student(
        network,
        lora.targets or family.lora_targets,
        lora.rank,
        lora.alpha or lora.rank,
        recipe.train.seed,
    )
    if recipe.model.offload:
        away = offload_blocks(network, device)
        log.info("offload=yes away_from_the_device=%.2f_GiB", away / 2**30)
    if lora.init_from:
        start_from_lora(student.weights, lora.init_from, family, _scale(lora))
    return student, Teacher(student.weights, recipe.method.decay)


def _optimizer_of(recipe: Recipe, student: Student) -> torch.optim.Optimizer:
    weights, rate, decay = (
        student.weights.values(),
        recipe.train.learning_rate,
        recipe.train.weight_decay,
    )
    if recipe.train.optimizer == "adamw_8bit":
        return adamw_8bit(weights, rate, decay)
    all_at_once = (
        None if recipe.adapter == "lora" else False
    )  # which would take a further copy of all weights
    return torch.optim.AdamW(weights, lr=rate, weight_decay=decay, foreach=all_at_once)


def _scale(lora: LoraSection) -> float:
    return (lora.alpha or lora.rank) / lora.rank
