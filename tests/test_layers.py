"""The layers of ARCHITECTURE.md, kept true by a walk over every import.

After a change to ROWS, draw the picture again: python tests/test_layers.py --write
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "anyfit"
PAGE = ROOT / "ARCHITECTURE.md"
START, END = "<!-- layers -->", "<!-- /layers -->"
REDRAW = "python tests/test_layers.py --write"

# From top to bottom: (left column, right column). A room is a module or a folder; it imports the rows beneath it and, in
# its own row, itself. The left column may use the right one, never the other way. The right column is free of torch and numpy.
# A room may be listed before it exists.
ROWS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("__main__",), ()),
    (("cli", "__init__"), ()),
    (("search",), ()),
    (("federate", "shrink", "pod", "estimator", "check", "adapt"), ()),
    (("fit", "trained"), ()),
    (("fitting",), ()),
    (("cluster", "worker"), ()),
    (("prepare", "record"), ()),
    (("load",), ()),
    (("strategy",), ()),
    (("tasks", "engine"), ("hub",)),
    (("task", "guard"), ()),
    (("private", "dropout", "program"), ()),
    (("data", "state", "metrics", "schedule", "machine", "embedding"), ("pages",)),
    (("update", "codec"), ("report", "bundle")),
    (("tree",), ("run", "wire", "policy")),
    ((), ("schema", "secure", "privacy")),
    ((), ("values",)),
    ((), ("errors",)),
]
HEAVY = ("torch", "numpy")


class Place(NamedTuple):
    row: int  # counted from the top
    right: bool


PLACES = {
    room: Place(row, right)
    for row, columns in enumerate(ROWS)
    for right, rooms in zip((False, True), columns, strict=True)
    for room in rooms
}


# ------------------------------------------------------------------ the walk


class Imports(ast.NodeVisitor):
    """Collects (line, full dotted name) of each import that runs, inside functions too; not those under TYPE_CHECKING."""

    def __init__(self, package: tuple[str, ...]) -> None:
        self.package = package  # what a relative import starts from
        self.found: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        if "TYPE_CHECKING" in (getattr(test, "id", None), getattr(test, "attr", None)):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = [*self._base(node.level), *([node.module] if node.module else [])]
        self.found += [(node.lineno, ".".join([*parts, alias.name])) for alias in node.names]

    def visit_Call(self, node: ast.Call) -> None:
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            name = str(node.args[0].value)
            level = len(name) - len(name.lstrip("."))
            self.found.append((node.lineno, ".".join([*self._base(level), name.lstrip(".")])))
        self.generic_visit(node)

    def _base(self, level: int) -> tuple[str, ...]:
        return self.package[: len(self.package) - level + 1] if level else ()


def room_of(path: str) -> str:
    """The room of a file such as "hub/app.py" or "fit.py"."""
    return path.removesuffix(".py").split("/", maxsplit=1)[0]


def violations(sources: Mapping[str, str]) -> list[str]:
    """What breaks the layers in `sources`, which maps paths inside the package to code."""
    rooms = set(PLACES) | {room_of(path) for path in sources}
    return [problem for path, code in sorted(sources.items()) for problem in _in_file(path, code, rooms)]


def _in_file(path: str, code: str, rooms: set[str]) -> Iterator[str]:
    room = room_of(path)
    if room not in PLACES:
        yield f"{path}: {room} stands in no row; give it one in ROWS of tests/test_layers.py, then {REDRAW}"
        return
    imports = Imports(("anyfit", *path.split("/")[:-1]))
    imports.visit(ast.parse(code, path))
    for line, name in imports.found:
        parts = name.split(".")
        if parts[0] != "anyfit":
            continue
        used = parts[1] if len(parts) > 1 and parts[1] in rooms else "__init__"  # a public name comes from there
        if used == room or used not in PLACES:  # a room without a row is reported once, by its own file
            continue
        here, there = PLACES[room], PLACES[used]
        if here.right and not there.right:
            yield f"{path}:{line}: {room} imports {used}: the right column never uses the left one"
        elif there.row < here.row:
            yield f"{path}:{line}: {room} imports {used}, which stands above it"
        elif there.row == here.row:
            yield f"{path}:{line}: {room} imports {used}, which stands beside it"


# ------------------------------------------------------------------ the picture


def picture() -> str:
    """The rows as text, the lowest as the floor on which all stand."""
    left = [" " + "   ".join(rooms) for rooms, _ in ROWS[:-1]]
    right = ["   ".join(rooms) for _, rooms in ROWS[:-1]]
    width = max(map(len, left)) + 2
    lines = [f"{one:<{width}} │  {other}".rstrip() for one, other in zip(left, right, strict=True)]
    floor = "   ".join(room for rooms in ROWS[-1] for room in rooms)
    return "\n".join([*lines, f" {floor} ".center(max(map(len, lines)) + 1, "─")])


def block() -> str:
    """The picture as it stands in the page, markers included."""
    return f"{START}\n```text\n{picture()}\n```\n{END}"


def redraw() -> None:
    """Put the picture between the markers of the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{PAGE.name} has no lines {START} and {END}; put both where the picture belongs")
    PAGE.write_text(before + block() + after, encoding="utf-8")


