"""Write the reference pages from the code: recipe keys, commands, Python API.

    make reference        # or: python docs/reference/generate.py

tests/test_docs.py compares the committed pages with what this script writes.
"""

import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.core import TyperGroup

import dopsd
from dopsd.cli.app import app
from dopsd.config.schema import Recipe
from dopsd.methods import METHODS

FOLDER = Path(__file__).parent
RECIPE = """# Recipe keys

A recipe is a YAML file. Only `model.name_or_path`, `data.folder`, `method.name` and `run_name` must
be given; an unknown key is refused with a suggestion. `dopsd init METHOD` writes a recipe with
every key, its default and its meaning; `--set train.max_steps=500` changes a key on the command
line; editors complete and check recipes by `recipes/recipe.schema.json`, which `dopsd schema`
prints.
"""
CLI = """# Commands

`dopsd COMMAND --help` prints the same. Exit codes: 0 done; 2 bad input, in one sentence; 3 stopped
by `stop.unhealthy`; 130 and 143 stopped by Ctrl-C or SIGTERM, with the last step saved.
"""
PYTHON = """# Python API

`dopsd.__all__`, imported lazily: `import dopsd` loads no torch. A worked example is
`examples/use_as_library.py`. Whatever is not on this page may change without notice.
"""


def pages() -> dict[str, str]:
    """The pages by file name."""
    return {"recipe.md": recipe_page(), "cli.md": cli_page(), "python.md": python_page()}


def recipe_page() -> str:
    """One table for each section of the recipe, one for each method."""
    lines = [RECIPE]
    top = {name: field for name, field in Recipe.model_fields.items() if _section(field) is None}
    del top["method"]  # a table for each method below
    lines += ["## Top level", "", *_table(top, ""), ""]
    for name, field in Recipe.model_fields.items():
        section = _section(field)
        if section is not None:
            lines += [f"## {name}", "", _first_paragraph(section), ""]
            lines += [*_table(section.model_fields, f"{name}."), ""]
        elif name == "method":
            for method in METHODS.values():
                lines += [f"## method: {method.model_fields['name'].default}", ""]
                lines += [_first_paragraph(method), "", *_table(method.model_fields, "method."), ""]
    return _joined(lines)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) else None


def _table(fields: dict[str, FieldInfo], prefix: str) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        kind, meaning = _cell(_kind(field.annotation)), _cell(field.description or "")
        yield f"| `{prefix}{name}` | {kind} | {_default(field)} | {meaning} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or value == ():
        return "none"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _kind(kind: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _kind(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(part) for part in parts if part is not type(None)))
    if origin in (tuple, list):
        return f"list of {_kind(parts[0])}"
    names = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true, false",
        Path: "path",
        dict: "mapping",
    }
    return names.get(kind, "mapping")


def cli_page() -> str:
    """Every command with its arguments and options."""
    lines = [CLI]
    for name, command in commands():
        lines += [
            f"## dopsd {name}",
            "",
            _sentence(command.help),
            "",
            "```",
            _usage(name, command),
            "```",
            "",
        ]
        options = [parameter for parameter in command.params if parameter.name != "help"]
        if options:
            lines += ["| argument or option | default | meaning |", "|---|---|---|"]
            lines += [_option_row(option) for option in options] + [""]
    return _joined(lines)


def commands() -> Iterator[tuple[str, Any]]:
    """Every command of the program by its full name, those of groups included."""

    def walk(group: Any, before: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if isinstance(command, TyperGroup):
                yield from walk(command, f"{before}{name} ")
            else:
                yield f"{before}{name}", command

    yield from walk(typer.main.get_command(app), "")


def _usage(name: str, command: Any) -> str:
    words = [f"dopsd {name}"]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            word = parameter.name.upper()
            words.append(f"{word} ..." if parameter.nargs == -1 else word)
    return " ".join([*words, "[OPTIONS]"])


def _option_row(option: Any) -> str:
    is_argument = option.param_type_name == "argument"
    names = [option.name.upper()] if is_argument else [*option.opts, *option.secondary_opts]
    no_default = option.default is None or option.default is False
    shown = "required" if option.required else "" if no_default else f"`{option.default}`"
    meaning = _cell(option.help or "")
    return f"| {', '.join(f'`{name}`' for name in names)} | {shown} | {meaning} |"


def python_page() -> str:
    """Signature and docstring of every public name."""
    lines = [PYTHON]
    for name in dopsd.__all__:
        member = getattr(dopsd, name)
        lines += [f"## {name}", "", f"From `{member.__module__}`.", ""]
        if not inspect.isclass(member):
            lines += ["```python", _signature(name, member), "```", ""]
        lines += [inspect.getdoc(member) or "", ""]
        if inspect.isclass(member) and issubclass(member, BaseModel):
            lines += ["Its fields are the [recipe keys](recipe.md).", ""]
    return _joined(lines)


def _signature(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    result = signature.return_annotation
    shown = result if isinstance(result, str) else inspect.formatannotation(result)
    parameters = [f"    {parameter}," for parameter in signature.parameters.values()]
    text = "\n".join([f"def {name}(", *parameters, f") -> {shown}"])
    return re.sub(r"\b(?:pathlib|collections\.abc|PIL\.Image|dopsd(?:\.\w+)+)\.(?=[A-Z])", "", text)


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split())


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _joined(lines: list[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    for file_name, text in pages().items():
        (FOLDER / file_name).write_text(text, encoding="utf-8")
        print(FOLDER / file_name)
