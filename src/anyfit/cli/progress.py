"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere, nothing when quiet. And tables."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from anyfit.cli.ranks import ranks_line, ranks_table

__all__ = ["Progress", "event_line", "print_table", "spell", "spell_bytes"]


class Progress:
    """Takes the events of fit. `heard`: whether there were any, which is so in one process of all that share a fit."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._live: Any = None
        self._bar: Any = None
        self._task: Any = None
        self._ranks: Mapping[str, Any] | None = None
        self.heard = False

    @property
    def ranks(self) -> int:
        """How many computed the last step that was told of."""
        return 1 if self._ranks is None else len(self._ranks["ranks"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        self.heard |= kind in ("start", "step", "evaluate", "stop")  # a notice may be this machine's own
        if kind == "ranks":
            self._ranks = event
        if self._quiet:
            return
        if kind == "start" and sys.stderr.isatty():
            self._draw(event)
        if self._live is None:
            line = event_line(event)
            if line:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
        elif kind == "step":
            self._bar.update(self._task, completed=event[kind], loss=f"loss {event['loss']:.4f}")
        elif kind in ("evaluate", "notice"):
            self._live.console.print(event_line(event), highlight=False, markup=False)

    def _draw(self, event: Mapping[str, Any]) -> None:
        """Begin to draw, now that it is known that this process is told."""
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self._bar = Bar(*columns, auto_refresh=False)
        self._task = self._bar.add_task("steps", total=event["steps"], completed=event["step"], loss="")
        self._live = Live(console=Console(stderr=True), get_renderable=self._drawn, refresh_per_second=10)
        self._live.start()

    def _drawn(self) -> Any:
        """The bar, and the ranks beneath it where there are any."""
        from rich.console import Group

        ranks = self._ranks
        return self._bar if ranks is None else Group(self._bar, ranks_table(ranks))


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
    if kind == "ranks":
        return ranks_line(event)
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
