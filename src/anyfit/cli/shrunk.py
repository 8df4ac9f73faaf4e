"""anyfit shrink: a trained run made to fit a device, and what each step of that costs and saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from anyfit.cli.options import (
    Device,
    Json,
    Quiet,
    RunFolder,
    Seed,
    Sets,
    SourceFields,
    Target,
    fraction_or_name,
    pairs,
    print_result,
    run_folder,
    source_of,
)
from anyfit.cli.progress import Progress
from anyfit.errors import InputError

if TYPE_CHECKING:
    from anyfit.data import Source
    from anyfit.task import Task

__all__ = ["show_stages", "shrink"]

COLUMNS = {
    "parameters": "parameters",
    "nonzero": "not zero",
    "weights_bytes": "bytes",
    "ram_bytes": "RAM",
    "macs": "MACs",
    "latency_us": "us/row",
}


def shrink(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to train and calibrate on (default: those that RUN was trained on).")
    ] = None,
    target: Target = None,
    test: Annotated[
        str | None, typer.Option("--test", help="Rows that all stages are compared on: a file, or a fraction (default: those of RUN).")
    ] = None,
    structured: Annotated[
        float | None, typer.Option("--structured", metavar="SHARE", help="Cut this share of each layer's channels.")
    ] = None,
    prune: Annotated[float | None, typer.Option("--prune", metavar="SHARE", help="Make this share of all weights zero.")] = None,
    quantize: Annotated[str | None, typer.Option("--quantize", metavar="int8", help="Compute in int8.")] = None,
    power_of_two: Annotated[
        bool, typer.Option("--power-of-two", help="int8 scales by which a device shifts, and does not multiply.")
    ] = False,
    finetune: Annotated[int, typer.Option("--finetune", metavar="EPOCHS", help="Epochs of training in each stage (default: none).")] = 0,
    calibration: Annotated[int, typer.Option("--calibration", metavar="ROWS", help="Rows that int8 ranges are measured on.")] = 2000,
    export: Annotated[
        str | None,
        typer.Option("--export", metavar="c,onnx", help="What to write (default: what the result and this machine allow); or none."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the C functions and of the files (default: after the task).")] = None,
    source: SourceFields = None,
    set: Sets = None,
    seed: Seed = None,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option("--run", metavar="OUT", help="Folder for the shrunk run (default: runs/<run>-shrunk-<n>).")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune, quantize and export a trained run; each stage is measured on the same rows."""
    from anyfit.run import read_record
    from anyfit.shrink.pipeline import shrink as make
    from anyfit.trained import open_run

    record = read_record(run)
    rows = _source(run, record, data, target, source)
    tested = fraction_or_name(test) if test is not None else _tested(run, record, rows)
    task, plan = _set(open_run(run)[0], {**pairs("--set", set), **({} if device is None else {"device": device})})
    folder = run_folder(out, f"{run.resolve().name}-shrunk", False)
    with _Trainings(quiet) as progress:
        done = make(
            task,
            run,
            rows,
            test=tested,
            structured=structured,
            prune=prune,
            quantize=quantize,
            power_of_two=power_of_two,
            finetune=finetune,
            calibration=calibration,
            export=None if export is None else _kinds(export),
            name=name,
            run=folder,
            seed=seed or 0,
            on_event=progress,
            **plan,
        )
    told = done.to_json()
    was, now = ((record["data"].get("train") or {}).get("sha256"), read_record(folder)["data"].get("train", {}).get("sha256"))
    if data is None and was is not None and was != now:
        told["notes"].append("the rows trained and calibrated on are not all of those that the run was trained on, or others")
    files = [str(folder / file) for artifact in told["artifacts"] for file in artifact["files"]]
    result = {"run": str(folder), "parent": str(run), **told, "files": files, "report": str(folder / "report.html")}
    result.pop("memory")  # a picture, and in shrink.json

    def show() -> None:
        show_stages(told["stages"])
        for note in told["notes"]:
            typer.echo(note)
        typer.echo("")
        for file in files:
            typer.echo(f"wrote   {file}")
        typer.echo(f"run     {folder}\nreport  {result['report']}")

    print_result(result, json, show)


def _kinds(export: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in export.split(",")))
    if "none" in kinds and len(kinds) > 1:
        raise InputError(f"--export (={export!r}): none stands alone; give it, or what is to be written")
    return () if kinds == ("none",) else kinds


# ------------------------------------------------------------------ what is not given


def _source(run: Path, record: Mapping[str, Any], data: str | None, target: str | None, more: list[str] | None) -> Source:
    """The rows: as given, or those that the run was trained on where they still are."""
    told = record["data"].get("train") or {}
    if data is None:
        data = told.get("source")
        if data is None or not _is_there(data):
            what = f"was trained on {data}, which is not there now" if data else f"(a {record['kind']}) names no rows of its own"
            raise InputError(f"--data is missing: run (={str(run)!r}) {what}; give rows like those that it was trained on")
    source = source_of(data, target, fields=more)
    size = tuple(told["size"]) if "size" in told else None
    return replace(source, missing=source.missing or tuple(told.get("missing", ())), size=source.size or size)


