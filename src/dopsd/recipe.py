"""The recipe: one frozen tree of settings, one YAML file. Unknown keys are refused with a suggestion.

Defaults are the papers' or the field's; a recipe file shows only what differs.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dopsd.files import write_text
from dopsd.methods import METHODS, AnyMethod

# Words of other tools, and what they are called here.
ALIASES = {
    "pretrained_model_name_or_path": "model.name_or_path",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "linear": "lora.rank",
    "linear_alpha": "lora.alpha",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lr": "train.learning_rate",
    "steps": "train.max_steps",
    "max_train_steps": "train.max_steps",
    "train_batch_size": "train.batch_size",
    "num_inference_steps": "sample.nfe",
    "sample_steps": "sample.nfe",
    "ema_decay": "method.teacher_decay",
    "save_every": "save.every",
    "checkpointing_steps": "save.every",
    "sample_every": "sample.every",
    "validation_prompt": "sample.prompts",
    "sample_prompts": "sample.prompts",
    "caption_ext": "data.caption_extension",
    "name_or_path": "model.name_or_path",
    "instance_data_dir": "data.folder",
    "dataset_path": "data.folder",
    "dataset_name": "data.dataset",
    "train_data_dir": "data.folder",
    "folder_path": "data.folder",
    "num_repeats": "data.repeats",
    "trigger_word": "data.trigger",
    "caption_dropout_rate": "data.caption_dropout",
    "max_step_saves_to_keep": "save.keep_last",
    "checkpoints_total_limit": "save.keep_last",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "lr_scheduler": "train.lr_schedule",
    "lr_warmup_steps": "train.warmup_steps",
    "output_name": "run_name",
    "resume_from_checkpoint": "the --resume flag",
    "memory": "model.memory",
    "load_in_4bit": "model.quantize",
    "base_quant": "model.quantize",
    "gradient_checkpointing": "model.memory",
    "report_to": "track.to",
    "log_with": "track.to",
    "wandb_project": "track.project",
    "tracker_project_name": "track.project",
}


class Section(BaseModel):
    """A part of the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    """The checkpoint that is tuned, which is the one that is deployed."""

    name_or_path: str = Field(description="Local diffusers folder, hub id, or `pocket`.")
    vlm: str | None = Field(None, description="Qwen3-VL the teacher sees pictures with; default: the family's.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    allow_base: bool = Field(False, description="Tune a many-step base model on purpose.")
    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="Of frozen weights; auto: bf16 on GPU.")
    quantize: Literal["nf4", "int8"] | None = Field(
        None, description="Put the frozen block linears in 4 or 8 bits while training (extra `quantize`)."
    )
    memory: Literal["auto", "low", "high"] = Field(
        "auto", description="low: recompute activations, decode in tiles; high: neither; auto: high where it fits."
    )


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str | int | dict) else value


def _no_single(prompts: tuple[str, ...]) -> tuple[str, ...]:
    if len(prompts) == 1:
        raise ValueError("one prompt has no spread to judge by: give two or more")
    return prompts


class SourceSection(Section):
    """One folder of pictures."""

    folder: Path = Field(description="Pictures with metadata.jsonl/.csv, same-stem .txt/.caption, or neither.")
    dataset: str | None = Field(
        None, description="Hub data set (or its folder) that fills `folder` if it is not there."
    )
    image_column: str = Field("image", description="Of the data set.")
    caption_column: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = Field(
        ("text",), min_length=1, description="Of the data set, one or several; all captions are kept."
    )
    split: str = Field("train", description="Of the data set.")
    instance_prompt: str | None = Field(None, description="Caption of every picture that brings none.")
    caption_extension: str | None = Field(None, description="Only captions of this extension, e.g. `.txt`.")
    repeats: int = Field(1, ge=1, description="How often an epoch visits each picture.")
    weight: float = Field(1.0, gt=0, description="Of its pictures' loss; a regularisation folder takes less than 1.")


class DataSection(SourceSection):
    """The pictures and their captions."""

    more: tuple[SourceSection, ...] = Field((), description="Further folders, each with the keys above.")
    trigger: str | None = Field(None, min_length=1, description="Word put before every caption that lacks it.")
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="Share of visits with the empty caption.")
    resolution: Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_one_or_many)] = Field(
        (), description="Sides of the square buckets in pixels, one or several; default: the model's."
    )
    skip_bad: bool = Field(False, description="Leave out pictures that cannot be used (they are listed).")


class LoraSection(Section):
    """The adapter."""

    rank: int = Field(32, ge=1)
    alpha: float | None = Field(None, gt=0, description="Scale is alpha / rank; default: alpha = rank.")
    targets: str | None = Field(None, description="Regular expression over module names; default: all block linears.")
    init_from: Path | None = Field(None, description="LoRA file to train on, of the same rank and targets.")


