"""What commands share: their options, the source that these name, and how a result is printed."""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyfit.errors import InputError

if TYPE_CHECKING:
    from anyfit.data import Source

__all__ = [
    "BatchSize",
    "DataPath",
    "Device",
    "Dtype",
    "Epochs",
    "Group",
    "Ignore",
    "Json",
    "Quiet",
    "Resume",
    "RunFolder",
    "RunOption",
    "Seed",
    "Sets",
    "SourceFields",
    "Split",
    "Steps",
    "Target",
    "TaskName",
    "Test",
    "Types",
    "Validation",
    "pairs",
    "print_result",
    "source_of",
]

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="A ready task (see `anyfit tasks`), file.py:Class or module:Class.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
DataPath = Annotated[
    str,
    typer.Option(
        "--data",
        help="A file, pattern, folder or zip, a URL of one or of a database, or 'digits' (comes with anyfit).",
    ),
]
Target = Annotated[str | None, typer.Option("--target", help="The column to learn; several: a,b (default: 'target' where there is one).")]
Test = Annotated[str | None, typer.Option("--test", help="A file to test on at the end, or a fraction of the rows.")]
Validation = Annotated[str | None, typer.Option("--validation", help="A file to validate on, or a fraction of the rows.")]
Group = Annotated[str | None, typer.Option("--group", help="Keep rows with one value of this column in one split.")]
Split = Annotated[str | None, typer.Option("--split", help="A column that says train, validation or test.")]
Ignore = Annotated[list[str] | None, typer.Option("--ignore", help="A column to leave out. Can be repeated.")]
Types = Annotated[list[str] | None, typer.Option("--type", metavar="COLUMN=TYPE", help="Force a column's type. Can be repeated.")]
SourceFields = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        metavar="FIELD=VALUE",
        help="More on the data: weight, missing, delimiter, encoding, table, query, size. Can be repeated.",
    ),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of the task or of the plan. Can be repeated.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the data (default: the task's).")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps, in place of epochs.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Rows of a batch (default: the task's).")]
Seed = Annotated[int | None, typer.Option("--seed", help="One seed gives one result (default: 0).")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda[:i] or mps (default: auto).")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, float64 or bfloat16 (default: float32).")]
RunOption = Annotated[Path | None, typer.Option("--run", help="Folder for the run (default: runs/<task>-<n>).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def pairs(option: str, items: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE items of an option that can be repeated."""
    result = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise InputError(f"{option} (={item!r}) must be NAME=VALUE")
        result[name] = value
    return result


def source_of(
    data: str,
    target: str | None,
    *,
    group: str | None = None,
    split: str | None = None,
    ignore: list[str] | None = None,
    types: list[str] | None = None,
    fields: list[str] | None = None,
) -> Source:
    """The source that the options describe."""
    from anyfit.data import Source
    from anyfit.values import coerce

    allowed = ("weight", "missing", "delimiter", "encoding", "table", "query", "size")
    more = pairs("--source", fields)
    unknown = sorted(set(more) - set(allowed))
    if unknown:
        raise InputError(f"--source (={unknown[0]!r}) is no field of the data; there are: {', '.join(allowed)}")
    hints = typing.get_type_hints(Source)
    hints["missing"] = tuple[str, ...]
    checked = {name: coerce(name, value, hints[name]) for name, value in more.items()}
    if checked.get("delimiter") in ("\\t", "tab"):
        checked["delimiter"] = "\t"
    several = None if target is None else tuple(target.split(","))
    wanted = several[0] if several is not None and len(several) == 1 else several
    return Source(data, wanted, group, split, tuple(ignore or ()), pairs("--type", types), **checked)


def print_result(value: dict[str, Any], as_json: bool, show: Callable[[], object]) -> None:
    """For people, or as one JSON object on the last line of stdout."""
    if as_json:
        sys.stdout.write(json.dumps(value, allow_nan=False, default=str) + "\n")
    else:
        show()
