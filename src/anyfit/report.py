"""A run folder as one page that stands alone, and its plots as PNG files. Reads JSON records only.

What a page shows (class names, columns, paths) comes from data, so all text is escaped where it becomes markup; see `_tag`.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from anyfit.errors import InputError
from anyfit.values import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["summary", "write_report"]

Points = list[tuple[float, float]]  # (step or round, value), in order

_FORMAT = 1
_BOOKKEEPING = {"event", "step", "epoch", "round", "rows", "seconds", "bytes_up", "bytes_down", "count", "best"}
_HEADLINES = ("accuracy", "rmse", "auroc", "f1")  # the first that a split has is its large figure
_MANY_POINTS, _MANY_PANELS, _MANY_CLASSES, _MANY_LINES, _MANY_ROWS = 2_000, 9, 30, 8, 100


def write_report(run: Path) -> Path:
    """Write `report.html` and the PNG plots into the run folder; plots that no longer apply are removed."""
    records = _read(Path(run))
    pictures = _draw(records)
    for name in ("loss", "metrics", "confusion", "sites"):
        path = records.run / f"{name}.png"
        if name in pictures:
            write_atomic(path, pictures[name].png)
        else:
            path.unlink(missing_ok=True)
    template = Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    title = f"{records.task} · {records.run.resolve().name} · anyfit"
    page = template.substitute(title=_markup(title), body="\n".join(_page(records, pictures)))
    path = records.run / "report.html"
    write_atomic(path, page.encode("utf-8", "replace"))  # JSON may carry lone surrogates, UTF-8 cannot
    return path


def summary(run: Path) -> dict[str, Any]:
    """What the run is and how it went, as strict JSON: task, plan, steps, best, and the final metrics by split."""
    records = _read(Path(run))
    task, result = _mapping(records.record["task"]), records.result
    return {
        "run": str(run),
        "kind": records.kind,
        "task": records.task,
        "values": _mapping(task.get("values")),
        "plan": _mapping(records.record.get("plan")),
        "finished": bool(result),
        "stopped": records.stopped,
        **{name: _whole(result.get(name, records.reached.get(name))) for name in ("steps", "epochs", "rounds")},
        "seconds": _number(result.get("seconds")),
        "parameters": _whole(records.record.get("parameters")),
        "best": {name: _number(value) for name, value in records.best.items()} or None,
        "splits": {split: _scalars(figures) for split, figures in records.splits.items()},
    }


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Records:
    """All that a run folder says, read once."""

    run: Path
    record: dict[str, Any]
    result: dict[str, Any]  # empty while the run has not finished
    training: dict[str, Points] = field(default_factory=dict)  # loss, lr and the task's own logs
    evaluations: dict[str, dict[str, Points]] = field(default_factory=dict)  # metric -> split -> points
    sites: dict[str, dict[str, Points]] = field(default_factory=dict)  # figure -> site -> points
    last_at_site: dict[str, dict[str, Any]] = field(default_factory=dict)
    latest: dict[str, dict[str, Any]] = field(default_factory=dict)  # split -> its last evaluation
    best: dict[str, Any] = field(default_factory=dict)
    reached: dict[str, int] = field(default_factory=dict)  # steps, epochs, rounds
    moved: dict[str, int] = field(default_factory=dict)  # bytes_up, bytes_down
    stopped: str | None = None
    torn: int = 0  # lines that could not be read
    not_finite: float | None = None  # where a loss first was NaN or infinite
    samples_per_s: float | None = None

    @property
    def kind(self) -> str:
        return str(self.record.get("kind", "fit"))

    @property
    def clock(self) -> str:
        """What the curves run over."""
        return "round" if self.kind == "federate" else "step"

    @property
    def task(self) -> str:
        return str(self.record["task"]["reference"])

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """Figures by split, the most telling split first: the result's, or the last evaluation's where there is none."""
        found = {name: figures for name, figures in _mapping(self.result.get("splits")).items() if isinstance(figures, dict)}
        found = found or self.latest
        first = [name for name in ("test", "validation") if name in found]
        return {name: found[name] for name in [*first, *(name for name in found if name not in first)]}

    @property
    def classes(self) -> tuple[str, list[list[int]]] | None:
        """(split, confusion matrix) of the first split that has one."""
        for split, figures in self.splits.items():
            matrix = figures.get("confusion")
            if isinstance(matrix, list) and matrix and all(_is_counts(row, len(matrix)) for row in matrix):
                return split, matrix
        return None

    def class_names(self, count: int) -> list[str]:
        """The target's categories where the schema has them, else numbers."""
        schema = _mapping(self.record.get("schema"))
        for column in _mappings(schema.get("columns")):
            names = column.get("categories")
            if column.get("name") == schema.get("target") and isinstance(names, list) and len(names) == count:
                return [str(name) for name in names]
        return [str(number) for number in range(count)]


