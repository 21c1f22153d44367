"""A commented recipe for a model and a method. Every key is in it; those at their default are
comments."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dopsd.config.recipe import Recipe, read_recipe
from dopsd.methods import METHODS
from dopsd.models.base import Family

FULL_RATE = 0.1  # of LoRA's learning rate: 1e-5 where LoRA takes 1e-4, as the field does


def starter_recipe(
    name_or_path: str, family: Family, method: str, folder: Path, adapter: str = "lora"
) -> str:
    """The text of a recipe that trains as it stands once `folder` holds images. Settings that
    differ from the general defaults are the family's own (`Family.starting_points`)."""
    chosen = {
        "model.name_or_path": name_or_path,
        "data.folder": str(folder),
        **family.starting_points(method),
    }
    if adapter == "full":
        chosen = {key: value for key, value in chosen.items() if not key.startswith("lora.")}
        chosen |= {
            "adapter": adapter,
            "train.learning_rate": FULL_RATE * chosen.get("train.learning_rate", 1e-4),
        }
    lines = [
        f"# {method} on {name_or_path} (family {family.name}, licence {family.licence}).",
        "#   dopsd check THIS_FILE    says what it would do, before any weight is loaded",
        "#   dopsd train THIS_FILE",
        "# A key behind # has its default; take the # away to change it.",
    ]
    for section, field in Recipe.model_fields.items():
        settings = METHODS[method] if section == "method" else field.annotation
        if not (isinstance(settings, type) and issubclass(settings, BaseModel)):
            if field.default is not PydanticUndefined:
                lines += ["", *_lines("", section, field, chosen)]
            continue  # run_name is the file's name
        lines += ["", f"{section}:", *_section_lines(section, settings, chosen)]
    text = "\n".join(lines) + "\n"
    assert read_recipe(text, "the starter recipe", {"run_name": "new"})
    return text


def _section_lines(
    section: str, settings: type[BaseModel], chosen: Mapping[str, Any]
) -> Iterator[str]:
    for key, field in settings.model_fields.items():
        yield from (f"  {line}" for line in _lines(f"{section}.", key, field, chosen))


def _lines(section: str, key: str, field: FieldInfo, chosen: Mapping[str, Any]) -> Iterator[str]:
    place = f"{section}{key}"
    asked = field.is_required()  # the user's to say; the example shows what is meant
    default = (field.examples or [None])[0] if asked else field.default
    value = chosen.get(place, default)
    plain = (
        list(value)
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
    )
    shown = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    words = f"  # {field.description}" if field.description else ""
    yield f"{'' if asked or place in chosen or place == 'method.name' else '# '}{key}: {shown}{words}"
