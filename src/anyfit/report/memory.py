"""Two pictures of a shrunk model: which value holds which bytes of its arena and when, and accuracy against bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyfit.report.plots import _COLOURS, _INK, _MUTED, _PAPER, _WIDTH, _drawable, _legend, _name_sites, _new_figure, _render, _style
from anyfit.report.records import mappings, number, whole
from anyfit.values import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

__all__ = ["draw_memory", "draw_tradeoff"]

_LETTER = 0.0108  # inches that a letter takes for each point of its size, on average and with room to spare
_DASHED = (0, (4, 3))


def draw_memory(record: Mapping[str, Any], path: Path) -> None:
    """A PNG of `Resources.memory()`: a box for each value, over the operations that it lives through and the bytes that it holds."""
    steps, values = mappings(record.get("steps")), mappings(record.get("values"))
    size, peak = whole(record.get("bytes")) or 0, whole(record.get("lower_bound")) or 0
    live = [0] * len(steps)
    for value in values:
        for position in range(value["first"], value["last"] + 1):
            live[position] += value["bytes"]
    width = max(4.6, min(_WIDTH, 1.3 + 0.85 * len(steps)))
    figure = _new_figure(width, 5.4)
    grid = figure.add_gridspec(2, 1, height_ratios=[4, 1])
    axes = figure.add_subplot(grid[0])
    _style(axes, f"memory over time, {record.get('type', '')}", None)
    axes.grid(False)
    _draw_boxes(axes, values, (width - 1.0) / max(len(steps), 1), 3.0 / max(size, 1))
    axes.axhline(size, color=_COLOURS[1], linewidth=1.2, linestyle=_DASHED)
    told = f"arena {_bytes(size)}" if peak == size else f"arena {_bytes(size)}, of which {_bytes(peak)} are live at once"
    axes.annotate(
        told, (1, size), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=7.5,
        color=_COLOURS[1],
    )  # fmt: skip
    weights = whole(record.get("weights_bytes"))
    if weights is not None:
        axes.set_title(f"weights {_bytes(weights)}, beside it", loc="right", fontsize=7.5, color=_MUTED)
    axes.set(xlim=(-0.5, max(len(steps), 1) - 0.5), ylim=(0, 1.09 * max(size, 1)))
    axes.tick_params(axis="x", labelbottom=False)
    beneath = figure.add_subplot(grid[1], sharex=axes)
    _style(beneath, "live bytes", None)
    beneath.grid(False, axis="x")
    beneath.bar(range(len(live)), live, width=0.84, color=[_COLOURS[1] if held == peak else _COLOURS[7] for held in live])
    beneath.set_ylim(0, 1.1 * max([*live, 1]))
    beneath.locator_params(axis="y", nbins=3)
    _name_sites(beneath, [_named(step) for step in steps] or ["no operation"])
    write_atomic(path, _render(figure).png)


def _draw_boxes(axes: Axes, values: Sequence[Mapping[str, Any]], column: float, row: float) -> None:
    """Values as boxes; `column` and `row` are inches of an operation and of a byte: a name stands where it has room."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    colours: dict[str, str] = {}
    for value in values:
        is_input = value["operation"] == "input"
        colour = _COLOURS[7] if is_input else colours.setdefault(value["layer"], _COLOURS[len(colours) % 7])
        left, across = value["first"] - 0.47, value["last"] - value["first"] + 0.94
        box = Rectangle(
            (left, value["offset"]), across, value["bytes"], facecolor=to_rgba(colour, 0.2), edgecolor=colour, linewidth=0.9,
            hatch="////" if value["operation"] == "scratch" else None,
        )  # fmt: skip
        axes.add_patch(box)
        _write(axes, value, left + across / 2, across * column, value["bytes"] * row)


def _write(axes: Axes, value: Mapping[str, Any], middle: float, wide: float, high: float) -> None:
    """The value's name and bytes in its box, or as much as it has room for; upright where that has more."""
    held, layer, operation = f"{value['bytes']:,}", str(value["layer"]), str(value["operation"])
    apart = [[layer, operation, held]] if _named(value) != layer else []
    choices = [[_named(value), held], *apart, [layer, held], [_named(value)], [layer], [operation]]
    for upright in (False, True):
        across, down = (high, wide) if upright else (wide, high)
        for lines in choices:
            for points in (7.5, 6.5):
                if max(map(len, lines)) * points * _LETTER <= across - 0.06 and len(lines) * points * 1.35 / 72 <= down:
                    at = value["offset"] + value["bytes"] / 2
                    axes.text(
                        middle, at, "\n".join(map(_drawable, lines)), ha="center", va="center", fontsize=points, color=_INK,
                        rotation=90 if upright else 0, parse_math=False, linespacing=1.25,
                    )  # fmt: skip
                    return