def _read(run: Path) -> _Records:
    path = run / "run.json"
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"run (={str(run)!r}) is no run folder: {path} cannot be read ({error.strerror or error}); "
            "give a folder that fit or federate wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is malformed ({error}); restore it from a copy, or fit again into a new folder") from error
    if not isinstance(record, dict) or not isinstance(_mapping(record.get("task")).get("reference"), str):
        raise InputError(f"{path} is malformed (it names no task); restore it from a copy, or fit again into a new folder")
    if record.get("format") != _FORMAT:
        raise InputError(f"{path} has format {record.get('format')!r}, but this anyfit reads format {_FORMAT}; install the one that wrote it")
    result = next(_lines(run / "result.json", whole=True), None) or {}
    records = _Records(run, record, result)
    for event in _lines(run / "metrics.jsonl"):
        if event is None:
            records.torn += 1
        else:
            _take(records, event)
    records.best = _mapping(result.get("best")) or records.best
    records.stopped = str(result["stopped"]) if "stopped" in result else records.stopped
    speeds = sorted(filter(None, (_number(line.get("samples_per_s")) for line in _lines(run / "timings.jsonl") if line)))
    records.samples_per_s = speeds[len(speeds) // 2] if speeds else None
    return records


def _lines(path: Path, *, whole: bool = False) -> Iterator[dict[str, Any] | None]:
    """The JSON objects of a file, None for each that is torn; nothing where there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in [file.read()] if whole else file:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else None


def _take(records: _Records, event: dict[str, Any]) -> None:
    """Sort one line of metrics.jsonl into the curves."""
    kind, at = event.get("event"), _number(event.get(records.clock))
    for name, total in (("step", "steps"), ("epoch", "epochs"), ("round", "rounds")):
        reached = _whole(event.get(name))
        if reached is not None:
            records.reached[total] = max(reached, records.reached.get(total, 0))
    if kind == "stop":
        records.stopped = str(event.get("reason"))
    if at is None:
        return
    if kind in ("step", "round"):
        figures = _scalars(event) | _scalars(_mapping(event.get("logs")))
        for name, value in figures.items():
            _point(records, records.training.setdefault(name, []), at, value, name)
        for name in ("bytes_up", "bytes_down"):
            records.moved[name] = records.moved.get(name, 0) + (_whole(event.get(name)) or 0)
    elif kind == "evaluate":
        split = str(event.get("split", "evaluation"))
        for name, value in _scalars(event).items():
            _point(records, records.evaluations.setdefault(name, {}).setdefault(split, []), at, value, name)
        records.latest[split] = event
        if event.get("best") is True:
            records.best = {records.clock: at, "loss": event.get("loss")}
    for site, entry in _mapping(event.get("sites")).items():
        figures = {name if kind == "round" else f"{event.get('split')} {name}": value for name, value in _scalars(_mapping(entry)).items()}
        for name, value in figures.items():
            _point(records, records.sites.setdefault(name, {}).setdefault(site, []), at, value, name)
        known = records.last_at_site.setdefault(site, {"rounds": 0, "bytes_up": 0, "bytes_down": 0})
        known["rounds"] += kind == "round"
        known["rows"] = _mapping(entry).get("rows", known.get("rows"))
        for name in ("bytes_up", "bytes_down"):
            known[name] += _whole(_mapping(entry).get(name)) or 0
        known |= figures


def _point(records: _Records, points: Points, at: float, value: float | None, name: str) -> None:
    """Add a point; what is not finite cannot be drawn, and for a loss it is said on the page."""
    if value is not None:
        points.append((at, value))
    elif name == "loss" and records.not_finite is None:
        records.not_finite = at


def _scalars(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """The named numbers among an event's entries; None where one is not finite."""
    plain = (int, float, type(None))
    return {
        str(name): _number(value)
        for name, value in figures.items()
        if name not in _BOOKKEEPING and isinstance(value, plain) and not isinstance(value, bool)
    }


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _is_counts(row: Any, size: int) -> bool:
    return isinstance(row, list) and len(row) == size and all((_whole(cell) or 0) >= 0 and _whole(cell) is not None for cell in row)


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_INK, _MUTED, _GRID, _PAPER = "#1b1f24", "#5c6672", "#e1e5ea", "#fefefe"
_COLOURS = ("#2866b1", "#c2571a", "#2f7d4f", "#7c4fa3", "#a8327a", "#117a8b", "#8a6d1b", "#6b7785")
# drawn once: the dark picture is the light one with these exchanged, so no other colour may be used in a drawing
_DARK = {
    _INK: "#e4e8ee", _MUTED: "#9ba6b4", _GRID: "#2c333d", _PAPER: "#10131a",
    **dict(zip(_COLOURS, ("#78aef0", "#f0955c", "#6cc492", "#bb97e0", "#e582bd", "#58c2d3", "#d6b75a", "#a4afbd"), strict=True)),
}  # fmt: skip
_WIDTH = 9.2  # inches of a picture that is as wide as the page


@dataclass(frozen=True, slots=True)
class _Picture:
    """One drawing: PNG for its file, SVG for the page."""

    png: bytes
    light: bytes
    dark: bytes
    width: float  # share of the page's width


def _draw(records: _Records) -> dict[str, _Picture]:
    """All pictures that the records allow, by name."""
    figures = {
        "loss": _draw_loss(records),
        "metrics": _draw_panels(_metric_panels(records), records),
        "sites": _draw_panels(dict(list(records.sites.items())[:_MANY_PANELS]), records),
    }
    found = records.classes
    if found and len(found[1]) <= _MANY_CLASSES:
        figures["confusion"] = _draw_confusion(found[1], records.class_names(len(found[1])))
    return {name: _render(figure) for name, figure in figures.items() if figure is not None}


def _metric_panels(records: _Records) -> dict[str, dict[str, Points]]:
    """A panel for each metric and each of the task's logs; the loss has its own picture."""
    panels = {name: dict(lines) for name, lines in records.evaluations.items() if name != "loss"}
    for name, points in records.training.items():
        if name not in ("loss", "lr"):
            panels.setdefault(name, {})["training"] = points
    filled = [(name, lines) for name, lines in panels.items() if any(lines.values())]
    return dict(filled[:_MANY_PANELS])


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
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.margins(x=0.02, y=0.08)
    if clock:
        axes.set_xlabel(clock, fontsize=7.5, color=_MUTED)
    else:
        axes.tick_params(labelbottom=False)


def _legend(axes: Axes) -> None:
    """Above the frame at the right, where it never hides a curve."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = len(labels) if len(labels) <= 4 else 4
        legend = axes.legend(
            handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, frameon=False, fontsize=7.5,
            labelcolor=_INK, borderaxespad=0.1, handlelength=1.4, columnspacing=1.2,
        )  # fmt: skip
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


def _draw_loss(records: _Records) -> Figure | None:
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
    at, loss = _number(records.best.get(records.clock)), _number(records.best.get("loss"))
    if at is not None and loss is not None:
        axes.plot([at], [loss], "o", markersize=8, markerfacecolor="none", markeredgecolor=_INK, label="best")
    for fork in _mappings(records.record.get("forks")):
        axes.axvline(_number(fork.get("step")) or 0, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    _legend(axes)
    if rate:
        beneath = figure.add_subplot(grid[1], sharex=axes)
        _style(beneath, "learning rate", records.clock)
        _line(beneath, rate, _COLOURS[7], None, width=1.2)
        beneath.set_ylim(bottom=0)
        beneath.locator_params(axis="y", nbins=2)
        axes.tick_params(labelbottom=False)
    return figure


def _split_colour(split: str) -> str:
    """Each split keeps its colour in all panels."""
    return {"training": _COLOURS[0], "validation": _COLOURS[1], "test": _COLOURS[2]}.get(split, _COLOURS[3])


def _draw_panels(panels: Mapping[str, Mapping[str, Points]], records: _Records) -> Figure | None:
    """Small multiples: a panel for each name, in it a curve for each split or site."""
    if not panels:
        return None
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    lines = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    are_splits = set(lines) <= {"training", "validation", "test"}
    figure = _new_figure(_WIDTH, rows * (2.9 if columns == 1 else 2.5) + (0.3 if len(lines) > 4 else 0))
    for index, (name, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        _style(axes, name, records.clock)
        axes.locator_params(axis="x", nbins=8 if columns == 1 else 5)
        if not are_splits and len(lines) > _MANY_LINES:
            _draw_crowd(axes, panel)
        else:
            for line, points in panel.items():
                _line(axes, points, _split_colour(line) if are_splits else _COLOURS[lines.index(line) % len(_COLOURS)], line)
        if index == min(columns, len(panels)) - 1 or columns == 1:
            _legend(axes)
    return figure


def _draw_crowd(axes: Axes, panel: Mapping[str, Points]) -> None:
    """Many sites: each as a thin grey line, and their median."""
    at_time: dict[float, list[float]] = {}
    for points in panel.values():
        _line(axes, points if len(points) > 1 else [], _MUTED, None, width=0.6, alpha=0.35)
        for at, value in points:
            at_time.setdefault(at, []).append(value)
    median = [(at, sorted(values)[len(values) // 2]) for at, values in sorted(at_time.items())]
    _line(axes, median, _COLOURS[0], f"median of {len(panel):,} sites")


def _draw_confusion(matrix: list[list[int]], names: Sequence[str]) -> Figure:
    """A cell for each pair of true and predicted class, shaded by its share of the row."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    size = len(matrix)
    cell = max(0.25, min(0.62, 4.0 / size))
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
                text = f"{count:,}" if count < 10_000 else f"{count / 1000:,.0f}k"
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
    return drawn if len(drawn) <= limit else drawn[: limit - 1] + "…"


def _render(figure: Figure) -> _Picture:
    png, svg = BytesIO(), BytesIO()
    figure.savefig(png, format="png", dpi=170, facecolor="#ffffff", metadata={"Software": None})
    figure.savefig(svg, format="svg", facecolor="none", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    light = svg.getvalue().decode()
    # ids are random in each drawing; numbered in order, equal runs have equal pages
    ids = list(dict.fromkeys(re.findall(r'id="([a-z][0-9a-f]{10})"', light)))
    for number, name in enumerate(ids):
        light = light.replace(name, f"id{number}")
    dark = re.sub(r"#[0-9a-f]{6}\b", lambda match: _DARK.get(match[0], match[0]), light)
    return _Picture(png.getvalue(), light.encode(), dark.encode(), float(figure.get_figwidth()) / _WIDTH)


# ── page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Html(str):
    """Text that is markup already."""

    __slots__ = ()


def _markup(value: object) -> str:
    return value if isinstance(value, _Html) else escape(_spell(value))


def _tag(name: str, *children: object, **attributes: object) -> _Html:
    """An element. All that is not markup is escaped here, and only here, so nothing can be forgotten."""
    opened = "".join(f' {key.rstrip("_")}="{escape(str(value))}"' for key, value in attributes.items())
    inside = "".join(_markup(child) for child in children)
    return _Html(f"<{name}{opened}>" if name in ("img", "source") else f"<{name}{opened}>{inside}</{name}>")


def _spell(value: object) -> str:
    """A value as people read it: thousands in groups, four digits that tell something, a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:.4f}" if 0.001 <= size < 10 else f"{value:,.2f}" if 10 <= size < 1e6 else f"{value:.4g}"
    return str(value)


def _plain(value: Any) -> str:
    """A setting as it was given: no rounding, no grouping."""
    return _hide(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _hide(text: str) -> str:
    """Without the password of a database address: pages are sent around."""
    return re.sub(r"(://[^/\s:@]*:)[^@\s]+@", r"\1***@", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], total: Iterable[Sequence[object]] = ()) -> _Html:
    """A table whose first column names the row; columns of numbers stand at the right."""
    body, foot = list(rows), list(total)
    numbers = [
        all(isinstance(row[index], int | float | None) for row in body) and any(row[index] is not None for row in body)
        for index in range(len(head))
    ]

    def line(row: Sequence[object], **attributes: object) -> _Html:
        cells = [_tag("td", cell, **({"class": "number"} if number else {})) for cell, number in zip(row[1:], numbers[1:], strict=True)]
        return _tag("tr", _tag("th", row[0], scope="row"), *cells, **attributes)

    top = [_tag("th", name, scope="col", **({"class": "number"} if number else {})) for name, number in zip(head, numbers, strict=True)]
    lines = [*(line(row) for row in body), *(line(row, class_="total") for row in foot)]
    return _tag("div", _tag("table", _tag("thead", _tag("tr", *top)), _tag("tbody", *lines)), class_="wide")


def _figure(picture: _Picture, alt: str, caption: str) -> _Html:
    """A picture that follows the reader's light or dark; paper is light."""
    light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in (picture.light, picture.dark))
    source = _tag("source", media="screen and (prefers-color-scheme: dark)", srcset=dark)
    image = _tag("img", src=light, alt=alt, style=f"width: {1024 * picture.width:.0f}px")
    return _tag("figure", _tag("picture", source, image), *([_tag("figcaption", caption)] if caption else []))


def _section(title: str, *children: object) -> _Html:
    return _tag("section", _tag("h2", title), *children)


def _page(records: _Records, pictures: Mapping[str, _Picture]) -> Iterator[_Html]:
    """The page's parts from top to bottom."""
    yield _head(records)
    yield from _curves(records, pictures)
    yield from _class_section(records, pictures)
    yield from _site_section(records, pictures)
    yield _configuration(records)
    yield _data_section(records)
    yield _environment(records)
    yield _repeat(records)
    yield _tag("footer", f"anyfit {records.record.get('anyfit', '')} · written from the records in {records.run.resolve().name}/")


def _head(records: _Records) -> _Html:
    words = {"finished": "finished", "patience": "finished early", "signal": "stopped by a signal"}
    state = words.get(records.stopped or "", records.stopped or "finished") if records.result else "unfinished"
    pill = _tag("span", state, class_="pill" if state.startswith("finished") else "pill warn")
    doing = f"federated over {len(_mapping(records.record.get('sites'))):,} sites" if records.kind == "federate" else records.kind
    line = _tag("p", f"{records.run.resolve().name} · {doing}", class_="muted")
    tiles = [_tile(records, split, figures) for split, figures in records.splits.items()]
    facts = [_tag("div", _tag("dt", name), _tag("dd", value)) for name, value in _facts(records)]
    return _tag(
        "header",
        _tag("div", _tag("h1", records.task), pill, class_="title"),
        line,
        *_notices(records),
        *([_tag("div", *tiles, class_="tiles")] if tiles else []),
        _tag("dl", *facts, class_="facts"),
    )


def _tile(records: _Records, split: str, figures: dict[str, Any]) -> _Html:
    """One split: its headline metric large, the others small."""
    scalars = _scalars(figures)
    named = [name for name in _HEADLINES if name in scalars] or [name for name in scalars if name != "loss"] or list(scalars)
    if not named:
        return _Html("")
    rows = _whole(figures.get("rows")) or _whole(_mapping(_mapping(records.record.get("data")).get(split)).get("rows"))
    others = [_tag("div", _tag("dt", name), _tag("dd", value)) for name, value in scalars.items() if name != named[0]]
    heading = _tag("h2", split, *([_tag("span", f"{rows:,} rows")] if rows else []))
    large = _tag("p", scalars[named[0]], class_="big")
    return _tag("div", heading, large, _tag("p", named[0], class_="muted"), _tag("dl", *others), class_="tile")


def _facts(records: _Records) -> Iterator[tuple[str, str]]:
    """Size, length and cost of the run, as far as they are known."""
    for name in ("rounds", "epochs", "steps"):
        count = _whole(records.result.get(name)) or records.reached.get(name)
        if count:
            yield name, _spell(count)
    best = _number(records.best.get(records.clock))
    if best is not None:
        yield f"best {records.clock}", f"{best:,.0f} (loss {_spell(_number(records.best.get('loss')))})"
    parameters, trainable = (_whole(records.record.get(name)) for name in ("parameters", "trainable"))
    if parameters is not None:
        yield "parameters", _spell(parameters) + (f" ({trainable:,} train)" if trainable not in (None, parameters) else "")
    seconds = _number(records.result.get("seconds"))
    if seconds is not None:
        yield "time", _duration(seconds)
    if records.samples_per_s:
        yield "median speed", f"{records.samples_per_s:,.0f} samples/s"
    if any(records.moved.values()):
        yield "moved", f"{_size(records.moved['bytes_up'])} up, {_size(records.moved['bytes_down'])} down"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _notices(records: _Records) -> Iterator[_Html]:
    """What a reader must know before they believe the figures."""
    if not records.result:
        reached = records.reached.get("rounds" if records.clock == "round" else "steps")
        text = f"This run is unfinished: its records end at {records.clock} {reached:,}" if reached else "This run is unfinished: no step is recorded yet"
        text += ", and the figures are those of the last evaluation." if reached and records.latest else "."
        command = _resume_command(records)
        more = [" To go on:", _tag("code", command)] if command else []
        yield _tag("div", text, *more, class_="notice")
    if records.not_finite is not None:
        yield _tag("div", f"The loss was not finite at {records.clock} {records.not_finite:,.0f}; such points are not drawn.", class_="notice")
    if records.torn:
        lines = "One line" if records.torn == 1 else f"{records.torn:,} lines"
        yield _tag("div", f"{lines} of metrics.jsonl could not be read (torn by a kill?) and left out.", class_="notice")


def _curves(records: _Records, pictures: Mapping[str, _Picture]) -> Iterator[_Html]:
    if "loss" not in pictures and "metrics" not in pictures:
        yield _section("Curves", _tag("p", "Nothing has been recorded yet.", class_="note"))
        return
    forks = " Dashed lines: resumed with changed settings." if _mappings(records.record.get("forks")) else ""
    meaning = "of each round's sites" if records.clock == "round" else "since the point before"
    parts = []
    if "loss" in pictures:
        caption = f"Each training point is the mean over the batches {meaning}." + forks
        parts.append(_figure(pictures["loss"], "Loss in training and evaluation", caption))
    if "metrics" in pictures:
        left_out = len({*records.evaluations, *records.training} - {"loss", "lr"}) - _MANY_PANELS
        caption = f"{left_out} further metrics are in metrics.jsonl." if left_out > 0 else ""
        parts.append(_figure(pictures["metrics"], "Metrics", caption))
    yield _section("Curves", *parts)


def _class_section(records: _Records, pictures: Mapping[str, _Picture]) -> Iterator[_Html]:
    """Which classes are told apart: the confusion matrix, and precision, recall and F1 of each class."""
    found = records.classes
    if found is None:
        if {"rmse", "mae", "r2"} & {name for figures in records.splits.values() for name in figures}:
            text = "The target is a number, so there are no classes to confuse; rmse and mae are in the target's unit."
            yield _section("Errors", _tag("p", text, class_="note"))
        return
    split, matrix = found
    names, total = records.class_names(len(matrix)), sum(map(sum, matrix))
    hits, support = sum(matrix[index][index] for index in range(len(matrix))), [sum(row) for row in matrix]
    low, high = _interval(hits, total)
    text = (
        f"{hits:,} of {total:,} rows right: accuracy {_spell(hits / max(1, total))}, 95 % interval {_spell(low)} to {_spell(high)} (Wilson). "
        f"Always answering “{names[support.index(max(support))]}” would give {_spell(max(support) / max(1, total))}."
    )
    parts: list[_Html] = []
    if "confusion" in pictures:
        caption = "A row for each true class, a column for each predicted one; shade is the share of the row."
        parts.append(_figure(pictures["confusion"], f"Confusion matrix of the {split} split", caption))
    else:
        parts.append(_tag("p", f"With {len(matrix):,} classes a confusion matrix is too large to read; it is in result.json.", class_="note"))
    tables = _tag("div", *_class_tables(matrix, names), class_="column")
    yield _section(f"Classes ({split})", _tag("p", text, class_="note"), _tag("div", *parts, tables, class_="pair"))


def _class_tables(matrix: list[list[int]], names: Sequence[str]) -> Iterator[_Html]:
    figures = [_scores(matrix, index) for index in range(len(matrix))]
    order = list(range(len(matrix)))
    if len(order) > _MANY_ROWS:
        order = sorted(order, key=lambda index: figures[index][2] if figures[index][2] is not None else 2.0)[:_MANY_ROWS]  # type: ignore[return-value,arg-type]
        yield _tag("p", f"The {_MANY_ROWS} of {len(matrix):,} classes with the lowest F1.", class_="note")
    support = [sum(row) for row in matrix]
    rows = [(names[index], *figures[index], support[index]) for index in order]
    ones = [1] * len(matrix)
    means = [
        (title, *(_mean([line[column] for line in figures], weights) for column in range(3)), sum(support))
        for title, weights in (("mean of classes", ones), ("weighted by support", support))
    ]
    yield _table(("class", "precision", "recall", "F1", "support"), rows, means)
    pairs = [(matrix[a][b], a, b) for a in range(len(matrix)) for b in range(len(matrix)) if a != b and matrix[a][b]]
    worst = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:5]
    if worst and len(matrix) > 2:
        yield _tag("h3", "Most frequent confusions")
        yield _table(("true", "taken for", "rows", "share of class"), [(names[a], names[b], n, n / support[a]) for n, a, b in worst])


