"""One network under training: its adapter, teacher, optimizer and roles; how it is previewed and exported."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dopsd import __version__
from dopsd.export import export_lora
from dopsd.families.base import Family
from dopsd.flow import Schedule
from dopsd.methods.base import Roles
from dopsd.preview import Preview, paint_previews
from dopsd.recipe import Recipe
from dopsd.training.adapters import add_lora
from dopsd.training.roles import Teacher, make_roles

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """Network, weights and optimizer of one run."""

    recipe: Recipe
    family: Family
    device: torch.device
    trainable: dict[str, nn.Parameter]
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    roles: Roles

    @classmethod
    def open(cls, recipe: Recipe, family: Family, device: torch.device, dtype: torch.dtype) -> "Session":
        """Load the denoiser, put LoRA on it, and make the roles."""
        denoiser = family.load_denoiser(device, dtype)
        if recipe.model.gradient_checkpointing:
            denoiser.network.enable_gradient_checkpointing()  # type: ignore[operator] - every diffusers model has it
        lora = recipe.lora
        trainable = add_lora(
            denoiser.network, lora.targets or family.lora_targets, lora.rank, lora.alpha or lora.rank, recipe.train.seed
        )
        teacher = Teacher(trainable, recipe.method.decay)
        optimizer = torch.optim.AdamW(
            trainable.values(), lr=recipe.train.learning_rate, weight_decay=recipe.train.weight_decay
        )

        def schedule(nfe: int | None, height: int, width: int) -> Schedule:
            return family.schedule(nfe or family.default_nfe, height, width)

        roles = make_roles(denoiser, trainable, teacher, schedule)
        return cls(recipe, family, device, trainable, teacher, optimizer, roles)

    @property
    def deployed_nfe(self) -> int:
        """Forwards of the sampler that previews and users take."""
        return self.recipe.sample.nfe or self.family.default_nfe

    def preview(self, previews: Sequence[Preview], folder: Path, step: int) -> None:
        """Paint the previews at the deployed NFE: `samples/step-N/`. The autoencoder is in memory only meanwhile."""
        paint_previews(
            folder / "samples" / f"step-{step:06d}",
            previews,
            self.roles,
            self.family.load_painter(self.device, torch.float32),
            lambda height, width: self.family.schedule(self.deployed_nfe, height, width),
            self.device,
        )

    def export(self, path: Path) -> None:
        """The student as a LoRA file, reopened and compared."""
        recipe, lora = self.recipe, self.recipe.lora
        base = Path(recipe.model.name_or_path)
        metadata = {
            "dopsd_version": __version__,
            "base_model": base.name if base.exists() else recipe.model.name_or_path,  # no path of a machine in a file
            "licence_of_base": self.family.licence,
            "method": recipe.method.name,
            "method_settings": recipe.method.model_dump_json(),
            "nfe": str(self.deployed_nfe),
            "rank": str(lora.rank),
            "steps": str(recipe.train.max_steps),
        }
        export_lora(path, self.trainable, (lora.alpha or lora.rank) / lora.rank, self.family.export_prefix, metadata)
        log.info("saved=%s reopened_and_compared=yes", path)
