"""Commented starter recipe for a model and a method: every key, those at their default commented
out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dopsd.config.recipe import Recipe, read_recipe
from dopsd.methods import METHODS

FULL_LEARNING_RATE = 0.1  # times LoRA's: 1e-5 where LoRA takes 1e-4, as is usual


def starter_recipe(
    name_or_path: str,
    method: str,
    folder: Path,
    *,
    family: str,
    licence: str,
    starting_points: Mapping[str, Any],
    adapter: str = "lora",
) -> str:
    """The text of a recipe that can be trained as soon as `folder` holds images.

    family, licence: names for the heading. starting_points: the family's recommended settings where
    they differ from the defaults, as `section.key` to value.
    """
    settings = {
        "model.name_or_path": name_or_path,
        "data.folder": str(folder),
        **starting_points,
    }
    if adapter == "full":
        settings = {key: value for key, value in settings.items() if not key.startswith("lora.")}
        lora_rate = settings.get("train.learning_rate", 1e-4)
        settings |= {"adapter": adapter, "train.learning_rate": FULL_LEARNING_RATE * lora_rate}
    lines = [
        f"# {method} on {name_or_path} (family {family}, licence {licence}).",
        "#   dopsd check THIS_FILE    shows what it would do, before any weight is loaded",
        "#   dopsd train THIS_FILE",
        "# A key after # has its default; remove the # to change it.",
    ]
    for name, field in Recipe.model_fields.items():
        section = METHODS[method] if name == "method" else field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += ["", f"{name}:", *_section_lines(name, section, settings)]
        elif field.default is not PydanticUndefined:  # run_name has none: it is the file's name
            lines += ["", *_key_lines("", name, field, settings)]
    text = "\n".join(lines) + "\n"
    assert read_recipe(text, "the starter recipe", {"run_name": "new"})
    return text


def _section_lines(
    name: str, section: type[BaseModel], settings: Mapping[str, Any]
) -> Iterator[str]:
    for key, field in section.model_fields.items():
        yield from (f"  {line}" for line in _key_lines(f"{name}.", key, field, settings))


def _key_lines(
    prefix: str, key: str, field: FieldInfo, settings: Mapping[str, Any]
) -> Iterator[str]:
    """`key: value  # description`, commented out where the key may be left out."""
    place = f"{prefix}{key}"
    default = (field.examples or [None])[0] if field.is_required() else field.default
    text = _as_yaml(settings.get(place, default))
    description = f"  # {field.description}" if field.description else ""
    is_needed = field.is_required() or place in settings or place == "method.name"
    yield f"{'' if is_needed else '# '}{key}: {text}{description}"


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    elif isinstance(value, Path):
        value = str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
