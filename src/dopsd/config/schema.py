"""The recipe: a frozen tree of settings, every key with its default and meaning.

Unknown keys are refused. Defaults are the papers' or measured ones; a recipe file shows only what
differs. Reading the file is left to `recipe`.
"""

from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from dopsd.config.fields import LocalPath, Section
from dopsd.config.inputs import DataSection, ModelSection
from dopsd.config.monitoring import HealthSection, SampleSection, TrackSection
from dopsd.config.training import (
    LoraSection,
    RetentionSection,
    SaveSection,
    StopSection,
    TrainSection,
)
from dopsd.files import write_text
from dopsd.methods import AnyMethod, WithRetention

INTERMEDIATE = "intermediate"  # folder of the results on the way, in the run folder


class Recipe(Section):
    """Everything a run is made from."""

    model: ModelSection
    data: DataSection
    method: AnyMethod
    adapter: Literal["lora", "full"] = Field(
        "lora", description="What trains: LoRA, or every weight of the network."
    )
    lora: LoraSection = LoraSection()  # type: ignore[call-arg]
    train: TrainSection = TrainSection()  # type: ignore[call-arg]
    sample: SampleSection = SampleSection()  # type: ignore[call-arg]
    health: HealthSection = HealthSection()  # type: ignore[call-arg]
    retention: RetentionSection = RetentionSection()  # type: ignore[call-arg]
    stop: StopSection = StopSection()  # type: ignore[call-arg]
    save: SaveSection = SaveSection()  # type: ignore[call-arg]
    track: TrackSection = TrackSection()  # type: ignore[call-arg]
    output_dir: LocalPath = Path("runs")
    run_name: str = Field(
        pattern=r"^[\w-][\w.-]*$",
        max_length=200,
        description="Folder name of the run and file name of the LoRA.",
    )

    @model_validator(mode="after")
    def _refuse_lora_with_full(self) -> Self:
        if self.adapter == "full" and self.model.quantize:
            raise ValueError(
                "adapter: full trains every weight, and model.quantize freezes them: leave one out"
            )
        if self.adapter == "full" and self.train.optimizer == "schedule_free_adamw":
            raise ValueError(
                "train.optimizer: schedule_free_adamw keeps two sets of weights, which adapter: "
                "full does not write back to the network: choose another optimizer"
            )
        if self.adapter == "full" and (self.model.train_on or self.model.training_adapter):
            raise ValueError(
                "adapter: full trains the deployed weights themselves: leave out model.train_on "
                "and model.training_adapter"
            )
        if self.adapter == "full" and (chosen := self.lora.model_dump(exclude_defaults=True)):
            raise ValueError(
                f"adapter: full has no LoRA: leave out lora.{', lora.'.join(chosen)}, or set "
                "adapter: lora"
            )
        return self

    @model_validator(mode="after")
    def _refuse_plateau_without_health(self) -> Self:
        every = self.sample.every if self.health.every is None else self.health.every
        if self.stop.plateau and not every:
            raise ValueError(
                "stop.plateau looks at health checks, and there are none: set health.every"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """The run's own folder: <output_dir>/<run_name>."""
        return self.output_dir / self.run_name

    @property
    def objective(self) -> WithRetention:
        """What an optimizer step minimises."""
        return WithRetention(self.method, self.retention)

    @property
    def images_per_step(self) -> int:
        """Images that an optimizer step trains on, where no bucket is smaller than a batch."""
        return self.train.batch_size * self.train.gradient_accumulation_steps

    def result(self, mark: str = "") -> Path:
        """Path of the run's result: a LoRA file, or the folder of a whole model. mark: added to the
        name of an intermediate one, such as `-step000250`, which lies in a folder of its own:
        loaders that are given the run folder take the first file in it."""
        extension = ".safetensors" if self.adapter == "lora" else ""
        folder = self.run_folder / INTERMEDIATE if mark else self.run_folder
        return folder / f"{self.run_name}{mark}{extension}"

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def save_as(self, path: Path) -> None:
        """Write the resolved recipe as YAML, atomically."""
        write_text(path, self.to_yaml())
