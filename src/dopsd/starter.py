"""A commented recipe for a model and a method. Every key is in it; those at their default are comments."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dopsd.families.base import Family
from dopsd.methods import METHODS
from dopsd.recipe import Recipe, read_recipe


def starter_recipe(name_or_path: str, family: Family, method: str, folder: Path) -> str:
    """The text of a recipe that trains as it stands once `folder` holds pictures. Settings that differ from the general
    defaults are the family's own (`Family.starting_points`)."""
    chosen = {"model.name_or_path": name_or_path, "data.folder": str(folder), **family.starting_points(method)}
    lines = [
        f"# {method} on {name_or_path} (family {family.name}, licence {family.licence}).",
        "#   dopsd check THIS_FILE    says what it would do, before any weight is loaded",
        "#   dopsd train THIS_FILE",
        "# A key behind # has its default; take the # away to change it.",
    ]
    for section, field in Recipe.model_fields.items():
        settings = METHODS[method] if section == "method" else field.annotation
        if not (isinstance(settings, type) and issubclass(settings, BaseModel)):
            continue  # output_dir and run_name have good defaults
        lines += ["", f"{section}:", *_section_lines(section, settings, chosen)]
    text = "\n".join(lines) + "\n"
    assert read_recipe(text, "the starter recipe", {"run_name": "new"})
    return text


def _section_lines(section: str, settings: type[BaseModel], chosen: Mapping[str, Any]) -> Iterator[str]:
    active = {"method.name"} | set(chosen)
    for key, field in settings.model_fields.items():
        place = f"{section}.{key}"
        if field.is_required() and place not in chosen:
            active.add(place)  # the user's to say; the example shows what is meant
            chosen = {**chosen, place: (field.examples or [None])[0]}
        value = chosen.get(place, None if field.default is PydanticUndefined else field.default)
        plain = list(value) if isinstance(value, tuple) else value
        shown = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        words = f"  # {field.description}" if field.description else ""
        yield f"  {'' if place in active else '# '}{key}: {shown}{words}"
