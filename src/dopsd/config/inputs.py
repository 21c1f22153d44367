"""Sections of the recipe for what a run starts from: the checkpoint, the images, their captions."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dopsd.config.fields import LocalPath, NameOrPath, Section, Word, as_list

Sides = Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(as_list)]


class ModelSection(Section):
    """The checkpoint that is tuned, which is the one that is deployed."""

    name_or_path: NameOrPath = Field(
        description="Local diffusers folder, hub id, `pocket`, or a single .safetensors file with "
        "`config`."
    )
    config: NameOrPath | None = Field(
        None,
        description="Beside a single file: diffusers folder or hub id of the same model, for "
        "configs, scheduler and what the file lacks.",
    )
    teacher_context: str | None = Field(
        None,
        min_length=1,
        description="How the teacher sees an image, e.g. `vlm` or `edit`; or `prompt`: it sees "
        "none, and reads `teacher_text` of metadata.jsonl. Default: the family's.",
    )
    teacher_suffix: str | None = Field(
        None, description="Words after the caption in the teacher's prompt."
    )
    vlm: NameOrPath | None = Field(
        None, description="Qwen3-VL with which the teacher sees images; default: the family's."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    distilled_by: NameOrPath | None = Field(
        None,
        description="What makes an SDXL base a few-step model: the LoRA or UNet of DMD2 or "
        "SDXL-Lightning (.safetensors), a file or owner/name/file on the hub.",
    )
    allow_base: bool = Field(False, description="Tune a many-step base model on purpose.")
    train_on: NameOrPath | None = Field(
        None,
        description="Train the LoRA on this checkpoint of the same architecture; previews and "
        "the LoRA file are for name_or_path.",
    )
    training_adapter: LocalPath | None = Field(
        None,
        description="LoRA file in the weights while training and not afterwards: a de-distill "
        "adapter.",
    )

    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Of frozen weights; auto: bf16 on a GPU."
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="Frozen linear layers of the blocks in 4 or 8 bits while training (extra "
        "`quantize`).",
    )
    offload: bool = Field(
        False,
        description="Frozen weights stay in main memory and are copied to the GPU block by block; "
        "implies `memory: low`. Under `adapter: full` these are the teacher's and the base's.",
    )
    memory: Literal["auto", "low", "high"] = Field(
        "auto",
        description="low: recompute activations, decode in tiles; high: neither; auto: high where "
        "it fits.",
    )

    @model_validator(mode="after")
    def _refuse_combinations(self) -> Self:
        keys = ("offload", "quantize", "train_on", "training_adapter")
        if len(chosen := [key for key in keys if getattr(self, key)]) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude one another: choose one")
        return self


class SourceSection(Section):
    """One folder of images."""

    folder: LocalPath = Field(
        description="Images with metadata.jsonl/.csv, .txt/.caption files of the same name, or "
        "neither."
    )
    dataset: NameOrPath | None = Field(
        None, description="Hub data set (or its folder) that fills `folder` if it does not exist."
    )
    image_column: str = Field("image", description="Of the data set.")
    caption_column: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field(
        ("text",),
        min_length=1,
        description="Of the data set, one or several; all captions are used.",
    )
    split: str = Field("train", description="Of the data set.")
    instance_prompt: str | None = Field(
        None, description="Caption of every image that has none of its own."
    )
    trigger: Word | None = Field(
        None,
        description="Word for what is learned, in the captions of this folder alone: takes the "
        "place of `[trigger]`, is put before captions that lack it, and is the caption where "
        "there is none.",
    )
    caption_extension: str | None = Field(
        None, pattern=r"^\.?\w+$", description="Only captions of this extension, e.g. `.txt`."
    )
    caption_lines: Literal["joined", "each"] = Field(
        "joined",
        description="Lines of a caption file: one caption together, or one each, of which an epoch "
        "draws one.",
    )
    masks: Literal["files", "alpha", "ignore"] = Field(
        "files",
        description="Masked loss: by files such as x-masklabel.png or x_mask.png beside x.png, by "
        "the images' own transparency, or none.",
    )
    repeats: int = Field(1, ge=1, description="How often an epoch visits each image.")
    weight: float = Field(
        1.0, gt=0, description="Of its images' loss; a regularisation folder takes less than 1."
    )
    rejected_column: str | None = Field(
        None, min_length=1, description="Of the data set: worse images, for pairs."
    )


class DataSection(SourceSection):
    """The images and their captions."""

    more: tuple[SourceSection, ...] = Field(
        (), description="Further folders, each with keys of its own as above (also `trigger`)."
    )
    caption_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of visits with the empty caption."
    )
    resolution: Sides = Field(
        (),
        description="Sides of the square buckets in pixels, one or several; default: the model's.",
    )
    skip_bad: bool = Field(
        False,
        description="Leave out images and captions that cannot be used, and rows of `dataset` "
        "(they are listed).",
    )
