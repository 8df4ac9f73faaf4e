"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere, nothing when quiet. And tables."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress", "event_line", "print_table", "spell", "spell_bytes"]


class Progress:
    """Takes the events of fit."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._last_loss = ""

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        if self._quiet:
            return
        if self._bar is None:
            line = event_line(event)
            if line:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
            return
        kind = event["event"]
        if kind == "start":
            self._task = self._bar.add_task("steps", total=event["steps"], completed=event["step"], loss="")
        elif kind == "step":
            self._bar.update(self._task, completed=event[kind], loss=f"loss {event['loss']:.4f}")
        elif kind in ("evaluate", "notice"):
            self._bar.console.print(event_line(event), highlight=False, markup=False)


def event_line(event: Mapping[str, Any]) -> str:
    """One event as one line; checkpoints go without saying."""
    kind = event["event"]
    if kind == "notice":
        return f"note: {event['text']}"
    if kind == "start":
        rows = ", ".join(f"{name} {count}" for name, count in event["rows"].items())
        return f"{event['parameters']:,} parameters; rows: {rows}"
    if kind == "checkpoint":
        return ""
    if kind == "stop":
        return f"stop: {event['reason']}"
    at = f"round {event['round']}" if "round" in event else f"step {event['step']}"
    figures = {name: value for name, value in event.items() if isinstance(value, float) and name != "lr"}
    mark = " (best)" if event.get("best") is True else ""
    return f"{at:>12}  {event.get('split', ''):<10}  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()) + mark


def spell(value: Any) -> str:
    """A value for a table."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {spell(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(spell, value))
    return str(value)


def spell_bytes(count: float) -> str:
    """A number of bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns aligned by hand: a table that goes through a pipe must not be cut to a terminal's width."""
    cells = [[spell(cell) for cell in row] for row in rows]
    widths = [max(len(line[index]) for line in [list(header), *cells]) for index in range(len(header))]
    numeric = [all(isinstance(row[index], int | float) or row[index] is None for row in rows) for index in range(len(header))]

    def render(line: Sequence[str]) -> str:
        parts = [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(line, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    if any(header):
        sys.stdout.write(render(header) + "\n" + "  ".join("-" * width for width in widths) + "\n")
    for line in cells:
        sys.stdout.write(render(line) + "\n")
