"""The documentation is true: its numbers, commands, keys, links and paths are those of the code."""

import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import typer.main
from pydantic import BaseModel
from typer.core import TyperGroup

from dopsd.cli.app import app
from dopsd.config.schema import Recipe
from dopsd.methods import Method
from dopsd.models.base import Family
from dopsd.pocket.__main__ import app as pocket_app

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [README, ROOT / "CONTRIBUTING.md", *PAGES]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
REFERENCE = DOCS / "reference"
GENERATED = {"results.md", "model_and_cost.md", "health_measured.md"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def generator():
    """docs/reference/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate_reference", REFERENCE / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Numbers


@pytest.mark.parametrize("page", sorted(GENERATED))
def test_a_results_page_is_what_the_numbers_say(page: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    written = importlib.import_module("write_pages").pages()[page]
    assert (DOCS / page).read_text(encoding="utf-8") == written, "run benchmarks/write_pages.py"


def test_the_table_of_the_readme_is_what_was_measured():
    page = README.read_text(encoding="utf-8")
    demo = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    metrics = ("thing_error", "thing_hit", "thing_sharp", "sharpness", "attributes")
    for model, name in demo["names"].items():
        values = [f"{demo[model][metric]:.3f}" for metric in metrics]
        assert f"| {name} | {' | '.join(values)} |" in page, name


def test_every_full_size_recipe_states_the_memory_that_was_forecast_for_it():
    rows = json.loads((RESULTS / "forecast.json").read_text(encoding="utf-8"))
    files = {
        path.stem: path
        for path in (ROOT / "recipes").glob("*.yaml")
        if not path.stem.startswith("pocket")
    }
    assert {row["recipe"] for row in rows} == files.keys(), "run benchmarks/forecast.py again"
    for row in rows:
        header = " ".join(
            files[row["recipe"]].read_text(encoding="utf-8").replace("#", " ").split()
        )
        peak = f"{row['peak_gib']:.1f}"
        words = {
            "low": f"a step takes {peak} GiB at model.memory: low",
            "high": f"and {peak} at high",
        }
        assert words[row["memory"]] in header, row


@pytest.mark.parametrize(
    ("label", "recipe"),
    [
        ("D-OPSD", "zimage-turbo-identity-dopsd"),
        ("SFT, DreamBooth, PSO, DPO", "zimage-turbo-identity-sft"),
        (
            "D-OPSD, `adapter: full`, `offload: true`, `optimizer: adamw_8bit`",
            "zimage-turbo-domain-dopsd-full",
        ),
        ("klein 4B", "klein-4b-identity-dopsd"),
        ("klein 4B, editing one image of 1024 x 1024", "klein-4b-editing-dopsd"),
        ("klein 9B", "klein-9b-identity-dopsd"),
        ("Turbo, SFT, PSO, DreamBooth", "sdxl-turbo-identity-sft"),
        ("DMD2, SFT, PSO, DreamBooth", "sdxl-dmd2-identity-sft"),
    ],
)
def test_a_row_of_the_memory_page_is_its_forecast(label: str, recipe: str):
    rows = json.loads((RESULTS / "forecast.json").read_text(encoding="utf-8"))
    peaks = {row["memory"]: row for row in rows if row["recipe"] == recipe}
    high = f"{peaks['high']['peak_gib']:.1f}" if "high" in peaks else "-"
    cells = f"{peaks['low']['resident_gib']:.1f} | {peaks['low']['peak_gib']:.1f} | {high}"
    assert f"| {label} | {cells} |" in (DOCS / "memory.md").read_text(encoding="utf-8")


# Size and place


def test_the_readme_has_at_most_120_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_image_of_the_readme_is_small():
    assert (DOCS / "assets" / "demo.png").stat().st_size <= 200_000


@pytest.mark.parametrize(
    "path", [path for path in TEXTS if path.name not in GENERATED | {"demo.png"}], ids=name_of
)
def test_lines_of_a_page_are_at_most_100_characters(path: Path):
    if path.parent == REFERENCE:
        return  # signatures and help texts are the code's
    lines = path.read_text(encoding="utf-8").splitlines()
    long = [line for line in lines if len(line) > 100 and not line.lstrip().startswith(("|", "!["))]
    assert not long, long[0]


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    def files(entries: list) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                yield from files(value) if isinstance(value, list) else [value]

    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(files(site["nav"])) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


# Links and paths


def anchors(page: Path) -> set[str]:
    """Ids of the headings, as the site (and the hub) makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = [re.sub(r"[`*]", "", heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)]
    return {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
        for heading in headings
    }


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_a_heading(path: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_file(), f"{target}: no such file"
        if path in PAGES:
            assert there.is_relative_to(DOCS), (
                f"{target} leaves docs/: the site has no such page; write it as code"
            )
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("path", [*TEXTS, *RECIPES], ids=name_of)
def test_every_file_of_the_repository_that_a_page_names_exists(path: Path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = re.findall(r"(?<![\w/.-])((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|md|json|toml))\b", text)
    homes = (ROOT, ROOT / "src" / "dopsd", DOCS)
    packages = {home.name for home in (ROOT / "src" / "dopsd").iterdir() if home.is_dir()}
    tops = packages | {"src", "tests", "docs", "benchmarks", "recipes", "examples"}
    gone = [
        n
        for n in named
        if n.split("/")[0] in tops and not any((home / n).exists() for home in homes)
    ]
    assert not gone, gone


def public_members(kind: type, parent: type) -> set[str]:
    """What a class declares beyond its parent: fields, properties and methods."""
    names = {*kind.__annotations__, *vars(kind)} - {*dir(parent), "model_config"}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(
    ("page", "kind", "parent"),
    [("add_a_family.md", Family, Protocol), ("add_a_method.md", Method, BaseModel)],
)
def test_the_page_on_adding_one_names_every_member(page: str, kind: type, parent: type):
    text = (DOCS / page).read_text(encoding="utf-8")
    named = {*re.findall(r"`(\w+)(?:\([^`]*\))?`", text), *re.findall(r"def (\w+)\(", text)}
    members = public_members(kind, parent)
    assert members <= named, members - named
    declared = set(re.findall(r"^def (\w+)\(", text, re.M)) - {"__init__"}
    assert declared <= members, declared - members


# Commands and recipe keys


def command_lines(path: Path) -> Iterator[str]:
    """Lines of code blocks that start with dopsd, continuation lines joined, comments dropped."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    if path.suffix == ".yaml":
        text = "\n".join(
            line.removeprefix("#") for line in text.splitlines() if line.startswith("#")
        )
    yield from re.findall(r"^(?: {3,}|\$ )(dopsd .+)$", text, re.M)
    for block in re.findall(r"^```(?:bash|sh|text)?\n(.*?)^```", text, re.M | re.S):
        yield from re.findall(r"^(dopsd .+)$", block, re.M)


COMMANDS = [
    (path, line)
    for path in [*TEXTS, *RECIPES]
    if path.parent != REFERENCE
    for line in dict.fromkeys(command_lines(path))
]


@pytest.mark.parametrize(
    ("path", "line"), COMMANDS, ids=[f"{name_of(path)}: {line}" for path, line in COMMANDS]
)
def test_a_command_line_of_a_page_parses(path: Path, line: str):
    command, words = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
    while isinstance(command, TyperGroup):
        assert words and words[0] in command.commands, f"{words[:1]} is no command"
        command, words = command.commands[words[0]], words[1:]
    command.make_context("dopsd", words)  # raises for an unknown option or a missing argument


@pytest.mark.parametrize("path", [path for path in TEXTS if path.parent != REFERENCE], ids=name_of)
def test_a_command_named_in_a_sentence_exists_with_its_options(path: Path):
    names = dict(generator().commands())
    for span in re.findall(r"`dopsd ([^`\n]+)`", path.read_text(encoding="utf-8")):
        words = span.split()
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in names), None)
        if name is None and words[0] in ("COMMAND", "--help", "--version"):
            continue
        assert name, f"dopsd {span}: no such command"
        options = {option for parameter in names[name].params for option in parameter.opts}
        unknown = {word for word in words if word.startswith("--")} - options - {"--help"}
        assert not unknown, f"dopsd {span}: {unknown}"


def test_stages_of_the_pocket_model_that_pages_name_exist():
    stages = typer.main.get_command(pocket_app)
    assert isinstance(stages, TyperGroup)
    for path in [*TEXTS, *RECIPES]:
        named = re.findall(r"python -m dopsd\.pocket ([a-z-]+)", path.read_text(encoding="utf-8"))
        assert set(named) <= stages.commands.keys(), path


def test_scripts_and_make_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M)) <= targets, path
        for script in re.findall(r"python ((?:benchmarks|examples|docs)/\S+?\.py)", text):
            assert (ROOT / script).is_file(), f"{path}: {script}"


@pytest.mark.parametrize("page", ["recipe.md", "cli.md", "python.md"])
def test_a_reference_page_is_what_the_code_says(page: str):
    assert (REFERENCE / page).read_text(encoding="utf-8") == generator().pages()[page], (
        "run `make reference`"
    )


def schema_keys() -> set[str]:
    """Keys of the recipe from its JSON schema, each with the name of its section before it."""
    schema = Recipe.model_json_schema()

    def sections(node: dict) -> Iterator[dict]:
        if "$ref" in node:
            yield schema["$defs"][node["$ref"].rpartition("/")[2]]
        for part in node.get("oneOf", node.get("allOf", [])):
            yield from sections(part)

    keys = set()
    for name, node in schema["properties"].items():
        inner = {key for section in sections(node) for key in section.get("properties", {})}
        keys |= {f"{name}.{key}" for key in inner} or {name}
    return keys


def test_the_reference_names_every_recipe_key_and_no_other():
    page = (REFERENCE / "recipe.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w.]+)` \|", page, re.M)) == schema_keys()


@pytest.mark.parametrize(
    "path", [path for path in [*TEXTS, *RECIPES] if path.parent != REFERENCE], ids=name_of
)
def test_every_recipe_key_that_a_page_names_is_in_the_schema(path: Path):
    keys = schema_keys()
    sections = {key.partition(".")[0] for key in keys if "." in key}
    pattern = rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_]+)(?![\w/(]|\.`)"
    files = re.compile(r"\.(?:py|yaml|json|jsonl|safetensors|txt|csv|md|html)$")
    named = {
        key
        for key in re.findall(pattern, path.read_text(encoding="utf-8"))
        if not files.search(key)
    }
    assert named <= keys, named - keys
