"""The pictures of a run: drawn once each, given as PNG for a file and as SVG for the page. The only room that needs matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING

from anyfit.report.markup import spell
from anyfit.report.records import Points, Records, low_is_worse, mapping, mappings, number, scalars

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MANY_COLUMNS", "MANY_PANELS", "MANY_SITES", "Picture", "draw"]

MANY_COLUMNS, MANY_PANELS, MANY_SITES = 5, 9, 100
_MANY_POINTS, _MANY_CLASSES, _MANY_LINES, _MANY_CURVES = 2_000, 30, 8, 30
_MANY_BARS, _NUMBERED_SITES, _SHADES = 40, 12, 16

_INK, _MUTED, _GRID, _PAPER = "#1b1f24", "#5c6672", "#e1e5ea", "#fefefe"
_COLOURS = ("#2866b1", "#c2571a", "#2f7d4f", "#7c4fa3", "#a8327a", "#117a8b", "#8a6d1b", "#6b7785")
# drawn once: the dark picture is the light one with these exchanged, so no other colour may be used in a drawing
_DARK = {
    _INK: "#e4e8ee", _MUTED: "#9ba6b4", _GRID: "#2c333d", _PAPER: "#10131a",
    **dict(zip(_COLOURS, ("#78aef0", "#f0955c", "#6cc492", "#bb97e0", "#e582bd", "#58c2d3", "#d6b75a", "#a4afbd"), strict=True)),
}  # fmt: skip
_WIDTH = 9.2  # inches of a picture that is as wide as the page


@dataclass(frozen=True, slots=True)
class Picture:
    """One drawing: PNG for its file, SVG for the page."""

    png: bytes
    light: bytes
    dark: bytes
    width: float  # share of the page's width


def draw(records: Records) -> dict[str, Picture]:
    """All pictures that the records allow, by name."""
    figures = {
        "loss": _draw_loss(records),
        "metrics": _draw_panels(_metric_panels(records), records),
        "sites": _draw_panels(dict(list(records.sites.items())[:MANY_PANELS]), records),
        "partition": _draw_partition(records),
        "privacy": _draw_privacy(records),
        "comparison": _draw_comparison(records),
        "ranks": _draw_ranks(records),
    }
    found = records.classes
    if found and len(found[1]) <= _MANY_CLASSES:
        figures["confusion"] = _draw_confusion(found[1], records.class_names(len(found[1])))
    return {name: _render(figure) for name, figure in figures.items() if figure is not None}


def _metric_panels(records: Records) -> dict[str, dict[str, Points]]:
    """A panel for each metric and each of the task's logs; the loss and epsilon have pictures of their own."""
    panels = {name: dict(lines) for name, lines in records.evaluations.items() if name != "loss"}
    for name, points in records.training.items():
        if name not in ("loss", "lr", "epsilon"):
            panels.setdefault(name, {})["training"] = points
    filled = [(name, lines) for name, lines in panels.items() if any(lines.values())]
    return dict(filled[:MANY_PANELS])


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # here, for a report is the only thing that needs it; never pyplot, which is global

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _style(axes: Axes, title: str, clock: str | None) -> None:
    """One look for all curves; `clock` None leaves the x axis to the panel beneath."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_facecolor("none")
    axes.set_title(_drawable(title), loc="left", fontsize=8.5, color=_INK, fontweight="bold", parse_math=False)
    axes.grid(True, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(_GRID)
    axes.tick_params(colors=_MUTED, labelsize=7.5, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, list(axes.get_yticks()))))
    axes.margins(x=0.02, y=0.08)
    if clock:
        axes.set_xlabel(clock, fontsize=7.5, color=_MUTED)
    else:
        axes.tick_params(labelbottom=False)


def _tick(value: float, ticks: list[float]) -> str:
    """A tick's label, with as many decimals as its neighbours need."""
    step = min((after - before for before, after in pairwise(ticks)), default=value) or 1.0
    places = next((places for places in range(7) if math.isclose(round(step, places), step, rel_tol=1e-6)), None)
    return f"{value:,.{places}f}" if places is not None and abs(value) < 1e7 else f"{value:.3g}"


