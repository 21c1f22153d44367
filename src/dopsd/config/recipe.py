"""Reading recipes: YAML and `--set` changes into the tree of settings, one sentence a fault."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dopsd.config.aliases import hint, with_current_names
from dopsd.config.fields import Section
from dopsd.config.monitoring import PromptSection
from dopsd.config.schema import Recipe
from dopsd.config.training import TrainSection
from dopsd.files import shorten
from dopsd.methods import METHODS

__all__ = [
    "PromptSection",
    "Recipe",
    "TrainSection",
    "known_keys",
    "load_recipe",
    "parse_recipe",
    "read_recipe",
]

# The key that a value stands for where someone gives a section as one value.
MAIN_KEYS = {
    "model": "name_or_path",
    "data": "folder",
    "data.more": "folder",
    "method": "name",
    "lora": "rank",
    "train": "max_steps",
    "retention": "weight",
    "sample": "prompts",
    "sample.prompts": "prompt",
    "health": "every",
    "stop": "unhealthy",
    "save": "every",
    "track": "to",
}


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key.sub=value` changes. Raises ValueError with one sentence a
    fault.

    Relative paths in the file are relative to the working directory, as on the command line.
    """
    if path.is_dir():
        recipes = sorted(path.glob("*.yaml"))
        example = f", such as {recipes[0]}" if recipes else ""
        raise ValueError(f"{path} is a folder: give a recipe file{example}.")
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: give a recipe file, or start from one in recipes/."
        )
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{path} holds weights and is no recipe: `dopsd inspect {path}` shows what it is."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error}): give a recipe file, saved as UTF-8."
        ) from error
    return read_recipe(text, str(path), {"run_name": path.stem}, changes)


def read_recipe(
    text: str, source: str, defaults: Mapping[str, Any], changes: Sequence[str] = ()
) -> Recipe:
    """Like `load_recipe`, from YAML text; `defaults` stand where the text has no such key."""
    try:
        tree = yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        hint = " Write a path with backslashes in single quotes." if "escape" in reason else ""
        raise ValueError(f"{source} is not valid YAML: {reason}.{hint}") from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"{source} must hold sections (model, data, method, ...), not {type(tree).__name__}."
        )
    # a section that holds only comments is None
    sections = {key: {} if value is None else value for key, value in tree.items()}
    tree = {**defaults, **sections}
    for change in changes:
        _apply(tree, change)
    return parse_recipe(tree, source)


def parse_recipe(tree: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """A nested mapping as a Recipe. Raises ValueError with one sentence a fault."""
    try:
        return Recipe.model_validate(with_current_names(tree, source))
    except ValidationError as error:
        raise ValueError(f"{source}: " + " ".join(_sentences(error))) from error


def _apply(tree: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise ValueError(
            f"--set {shorten(change)}: write it as key=value, for instance train.max_steps=500."
        )
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--set {shorten(change)}: {section} is a value, not a section.")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--set {shorten(change)}: {shorten(repr(value))} is not a YAML value."
        ) from error
    tree[name] = parsed


def _sentences(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        # a discriminated union adds the method's name to the location
        place = ".".join(
            str(part)
            for part in fault["loc"]
            if not (fault["loc"][0] == "method" and part in METHODS)
        )
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            yield f"{place} is no key of a recipe{hint(place, known_keys(), _owners(place))}."
        elif fault["type"] == "missing":
            yield f"{place} is missing."
        elif fault["type"].startswith("union_tag"):
            yield f"method.name must be one of {', '.join(METHODS)}."
        elif fault["type"] in ("model_type", "model_attributes_type"):
            yield _section_sentence(place, fault["input"])
        elif not place:  # of the recipe as a whole
            yield f"{message}."
        else:
            yield f"{place} is {_quoted(fault['input'])}: {message[0].lower()}{message[1:]}."


def _section_sentence(place: str, value: Any) -> str:
    """For a value where keys are expected: how to write it as a section."""
    section = re.sub(r"\.\d+$", "", place)  # of an item of a list, such as data.more.0
    written = shorten(str(value), 60) if isinstance(value, str | int | float) else "..."
    if section == "method" and written not in METHODS:
        written = next(iter(METHODS))
    keys = f"{{{MAIN_KEYS[section]}: {written}}}"
    example = f"{section}: {keys}" if section == place else keys
    return f"{place} is {_quoted(value)}, not a section: write {example}."


def _quoted(value: Any) -> str:
    return shorten(repr(value)) if isinstance(value, str) else shorten(value)


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


def _owners(place: str) -> list[str]:
    """The methods that have the key."""
    section, _, key = place.partition(".")
    if section != "method":
        return []
    return [name for name, method in METHODS.items() if key in method.model_fields]
