"""The layout of the package, held by tests: who may import whom, where libraries live, how long
files and functions may be.

The import table is read from docs/architecture.md and printed. The source is read with `ast` and
not run, except for two tests of what the command line imports. When a rule is in the way, see
CONTRIBUTING.md.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import dopsd
from dopsd.methods import METHODS
from dopsd.models import FAMILIES

SOURCE = Path(dopsd.__file__).parent
ARCHITECTURE = SOURCE.parents[1] / "docs" / "architecture.md"

# Who may import a heavy library; patterns of paths under src/dopsd.
MODELS = ("models/*", "evaluation/metrics/*", "pocket/*")
HOMES = {
    "diffusers": MODELS,
    "transformers": (*MODELS, "training/optimizers.py"),
    "tokenizers": MODELS,
    "peft": ("training/adapters.py",),
    "bitsandbytes": ("training/quantize.py",),
    "accelerate": ("training/distributed.py", "models/pipeline.py", "runs/outputs/trackers.py"),
}

MAX_FILE_LINES = 330
MAX_FUNCTION_LINES = 80
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class File:
    """A source file: its path under src/dopsd, its dotted module name, its text and tree."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """Its package or single file under dopsd; `__init__` for dopsd/__init__.py itself."""
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 else "__init__"

    def at(self, line: int) -> str:
        return f"src/dopsd/{self.path}:{line}"


@dataclass(frozen=True)
class Import:
    """One imported name: `import a.b` is a.b, `from a import b` is a.b as well."""

    line: int
    name: str


def _read(path: Path) -> File:
    module = ".".join(["dopsd", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(
        ".__init__"
    )
    text = path.read_text(encoding="utf-8")
    return File(path.relative_to(SOURCE).as_posix(), module, text, ast.parse(text))


FILES = [_read(path) for path in sorted(SOURCE.rglob("*.py"))]
MODULES = {file.module: file for file in FILES}


def imports_of(file: File) -> Iterator[Import]:
    """All imports of a file, those inside functions and under TYPE_CHECKING included."""
    package = file.module if file.path.endswith("__init__.py") else file.module.rpartition(".")[0]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield Import(node.lineno, f"{source}.{alias.name}")


def module_of(name: str) -> str | None:
    """The module of dopsd that an imported name comes from; None for other libraries."""
    if name.split(".")[0] != "dopsd":
        return None
    return name if name in MODULES else name.rpartition(".")[0]


def inner_imports() -> Iterator[tuple[File, Import, File]]:
    """(file, import, file it leads to) for each import of one file of dopsd by another."""
    for file in FILES:
        for imported in imports_of(file):
            if (target := MODULES.get(module_of(imported.name) or "")) and target is not file:
                yield file, imported, target


def import_table() -> dict[str, set[str]]:
    """The table under "Who may import whom": package -> packages that it may import."""
    text = (
        ARCHITECTURE.read_text(encoding="utf-8")
        .partition("## Who may import whom")[2]
        .partition("\n## ")[0]
    )
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if "|" in line
    ]
    columns, _, *rows = lines
    table: dict[str, set[str]] = {}
    for row in rows:
        allowed: set[str] = set()
        for column, mark in zip(columns[1:], row[1:], strict=True):
            allowed |= set(_names(column if mark == "x" else mark))
        table |= {name: allowed for name in _names(row[0])}
    return table


def _names(cell: str) -> list[str]:
    return re.findall(r"\w+", cell)


TABLE = import_table()


def refuse(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_the_import_table_is_printed_and_names_every_package(capsys: pytest.CaptureFixture[str]):
    with capsys.disabled():
        print("\n\nWho may import whom (docs/architecture.md):")
        for name, allowed in TABLE.items():
            print(f"  {name:<11} may import {', '.join(sorted(allowed)) or 'nothing'}")
    packages = {file.package for file in FILES} - {"__main__"}
    refuse(
        [f"{name} has no row in docs/architecture.md" for name in sorted(packages - TABLE.keys())]
    )


def test_every_import_is_allowed_by_the_table():
    faults = []
    for file, imported, target in inner_imports():
        if file.package == "__main__":
            continue
        if target.package != file.package and target.package not in TABLE[file.package]:
            faults.append(
                f"{file.at(imported.line)}: {file.package} must not import {imported.name}"
            )
    refuse(faults)


def test_the_table_keeps_methods_training_data_and_pocket_apart():
    """What the table is for: these hold whatever else changes in it."""
    models_and_files = {"models", "data", "files", "runs", "config"}
    assert not TABLE["methods"] & models_and_files, "methods know no model, file or device"
    assert not TABLE["training"] & {"models", "config", "runs"}, (
        "training knows no model family and no recipe"
    )
    assert "models" not in TABLE["data"], "data knows no model"
    sixth_layer = {"pocket", "studio", "cli"}
    below = {name for name in TABLE if name not in sixth_layer}
    refuse(
        [f"{name} is below layer 6 and knows pocket" for name in below if "pocket" in TABLE[name]]
    )


def test_methods_name_no_device():
    faults = []
    for file in FILES:
        for node in ast.walk(file.tree):
            if (
                file.package == "methods"
                and isinstance(node, ast.Attribute)
                and node.attr in ("cuda", "mps", "xpu")
            ):
                faults.append(
                    f"{file.at(node.lineno)}: methods work on whatever device their tensors are on"
                )
    refuse(faults)


def test_no_imports_form_a_cycle():
    graph: dict[str, set[str]] = {file.module: set() for file in FILES}
    for file, _, target in inner_imports():
        if not (target.path.endswith("__init__.py")):
            graph[file.module].add(target.module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_modules_are_imported_from_their_homes_and_not_from_the_public_face():
    faults = []
    for file in FILES:
        for imported in imports_of(file):
            of_the_face = (
                imported.name.rpartition(".")[0] == "dopsd" and imported.name not in MODULES
            )
            if of_the_face:
                where = file.at(imported.line)
                faults.append(f"{where}: import {imported.name} from where it is defined")
    refuse(faults)


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_stay_in_their_packages(library: str):
    faults = []
    for file in FILES:
        at_home = any(fnmatch(file.path, pattern) for pattern in HOMES[library])
        for imported in imports_of(file):
            if imported.name.split(".")[0] == library and not at_home:
                faults.append(
                    f"{file.at(imported.line)}: {library} belongs in {', '.join(HOMES[library])}"
                )
    refuse(faults)


# Where a method or a family may be named: its own file, and the registries.
NAMING_PLACES = ("methods/*", "models/__init__.py")


def test_no_code_branches_on_the_name_of_a_method_or_a_family():
    names = {*METHODS, *FAMILIES}
    faults = []
    for file in FILES:
        if any(fnmatch(file.path, pattern) for pattern in NAMING_PLACES):
            continue
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Compare):
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                if named := sorted(names & {c for c in constants if isinstance(c, str)}):
                    faults.append(f"{file.at(node.lineno)}: branch on a trait, not on {named[0]}")
    refuse(faults)


def test_tests_mirror_the_source():
    """tests/<package>/test_<topic>.py stands beside the package it tests, tests/benchmarks beside
    the scripts."""
    folders = {path.relative_to(SOURCE).parent.as_posix() for path in SOURCE.rglob("*.py")}
    folders.add("benchmarks")
    tests = Path(__file__).parent
    refuse(
        [
            f"tests/{path.relative_to(tests)}: src/dopsd has no such package"
            for path in sorted(tests.rglob("test_*.py"))
            if path.relative_to(tests).parent.as_posix() not in folders
        ]
    )


def test_every_file_opens_with_what_it_is_for():
    refuse([f"{file.at(1)}: no docstring" for file in FILES if not ast.get_docstring(file.tree)])


def test_files_are_short():
    lengths = [(file, len(file.text.splitlines())) for file in FILES]
    refuse(
        [
            f"{f.at(n)}: {n} lines, the limit is {MAX_FILE_LINES}"
            for f, n in lengths
            if n > MAX_FILE_LINES
        ]
    )


def test_functions_are_short():
    faults = []
    for file in FILES:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    where = file.at(node.lineno)
                    faults.append(
                        f"{where}: {node.name} has {lines} lines, over {MAX_FUNCTION_LINES}"
                    )
    refuse(faults)


def test_every_function_has_a_file_named_for_its_topic():
    homeless = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    refuse(
        [
            f"{file.at(1)}: name it for what it does"
            for file in FILES
            if Path(file.path).name in homeless
        ]
    )


@pytest.mark.parametrize(
    "code",
    [
        "import dopsd.cli.app",
        "from dopsd.cli.app import app; app(['--help'], standalone_mode=False)",
    ],
    ids=["import", "help"],
)
def test_the_command_line_starts_without_torch(code: str):
    script = (
        f"import sys\n{code}\nprint('LOADED', *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["LOADED"], (
        "`dopsd --help` must not wait for these libraries"
    )


def test_the_public_words_are_what_is_imported():
    """In a process of its own: a submodule of a word's name, once imported, would hide the word."""
    words = ", ".join(dopsd.__all__)
    script = f"from dopsd import {words}\nfor word in ({words}): assert callable(word), word"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"`from dopsd import {words}` gives something else:\n{done.stderr}"
