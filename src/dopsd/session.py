"""One network under training: its adapter, teacher, optimizer and roles; how it is previewed and exported."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from dopsd import __version__
from dopsd.batch import Context
from dopsd.evaluation.health import Agreement, Checkup, Health
from dopsd.evaluation.judges import load_judge
from dopsd.export import export_lora, start_from_lora
from dopsd.families.base import Family, Painter
from dopsd.files import sha256_of
from dopsd.flow import Schedule
from dopsd.methods.base import Roles, Score
from dopsd.preview import Preview, paint_previews
from dopsd.recipe import Recipe
from dopsd.training.adapters import add_lora
from dopsd.training.offload import offload_blocks
from dopsd.training.quantize import adamw_8bit, quantize
from dopsd.training.roles import Teacher, make_roles

log = logging.getLogger(__name__)


def judged_by(recipe: Recipe, family: Family, device: torch.device, lean: bool) -> Score:
    """The method's judge, looking at latents through the autoencoder; both stay in memory. Raises ValueError once it
    has been without an answer for as many steps in a row as the recipe would skip."""
    judge = load_judge(str(recipe.method.judged_by), device)
    painter = family.load_painter(device, torch.float32, tiled=lean)
    most = 2 * recipe.train.max_skipped_steps * recipe.train.gradient_accumulation_steps  # two walks a batch
    silent_in_a_row = 0

    @torch.no_grad()
    def score(clean: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        nonlocal silent_in_a_row
        scores = judge((painter.pixels(clean) / 2 + 0.5).clamp(0, 1), prompts)
        silent_in_a_row = silent_in_a_row + 1 if scores.isnan().all() else 0
        if silent_in_a_row == most:
            raise ValueError(
                f"the judge {recipe.method.judged_by} answered NaN for every picture of {most} walks in a row: nothing "
                "can be learned from that. What was saved before is kept; look at what the judge makes of pictures "
                "[B, 3, H, W] in [0, 1]."
            )
        return scores

    return score


@dataclass(frozen=True)
class Session:
    """Network, weights and optimizer of one run."""

    recipe: Recipe
    family: Family
    accelerator: Accelerator
    lean: bool  # activations are recomputed, pictures decoded in tiles
    data: Mapping[str, str]  # what a LoRA file says of the pictures it was tuned on
    quantization_gap: float | None  # how far quantizing the base moved its first velocity; None: it was not
    trainable: dict[str, nn.Parameter]
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    roles: Roles

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        family: Family,
        accelerator: Accelerator,
        dtype: torch.dtype,
        lean: bool,
        data: Mapping[str, str],
        probe: Context,
    ) -> "Session":
        """Load the denoiser, put LoRA on it, and make the roles. probe: what a quantized base is compared on."""
        kind, gap = recipe.model.quantize, None
        starts_on = torch.device("cpu") if kind or recipe.model.offload else accelerator.device
        denoiser = family.load_denoiser(starts_on, dtype)
        if kind:
            start = family.schedule(family.default_nfe, 16, 16).times[:1]
            gap = quantize(denoiser, family.quantizable, kind, accelerator.device, probe, family.channels, start)
            log.info("quantize=%s first_velocity_moved_by=%.3f", kind, gap)
        if lean:
            denoiser.network.enable_gradient_checkpointing()  # type: ignore[operator] - every diffusers model has it
        lora = recipe.lora
        trainable = add_lora(
            denoiser.network, lora.targets or family.lora_targets, lora.rank, lora.alpha or lora.rank, recipe.train.seed
        )
        if recipe.model.offload:
            away = offload_blocks(denoiser.network, accelerator.device)
            log.info("offload=yes away_from_the_device=%.2f_GiB", away / 2**30)
        if lora.init_from:
            start_from_lora(trainable, lora.init_from, family, (lora.alpha or lora.rank) / lora.rank)
        teacher = Teacher(trainable, recipe.method.decay)
        kind_of_optimizer = adamw_8bit if recipe.train.optimizer == "adamw_8bit" else torch.optim.AdamW
        optimizer = kind_of_optimizer(
            trainable.values(), lr=recipe.train.learning_rate, weight_decay=recipe.train.weight_decay
        )

        def schedule(nfe: int | None, height: int, width: int) -> Schedule:
            return family.schedule(nfe or family.default_nfe, height, width)

        score = judged_by(recipe, family, accelerator.device, lean) if recipe.method.judged_by else None
        roles = make_roles(denoiser, trainable, teacher, schedule, score)
        return cls(recipe, family, accelerator, lean, data, gap, trainable, teacher, optimizer, roles)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.accelerator.device

    @property
    def deployed_nfe(self) -> int:
        """Forwards of the sampler that previews and users take."""
        return self.recipe.sample.nfe or self.family.default_nfe

    def painter(self) -> Painter:
        """The autoencoder, for as long as the caller keeps it."""
        return self.family.load_painter(self.device, torch.float32, tiled=self.lean)

    def preview(self, previews: Sequence[Preview], folder: Path, step: int) -> Path:
        """Paint the previews at the deployed NFE: `samples/step-N/`. The autoencoder is in memory only meanwhile."""
        path = folder / "samples" / f"step-{step:06d}"
        paint_previews(
            path,
            previews,
            self.roles,
            self.painter(),
            lambda height, width: self.family.schedule(self.deployed_nfe, height, width),
            self.device,
        )
        return path

    def checkup(self, context: Context, prompts: Sequence[str]) -> Checkup:
        """The untouched model's side of the health measures, painted on these prompts."""
        height, width = self._cells
        return Checkup(
            self.roles.base, self.painter(), lambda nfe: self.family.schedule(nfe, height, width), self.deployed_nfe,
            context.to(self.device), (self.family.channels, height, width), agreement=self._agreement(prompts),
        )  # fmt: skip

    def _agreement(self, prompts: Sequence[str]) -> Agreement | None:
        if self.recipe.health.text_model is None:
            return None
        from dopsd.evaluation.measures.clip import ClipScore

        judge = ClipScore(self.recipe.health.text_model, self.device, called="health.text_model")
        return lambda pictures, in_a_row: judge(
            torch.from_numpy(pictures).permute(0, 3, 1, 2), [prompt for prompt in prompts for _ in range(in_a_row)]
        ).double().cpu().numpy()  # fmt: skip

    def health(self, checkup: Checkup) -> Health:
        """How the student is now."""
        return checkup.examine(self.roles.student, self.painter())

    def export(self, path: Path, step: int) -> None:
        """The student after `step` steps as a LoRA file, reopened and compared."""
        scale = (self.recipe.lora.alpha or self.recipe.lora.rank) / self.recipe.lora.rank
        export_lora(path, self.trainable, scale, self.family, self.metadata(step))
        log.info("saved=%s reopened_and_compared=yes", path)

    def metadata(self, step: int) -> dict[str, str]:
        """What a LoRA file says of itself: modelspec, the keys that kohya's tools show, and ours. No path of a machine,
        no caption."""
        recipe, family = self.recipe, self.family
        base = Path(recipe.model.name_or_path)
        metadata = {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{family.architecture}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": recipe.run_name,
            "modelspec.date": time.strftime("%Y-%m-%d"),
            "modelspec.license": family.licence,
            "modelspec.resolution": f"{self._side}x{self._side}",
            "modelspec.usage_hint": f"{self.deployed_nfe} steps, no guidance, strength 1",
            "ss_base_model_version": family.base_version,
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(recipe.lora.rank),
            "ss_network_alpha": str(recipe.lora.rank),  # the true alpha is multiplied into B
            "ss_learning_rate": str(recipe.train.learning_rate),
            "ss_optimizer": "AdamW8bit" if recipe.train.optimizer == "adamw_8bit" else "AdamW",
            "ss_steps": str(step),
            "ss_seed": str(recipe.train.seed),
            "ss_output_name": recipe.run_name,
            "dopsd_version": __version__,
            "base_model": base.name if base.exists() else recipe.model.name_or_path,
            "method": recipe.method.name,
            "method_settings": recipe.method.model_dump_json(),
            "teacher_context": str(family.teacher_context) if "privileged" in recipe.method.needs else "none",
            **self.data,
            "nfe": str(self.deployed_nfe),
            "sigmas": json.dumps(family.schedule(self.deployed_nfe, *self._cells).times.tolist()),
        }
        if file := recipe.model.distilled_by:
            metadata["distilled_by"] = Path(file).name if Path(file).exists() else file
        if recipe.model.quantize:
            metadata["base_while_training"] = recipe.model.quantize
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
    def _cells(self) -> tuple[int, int]:
        return self._side // self.family.cell, self._side // self.family.cell
