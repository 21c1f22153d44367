"""The recipe's tree of settings: frozen, every key with its default and meaning, unknown keys
refused.

Defaults are the papers' or the field's; a recipe file shows only what differs. Reading the file is
left to `recipe`.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dopsd.files import write_text
from dopsd.methods import AnyMethod


def _args_of(section: type[BaseModel], name: str | None) -> tuple[Any, ...]:
    return get_args(section.model_fields[str(name)].annotation)


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"no regular expression ({error})") from error
    return text


Word = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_regular_expression)]
SEED_LIMIT = 2**63  # of torch's generators


class Section(BaseModel):
    """A part of the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = {int, float} & {
            cls.model_fields[str(info.field_name)].annotation,
            *_args_of(cls, info.field_name),
        }
        if isinstance(value, bool) and kinds:
            raise ValueError("a number is wanted")
        return value


class ModelSection(Section):
    """The checkpoint that is tuned, which is the one that is deployed."""

    name_or_path: str = Field(
        min_length=1, description="Local diffusers folder, hub id, or `pocket`."
    )
    teacher_context: str | None = Field(
        None,
        min_length=1,
        description="How the teacher sees a picture, e.g. `vlm` or `edit`; default: the family's.",
    )
    teacher_suffix: str | None = Field(
        None, description="Words after the caption in the teacher's prompt."
    )
    vlm: str | None = Field(
        None, description="Qwen3-VL the teacher sees pictures with; default: the family's."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    distilled_by: str | None = Field(
        None,
        min_length=1,
        description="What makes an SDXL base a few-step model: DMD2's LoRA or UNet (.safetensors), a file or "
        "owner/name/file on the hub.",
    )
    allow_base: bool = Field(False, description="Tune a many-step base model on purpose.")

    train_on: str | None = Field(
        None,
        description="Train the LoRA on this checkpoint of the same architecture; it is shown on name_or_path.",
    )
    training_adapter: Path | None = Field(
        None,
        description="LoRA file in the weights while training and not afterwards: a de-distill adapter.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        keys = ("offload", "quantize", "train_on", "training_adapter")
        if len(chosen := [key for key in keys if getattr(self, key)]) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude one another: choose one")
        return self

    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Of frozen weights; auto: bf16 on GPU."
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="Put the frozen block linears in 4 or 8 bits while training (extra `quantize`).",
    )
    offload: bool = Field(
        False,
        description="Frozen weights stay in main memory and are lent while they work; memory is low then. Under "
        "`adapter: full` these are the teacher's and the untouched model's.",
    )
    memory: Literal["auto", "low", "high"] = Field(
        "auto",
        description="low: recompute activations, decode in tiles; high: neither; auto: high where it fits.",
    )


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str | int | dict) else value


def _no_single(prompts: tuple[str, ...]) -> tuple[str, ...]:
    if len(prompts) == 1:
        raise ValueError("one prompt has no spread to judge by: give two or more")
    return prompts


class SourceSection(Section):
    """One folder of images."""

    folder: Path = Field(
        description="Pictures with metadata.jsonl/.csv, same-stem .txt/.caption, or neither."
    )
    dataset: str | None = Field(
        None, description="Hub data set (or its folder) that fills `folder` if it is not there."
    )
    image_column: str = Field("image", description="Of the data set.")
    caption_column: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = Field(
        ("text",),
        min_length=1,
        description="Of the data set, one or several; all captions are kept.",
    )
    split: str = Field("train", description="Of the data set.")
    instance_prompt: str | None = Field(
        None, description="Caption of every picture that brings none."
    )
    caption_extension: str | None = Field(
        None, pattern=r"^\.?\w+$", description="Only captions of this extension, e.g. `.txt`."
    )
    repeats: int = Field(1, ge=1, description="How often an epoch visits each picture.")
    weight: float = Field(
        1.0, gt=0, description="Of its pictures' loss; a regularisation folder takes less than 1."
    )
    rejected_column: str | None = Field(
        None, min_length=1, description="Of the data set: worse pictures, for pairs."
    )


class DataSection(SourceSection):
    """The images and their captions."""

    more: tuple[SourceSection, ...] = Field(
        (), description="Further folders, each with the keys above."
    )
    trigger: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] | None = Field(
        None, description="Word put before every caption that lacks it."
    )
    caption_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of visits with the empty caption."
    )
    resolution: Annotated[
        tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_one_or_many)
    ] = Field(
        (),
        description="Sides of the square buckets in pixels, one or several; default: the model's.",
    )
    skip_bad: bool = Field(
        False, description="Leave out pictures that cannot be used (they are listed)."
    )
    replay: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = Field(
        (),
        description="Prompts of method.retention, or one .txt or .jsonl file of them; default: the health prompts.",
    )


class LoraSection(Section):
    """The adapter."""

    rank: int = Field(32, ge=1)
    alpha: float | None = Field(
        None, gt=0, description="Scale is alpha / rank; default: alpha = rank."
    )
    targets: Annotated[str, Field(min_length=1), AfterValidator(_regular_expression)] | None = (
        Field(None, description="Regular expression over module names; default: all block linears.")
    )
    init_from: Path | None = Field(
        None, description="LoRA file to train on, of the same rank and targets."
    )