def _legend(axes: Axes, *, outside: bool = False) -> None:
    """Above the frame at the right, where it never hides a curve, or `outside` above all panels; tells of the curves of all."""
    named: dict[str, Artist] = {}
    for panel in axes.figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    handles, labels = list(named.values()), list(named)
    if labels:
        columns = min(len(labels), 4)
        look = {"ncols": columns, "frameon": False, "fontsize": 7.5, "labelcolor": _INK, "handlelength": 1.4, "columnspacing": 1.2}
        if outside:
            legend = axes.figure.legend(handles, labels, loc="outside upper right", borderaxespad=0.2, **look)
        else:
            legend = axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1, **look)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _line(axes: Axes, points: Points, colour: str, label: str | None, *, width: float = 1.6, alpha: float = 1.0) -> None:
    """A curve; with few points each is marked, for one point alone has no line."""
    if not points:
        return
    shown = _thin(points)
    axes.plot(
        [at for at, _ in shown], [value for _, value in shown], color=colour, label=label and _drawable(label),
        linewidth=width, alpha=alpha, solid_joinstyle="round", marker="o" if len(shown) <= 30 else None,
        markersize=3.2 if len(shown) > 1 else 5.5, markeredgewidth=0,
    )  # fmt: skip


def _thin(points: Points, limit: int = _MANY_POINTS) -> Points:
    """At most about `limit` points: the lowest and the highest of each stretch, and both ends."""
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    kept = [points[0]]
    for start in range(0, len(points), size):
        part = sorted(points[start : start + size], key=lambda point: point[1])
        kept.extend(sorted({part[0], part[-1]} - {kept[-1]}))
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _smooth(points: Points) -> Points:
    """Mean over a centred window of a fiftieth of the points."""
    half, sums = len(points) // 100, [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smoothed = []
    for index, (at, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)  # stays centred at both ends
        smoothed.append((at, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return smoothed


def _draw_loss(records: Records) -> Figure | None:
    """Training and evaluation loss over steps or rounds; the learning rate small beneath."""
    training, rate = records.training.get("loss", []), records.training.get("lr", [])
    evaluations = records.evaluations.get("loss", {})
    if not training and not any(evaluations.values()):
        return None
    figure = _new_figure(_WIDTH, 4.3 if rate else 3.5)
    grid = figure.add_gridspec(2 if rate else 1, 1, height_ratios=[4, 1] if rate else [1])
    axes = figure.add_subplot(grid[0])
    _style(axes, "loss", None if rate else records.clock)
    if len(training) > 200:
        _line(axes, training, _COLOURS[0], "training", width=0.8, alpha=0.35)
        _line(axes, _smooth(training), _COLOURS[0], "training, smoothed")
    else:
        _line(axes, training, _COLOURS[0], "training")
    for split, points in evaluations.items():
        _line(axes, points, _split_colour(split), split)
    at, loss = number(records.best.get(records.clock)), number(records.best.get("loss"))
    if at is not None and loss is not None:
        axes.plot([at], [loss], "o", markersize=8, markerfacecolor="none", markeredgecolor=_INK, label="best")
    for fork in mappings(records.record.get("forks")):
        axes.axvline(number(fork.get("step")) or 0, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    _legend(axes)
    if rate:
        beneath = figure.add_subplot(grid[1], sharex=axes)
        _style(beneath, "learning rate", records.clock)
        _line(beneath, rate, _COLOURS[7], None, width=1.2)
        highest = max(value for _, value in rate) or 1.0
        beneath.set_ylim(0, 1.15 * highest)
        beneath.set_yticks([0, highest], ["0", f"{highest:.3g}"])
        axes.tick_params(labelbottom=False)
    return figure


def _split_colour(split: str) -> str:
    """Each split keeps its colour in all panels."""
    return {"training": _COLOURS[0], "validation": _COLOURS[1], "test": _COLOURS[2]}.get(split, _COLOURS[3])


def _draw_panels(panels: Mapping[str, Mapping[str, Points]], records: Records) -> Figure | None:
    """Small multiples: a panel for each name, in it a curve for each split or site."""
    if not panels:
        return None
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    lines = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    are_splits = set(lines) <= {"training", "validation", "test"}
    lines = lines if are_splits else sorted(lines)  # sites come in the order of their replies
    figure = _new_figure(_WIDTH, rows * (2.9 if columns == 1 else 2.5) + (0.25 if len(lines) > 4 or columns > 1 else 0))
    for index, (name, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1, sharex=figure.axes[0] if index else None)
        _style(axes, name, records.clock)
        axes.locator_params(axis="x", nbins=8 if columns == 1 else 5)
        if not are_splits and len(lines) > _MANY_LINES:
            _draw_crowd(axes, name, panel)
        else:
            for line in [line for line in lines if line in panel]:
                _line(axes, panel[line], _split_colour(line) if are_splits else _COLOURS[lines.index(line) % len(_COLOURS)], line)
    _legend(figure.axes[columns - 1], outside=columns > 1)
    return figure


def _draw_crowd(axes: Axes, name: str, panel: Mapping[str, Points], each: str = "site", worst: str = "worst site of each round") -> None:
    """Many sites: each as a thin grey line, or where lines would hide each other the band of most; their median, and the worst."""
    at_time: dict[float, list[float]] = {}
    for points in panel.values():
        if len(panel) <= _MANY_CURVES:
            _line(axes, points if len(points) > 1 else [], _MUTED, None, width=0.6, alpha=0.35)
        for at, value in points:
            at_time.setdefault(at, []).append(value)
    ordered = [(at, sorted(values)) for at, values in sorted(at_time.items())]
    if len(panel) > _MANY_CURVES:
        low, high = ([_quantile(values, share) for _, values in ordered] for share in (0.1, 0.9))
        label = f"10 % to 90 % of {each}s"
        axes.fill_between([at for at, _ in ordered], low, high, color=_COLOURS[0], alpha=0.2, linewidth=0, label=label)
        extreme = [(at, values[0 if low_is_worse(name) else -1]) for at, values in ordered]
        _line(axes, extreme, _COLOURS[1], worst, width=1.0)
    _line(axes, [(at, _quantile(values, 0.5)) for at, values in ordered], _COLOURS[0], f"median of {len(panel):,} {each}s")


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Between the two values next to that place."""
    place = share * (len(ordered) - 1)
    low, rest = ordered[int(place)], place - int(place)
    return low if rest == 0 else low + rest * (ordered[int(place) + 1] - low)


def _draw_ranks(records: Records) -> Figure | None:
    """Each rank's share of the step and how long it waited for others; where their number changed, a dashed line, and the number beneath."""
    ranks = records.ranks
    panels = [
        (name, panel) for name, panel in (("share of the step (%)", ranks.shares), ("waiting (ms)", ranks.waited)) if any(panel.values())
    ]
    if not panels:
        return None
    changes = [at for (_, before), (at, after) in pairwise(ranks.counts) if before != after]
    heights = [*([2.0] * len(panels)), *([0.7] if changes else [])]
    figure = _new_figure(_WIDTH, sum(heights) + 0.7)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for index, (name, panel) in enumerate(panels):
        axes = figure.add_subplot(grid[index], sharex=figure.axes[0] if index else None)
        _style(axes, name, records.clock if index == len(heights) - 1 else None)
        if len(panel) > _MANY_LINES:
            _draw_crowd(axes, name, panel, "rank", "highest of each step")
        else:
            for place, (rank, points) in enumerate(panel.items()):
                _line(axes, points, _COLOURS[place % len(_COLOURS)], rank)
        axes.set_ylim(bottom=0)
        for at in changes:
            axes.axvline(at, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    if changes:
        beneath = figure.add_subplot(grid[len(panels)], sharex=figure.axes[0])
        _style(beneath, "ranks", records.clock)
        beneath.plot(*zip(*ranks.counts, strict=True), color=_COLOURS[7], linewidth=1.2, drawstyle="steps-post")
        numbers = sorted({int(count) for _, count in ranks.counts})
        beneath.set_yticks([numbers[0], numbers[-1]], [f"{numbers[0]:,}", f"{numbers[-1]:,}"])
        beneath.set_ylim(numbers[0] - 0.5, numbers[-1] + 0.5)
    _legend(figure.axes[0])
    return figure


def _draw_privacy(records: Records) -> Figure | None:
    """What the weights may tell of one row or site, as it grows, and the budget."""
    spent = records.training.get("epsilon", [])
    if not spent:
        return None
    figure = _new_figure(_WIDTH, 2.6)
    axes = figure.add_subplot()
    _style(axes, "epsilon", records.clock)
    _line(axes, spent, _COLOURS[0], "spent")
    budget = number(mapping(records.record.get("privacy")).get("epsilon"))
    if budget is not None:
        axes.axhline(budget, color=_COLOURS[1], linewidth=1.2, linestyle=(0, (4, 3)), label="budget")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def _draw_comparison(records: Records) -> Figure | None:
    """Bars: a panel for each column of the comparison, a bar for each thing compared."""
    lines = [(str(line["what"]), scalars(line)) for line in records.comparison[:_MANY_CLASSES]]
    names = records.compared[:MANY_COLUMNS]
    if not names:
        return None
    figure = _new_figure(_WIDTH, 0.55 + 0.27 * len(lines))
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        _style(axes, _drawable(name, 56 // len(names)), None)
        values = [figures.get(name) for _, figures in lines]
        known = [(place, value) for place, value in enumerate(values) if value is not None]
        axes.barh([place for place, _ in known], [value for _, value in known], height=0.66, color=_COLOURS[0])
        for place, value in known:
            axes.annotate(
                spell(value), (value, place), (3 if value >= 0 else -3, 0), textcoords="offset points",
                ha="left" if value >= 0 else "right", va="center_baseline", fontsize=7.5, color=_INK,
            )  # fmt: skip
        axes.grid(False)
        axes.margins(x=0.09 * (1 + len(names)))
        axes.set_xlim(left=0 if min((value for _, value in known), default=0.0) >= 0 else None)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        labels = [_drawable(what) if index == 0 else "" for what, _ in lines]
        axes.yaxis.set_ticks(range(len(lines)), labels, color=_INK, parse_math=False)
    return figure


def _draw_partition(records: Records) -> Figure | None:
    """Who has what: bars of the classes for few sites and classes; else bars of sizes, and under each bar the shares of the classes."""
    sites = records.partition
    if not sites:
        return None
    names = list(sites)
    if len(names) > MANY_SITES:
        names = [names[round(place * (len(names) - 1) / (MANY_SITES - 1))] for place in range(MANY_SITES)]
    labels = list(dict.fromkeys(label for name in names for label in sites[name]))
    if len(labels) > _MANY_CLASSES:
        labels = sorted(labels, key=lambda label: -sum(sites[name].get(label, 0) for name in names))[:_MANY_CLASSES]
    stacked = len(names) <= _MANY_BARS and len(labels) <= len(_COLOURS)
    shaded = not stacked and len(labels) > 1
    heights = [1.25, 0.19 * len(labels)] if shaded else [2.4]
    figure = _new_figure(min(_WIDTH, 2 + 0.8 * len(names)), sum(heights) + 0.9)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    bars = figure.add_subplot(grid[0])
    _style(bars, "rows of each class" if stacked and len(labels) > 1 else "rows", None)
    bars.grid(False, axis="x")
    bars.locator_params(axis="y", integer=True)
    totals = [sum(sites[name].values()) for name in names]
    beneath = [0] * len(names)
    for index, label in enumerate(labels if stacked else []):
        counts = [sites[name].get(label, 0) for name in names]
        shown = _drawable(label) if len(labels) > 1 else None
        bars.bar(range(len(names)), counts, width=0.8, bottom=beneath, color=_COLOURS[index], label=shown)
        beneath = [before + count for before, count in zip(beneath, counts, strict=True)]
    if not stacked:
        bars.bar(range(len(names)), totals, width=0.8, color=_COLOURS[-1] if shaded else _COLOURS[0])
    bars.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, 1.05 * max(*totals, 1)))
    _legend(bars)
    lowest = bars
    if shaded:
        lowest = figure.add_subplot(grid[1], sharex=bars)
        _draw_shares(lowest, [[sites[name].get(label, 0) for name in names] for label in labels], totals)
        lowest.yaxis.set_ticks(range(len(labels)), [_drawable(label, 16) for label in labels], fontsize=7.5, color=_INK, parse_math=False)
    _name_sites(lowest, names)
    return figure


def _draw_shares(axes: Axes, counts: Sequence[Sequence[int]], totals: Sequence[int]) -> None:
    """A cell for each class and site, shaded by the class's share of the site's rows. All cells of a shade are one path: pages stay small."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    darkest = max((count / total for line in counts for count, total in zip(line, totals, strict=True) if count), default=1.0)
    _style(axes, f"share of site (darkest {darkest:.0%})", None)
    axes.grid(False)
    corners: dict[int, list[tuple[float, float]]] = {}
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            if not count:
                continue
            share = count / totals[column] / darkest
            left, right, top, bottom = column - 0.47, column + 0.47, row - 0.45, row + 0.45
            box = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
            corners.setdefault(min(_SHADES, math.ceil(_SHADES * share)), []).extend(box)
            if len(totals) <= _NUMBERED_SITES:
                colour = _PAPER if share > 0.6 else _INK
                axes.text(column, row, f"{count:,}", ha="center", va="center_baseline", fontsize=7, color=colour)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for level, points in corners.items():
        shade = to_rgba(_COLOURS[0], 0.08 + 0.92 * level / _SHADES)
        axes.add_patch(PathPatch(Path(points, codes * (len(points) // 5)), facecolor=shade, edgecolor="none"))
    axes.set_ylim(len(counts) - 0.5, -0.5)
    axes.spines[:].set_visible(True)


def _name_sites(axes: Axes, names: Sequence[str]) -> None:
    """Names under the lowest panel: all, or as many as can be read."""
    every = math.ceil(len(names) / _MANY_BARS)
    shown = list(range(0, len(names), every))
    labels = [_drawable(names[place], 20) for place in shown]
    flat = max(map(len, labels)) * len(labels) <= 110
    axes.tick_params(axis="x", labelbottom=True, rotation=0 if flat else 90)
    axes.xaxis.set_ticks(shown, labels, fontsize=7.5 if flat else 7, color=_INK, parse_math=False)


def _draw_confusion(matrix: list[list[int]], names: Sequence[str]) -> Figure:
    """A cell for each pair of true and predicted class, shaded by its share of the row."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    size = len(matrix)
    cell = max(0.25, min(0.62, 3.7 / size))
    labels = [_drawable(name, 16) for name in names]
    figure = _new_figure(min(_WIDTH, size * cell + 0.7 + 0.065 * max(map(len, labels))), size * cell + 0.9)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    boxes, shades = [], []
    for row, counts in enumerate(matrix):
        for column, count in enumerate(counts):
            share = count / max(1, sum(counts))
            boxes.append(Rectangle((column - 0.5, row - 0.5), 1, 1))
            shades.append(to_rgba(_COLOURS[0], 0.07 + 0.93 * share if count else 0.0))
            if count and size <= 20:
                text = f"{count:,}" if len(f"{count:,}") * 0.08 < cell else f"{count / 1000:,.0f}k"
                colour = _PAPER if share > 0.45 else _INK
                axes.text(column, row, text, ha="center", va="center_baseline", fontsize=min(8.0, 19 * cell), color=colour)
    axes.add_collection(PatchCollection(boxes, facecolors=shades, edgecolors=_GRID, linewidths=0.6))
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
    for axis, text in ((axes.xaxis, "predicted class"), (axes.yaxis, "true class")):
        axis.set_ticks(range(size), labels, fontsize=7.5, color=_INK, parse_math=False)
        axis.set_label_text(text, fontsize=7.5, color=_MUTED)
    longest = max(map(len, labels))
    axes.tick_params(length=0)
    axes.tick_params(axis="x", rotation=90 if longest * 0.075 > cell else 0)
    axes.spines[:].set_visible(False)
    return figure


def _drawable(text: str, limit: int = 28) -> str:
    """Text that the bundled font can draw, for a missing glyph is a warning and an empty box."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    drawn = "".join(letter if font.get_char_index(ord(letter)) else "□" for letter in " ".join(text.split()))
    head = (limit - 1) // 2  # what tells names apart is as often at their end
    return drawn if len(drawn) <= limit else f"{drawn[:head]}…{drawn[head + 1 - limit :]}"


def _render(figure: Figure) -> Picture:
    png, svg = BytesIO(), BytesIO()
    figure.savefig(png, format="png", dpi=170, facecolor="#ffffff", metadata={"Software": None})
    figure.set_layout_engine("none")  # it is laid out by now, and both pictures shall be the same
    figure.savefig(svg, format="svg", facecolor="none", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    light = svg.getvalue().decode()
    # ids are random in each drawing; numbered in order, equal runs have equal pages
    ids = list(dict.fromkeys(re.findall(r'id="([a-z][0-9a-f]{10})"', light)))
    for index, name in enumerate(ids):
        light = light.replace(name, f"id{index}")
    dark = re.sub(r"#[0-9a-f]{6}\b", lambda match: _DARK.get(match[0], match[0]), light)
    return Picture(png.getvalue(), light.encode(), dark.encode(), float(figure.get_figwidth()) / _WIDTH)