def _scores(matrix: list[list[int]], index: int) -> tuple[float | None, float | None, float | None]:
    """(precision, recall, F1) of a class; None where nothing was predicted or nothing is there."""
    hits, actual, predicted = matrix[index][index], sum(matrix[index]), sum(row[index] for row in matrix)

    def ratio(above: int, beneath: int) -> float | None:
        return above / beneath if beneath else None

    return ratio(hits, predicted), ratio(hits, actual), ratio(2 * hits, actual + predicted)


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """Weighted mean of what is defined."""
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _interval(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): right near 0 and 1 too, where the usual one leaves the range."""
    if not total:
        return 0.0, 1.0
    z, share = 1.959964, hits / total
    centre, scale = share + z * z / (2 * total), 1 + z * z / total
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - reach) / scale, (centre + reach) / scale


def _site_section(records: _Records, pictures: Mapping[str, _Picture]) -> Iterator[_Html]:
    """Each site's part in a federation."""
    known = _mapping(records.record.get("sites"))
    names = list(dict.fromkeys([*known, *records.last_at_site]))
    if not names:
        return
    metrics = list(records.sites)
    entries = {name: _mapping(known.get(name)) | {key: value for key, value in records.last_at_site.get(name, {}).items() if value is not None} for name in names}
    total = sum(_whole(entry.get("rows")) or 0 for entry in entries.values())
    traffic = [key for key in ("bytes_up", "bytes_down") if any(entry.get(key) for entry in entries.values())]
    rows = []
    for name in names[:_MANY_ROWS]:
        entry = entries[name]
        share = (_whole(entry.get("rows")) or 0) / total if total else 0.0
        bar = _tag("span", _tag("i", style=f"width: {100 * share:.1f}%"), class_="bar", title=f"{share:.1%}")
        moved = [_size(entry[key]) if entry.get(key) is not None else None for key in traffic]
        rows.append((name, _whole(entry.get("rows")), bar, _whole(entry.get("rounds")), *(_number(entry.get(metric)) for metric in metrics), *moved))
    head = ("site", "rows", "share of rows", "rounds", *(f"last {metric}" for metric in metrics), *(key.replace("bytes_", "") for key in traffic))
    parts = [_figure(pictures["sites"], "Curves of the sites", "")] if "sites" in pictures else []
    note = [f"The first {_MANY_ROWS} of {len(names):,} sites."] if len(names) > _MANY_ROWS else []
    if any(records.moved.values()):
        note.append(f"All sites together sent {_size(records.moved['bytes_up'])} and received {_size(records.moved['bytes_down'])}.")
    yield _section("Sites", _table(head, rows), *([_tag("p", " ".join(note), class_="note")] if note else []), *parts)


