"""Base class and value types of the recipe's sections: local paths, names on the hub, patterns."""

import re
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

SEED_LIMIT = 2**63  # of torch's generators
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two characters or more: C:/ is a drive


class Section(BaseModel):
    """A part of the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read `true` as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise ValueError("a number is expected")
        return value


def as_list(value: Any) -> Any:
    """A single value as a list of one, so that a key takes one value or several."""
    return [value] if isinstance(value, str | int | dict) else value


def _refuse_control_characters(path: str) -> None:
    """In double quotes YAML reads \\n and \\t of C:\\new\\train as line break and tab."""
    if CONTROL.search(path):
        raise ValueError(
            "it holds a control character, such as a tab or a line break. YAML reads \\n, \\t and "
            "other letters after a backslash so in double quotes: write the path in single quotes, "
            "or with forward slashes"
        )


def _as_local_path(value: Any) -> Any:
    if not isinstance(value, str | Path):
        return value
    _refuse_control_characters(str(value))
    if URL.match(str(value)):
        raise ValueError(
            "it is a URL, and only local files and folders are read and written: give a local "
            "path, and copy or mount what is stored elsewhere"
        )
    return _expand_home(str(value))


def _as_name_or_path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    _refuse_control_characters(value)
    if URL.match(value):
        raise ValueError("it is a URL: give a name on the hub (owner/name) or a local path")
    return _expand_home(value)


def _expand_home(path: str) -> str:
    """`~` and `~user` at the start are the home folder, as in a shell."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{path.split('/')[0]} has no home folder on this machine") from error


def _as_names(value: Any) -> Any:
    """None (as in run folders of older versions) as no name, one name as a list of it."""
    if isinstance(value, Path):
        return (str(value),)
    return () if value is None else as_list(value)


def _as_prompt_or_file(text: str) -> str:
    return _expand_home(text) if text.endswith((".txt", ".jsonl")) else text


def _check_regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"it is not a regular expression ({error})") from error
    return text


LocalPath = Annotated[Path, BeforeValidator(_as_local_path)]
NameOrPath = Annotated[str, Field(min_length=1), BeforeValidator(_as_name_or_path)]
PromptOrFile = Annotated[str, AfterValidator(_as_prompt_or_file)]
LoraNames = Annotated[tuple[NameOrPath, ...], BeforeValidator(_as_names)]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_check_regular_expression)]
Word = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
