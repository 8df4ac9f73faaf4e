"""What a run folder says, read once; an unfinished or torn one too."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyfit.errors import InputError
from anyfit.run import read_record

__all__ = ["Points", "Ranks", "Records", "low_is_worse", "mapping", "mappings", "number", "read", "scalars", "whole"]

Points = list[tuple[float, float]]  # (step or round, value), in order

_LOW_IS_WORSE = ("accuracy", "auroc", "f1", "r2", "precision", "recall", "score")  # of anything else, a loss or an error, the highest is
_BOOKKEEPING = {"event", "step", "epoch", "round", "rows", "seconds", "bytes_up", "bytes_down", "count", "best"}


@dataclass(slots=True)
class Ranks:
    """What timings.jsonl says of ranks that shared each step. A rank keeps its first name when others before it are lost."""

    counts: Points = field(default_factory=list)  # how many there were
    shares: dict[str, Points] = field(default_factory=dict)  # rank -> per cent of the step
    waited: dict[str, Points] = field(default_factory=dict)  # rank -> ms
    last: dict[str, dict[str, Any]] = field(default_factory=dict)  # rank -> what was told of it last
    gains: Points = field(default_factory=list)  # how many times as fast as with equal shares
    reached: Points = field(default_factory=list)  # of what the ranks' speeds allow
    _names: dict[int, str] = field(default_factory=dict)  # of the members of this launch

    def take(self, line: Mapping[str, Any]) -> None:
        """One line of timings.jsonl. What a resume took back is forgotten."""
        at = number(line.get("step"))
        if at is None or "samples_per_s" not in line:
            return
        told = [entry for entry in mappings(line.get("ranks")) if whole(entry.get("rank")) is not None]
        if self.counts and at <= self.counts[-1][0]:
            self._cut(at)
        if told or self.counts:
            self.counts.append((at, max(1, len(told))))
        equal, current, limit = (number(line.get(name)) for name in ("equal", "current", "limit"))
        if equal and current and limit and len(told) > 1:
            self.gains.append((at, equal / current))
            self.reached.append((at, equal / current / limit))
        total = sum(whole(entry.get("share")) or 0 for entry in told)
        for entry in told:
            name = self._name(entry, at)
            share, waited = whole(entry.get("share")), number(entry.get("waited"))
            self.last[name] = {**entry, "first": self.last.get(name, {}).get("first", at), "step": at}
            if share is not None and total:
                self.shares.setdefault(name, []).append((at, 100 * share / total))
            if waited is not None:
                self.waited.setdefault(name, []).append((at, 1e3 * waited))

    def _name(self, entry: Mapping[str, Any], at: float) -> str:
        member, name = whole(entry.get("member")), f"rank {entry['rank']}"
        if member is None:
            return name
        if member not in self._names:
            self._names[member] = name if name not in self._names.values() else f"{name} from step {at:,.0f}"
        return self._names[member]

    def _cut(self, at: float) -> None:
        """Of a run that was resumed at an earlier step; its members are numbered anew."""
        self._names = {}
        for points in (self.counts, self.gains, self.reached, *self.shares.values(), *self.waited.values()):
            points[:] = [point for point in points if point[0] < at]


@dataclass(slots=True)
class Records:
    """All that a run folder says, read once."""

    run: Path
    record: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)  # empty while the run has not finished
    training: dict[str, Points] = field(default_factory=dict)  # loss, lr and the task's own logs
    evaluations: dict[str, dict[str, Points]] = field(default_factory=dict)  # metric -> split -> points
    sites: dict[str, dict[str, Points]] = field(default_factory=dict)  # figure -> site -> points
    last_at_site: dict[str, dict[str, Any]] = field(default_factory=dict)
    latest: dict[str, dict[str, Any]] = field(default_factory=dict)  # split -> its last evaluation
    best: dict[str, Any] = field(default_factory=dict)
    reached: int = 0  # last step or round
    moved: dict[str, int] = field(default_factory=lambda: {"bytes_up": 0, "bytes_down": 0})
    stopped: str | None = None
    torn: int = 0  # lines that could not be read
    not_finite: float | None = None  # where a loss first was NaN or infinite
    samples_per_s: float | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def kind(self) -> str:
        return str(self.record.get("kind", "fit"))

    @property
    def clock(self) -> str:
        """What the curves run over."""
        return "round" if self.kind == "federate" else "step"

    @property
    def task(self) -> str:
        """The task as it was asked for; the class of one that lives in no file. Of a shrunk one that within, and what was done to it."""
        task = self.record["task"]
        name, values, done = str(task.get("reference") or task["class"]), mapping(task.get("values")), []
        while name.startswith("anyfit.tasks.shrunk:") and (within := mapping(values.get("task"))):
            done.append(name.rpartition(":")[2].lower())
            name, values = str(within.get("task")), mapping(within.get("values"))
        return ", ".join([name, *reversed(done)])

    @property
    def length(self) -> dict[str, int | None]:
        """Steps and epochs, or rounds, that were done; epochs are known at the end only."""
        if self.clock == "round":
            return {"rounds": whole(self.result.get("rounds")) or self.reached}
        return {"steps": whole(self.result.get("steps")) or self.reached, "epochs": whole(self.result.get("epochs"))}

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """Figures by split, the most telling split first: the result's, or the last evaluation's where there is none."""
        found = {name: figures for name, figures in mapping(self.result.get("splits")).items() if isinstance(figures, dict)}
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

    @property
    def partition(self) -> dict[str, dict[str, int]]:
        """Rows of each class at each site, where one data set was dealt to sites."""
        told = mapping(mapping(self.record.get("partition")).get("counts"))
        found = {
            site: {label: count for label, count in mapping(counts).items() if whole(count) is not None and count >= 0}
            for site, counts in told.items()
        }
        return {site: counts for site, counts in found.items() if counts}

    @property
    def fairness(self) -> dict[str, dict[str, Any]]:
        """How a metric differs between sites, by metric."""
        return {metric: spread for metric, spread in mapping(self.result.get("fairness")).items() if isinstance(spread, dict)}

    @property
    def comparison(self) -> list[dict[str, Any]]:
        """Figures of the same rows by different means, each with its name as `what`."""
        return [line for line in mappings(self.result.get("comparison")) if isinstance(line.get("what"), str)]

    @property
    def compared(self) -> list[str]:
        """The columns of the comparison in which anything stands."""
        return list(dict.fromkeys(name for line in self.comparison for name, value in scalars(line).items() if value is not None))

    def class_names(self, count: int) -> list[str]:
        """The target's categories where the schema has them, else numbers."""
        schema = mapping(self.record.get("schema"))
        for column in mappings(schema.get("columns")):
            names = column.get("categories")
            if column.get("name") == schema.get("target") and isinstance(names, list) and len(names) == count:
                return [str(name) for name in names]
        return [str(number) for number in range(count)]