def _settings(title: str, values: Mapping[str, Any]) -> _Html:
    """Names and values as they were given."""
    rows = [(name, _tag("code", _plain(value))) for name, value in values.items()]
    inside = _table(("name", "value"), rows) if rows else _tag("p", "none", class_="note")
    return _tag("div", _tag("h3", title), inside, class_="column")


def _configuration(records: _Records) -> _Html:
    task = _mapping(records.record["task"])
    columns = [_settings("Plan: how it is trained", _mapping(records.record.get("plan")))]
    strategy = _mapping(records.record.get("strategy"))
    identity = {key: task[key] for key in ("class", "code") if key in task}
    right = [_settings("Task: what is learnt", _mapping(task.get("values"))), _settings("Identity", identity)]
    if strategy:
        right.insert(1, _settings("Strategy", {"name": strategy.get("name"), **_mapping(strategy.get("values"))}))
    parts = [_tag("div", *columns, _tag("div", *right, class_="column"), class_="pair")]
    forks = _mappings(records.record.get("forks"))
    if forks:
        rows = []
        for fork in forks:
            for name, change in _mapping(fork.get("changed")).items():
                before, after = change if isinstance(change, list) and len(change) == 2 else (None, change)
                rows.append((_spell(fork.get("step")), name, _tag("code", _plain(before)), _tag("code", _plain(after))))
        parts += [_tag("h3", "Forks: settings changed on resume"), _table(("at step", "setting", "before", "after"), rows)]
    return _section("Configuration", *parts)


