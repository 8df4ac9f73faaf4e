"""The pages are true: snippets are files that run, commands exist, each setting, error and public name has its line.

After a change to a command or a public name: python tests/test_docs.py --write
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import anyfit
from anyfit import errors
from anyfit.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = {path.read_text() for path in (ROOT / "examples").glob("*.py")}
COMMANDS = typer.main.get_command(app)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(group: Any = COMMANDS, prefix: str = "") -> dict[str, Any]:
    """Every command by its whole name."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        if command.hidden:  # what a launcher starts
            continue
        whole = f"{prefix}{name}"
        found |= commands(command, f"{whole} ") if hasattr(command, "commands") else {whole: command}
    return found


def commands_page() -> str:
    """docs/commands.md, from the commands' own help."""
    page = [
        "# Commands",
        "",
        "From the commands' own help (`anyfit COMMAND --help`). Progress goes to stderr, what was found to stdout.",
        "",
    ]
    for name, command in commands().items():
        page += [f"## anyfit {name}", "", command.help, "", "| option | |", "|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            names = (
                ", ".join(f"`{option}`" for option in parameter.opts) if parameter.param_type_name == "option" else f"`{parameter.metavar}`"
            )
            page.append(f"| {names} | {parameter.help}{' Required.' if parameter.required else ''} |")
        page.append("")
    return "\n".join(page)


def python_page() -> str:
    """docs/python.md, from the docstrings."""
    page = [
        "# Python",
        "",
        "What `import anyfit` offers; everything resolves on first use, so the import itself loads neither torch nor numpy.",
        "",
    ]
    for name in anyfit.__all__:
        value = getattr(anyfit, name)
        page += [f"## {name}", "", "```text", _signature(name, value), "```", "", inspect.cleandoc(value.__doc__ or ""), ""]
    return "\n".join(page)


def _signature(name: str, value: Any) -> str:
    if dataclasses.is_dataclass(value):
        fields = ", ".join(
            field.name + ("" if field.default is dataclasses.MISSING else f"={field.default!r}")
            for field in dataclasses.fields(value)
            if field.default_factory is dataclasses.MISSING
        )
        return f"{name}({fields})"
    if inspect.isclass(value):
        return name
    parameters = ", ".join(re.sub(r": .*?(?= = |$)", "", str(p)).replace(" = ", "=") for p in inspect.signature(value).parameters.values())
    return re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", f"{name}({parameters})")


GENERATED = {"commands.md": commands_page, "python.md": python_page}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == GENERATED[name](), "run: python tests/test_docs.py --write"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_are_examples_that_run(page: Path) -> None:
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            assert code in EXAMPLES, f"{page.name} has a snippet that is no file in examples/:\n{code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    lines = [line for language, code in BLOCK.findall(page.read_text()) if language == "sh" for line in code.splitlines()]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["anyfit"]:
            name = next(name for name in (" ".join(words[1:3]), words[1]) if name in commands())
            commands()[name].make_context(name, words[1 + len(name.split()) :])  # refuses unknown options and missing ones
        elif words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target
    for target in re.findall(r"literalinclude\} (\S+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_each_setting_has_its_line() -> None:
    text = (ROOT / "docs/training.md").read_text()
    missing = [field.name for field in dataclasses.fields(anyfit.Plan) if f"| `{field.name}` |" not in text]
    assert not missing


def test_each_error_has_its_line_and_its_place_in_the_tree() -> None:
    text = (ROOT / "docs/errors.md").read_text()
    assert [name for name in errors.__all__ if f"| `{name}` |" not in text] == []
    assert [name for name in errors.__all__ if name not in (errors.__doc__ or "")] == []


def test_each_method_of_a_task_has_its_line() -> None:
    text = (ROOT / "docs/tasks.md").read_text()
    methods = [name for name, member in vars(anyfit.Task).items() if inspect.isfunction(member) and not name.startswith("_")]
    assert [name for name in methods if f"`{name}" not in text and name != "replaced"] == []


def test_the_tree_in_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^  (\w+(?:\.py|/))", text.split("src/anyfit/\n")[1].split("tests/")[0], re.MULTILINE))
    found = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "src/anyfit").iterdir()
        if not path.name.startswith(("_", "py.typed"))
    }
    assert listed == found


if __name__ == "__main__" and "--write" in sys.argv:
    for name, make in GENERATED.items():
        (ROOT / "docs" / name).write_text(make())