def _is_there(data: str) -> bool:
    file = data.rpartition(":")[0]  # file.py:function
    return data == "digits" or Path(data).exists() or (file.endswith(".py") and Path(file).exists())


def _tested(run: Path, record: Mapping[str, Any], source: Source) -> Any:
    """The rows that the run was tested on, found again by their hash: of a source of their own, a part of the data, or a fraction of it."""
    from anyfit.data import fingerprint, num_rows, read_splits, take_fraction

    told, trained = record["data"].get("test"), record["data"].get("train") or {}
    if told is None:
        raise InputError(
            f"--test is missing: run (={str(run)!r}) was not tested; give a file, or a fraction (whose rows, if it was trained on them, flatter it)"
        )
    own = told.get("source")
    if own is not None and own != trained.get("source") and _is_there(own):
        rows = read_splits(source_of(own, None), None, None, wants_validation=False)
        if fingerprint(rows.get("test", rows["train"])) == told.get("sha256"):
            return own
        raise InputError(
            f"--test is missing: the rows of {own} are not those that run (={str(run)!r}) was tested on; give rows to compare on"
        )
    parts = read_splits(source, None, None, wants_validation=False)
    if "test" in parts and fingerprint(parts["test"]) == told.get("sha256"):
        return None
    total = num_rows(parts["train"])
    share = (told.get("rows") or 0) / total if total else 0.0
    near = [round(share, digits) for digits in (1, 2, 3)] + sorted(
        (part / 20 for part in range(1, 20)), key=lambda part: abs(part - share)
    )[:4]
    for fraction in dict.fromkeys([told.get("fraction", 0.0), *near, 0.1, 0.2]):  # equal rows go together, so the share may be far off
        if 0 < fraction < 1:
            rows = take_fraction(parts["train"], fraction, group=source.group, salt="test")[1]
            if fingerprint(rows) == told.get("sha256"):
                return fraction
    raise InputError(
        f"--test is missing: the rows that run (={str(run)!r}) was tested on are not found in {source.name}; give a file or a fraction"
    )


def _set(task: Task, values: Mapping[str, Any]) -> tuple[Task, dict[str, Any]]:
    """Fields of the plan, and the task with those of its own replaced: of a shrunk one, of the first task within that has them."""
    from anyfit.values import Plan

    plan = {name: value for name, value in values.items() if name in Plan.__dataclass_fields__}
    return _replaced(task, {name: value for name, value in values.items() if name not in plan}), plan


def _replaced(task: Task, values: Mapping[str, Any]) -> Task:
    from anyfit.tasks.shrunk import Shrunk

    if not isinstance(task, Shrunk):
        return task.replaced(**values)
    own = {field.name for field in fields(task)} - {field.name for field in fields(Shrunk)}
    within = _replaced(task.task, {name: value for name, value in values.items() if name not in own})
    return replace(task.replaced(**{name: value for name, value in values.items() if name in own}), task=within)


# ------------------------------------------------------------------ what is shown


class _Trainings:
    """Progress of several trainings, one after the other."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._stack, self._now = quiet, ExitStack(), Progress(quiet)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._now)
        return self

    def __exit__(self, *given: object) -> None:
        self._stack.close()

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "start":
            self._stack.close()
            self._now = self._stack.enter_context(Progress(self._quiet))
        self._now(event)


def show_stages(stages: Sequence[Mapping[str, Any]]) -> None:
    """The stages as a table: ~ stands before what is estimated."""
    from anyfit.report.shrunk import headline

    metric = headline(stages)
    names = {metric: metric, **COLUMNS}
    lines = [["stage", *names.values()], *([stage["stage"], *(_cell(stage, name) for name in names)] for stage in stages)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        typer.echo("  ".join([*cells, *([lines_note] if number and (lines_note := stages[number - 1].get("note")) else [])]).rstrip())
        if not number:
            typer.echo("  ".join("-" * width for width in widths))
    equal = next((stage["equal"] for stage in stages if "equal" in stage), None)
    typer.echo("~ is estimated from the graph; the rest is measured, on the same test rows and on this machine")
    made = next((stage for stage in stages if "code_bytes" in stage["costs"]), None)
    if made:
        code, stack = (made["costs"].get(name, {}).get("value") for name in ("code_bytes", "stack_bytes"))
        beside = f", {stack:,} of stack" if stack is not None else ""
        typer.echo(f"beside the constants and the arena, the compiled C takes {code:,} bytes of code{beside} ({made['compiler']})")
    if equal:
        typer.echo(f"the compiled C equals the integer program in each answer and logit of {equal['rows']:,} rows")


def _cell(stage: Mapping[str, Any], name: str) -> str:
    figure = stage["metrics"].get(name) or stage["costs"].get(name)
    if figure is None:
        return "-"
    value = figure["value"]
    shown = f"{value:.4f}" if name in stage["metrics"] else f"{value:,.1f}" if name == "latency_us" else f"{value:,}"
    return f"~{shown}" if figure["kind"] == "estimated" else shown