# ------------------------------------------------------------------ the tests


def sources() -> dict[str, str]:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


def test_every_import_keeps_the_layers() -> None:
    found = sources()
    assert "errors.py" in found
    assert "\n".join(violations(found)) == ""


def test_a_room_stands_in_one_row_only() -> None:
    assert len(PLACES) == sum(len(rooms) for columns in ROWS for rooms in columns)


BROKEN = {
    "above": ({"tree.py": "from anyfit.engine import train"}, "tree.py:1: tree imports engine, which stands above it"),
    "beside": ({"state.py": "import anyfit.metrics"}, "state.py:1: state imports metrics, which stands beside it"),
    "above, by the package": ({"task.py": "from anyfit import fit"}, "task.py:1: task imports fit, which stands above it"),
    "a public name": ({"engine.py": "from anyfit import Task"}, "engine.py:1: engine imports __init__, which stands above it"),
    "the bare package": ({"engine.py": "import anyfit"}, "engine.py:1: engine imports __init__, which stands above it"),
    "inside a function": (
        {"data/csv.py": "def rows():\n    if True:\n        from anyfit.fit import fit"},
        "data/csv.py:3: data imports fit, which stands above it",
    ),
    "relative": ({"data/csv.py": "from ..fit import fit"}, "data/csv.py:1: data imports fit, which stands above it"),
    "relative, of the package": ({"data/csv.py": "from .. import fit"}, "data/csv.py:1: data imports fit, which stands above it"),
    "by name": (
        {"tree.py": "import importlib\nimportlib.import_module('anyfit.task')"},
        "tree.py:2: tree imports task, which stands above it",
    ),
    "right uses left beneath": (
        {"hub/app.py": "from anyfit.update import Update"},
        "hub/app.py:1: hub imports update: the right column never uses the left one",
    ),
    "left uses right beside": ({"tree.py": "import anyfit.run"}, "tree.py:1: tree imports run, which stands beside it"),
    "under `else` of TYPE_CHECKING": (
        {"tree.py": "if TYPE_CHECKING:\n    pass\nelse:\n    import anyfit.fit"},
        "tree.py:4: tree imports fit, which stands above it",
    ),
    "no row": (
        {"utils/__init__.py": ""},
        f"utils/__init__.py: utils stands in no row; give it one in ROWS of tests/test_layers.py, then {REDRAW}",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_walk_finds_what_breaks_the_layers(case: str) -> None:
    code, message = BROKEN[case]
    assert violations(code) == [message]


@pytest.mark.parametrize(
    "code",
    [
        {"fit.py": "import torch\nfrom anyfit.engine import train\nfrom anyfit.errors import InputError"},
        {"fit.py": "import anyfit.run, anyfit.report"},  # left uses right beneath
        {"data/csv.py": "from anyfit.data import split\nfrom . import split\nfrom .split import by_hash"},  # its own folder
        {"tree.py": "import typing\nif typing.TYPE_CHECKING:\n    from anyfit.fit import fit"},
        {"__init__.py": "import importlib\nimportlib.import_module(f'anyfit.{name}')"},  # the lazy table
    ],
)
def test_the_walk_lets_pass_what_keeps_the_layers(code: dict[str, str]) -> None:
    assert violations(code) == []


def right_rooms() -> dict[str, list[str]]:
    """The modules of each room of the right column that exists."""
    rooms: dict[str, list[str]] = {}
    for path in sorted(sources()):
        parts = path.removesuffix(".py").split("/")
        if parts[0] in PLACES and PLACES[parts[0]].right and parts[-1] != "__main__":
            rooms.setdefault(parts[0], []).append(".".join(["anyfit", *parts]).removesuffix(".__init__"))
    return rooms


def heavy_after(modules: list[str]) -> list[str]:
    """Which of HEAVY a fresh process has loaded once it imported `modules`."""
    code = (
        f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\nprint(*[n for n in {HEAVY!r} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("room", "modules"), right_rooms().items())
def test_the_right_column_loads_neither_torch_nor_numpy(room: str, modules: list[str]) -> None:
    assert heavy_after(modules) == [], f"{room} belongs to the torch-free column"


def test_the_package_itself_loads_neither_torch_nor_numpy() -> None:
    assert heavy_after(["anyfit"]) == []


def test_a_module_that_loads_numpy_would_be_noticed() -> None:
    assert heavy_after(["numpy"]) == ["numpy"]


def test_the_architecture_page_shows_these_layers() -> None:
    assert block() in PAGE.read_text(encoding="utf-8"), f"the picture in {PAGE.name} is not the one of ROWS; run: {REDRAW}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        redraw()
    else:
        print(picture())
