"""What a person sees of a federation while it runs: a live table of its sites on a terminal, one line for each round elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from anyfit.cli.progress import event_line, spell_bytes

__all__ = ["Rounds"]

MOST_SITES = 15  # that have a line each; of more, the slowest and the worst
EXTREMES = 5
MOST_MISSING = 5  # named in a line


@dataclass
class Seen:
    """What was heard of one site."""

    rows: int
    turns: int = 0
    loss: float | None = None
    seconds: float = 0.0  # of its last turn


class Rounds:
    """Takes the events of federate."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._live: Any = None
        self._sites: dict[str, Seen] = {}
        self._title = ""
        self._rounds = 0
        self.complete = False  # all rounds are run and saved

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # the table is made when the screen is drawn, not at each of many replies
            self._live = Live(console=Console(stderr=True), get_renderable=self._table, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        self.complete |= kind == "stop" and event["reason"] != "signal"
        if self._quiet:
            return
        self._take(kind, event)
        if kind in ("reply", "checkpoint") or (self._live is not None and kind in ("start", "round")):
            return
        line = _start_line(event) if kind == "start" else round_line(event) if kind == "round" else event_line(event)
        if self._live is not None:
            self._live.console.print(line, highlight=False, markup=False)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def _take(self, kind: str, event: Mapping[str, Any]) -> None:
        if kind == "start":
            self._sites = {name: Seen(rows) for name, rows in event["sites"].items()}
            self._rounds, self._title = event["rounds"], _start_line(event)
        elif kind == "reply":
            seen = self._sites.setdefault(event["site"], Seen(event["rows"]))
            seen.turns += 1
            seen.loss, seen.seconds = event.get("loss", seen.loss), event["seconds"]
        elif kind == "round":
            self._title = round_line(event, self._rounds)

    def _table(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("site", "rows", "turns", "last loss", "seconds"):
            table.add_column(name, justify="left" if name == "site" else "right")
        sites = dict(self._sites)  # replies go on while this is drawn
        for name in shown(sites):
            seen = sites[name]
            loss = "-" if seen.loss is None else f"{seen.loss:.4f}"
            table.add_row(name, f"{seen.rows:,}", str(seen.turns), loss, f"{seen.seconds:.2f}")
        if len(sites) > MOST_SITES:
            turns, rows = sum(seen.turns for seen in sites.values()), sum(seen.rows for seen in sites.values())
            heard = sum(seen.turns > 0 for seen in sites.values())
            table.add_row(f"all {len(sites):,} sites ({heard:,} heard of)", f"{rows:,}", f"{turns:,}", "", "", style="bold")
        return Group(Text(self._title), table)


def shown(sites: Mapping[str, Seen]) -> list[str]:
    """The sites that get a line: all of a few; of many the slowest, then those of the highest loss."""
    if len(sites) <= MOST_SITES:
        return list(sites)
    heard = [name for name in sites if sites[name].turns]
    slowest = sorted(heard, key=lambda name: -sites[name].seconds)[:EXTREMES]
    worst = sorted(heard, key=lambda name: -(sites[name].loss or 0.0))
    return [*slowest, *[name for name in worst if name not in slowest][:EXTREMES]]


def _start_line(event: Mapping[str, Any]) -> str:
    rows = event["sites"]
    few = ": " + ", ".join(f"{name} {count:,}" for name, count in rows.items()) if len(rows) <= 5 else ""
    sizes = few or f" ({min(rows.values()):,} to {max(rows.values()):,} each)"
    return f"{event['parameters']:,} parameters; {len(rows):,} sites, {sum(rows.values()):,} rows{sizes}"


def round_line(event: Mapping[str, Any], rounds: int | None = None) -> str:
    """One round: loss, who answered, who did not, bytes, epsilon."""
    missing, answered = event.get("missing", []), event.get("answered", len(event["sites"]))
    at = f"round {event['round']}"
    parts = [f"{at:>12}" if rounds is None else f"{at} of {rounds}"]
    parts += [f"loss {event['loss']:.4f}"] if "loss" in event else []
    # where sites are protected, who did not answer is told to nobody
    parts.append(f"{answered:,} sites" if "answered" in event else f"{answered:,} of {answered + len(missing):,} sites")
    parts.append(f"{spell_bytes(event['bytes_up'])} up, {spell_bytes(event['bytes_down'])} down")
    if "epsilon" in event:
        parts.append("epsilon infinite" if event["epsilon"] is None else f"epsilon {event['epsilon']:.3f}")
    if missing:
        more = f" and {len(missing) - MOST_MISSING} more" if len(missing) > MOST_MISSING else ""
        parts.append(f"missing: {', '.join(missing[:MOST_MISSING])}{more}")
    return "  ".join(parts)