def _data_section(records: _Records) -> _Html:
    splits = {name: _mapping(entry) for name, entry in _mapping(records.record.get("data")).items()}
    rows = [(name, _whole(entry.get("rows")), _tag("code", _plain(entry.get("source")))) for name, entry in splits.items()]
    parts = [_table(("split", "rows", "source"), rows)] if rows else [_tag("p", "No sources are recorded.", class_="note")]
    schema = _mapping(records.record.get("schema"))
    columns = _mappings(schema.get("columns"))
    if columns:
        lines = [_column(column, schema.get("target")) for column in columns[:_MANY_ROWS]]
        table = _table(("column", "type", "values"), lines)
        count = f"{len(columns):,} columns" + (f", of which the first {_MANY_ROWS} are shown" if len(columns) > _MANY_ROWS else "")
        if len(columns) > 25:
            parts.append(_tag("details", _tag("summary", count), table))
        else:
            parts += [_tag("h3", count), table]
    else:
        parts.append(_tag("p", "No schema: the data came as tensors.", class_="note"))
    return _section("Data", *parts)


def _column(column: Mapping[str, Any], target: object) -> tuple[object, ...]:
    """A schema's column as a row: name, type, and what is known of its values."""
    categories, mean, deviation = column.get("categories"), _number(column.get("mean")), _number(column.get("std"))
    values = ""
    if isinstance(categories, list):
        shown = ", ".join(str(category) for category in categories[:8])
        values = f"{len(categories):,}: {shown[:160]}" + (", …" if len(categories) > 8 or len(shown) > 160 else "")
    elif mean is not None and deviation is not None:
        values = f"mean {_spell(float(mean))}, standard deviation {_spell(float(deviation))}"
    elif column.get("shape"):
        values = "shape " + _plain(column["shape"])
    name = str(column.get("name"))
    marked = _Html(_markup(name) + _tag("span", "target", class_="tag")) if name == target else name
    return marked, str(column.get("type")), values


