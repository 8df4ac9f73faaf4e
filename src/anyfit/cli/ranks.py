"""What a person sees of ranks that share each step: a table on a terminal, one line elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ranks_line", "ranks_table"]

MOST_IN_A_LINE = 8  # ranks that are told one by one
MOST_IN_A_TABLE = 16  # that have a line each; of more, the slowest and those that wait longest
EXTREMES = 5

Event = Mapping[str, Any]


def ranks_line(event: Event) -> str:
    """The ranks at one line of the log: shares of the step, speeds, waiting, and how much of what can be gained is."""
    ranks = event["ranks"]
    at, many, shares = f"step {event['step']}", f"{len(ranks):,} ranks" if len(ranks) > 1 else "1 rank", [rank["share"] for rank in ranks]
    parts = [f"{at:>12}", f"{many:<10}", f"shares {_few([f'{share:,}' for share in shares], shares)}"]
    speeds = [rank["speed"] for rank in ranks if rank["speed"] is not None]
    if speeds:
        parts.append(f"speeds {_few([_speed(rank) for rank in ranks], speeds)}/s")
    if len(ranks) > 1:
        waits = [1e3 * rank["waited"] for rank in ranks]
        parts.append(f"waiting {_few([f'{wait:.0f}' for wait in waits], waits)} ms")
        parts += [text for text in [_reached(event)] if text]
    return "  ".join(parts)


def _few(each: Sequence[str], values: Sequence[float]) -> str:
    """One by one, or of many the lowest and the highest."""
    return ":".join(each) if len(each) <= MOST_IN_A_LINE else f"{min(values):,.0f} to {max(values):,.0f}"


def _speed(rank: Event) -> str:
    return "-" if rank["speed"] is None else f"{rank['speed']:,.0f}"


def _reached(event: Event) -> str:
    """How much faster than by equal shares, beside what these speeds allow."""
    if not event["limit"] or not event["current"]:
        return ""
    gain = event["equal"] / event["current"]
    return f"{gain:.2f}x equal shares, {gain / event['limit']:.0%} of the limit"


def ranks_table(event: Event) -> Any:
    """A line for each rank, and how near the limit all are."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    ranks = event["ranks"]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("rank", "host", "share", "", "speed", "waiting"):
        table.add_column(name, justify="left" if name == "host" else "right", no_wrap=True)
    total = max(1, sum(rank["share"] for rank in ranks))
    for rank in shown(ranks):
        wait = f"{1e3 * rank['waited']:,.0f} ms"
        part = f"{rank['share'] / total:.0%}"
        table.add_row(str(rank["rank"]), Text(rank["host"]), f"{rank['share']:,}", part, f"{_speed(rank)}/s", wait)
    if len(ranks) > MOST_IN_A_TABLE:
        hosts = len({rank["host"] for rank in ranks})
        speed = sum(rank["speed"] or 0.0 for rank in ranks)
        table.add_row("all", f"{len(ranks):,} ranks of {hosts:,} hosts", f"{total:,}", "", f"{speed:,.0f}/s", "", style="bold")
    reached = _reached(event) if len(ranks) > 1 else ""
    return Group(table, Text(reached, style="dim")) if reached else table


def shown(ranks: Sequence[Event]) -> list[Event]:
    """The ranks that get a line: all of a few; of many the slowest, and those that wait longest."""
    if len(ranks) <= MOST_IN_A_TABLE:
        return list(ranks)
    measured = [rank for rank in ranks if rank["speed"] is not None]
    slowest = sorted(measured, key=lambda rank: rank["speed"])[:EXTREMES]
    idle = sorted((rank for rank in ranks if rank not in slowest), key=lambda rank: -rank["waited"])[:EXTREMES]
    return sorted([*slowest, *idle], key=lambda rank: rank["rank"])