def read(run: Path) -> Records:
    """The records of a run folder; all but run.json may be missing or torn."""
    path = run / "run.json"
    try:
        record = read_record(run)
    except (ValueError, OSError) as error:  # InputError is a ValueError
        if not path.is_file():
            raise
        raise InputError(f"{error}; restore {path} from a copy, or fit again into a new folder") from error
    task = mapping(record.get("task"))
    if not isinstance(task.get("reference") or task.get("class"), str):
        raise InputError(f"{path} names no task; restore it from a copy, or fit again into a new folder")
    records = Records(run, record)
    for result in _lines(run / "result.json", whole=True):
        records.result = result or {}
    for event in _lines(run / "metrics.jsonl"):
        if event is None:
            records.torn += 1
        else:
            _take(records, event)
    if records.reached > (whole(records.result.get(f"{records.clock}s")) or records.reached):
        records.result = {}  # of an earlier end, after which the run was resumed
    records.best = mapping(records.result.get("best")) or records.best
    records.stopped = str(records.result["stopped"]) if "stopped" in records.result else records.stopped
    moved = mapping(records.result.get("bytes"))  # counts what went before the first round too
    records.moved |= {f"bytes_{way}": count for way in ("up", "down") if (count := whole(moved.get(way))) is not None}
    timings = [line for line in _lines(run / "timings.jsonl") if line]
    for line in timings:
        records.ranks.take(line)
    speeds = sorted(filter(None, (number(line.get("samples_per_s")) for line in timings)))
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


def _take(records: Records, event: dict[str, Any]) -> None:
    """Sort one line of metrics.jsonl into the curves."""
    kind, at = event.get("event"), number(event.get(records.clock))
    if at is None:
        return
    records.reached = max(records.reached, int(at))
    if kind == "stop":
        records.stopped = str(event.get("reason"))
    elif kind in ("step", "round"):
        for name, value in (scalars(event) | scalars(mapping(event.get("logs")))).items():
            _point(records, records.training.setdefault(name, []), at, value, name)
        for name in records.moved:
            records.moved[name] += whole(event.get(name)) or 0
        _take_sites(records, event, at, "")
    elif kind == "evaluate":
        split = str(event.get("split", "evaluation"))
        for name, value in scalars(event).items():
            _point(records, records.evaluations.setdefault(name, {}).setdefault(split, []), at, value, name)
        records.latest[split] = event
        if event.get("best") is True:
            records.best = {records.clock: at, "loss": event.get("loss")}
        _take_sites(records, event, at, f"{split} ")


def _take_sites(records: Records, event: dict[str, Any], at: float, prefix: str) -> None:
    """What each site told in one round."""
    for site, entry in mapping(event.get("sites")).items():
        told = mapping(entry)
        last = records.last_at_site.setdefault(site, {"rounds": 0, "bytes_up": 0, "bytes_down": 0})
        if not prefix:  # a round; an evaluation tells of other rows than those to train on
            last["rounds"] += 1
            last["rows"] = whole(told.get("rows")) or last.get("rows")
        for name in ("bytes_up", "bytes_down"):
            last[name] += whole(told.get(name)) or 0
        for name, value in scalars(told).items():
            _point(records, records.sites.setdefault(prefix + name, {}).setdefault(site, []), at, value, name)
            last[prefix + name] = value


def _point(records: Records, points: Points, at: float, value: float | None, name: str) -> None:
    """Add a point; what is not finite cannot be drawn, and for a loss it is said on the page."""
    if value is not None:
        points.append((at, value))
    elif name == "loss" and records.not_finite is None:
        records.not_finite = at


def low_is_worse(name: str) -> bool:
    """Whether the lowest value of a figure is the worst one, by its name."""
    return any(word in name for word in _LOW_IS_WORSE)


def scalars(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """The named numbers among an event's entries; None where one is not finite."""
    plain = (int, float, type(None))
    return {
        str(name): number(value)
        for name, value in figures.items()
        if name not in _BOOKKEEPING and isinstance(value, plain) and not isinstance(value, bool)
    }


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def whole(value: Any) -> int | None:
    """The value if it is a whole number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON array."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _is_counts(row: Any, size: int) -> bool:
    return isinstance(row, list) and len(row) == size and all(isinstance(cell, int) and cell >= 0 for cell in row)
