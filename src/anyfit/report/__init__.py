"""A run folder as one page that stands alone, and its plots as PNG files. Reads JSON records only: neither torch nor numpy.

records (what the folder says) -> plots (pictures) -> page (its parts, made with markup) -> page.html (frame and style)
"""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from anyfit.report import shrunk
from anyfit.report.markup import markup
from anyfit.report.page import build
from anyfit.report.plots import draw
from anyfit.report.records import mapping, number, read, scalars, whole
from anyfit.values import write_atomic

__all__ = ["summary", "write_report"]


def write_report(run: Path) -> Path:
    """Write `report.html` and the PNG plots into the run folder; plots that no longer apply are removed."""
    records = read(Path(run))
    if records.kind == "shrink":
        shrunk.draw(records.run)
    pictures = draw(records)
    for name in ("loss", "metrics", "confusion", "partition", "sites", "privacy", "comparison", "ranks"):
        path = records.run / f"{name}.png"
        if name in pictures:
            write_atomic(path, pictures[name].png)
        else:
            path.unlink(missing_ok=True)
    template = Template(Path(__file__).with_name("page.html").read_text("utf-8"))
    title = f"{records.task} · {records.run.resolve().name} · anyfit"
    page = template.substitute(title=markup(title), body="\n".join(build(records, pictures)))
    path = records.run / "report.html"
    write_atomic(path, page.encode("utf-8", "replace"))  # JSON may carry lone surrogates, UTF-8 cannot
    return path


def summary(run: Path) -> dict[str, Any]:
    """What the run is and how it went, as strict JSON: task, plan, steps, best, and the final metrics by split."""
    records = read(Path(run))
    result = records.result
    return {
        "run": str(run),
        "kind": records.kind,
        "task": records.task,
        "values": mapping(records.record["task"].get("values")),
        "plan": mapping(records.record.get("plan")),
        "finished": bool(result),
        "stopped": records.stopped,
        **records.length,
        "seconds": number(result.get("seconds")),
        "parameters": whole(records.record.get("parameters")),
        "best": {name: number(value) for name, value in records.best.items()} or None,
        "splits": {split: scalars(figures) for split, figures in records.splits.items()},
    }
