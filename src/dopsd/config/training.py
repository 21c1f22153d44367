"""Sections of the recipe for training itself: adapter, optimizer, retention, when to stop,
checkpoints."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dopsd.config.fields import LoraNames, Pattern, PromptOrFile, Section, Seed, as_list
from dopsd.methods import Retention


class LoraSection(Section):
    """The adapter."""

    rank: int = Field(32, ge=1)
    alpha: float | None = Field(
        None, gt=0, description="Scale is alpha / rank; default: alpha = rank."
    )
    targets: Pattern | None = Field(
        None,
        description="Regular expression over module names; default: all linear layers of the "
        "blocks.",
    )
    init: Literal["gaussian", "kaiming"] = Field(
        "gaussian",
        description="Start of A (B is 0): normal with deviation 1 / rank, as in the reference "
        "code, or peft's default, uniform within 1 / sqrt(inputs).",
    )
    init_from: LoraNames = Field(
        (),
        description="LoRAs to continue from, FILE or FILE@STRENGTH each; their ranks add up to at "
        "most lora.rank.",
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
    optimizer: Literal[
        "adamw", "adamw_8bit", "adafactor", "lion", "prodigy", "schedule_free_adamw"
    ] = Field(
        "adamw",
        description="adamw_8bit: its moments in 8 bits (extra `quantize`); lion, prodigy (with "
        "learning_rate: 1) and schedule_free_adamw: extra `optimizers`.",
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped_steps: int = Field(
        3, ge=1, description="Steps in a row without finite loss or gradient, then stop."
    )
    seed: Seed = 0


class RetentionSection(Section, Retention):
    """What holds the student to the base model on prompts unrelated to the data, beside the loss of
    any method."""

    prompts: Annotated[tuple[PromptOrFile, ...], BeforeValidator(as_list)] = Field(
        ("",),
        min_length=1,
        description="Replayed prompts, or one .txt or .jsonl file of them; default: the empty one. "
        "Never prompts that the result is judged by.",
    )
    samples: int = Field(
        64,
        ge=1,
        description="States samples and each data.resolution: images that the base model "
        "generates once, the prompts in turn.",
    )


class StopSection(Section):
    """When to end before max_steps."""

    unhealthy: bool = Field(
        False, description="End with exit code 3 at the first health check that fails."
    )
    plateau: int | None = Field(
        None,
        ge=2,
        description="End, as at max_steps, once over this many health checks the loss has not "
        "fallen while drift has grown; 3 is a good start.",
    )


class SaveSection(Section):
    """Checkpoints."""

    every: int = Field(250, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep_last: int | None = Field(
        2,
        ge=2,
        description="Checkpoints (and whole models) to keep; null: all. LoRA files are all kept.",
    )