def _environment(records: _Records) -> _Html:
    hardware = dict(_mapping(records.record.get("hardware")))
    memory = _number(hardware.pop("memory_bytes", None))
    if memory is not None:
        hardware["memory"] = f"{memory / 2**30:.1f} GiB"
    versions = {"anyfit": records.record.get("anyfit")} | _mapping(records.record.get("versions"))
    return _section("Environment", _tag("div", _settings("Versions", versions), _settings("Hardware", hardware), class_="pair"))


def _repeat(records: _Records) -> _Html:
    command = _command(records)
    if command:
        return _section("Repeat it", _tag("pre", _hide(shlex.join(command))))
    text = "The run was started from Python; the task, plan and seed above repeat it."
    return _section("Repeat it", _tag("p", text, class_="note"))


def _command(records: _Records) -> list[str]:
    command = records.record.get("command")
    return [str(word) for word in command] if isinstance(command, list) else []


def _resume_command(records: _Records) -> str:
    """The command that goes on with an unfinished run; empty where it was started from Python."""
    command = _command(records)
    if not command:
        return ""
    names_run = any(word == "--run" or word.startswith("--run=") for word in command)
    command += [] if names_run else ["--run", str(records.run)]
    return _hide(shlex.join([*command, *([] if "--resume" in command else ["--resume"])]))
