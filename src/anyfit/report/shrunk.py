"""What the page of a shrunk run says: each stage's worth and cost, the memory of one prediction, and what was exported."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyfit.report.markup import Html, spell, tag
from anyfit.report.memory import draw_memory, draw_tradeoff
from anyfit.report.records import Records, mapping, mappings, number

__all__ = ["COSTS", "draw", "headline", "sections", "stages_of"]

PICTURES = ("memory", "tradeoff")
METRICS = ("accuracy", "rmse", "auroc", "f1")  # the first that a stage has is the one that is told of
COSTS = {
    "parameters": "parameters",
    "nonzero": "not zero",
    "weights_bytes": "weights, bytes",
    "ram_bytes": "RAM, bytes",
    "weights_bytes_in_int8": "weights in int8",
    "ram_bytes_in_int8": "RAM in int8",
    "macs": "MACs",
    "code_bytes": "code, bytes",
    "stack_bytes": "stack, bytes",
    "latency_us": "µs a row",
}
DPI, PAGE = 170, 9.2 / 1024  # of the pictures, and inches of a pixel of the page


def draw(run: Path) -> None:
    """The PNGs of a shrunk run; those that do not apply are removed."""
    told = _told(run)
    memory, stages = mapping(told.get("memory")), stages_of(told)
    metric = headline(stages)
    ran = any(
        stage.get("form") == "c" and stage.get("metrics") for stage in stages
    )  # then the integers that it was compared with lie beneath
    points = [
        {"stage": stage["stage"], metric: _value(stage, metric), "bytes": size, "kind": kind}
        for stage in stages
        if not (ran and stage.get("form") == "int8")
        if (size := _value(stage, "weights_bytes")) is not None and (kind := _kind(stage, "weights_bytes"))
    ]
    if memory:
        draw_memory(memory, run / "memory.png")
    if points:
        draw_tradeoff(points, run / "tradeoff.png", metric=metric)
    for name, there in (("memory", memory), ("tradeoff", points)):
        if not there:
            (run / f"{name}.png").unlink(missing_ok=True)


def sections(records: Records) -> Iterator[Html]:
    """Parts of the page."""
    told = _told(records.run)
    stages = stages_of(told)
    if not stages:
        yield _section("Stages", tag("p", "shrink.json is missing or torn: shrink again into a new folder.", class_="note"))
        return
    metric = headline(stages)
    notes = [f"{stage['stage']}: {stage['note']}" for stage in stages if "note" in stage] + [str(note) for note in _list(told.get("notes"))]
    legend = (
        "≈ is estimated, from the graph; all else is measured: metrics on the same test rows, latency on this machine with one thread (torch, "
        "onnxruntime and the compiled C by its own clock), bytes of C in the object file, of ONNX as the file."
    )
    parts: list[Html] = [_table(stages, metric), tag("p", legend, class_="note")]
    parts += [tag("div", note, class_="notice") for note in notes]
    parts += [_picture(records.run / "tradeoff.png", f"{metric} against bytes", "")]
    yield _section("Stages", *[part for part in parts if part])
    if picture := _picture(
        records.run / "memory.png", "Memory of one prediction", "A box for each value, over the operations that need it."
    ):
        yield _section("Memory", picture)
    yield _made(records, told, stages)


def stages_of(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages that shrink.json tells of."""
    return [stage for stage in mappings(told.get("stages")) if isinstance(stage.get("stage"), str)]


def headline(stages: Sequence[Mapping[str, Any]]) -> str:
    """The metric that is told of."""
    names = mapping(stages[0].get("metrics")) if stages else {}
    return next((name for name in METRICS if name in names), "loss")


def _told(run: Path) -> dict[str, Any]:
    try:
        return mapping(json.loads((run / "shrink.json").read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}


def _figure(stage: Mapping[str, Any], name: str) -> dict[str, Any]:
    return mapping(mapping(stage.get("metrics")).get(name)) or mapping(mapping(stage.get("costs")).get(name))


def _value(stage: Mapping[str, Any], name: str) -> float | None:
    return number(_figure(stage, name).get("value"))


def _kind(stage: Mapping[str, Any], name: str) -> str:
    return str(_figure(stage, name).get("kind"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _section(title: str, *children: object) -> Html:
    return tag("section", tag("h2", title), *children)


def _table(stages: Sequence[Mapping[str, Any]], metric: str) -> Html:
    """A row for each stage; a column for each figure that any of them has."""
    names = [name for name in (metric, *COSTS) if any(_value(stage, name) is not None for stage in stages)]
    head = [tag("th", "stage", scope="col"), *(tag("th", COSTS.get(name, name), scope="col", class_="number") for name in names)]
    rows = []
    for stage in stages:
        cells = []
        for name in names:
            value = _value(stage, name)
            mark = "≈ " if value is not None and _kind(stage, name) == "estimated" else ""
            shown = value if name == metric or value is None else round(value, 1) if name == "latency_us" else round(value)
            cells.append(tag("td", f"{mark}{spell(shown)}", class_="number"))
        rows.append(tag("tr", tag("th", stage["stage"], scope="row", class_="nowrap"), *cells))
    return tag("div", tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows)), class_="wide")


def _picture(path: Path, alt: str, caption: str) -> Html:
    """A PNG as it stands in the folder, at the size that it was drawn for; nothing where there is none."""
    if not path.is_file():
        return Html()
    content = path.read_bytes()
    wide = struct.unpack(">I", content[16:20])[0] / DPI / PAGE
    image = tag("img", src=f"data:image/png;base64,{base64.b64encode(content).decode()}", alt=alt)
    return tag("figure", image, *([tag("figcaption", caption)] if caption else []), style=f"width: {wide:.0f}px")


def _made(records: Records, told: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> Html:
    """What it was made from, and what was written."""
    parent = mapping(mapping(records.record.get("shrink")).get("parent"))
    made = f"{parent['run']}, weights {str(parent.get('sha256'))[:12]}" if parent.get("run") else "a state in memory"
    lines = [("made from", made)]
    for artifact in mappings(told.get("artifacts")):
        files = ", ".join(map(str, _list(artifact.get("files"))))
        lines.append((str(artifact.get("kind")), files))
    for stage in stages:
        equal, agreement = mapping(stage.get("equal")), mapping(stage.get("agreement"))
        if equal:
            lines.append(
                ("C against the integers", f"{equal.get('rows'):,} rows, each answer and each logit equal ({stage.get('compiler')})")
            )
        if agreement:
            share = number(agreement.get("answers")) or 0.0
            lines.append(("ONNX against the integers", f"{share:.2%} of {spell(agreement.get('rows'))} answers equal"))
    facts = [tag("div", tag("dt", name), tag("dd", value)) for name, value in lines]
    return _section("What was written", tag("dl", *facts, class_="facts"))