class TrainSection(Section):
    """The optimizer and how long it runs."""

    max_steps: int = Field(1000, ge=1)
    max_seconds: float | None = Field(
        None, gt=0, description="Of steps, after which training ends as at max_steps."
    )
    batch_size: int = Field(1, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit: its moments in 8 bits (extra `quantize`)."
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped_steps: int = Field(
        3, ge=1, description="Steps in a row without finite loss or gradient, then stop."
    )
    seed: int = Field(0, ge=0, lt=SEED_LIMIT)


class PromptSection(Section):
    """A prompt whose preview has a seed or a size of its own."""

    prompt: str
    seed: int | None = Field(
        None, ge=0, lt=SEED_LIMIT, description="Default: sample.seed plus its place in the list."
    )
    width: int | None = Field(None, gt=0, description="Pixels; default: sample.width.")
    height: int | None = Field(None, gt=0, description="Pixels; default: sample.height.")
    references: Annotated[tuple[Path, ...], BeforeValidator(_one_or_many)] = Field(
        (), description="Pictures to edit, where the model edits pictures."
    )


def _as_prompt(value: Any) -> Any:
    return {"prompt": value} if isinstance(value, str) else value


Prompt = Annotated[
    PromptSection, BeforeValidator(_as_prompt, json_schema_input_type=str | PromptSection)
]


class SampleSection(Section):
    """Previews while training: student, teacher and base on the same noise."""

    prompts: Annotated[tuple[Prompt, ...], BeforeValidator(_one_or_many)] = Field(
        (), description="Texts, or {prompt, seed, width, height}; default: 4 captions."
    )
    unrelated: int = Field(
        2, ge=0, le=8, description="How many of the health prompts are shown as well."
    )
    every: int = Field(100, ge=0, description="Steps between previews; 0: only before and after.")
    nfe: int | None = Field(
        None, ge=1, description="Forwards of the sampler; default: the model's own."
    )
    seed: int = Field(0, ge=0, lt=SEED_LIMIT)
    width: int | None = Field(None, gt=0)
    height: int | None = Field(None, gt=0)


class HealthSection(Section):
    """Few-step health of the student against the base model, on prompts that have nothing to do
    with the data."""

    every: int | None = Field(
        None, ge=0, description="Steps between checkups; default: sample.every; 0: none."
    )
    prompts: Annotated[tuple[str, ...], AfterValidator(_no_single)] = Field(
        (), description="Default: 8 built in."
    )
    text_model: str | None = Field(
        None, min_length=1, description="A CLIP, hub id or folder: measures `text` as well."
    )


class StopSection(Section):
    """When to end before max_steps."""

    unhealthy: bool = Field(
        False, description="End with exit code 3 at the first checkup that is not healthy."
    )


class SaveSection(Section):
    """Checkpoints."""

    every: int = Field(250, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep_last: int | None = Field(
        2,
        ge=2,
        description="Checkpoints (and whole models) to keep; null: all. LoRA files are all kept.",
    )


class TrackSection(Section):
    """Where a run's numbers, previews and health are told besides its own folder."""

    to: Annotated[
        tuple[Literal["tensorboard", "trackio", "wandb"], ...], BeforeValidator(_one_or_many)
    ] = Field((), description="Any of tensorboard, trackio, wandb; each an extra of the same name.")
    project: str = Field("dopsd", min_length=1, description="Project name at trackio and wandb.")


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
    stop: StopSection = StopSection()  # type: ignore[call-arg]
    save: SaveSection = SaveSection()  # type: ignore[call-arg]
    track: TrackSection = TrackSection()  # type: ignore[call-arg]
    output_dir: Path = Path("runs")
    run_name: str = Field(
        pattern=r"^[\w-][\w.-]*$",
        max_length=200,
        description="Folder name of the run and file name of the LoRA.",
    )

    @model_validator(mode="after")
    def _full_has_no_lora(self) -> Self:
        if self.adapter == "full" and self.model.quantize:
            raise ValueError(
                "adapter: full trains every weight, and model.quantize freezes them: leave one out"
            )
        if self.adapter == "full" and (self.model.train_on or self.model.training_adapter):
            raise ValueError(
                "adapter: full trains the weights that are deployed: no model.train_on and the like"
            )
        if self.adapter == "full" and (chosen := self.lora.model_dump(exclude_defaults=True)):
            raise ValueError(
                f"adapter: full has no LoRA: leave out lora.{', lora.'.join(chosen)}, or set adapter: lora"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """Where the run lives."""
        return self.output_dir / self.run_name

    def result(self, mark: str = "") -> Path:
        """What the run leaves: a LoRA file, or the folder of a model. mark: of one that it leaves
        on the way."""
        return (
            self.run_folder
            / f"{self.run_name}{mark}{'.safetensors' if self.adapter == 'lora' else ''}"
        )

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def save_as(self, path: Path) -> None:
        write_text(path, self.to_yaml())
