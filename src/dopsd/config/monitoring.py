"""Sections of the recipe for what is shown and measured while training."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dopsd.config.fields import LocalPath, NameOrPath, PromptOrFile, Section, Seed, as_list


class PromptSection(Section):
    """A prompt whose preview has a seed or a size of its own."""

    prompt: PromptOrFile
    seed: Seed | None = Field(
        None, description="Default: sample.seed plus its position in the list."
    )
    width: int | None = Field(None, gt=0, description="Pixels; default: sample.width.")
    height: int | None = Field(None, gt=0, description="Pixels; default: sample.height.")
    references: Annotated[tuple[LocalPath, ...], BeforeValidator(as_list)] = Field(
        (), description="Images to edit, where the model edits images."
    )


def _as_prompt(value: Any) -> Any:
    return {"prompt": value} if isinstance(value, str) else value


Prompt = Annotated[
    PromptSection, BeforeValidator(_as_prompt, json_schema_input_type=str | PromptSection)
]


class SampleSection(Section):
    """Previews while training: student, teacher and base on the same noise."""

    prompts: Annotated[tuple[Prompt, ...], BeforeValidator(as_list)] = Field(
        (),
        description="Texts, or {prompt, seed, width, height}, or one .txt or .jsonl file of them; "
        "default: 4 captions.",
    )
    unrelated: int = Field(
        2, ge=0, le=8, description="How many of the health prompts are shown as well."
    )
    every: int = Field(100, ge=0, description="Steps between previews; 0: only before and after.")
    nfe: int | None = Field(
        None, ge=1, description="Forwards of the sampler; default: the model's own."
    )
    seed: Seed = 0
    width: int | None = Field(None, gt=0)
    height: int | None = Field(None, gt=0)


def _refuse_single_prompt(prompts: tuple[str, ...]) -> tuple[str, ...]:
    if len(prompts) == 1 and not prompts[0].endswith((".txt", ".jsonl")):
        raise ValueError("the spread over prompts needs two or more")
    return prompts


class HealthSection(Section):
    """Few-step health: the student against the base model on prompts unrelated to the data."""

    every: int | None = Field(
        None, ge=0, description="Steps between health checks; default: sample.every; 0: none."
    )
    prompts: Annotated[
        tuple[PromptOrFile, ...], BeforeValidator(as_list), AfterValidator(_refuse_single_prompt)
    ] = Field((), description="Texts, or one .txt or .jsonl file of them; default: 8 built in.")
    text_model: NameOrPath | None = Field(
        None, description="A CLIP, hub id or folder: measures `text` as well."
    )


class TrackSection(Section):
    """Trackers that receive metrics, previews and health, besides the run's own folder."""

    to: Annotated[
        tuple[Literal["tensorboard", "trackio", "wandb"], ...], BeforeValidator(as_list)
    ] = Field((), description="Any of tensorboard, trackio, wandb; each an extra of the same name.")
    project: str = Field("dopsd", min_length=1, description="Project name at trackio and wandb.")