class TrainSection(Section):
    """The optimizer and how long it runs."""

    max_steps: int = Field(1000, ge=1)
    batch_size: int = Field(1, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped_steps: int = Field(3, ge=1, description="Steps in a row without finite loss or gradient, then stop.")
    seed: int = Field(0, ge=0)


class PromptSection(Section):
    """A prompt whose preview has a seed or a size of its own."""

    prompt: str
    seed: int | None = Field(None, ge=0, description="Default: sample.seed plus its place in the list.")
    width: int | None = Field(None, gt=0, description="Pixels; default: sample.width.")
    height: int | None = Field(None, gt=0, description="Pixels; default: sample.height.")


class SampleSection(Section):
    """Previews while training: student, teacher and base on the same noise."""

    prompts: Annotated[tuple[str | PromptSection, ...], BeforeValidator(_one_or_many)] = Field(
        (), description="Texts, or {prompt, seed, width, height}; default: 4 captions."
    )
    unrelated: int = Field(2, ge=0, le=8, description="How many of the health prompts are shown as well.")
    every: int = Field(100, ge=0, description="Steps between previews; 0: only before and after.")
    nfe: int | None = Field(None, ge=1, description="Forwards of the sampler; default: the model's own.")
    seed: int = Field(0, ge=0)
    width: int | None = Field(None, gt=0)
    height: int | None = Field(None, gt=0)


class HealthSection(Section):
    """Few-step health of the student against the untouched model, on prompts that have nothing to do with the data."""

    every: int | None = Field(None, ge=0, description="Steps between checkups; default: sample.every; 0: none.")
    prompts: Annotated[tuple[str, ...], AfterValidator(_no_single)] = Field((), description="Default: 8 built in.")


class StopSection(Section):
    """When to end before max_steps."""

    unhealthy: bool = Field(False, description="End with exit code 3 at the first checkup that is not healthy.")


class SaveSection(Section):
    """Checkpoints."""

    every: int = Field(250, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep_last: int | None = Field(2, ge=2, description="Checkpoints to keep; null: all. LoRA files are all kept.")


class TrackSection(Section):
    """Where a run's numbers, previews and health are told besides its own folder."""

    to: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], BeforeValidator(_one_or_many)] = Field(
        (), description="Any of tensorboard, trackio, wandb; each an extra of the same name."
    )
    project: str = Field("dopsd", min_length=1, description="Project name at trackio and wandb.")


class Recipe(Section):
    """Everything a run is made from."""

    model: ModelSection
    data: DataSection
    method: AnyMethod
    lora: LoraSection = LoraSection()  # type: ignore[call-arg]
    train: TrainSection = TrainSection()  # type: ignore[call-arg]
    sample: SampleSection = SampleSection()  # type: ignore[call-arg]
    health: HealthSection = HealthSection()  # type: ignore[call-arg]
    stop: StopSection = StopSection()  # type: ignore[call-arg]
    save: SaveSection = SaveSection()  # type: ignore[call-arg]
    track: TrackSection = TrackSection()  # type: ignore[call-arg]
    output_dir: Path = Path("runs")
    run_name: str = Field(pattern=r"^[\w.-]+$", description="Folder name of the run and file name of the LoRA.")

    @property
    def run_folder(self) -> Path:
        """Where the run lives."""
        return self.output_dir / self.run_name

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def save_as(self, path: Path) -> None:
        write_text(path, self.to_yaml())


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` changes. Raises ValueError with one sentence a fault.

    Relative paths in the file are relative to the working directory, as on the command line.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a recipe file, or start from one in recipes/.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it again as UTF-8.") from error
    return read_recipe(text, str(path), {"run_name": path.stem}, changes)


def read_recipe(text: str, source: str, defaults: Mapping[str, Any], changes: Sequence[str] = ()) -> Recipe:
    """Like `load_recipe`, from YAML text; `defaults` stand where the text has no such key."""
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{source} must hold sections (model, data, method, ...), not {type(tree).__name__}.")
    tree = {**defaults, **{key: {} if value is None else value for key, value in tree.items()}}  # comments alone: None
    for change in changes:
        _apply(tree, change)
    return parse_recipe(tree, source)


def parse_recipe(tree: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """A nested mapping as a Recipe. Raises ValueError with one sentence a fault."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{source}: " + " ".join(_sentences(error))) from error


def _apply(tree: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {change}: write it as key=value, for instance train.max_steps=500.")
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--set {change}: {section} is a value, not a section.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {change}: {value!r} is not a YAML value.") from error
    tree[name] = parsed


def _sentences(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        # a discriminated union adds the method's name to the location
        place = ".".join(str(part) for part in fault["loc"] if not (fault["loc"][0] == "method" and part in METHODS))
        if fault["type"] == "extra_forbidden":
            yield f"{place} is no key of a recipe{_hint(place)}."
        elif fault["type"] == "missing":
            yield f"{place} is missing."
        elif fault["type"].startswith("union_tag"):
            yield f"method.name must be one of {', '.join(METHODS)}."
        else:
            yield f"{place} is {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}."


def known_keys() -> list[str]:
    """Every key of a recipe as section.key."""
    keys: list[str] = []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    for method in METHODS.values():
        keys += [f"method.{key}" for key in method.model_fields]
    return sorted(set(keys))


def _hint(place: str) -> str:
    last = place.rpartition(".")[2]
    if last in ALIASES:
        return f"; {last} is {ALIASES[last]} here"
    keys = known_keys()
    close = difflib.get_close_matches(place, keys, 1, 0.6)
    close = close or [k for k in keys if difflib.SequenceMatcher(None, k.rpartition(".")[2], last).ratio() > 0.7]
    return f" (did you mean {close[0]}?)" if close else f"; the sections are {', '.join(Recipe.model_fields)}"
