"""The house keeps its shape: imports point downward, libraries stay in their rooms, files and functions stay small.

Everything here reads the source with `ast` and runs none of it, except two tests of what `import dopsd.cli` drags in.
When a rule is in the way, see CONTRIBUTING.md.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import resolve_name
from pathlib import Path

import pytest

import dopsd

SOURCE = Path(dopsd.__file__).parent

# Rooms (top-level names under dopsd, and every __main__), low to high. A room imports from floors below and from
# itself, never from a neighbour on its floor. So training may use families.base and methods.base: they are lower.
FLOORS = (
    ("files", "batch", "flow", "stopping", "statistics"),
    ("families", "rollout"),
    ("methods", "paint"),
    ("training", "data", "evaluation", "pocket", "settings"),
    ("recipe", "export", "model_folder", "preview", "doctor", "pickled"),
    ("session", "run_folder", "starter", "deployed", "trackers", "forecast", "card", "inspection", "budget"),
    ("ward", "checking", "generated", "protocol"),
    ("run", "preflight", "contest", "dedistill"),
    ("standings",),
    ("compare", "console"),
    ("door",),
    ("commands",),
    ("cli", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Lower floors that a room must not know all the same.
STRANGERS = {"methods": {"families", "files"}}

# Who may import a heavy library; patterns of paths under src/dopsd.
MODELS = ("families/*", "pocket/*", "evaluation/measures/*")
HOMES = {
    "diffusers": MODELS,
    "transformers": MODELS,
    "tokenizers": MODELS,
    "peft": ("training/adapters.py",),
    "bitsandbytes": ("training/quantize.py",),
    "accelerate": ("training/loop.py", "session.py", "deployed.py", "run.py", "trackers.py", "checking.py"),
}
VERSION_STRINGS = {("run.py", "diffusers.__version__")}

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
    def room(self) -> str:
        """Empty for dopsd/__init__.py, the face of the package, which lives on no floor."""
        parts = self.module.split(".")
        return "__main__" if parts[-1] == "__main__" else parts[1] if len(parts) > 1 else ""

    def at(self, line: int) -> str:
        return f"src/dopsd/{self.path}:{line}"


@dataclass(frozen=True)
class Import:
    """One imported name: `import a.b` is a.b, `from a import b` is a.b as well."""

    line: int
    name: str


def _read(path: Path) -> File:
    module = ".".join(["dopsd", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
    text = path.read_text(encoding="utf-8")
    return File(path.relative_to(SOURCE).as_posix(), module, text, ast.parse(text))


FILES = [_read(path) for path in sorted(SOURCE.rglob("*.py"))]
MODULES = {file.module for file in FILES}


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


def room_of(name: str) -> str:
    """The room an import leads to; "" for a name that is dopsd's own."""
    parts = name.split(".")
    if name in MODULES and parts[-1] == "__main__":
        return "__main__"
    return parts[1] if len(parts) > 1 and f"dopsd.{parts[1]}" in MODULES else ""


def house_imports() -> Iterator[tuple[File, Import, str]]:
    """(file, import, room it leads to) for each import of one room by another; the face is left out."""
    for file in FILES:
        for found in imports_of(file):
            room = room_of(found.name)
            if file.room and room and room != file.room and found.name.split(".")[0] == "dopsd":
                yield file, found, room


def refuse(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_there_is_a_house_to_look_at():
    assert len(FILES) > 20
    assert sum(1 for _ in house_imports()) > 20


def test_every_room_has_a_floor():
    refuse(
        [
            f"{file.at(1)}: the room {file.room!r} has no floor; give it one in tests/test_house.py"
            for file in FILES
            if file.room and file.room not in FLOOR_OF
        ]
    )


def test_imports_point_downward():
    faults = []
    for file, found, room in house_imports():
        mine, its = FLOOR_OF.get(file.room), FLOOR_OF.get(room)
        if mine is not None and its is not None and its >= mine and file.room != "__main__":
            where = "on the same floor" if its == mine else f"above (floor {its}, this is floor {mine})"
            faults.append(f"{file.at(found.line)}: {file.room} imports {found.name}, which is {where}")
    refuse(faults)


def test_methods_know_no_family_and_no_disk():
    refuse(
        [
            f"{file.at(found.line)}: {file.room} must not know {room}, but imports {found.name}"
            for file, found, room in house_imports()
            if room in STRANGERS.get(file.room, ())
        ]
    )


def test_only_the_front_doors_import_run():
    refuse(
        [
            f"{file.at(found.line)}: only cli, commands and compare import run"
            for file, found, room in house_imports()
            if room == "run" and file.room not in ("cli", "commands", "compare")
        ]
    )


def test_rooms_import_from_each_others_homes_and_not_from_the_face():
    faults = []
    for file in FILES:
        for found in imports_of(file):
            of_the_face = found.name.rpartition(".")[0] == "dopsd" and found.name not in MODULES
            if of_the_face and found.name != "dopsd.__version__":
                faults.append(f"{file.at(found.line)}: {found.name} has a home below dopsd; import it from there")
    refuse(faults)


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_stay_in_their_rooms(library: str):
    faults = []
    for file in FILES:
        at_home = any(fnmatch(file.path, pattern) for pattern in HOMES[library])
        for found in imports_of(file):
            if found.name.split(".")[0] == library and not at_home and (file.path, found.name) not in VERSION_STRINGS:
                faults.append(f"{file.at(found.line)}: {library} belongs in {', '.join(HOMES[library])}")
    refuse(faults)


def test_every_file_opens_with_what_it_is_for():
    refuse([f"{file.at(1)}: no docstring" for file in FILES if not ast.get_docstring(file.tree)])


def test_files_are_short():
    lengths = [(file, len(file.text.splitlines())) for file in FILES]
    refuse([f"{f.at(n)}: {n} lines, the limit is {MAX_FILE_LINES}" for f, n in lengths if n > MAX_FILE_LINES])


def test_functions_are_short():
    faults = []
    for file in FILES:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    faults.append(f"{file.at(node.lineno)}: {node.name} has {lines} lines, not {MAX_FUNCTION_LINES}")
    refuse(faults)


def test_every_function_has_a_room_of_its_own():
    homeless = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    refuse([f"{file.at(1)}: name it for what it does" for file in FILES if Path(file.path).name in homeless])


@pytest.mark.parametrize(
    "code",
    ["import dopsd.cli", "from dopsd.cli import app; app(['--help'], standalone_mode=False)"],
    ids=["import", "help"],
)
def test_the_front_door_opens_without_torch(code: str):
    script = f"import sys\n{code}\nprint('LOADED', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["LOADED"], "`dopsd --help` must not wait for these libraries"


def test_the_public_words_are_what_is_imported():
    """In a process of its own: a submodule of a word's name, once imported, would hide the word."""
    words = ", ".join(dopsd.__all__)
    script = f"from dopsd import {words}\nfor word in ({words}): assert callable(word), word"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"`from dopsd import {words}` gives something else:\n{done.stderr}"


def test_the_readme_names_every_source_file_and_page():
    root = SOURCE.parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8")
    paths = [*SOURCE.rglob("*.py"), *root.glob("docs/**/*.md"), *root.glob("*/*.py")]
    names = {
        path.name for path in paths if path.name not in ("__init__.py", "conftest.py") and path.parent.name != "tests"
    }
    refuse([f"README.md: {name} is not in the tree" for name in sorted(names) if name not in readme])