def _named(made: Mapping[str, Any]) -> str:
    layer, operation = str(made.get("layer")), str(made.get("operation"))
    return layer if operation in ("input", layer) else f"{layer} {operation}"


def _bytes(size: float) -> str:
    return f"{size:,.0f} bytes"


def draw_tradeoff(records: Sequence[Mapping[str, Any]], path: Path, *, metric: str = "accuracy") -> None:
    """A PNG of a metric against bytes: a point for each record (`stage`, the metric, `bytes`, `kind`: "measured" | "estimated"), in their order."""
    points = [
        (str(record.get("stage", "")), size, value, record.get("kind") == "estimated")
        for record in records
        if (size := number(record.get("bytes"))) and (value := number(record.get(metric))) is not None
    ]
    share = all(0 <= value <= 1 for _, _, value, _ in points)
    figure = _new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    _style(axes, f"{metric} against bytes", "bytes")
    axes.plot(
        [size for _, size, _, _ in points], [value for _, _, value, _ in points], color=_MUTED, linewidth=0.9, linestyle=_DASHED, zorder=1
    )
    for estimated, label in ((False, "measured"), (True, "estimated")):
        found = [(size, value) for _, size, value, which in points if which == estimated]
        if found:
            axes.plot(
                *zip(*found, strict=True), "o", markersize=7, markeredgewidth=1.6, markeredgecolor=_COLOURS[0],
                markerfacecolor=_PAPER if estimated else _COLOURS[0], label=label, zorder=2,
            )  # fmt: skip
    _scale(axes, [size for _, size, _, _ in points], [value for _, _, value, _ in points], share=share)
    _legend(axes)
    labels = [
        (f"{stage}\n{f'{100 * value:.2f} %' if share else f'{value:.4g}'}, {_bytes(size)}", (size, value))
        for stage, size, value, _ in points
    ]
    _place_labels(figure, axes, labels)
    write_atomic(path, _render(figure).png)


def _scale(axes: Axes, sizes: Sequence[float], values: Sequence[float], *, share: bool) -> None:
    """Bytes by factors; room around the points for their labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(sizes, default=1.0), max(sizes, default=10.0)
    room = max(0.35, 0.22 * math.log10(high / low))
    axes.set_xscale("log")
    axes.set_xlim(low / 10**room, high * 10**room)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    span = max(max(values, default=1.0) - min(values, default=0.0), 0.004 if share else 1e-9)
    axes.set_ylim(min(values, default=0.0) - 0.35 * span, max(values, default=1.0) + 0.35 * span)
    if share:
        places = 0 if span > 0.05 else 1 if span > 0.005 else 2
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.{places}f} %"))


def _place_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Each beside its point, on the side where it hides least of the line and of the labels before it."""
    figure.draw_without_rendering()  # the layout decides where points are
    corners = [tuple(axes.transData.transform(at)) for _, at in labels]
    dots = [
        (x + (x_next - x) * part / 40, y + (y_next - y) * part / 40)
        for (x, y), (x_next, y_next) in pairwise([*corners, corners[-1]] if corners else [])
        for part in range(40)
    ]
    placed: list[Bbox] = []
    sides = [(0, 9, "center", "bottom"), (0, -9, "center", "top"), (10, 0, "left", "center"), (-10, 0, "right", "center")]
    for text, at in labels:
        hidden: list[tuple[int, int]] = []
        for place, side in enumerate(sides):
            label = _beside(axes, text, at, side)
            box = label.get_window_extent()
            label.remove()
            outside = not (axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1)
            meets = sum(box.overlaps(other) for other in placed) + outside
            hidden.append((1000 * meets + sum(box.contains(x, y) for x, y in dots), place))
        label = _beside(axes, text, at, sides[min(hidden)[1]])
        placed.append(label.get_window_extent())


def _beside(axes: Axes, text: str, at: tuple[float, float], side: tuple[int, int, str, str]) -> Text:
    across, up, horizontal, vertical = side
    return axes.annotate(
        text, at, (across, up), textcoords="offset points", ha=horizontal, va=vertical, fontsize=7.5, color=_INK, linespacing=1.3,
        parse_math=False,
    )  # fmt: skip
