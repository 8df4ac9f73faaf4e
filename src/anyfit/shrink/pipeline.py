"""The whole chain: a trained task is pruned, quantized and exported, and what it is worth and costs is measured before, between and after."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from anyfit import data as rooms
from anyfit.data import Blocks, Rows, Source
from anyfit.errors import AnyfitError, DataError, InputError, MissingExtra, RunError, StorageError, TaskError
from anyfit.fit import fit as fit_here
from anyfit.prepare import opened
from anyfit.program import Program, QuantizedNetwork, describe_row
from anyfit.record import record_of, weights_file
from anyfit.run import Folder
from anyfit.schema import Schema
from anyfit.shrink import c, compiled, onnx
from anyfit.shrink.export import Artifact, program_of
from anyfit.shrink.export import export as export_one
from anyfit.shrink.opened import FitShaped, Opened, open_model, state_of
from anyfit.shrink.prune import prune as prune_weights
from anyfit.shrink.quantize import check_columns
from anyfit.shrink.quantize import quantize as quantize_network
from anyfit.shrink.stages import OWN, Bench, Stage, compiled_stage, onnx_stage, stage_of
from anyfit.state import State
from anyfit.task import Task
from anyfit.tasks.shrunk import Quantized
from anyfit.tasks.shrunk import Shrunk as Wrapped
from anyfit.values import Plan, write_atomic, write_json

__all__ = ["EXPORTS", "Shrunk", "shrink"]

EXPORTS = ("c", "onnx")
OnEvent = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Shrunk:
    """What a chain came to: the last task and its state, figures of each stage, and what was written."""

    task: Task
    state: State
    stages: tuple[Stage, ...]
    artifacts: tuple[Artifact, ...]
    memory: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """For records. Files are named from the run folder on, where there is one."""

        def place(path: Path) -> str:
            return str(path.relative_to(self.path)) if self.path is not None else path.name

        artifacts = [{**each.to_json(), "path": place(each.path), "files": [place(file) for file in each.files]} for each in self.artifacts]
        stages = [stage.to_json() for stage in self.stages]
        return {"stages": stages, "artifacts": artifacts, "memory": self.memory, "notes": list(self.notes)}


def shrink(
    task: Task,
    state: Any,
    data: Any,
    *,
    test: Any = None,
    target: str | None = None,
    structured: float | None = None,
    prune: float | None = None,
    quantize: str | None = None,
    power_of_two: bool = False,
    finetune: int = 0,
    calibration: int = 2000,
    export: Sequence[str] | None = None,
    name: str | None = None,
    run: str | Path | None = None,
    seed: int = 0,
    fit: FitShaped = fit_here,
    on_event: OnEvent | None = None,
    **plan: Any,
) -> Shrunk:
    """Shrink a trained task: cut channels (`structured`, a share), make weights zero (`prune`, a share), compute in int8 (`quantize`), and export.

    Each stage trains for `finetune` epochs and is measured on the same `test` rows: a fraction of `data` as in `fit`, a source, or None where
    `data` has a part for testing. `export`: "c" (compiled, run over all test rows, and refused unless each bit is that of the integer program) and
    "onnx"; None: what the result and this machine allow. `name`: of the C functions and the files. `run`: a new folder, which becomes an
    ordinary run with the exported files, figures and a page; None writes nothing. `state`: of a run, or its path. `fit`:
    `partial(federate, rounds=...)` with sites as `data`. `plan`: fields of `Plan`, for the training.
    """
    begun = time.monotonic()
    heard = _Heard(on_event)
    asked = _Asked(structured, prune, quantize, power_of_two, finetune, tuple(export) if export is not None else None, name or _name(task))
    asked.check(task)
    if plan.get("epochs") is not None:
        raise InputError(f"epochs (={plan['epochs']}): how long each stage trains is finetune here")
    found = open_model(task, state)
    if found.position.step == 0:
        raise InputError("state is that of an untrained network (step 0); train it first, then shrink it")
    local = "strategy" not in inspect.signature(fit).parameters
    source, rows, sources = _rows(data if local else None, test, target, found.schema)
    final = task.plan().updated(**{key: value for key, value in plan.items() if key not in ("epochs", "steps", "rounds")})
    bench = Bench(rows["test"], final, sources)
    training = source if local else data
    row = found.row(training if local else None)
    with _folder(run, _origin(state)) as folder:
        kinds, notes = _rehearsed(asked, found, row, trains=bool(finetune or plan.get("steps")) or not local)
        if prune and "c" in kinds:
            notes.append("C stores zeros as it stores other weights: structured makes it smaller and faster, prune does not")
        for note in notes:
            heard.say(note)
        options: dict[str, Any] = {**plan, "seed": seed, "fit": fit, "on_event": heard}
        if finetune:
            options["epochs"] = finetune
        predicted = bool(asked.quantize or kinds) and any(task.own_method(method) for method in OWN)
        if predicted:
            notes.append(
                "figures are computed of predictions at every stage, for the task's own evaluation knows nothing of exported networks"
            )
            heard.say(notes[-1])
        stage, costs = stage_of("original", found, bench, row, predicted=predicted)
        heard.say(_line(stage))
        stages, now = [stage], (task, state_of(found.model, found))
        for title, change in _changes(asked, training, calibration, options):
            now = heard.through(change, now)
            found = open_model(*now)
            stage, costs = stage_of(title, found, bench, row, predicted=predicted)
            stages.append(stage)
            heard.say(_line(stage))
        with TemporaryDirectory(prefix="anyfit-export-") as scratch:
            artifacts = []
            for kind in kinds:
                artifact = export_one(*now, Path(scratch) / f"{asked.name}.{kind}", name=asked.name)
                stages.append((compiled_stage if kind == "c" else onnx_stage)(artifact, now[0], found.schema, bench))
                heard.say(_line(stages[-1]))
                artifacts.append(artifact)
            done = Shrunk(*now, tuple(stages), tuple(artifacts), None if costs is None else costs.memory(), tuple(notes))
            if folder is not None:
                record = {"data": sources, "shrink": {**asked.to_json(), "calibration": calibration, "parent": _parent(state)}}
                done = _written(folder, done, found, final.updated(seed=seed), record, time.monotonic() - begun)
    if folder is not None:
        from anyfit.report import write_report

        write_report(folder.path)
    return done


class _Heard:
    """Passes the events of trainings on, and notes whether a signal ended one."""

    def __init__(self, on_event: OnEvent | None) -> None:
        self._on_event, self._signalled = on_event, False

    def __call__(self, event: dict[str, Any]) -> Any:
        self._signalled |= event["event"] == "stop" and event.get("reason") == "signal"
        return None if self._on_event is None else self._on_event(event)

    def say(self, text: str) -> None:
        """A word between two trainings."""
        self({"event": "notice", "text": text})

    def through(self, change: Callable[[Task, State], tuple[Task, State]], now: tuple[Task, State]) -> tuple[Task, State]:
        """A change that trains; what a signal cut short goes no further."""
        try:
            now = change(*now)
        except RunError:
            if not self._signalled:
                raise
        if self._signalled:
            raise KeyboardInterrupt
        return now


# ------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class _Asked:
    structured: float | None
    prune: float | None
    quantize: str | None
    power_of_two: bool
    finetune: int
    export: tuple[str, ...] | None
    name: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "export": None if self.export is None else list(self.export)}

    def check(self, task: Task) -> None:
        """All that can be refused before any row is read."""
        for option, share, what in (("structured", self.structured, "channels that go"), ("prune", self.prune, "weights that become zero")):
            if share is not None and not 0 < share < 1:
                raise InputError(f"{option} (={share}) must be above 0 and below 1: the share of {what}")
        if self.quantize not in (None, "int8"):
            raise InputError(f"quantize (={self.quantize!r}) must be int8")
        if self.finetune < 0:
            raise InputError(f"finetune (={self.finetune}) must be a number of epochs, 0 or more")
        unknown = [kind for kind in self.export or () if kind not in EXPORTS]
        if unknown:
            raise InputError(f"export (={unknown[0]!r}) must be one of {', '.join(EXPORTS)}")
        quantized = isinstance(task, Quantized)
        if quantized and (self.quantize or self.prune or self.structured):
            option = "quantize" if self.quantize else "prune" if self.prune else "structured"
            raise TaskError(
                f"{option}: the network is quantized already; start from the run that it was made from, or leave {option} out to export"
            )
        if self.power_of_two and not self.quantize:
            raise InputError("power_of_two is about int8 scales; add quantize='int8'")
        if "c" in (self.export or ()) and not (quantized or self.quantize):
            raise InputError("export (='c') needs quantize='int8': C is written of integers alone; floats are exported to ONNX")
        if not (self.structured or self.prune or self.quantize or self.export):
            raise InputError("there is nothing to do; give structured, prune, quantize or export")
        c.check_name(self.name)
        if "onnx" in (self.export or ()):
            absent = _absent()
            if absent is not None:
                raise MissingExtra(absent, "shrink")


def _absent() -> str | None:
    """The first package of those that ONNX needs which is not installed."""
    return next((package for package in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(package) is None), None)


def _name(task: Task) -> str:
    """Of functions and files, after the class of the innermost task."""
    while isinstance(task, Wrapped):
        task = task.task
    return f"{type(task).__name__.lower().lstrip('_') or 'network'}_model"


def _rehearsed(asked: _Asked, found: Opened, row: Any, *, trains: bool) -> tuple[list[str], list[str]]:
    """Which exports there will be, and notes on those left out. What cannot be lowered or exported is refused here, before any training."""
    notes: list[str] = []
    task, state = found.task, state_of(found.model, found)
    if asked.quantize:
        check_columns(found)
        task = Quantized(task=found.task, inputs=describe_row(row), power_of_two=asked.power_of_two)
        network = QuantizedNetwork(task.lowered(found.model), power_of_two=asked.power_of_two)
        torch.nn.init.ones_(network.ranges)  # any will do to see whether it can be written
        state = state_of(network, found)
    int8 = isinstance(task, Quantized)
    wanted = asked.export
    if wanted is None:
        wanted = (*(("c",) if int8 else ()), "onnx")
        if (absent := _absent()) is not None:
            notes.append(f"not exported to ONNX: {absent} is not installed (pip install 'anyfit[shrink]')")
            wanted = tuple(kind for kind in wanted if kind != "onnx")
    kinds: list[str] = []
    for kind in wanted:
        try:
            if int8:
                program = program_of(task, state)
                with TemporaryDirectory(prefix="anyfit-export-") as scratch:
                    if kind == "c":
                        _compiled(program, asked.name, Path(scratch))
                    else:
                        onnx.export_int8(program, Path(scratch, "model.onnx"))
            elif trains or asked.export is None:
                with TemporaryDirectory(prefix="anyfit-export-") as scratch:
                    export_one(task, state, Path(scratch, "model.onnx"), inputs=row)
        except AnyfitError as error:
            if asked.export is not None:
                raise
            notes.append(f"not exported to {'C' if kind == 'c' else 'ONNX'}: {error}")
        else:
            kinds.append(kind)
    return kinds, notes


def _compiled(program: Program, name: str, folder: Path) -> None:
    """Whether the C compiler here makes something that runs, before hours are spent."""
    files = c.emit(program, name, c.plan(program))
    if compiled.compiler() is None:
        return
    for file, text in files.items():
        write_atomic(folder / file, text.encode())
    size = sum(given.bytes for given in program.inputs)
    compiled.run(compiled.build(folder, name, folder), np.zeros((1, size), np.uint8), program.operations[-1].bytes)


def _changes(
    asked: _Asked, data: Any, calibration: int, options: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[Task, State], tuple[Task, State]]]]:
    """The stages in their order, each a change of a task and its state."""
    if asked.structured:
        share = asked.structured
        yield f"structured {100 * share:g} %", lambda task, state: prune_weights(task, state, data, share, structured=True, **options)
    if asked.prune:
        amount = asked.prune
        yield f"pruned {100 * amount:g} %", lambda task, state: prune_weights(task, state, data, amount, **options)
    if asked.quantize:
        more: dict[str, Any] = {"calibration": calibration, "power_of_two": asked.power_of_two}
        yield "int8", lambda task, state: quantize_network(task, state, data, **more, **options)


# ------------------------------------------------------------------ rows


def _rows(data: Any, test: Any, target: str | None, schema: Schema) -> tuple[Source | None, dict[str, Rows], dict[str, dict[str, Any]]]:
    """Rows to train on as a source, all rows by split, and what is recorded of them. Columns are those of the schema that was trained with."""
    if data is None:  # sites keep theirs
        if test is None or isinstance(test, int | float):
            raise InputError(f"test (={test}) must be a source, for the rows stay at their sites; give rows that no site has")
        source = opened(test, target)
        read = _known(source, schema, source.read())
        rows = read[1].get("test", read[1]["train"])
        return None, {"test": rows}, {"test": _about(source.name, rows)}
    given = opened(data, target)
    tested = test if test is None or isinstance(test, int | float) else opened(test)
    parts = rooms.read_splits(given, None, tested, wants_validation=False)
    if "test" not in parts:
        raise InputError(
            "test is missing: stages are compared on rows that are not trained on; give a fraction as in fit (test=0.2), or a source"
        )
    source, parts = _known(given, schema, parts)
    names = {"train": given.name, "test": given.name if test is None or isinstance(test, int | float) else Source.of(test).name}
    sources = {split: _about(name, parts[split]) for split, name in names.items()}
    if isinstance(test, int | float):
        sources["test"]["fraction"] = float(test)
    sources["train"] |= {name: list(given_) for name, given_ in (("missing", given.missing), ("size", given.size)) if given_}
    return source, parts, sources


def _about(name: str, rows: Rows) -> dict[str, Any]:
    return {"source": name, "rows": rooms.num_rows(rows), "sha256": rooms.fingerprint(rows)}


def _known(source: Source, schema: Schema, parts: dict[str, Rows]) -> tuple[Source, dict[str, Rows]]:
    """The training rows as a source with the types, target and weight that the network was trained with, and without other columns."""
    rows = parts["train"]
    plain = replace(source, origin=rows, split=None, group=None, table=None, query=None)
    if not schema.columns or not isinstance(rows, pa.Table | Blocks):
        return plain, parts
    names = rows.column_names
    wanted = {column.name: column.type for column in schema.columns if column.name in names}
    weight = schema.weight if schema.weight in names else None
    others = tuple(name for name in names if name not in wanted and name != weight)
    missing = [name for name in schema.targets if name not in names]
    if missing:
        raise DataError(f"target (={missing[0]!r}) is not a column of {source.name}; the columns are: {', '.join(names)}")
    return replace(plain, target=schema.target, types=wanted, weight=weight, ignore=others), parts


# ------------------------------------------------------------------ the folder


def _line(stage: Stage) -> str:
    """One stage in a few words."""
    shown = [name for name in ("accuracy", "rmse", "auroc", "loss") if name in stage.metrics][:1]
    words = [f"{name} {stage.value(name):.4f}" for name in shown]
    size = stage.value("weights_bytes")
    words += [f"{size:,} bytes of weights"] if size is not None else []
    return f"{stage.name}: {', '.join([*words, *([stage.about['note']] if 'note' in stage.about else [])])}"


def _origin(state: Any) -> Path | None:
    return Path(state) if isinstance(state, str | Path) else getattr(state, "path", None)


def _parent(state: Any) -> dict[str, Any]:
    """What a shrunk run was made from."""
    path = _origin(state)
    if path is None:
        return {"run": None, "sha256": None}
    with weights_file(path).open("rb") as file:
        return {"run": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextmanager
def _folder(run: str | Path | None, parent: Path | None) -> Iterator[Folder | None]:
    """The run's folder, held; what failed leaves nothing behind."""
    if run is None:
        yield None
        return
    path = Path(run)
    if parent is not None and path.resolve() == parent.resolve():
        raise InputError(f"run (={str(path)!r}) is the run that is to be shrunk; give another folder")
    if (path / "run.json").exists():
        raise InputError(f"run (={str(path)!r}) holds a run already; give another folder")
    before = set(path.glob("checkpoints/*"))
    folder = Folder(path, resume=False)
    try:
        yield folder
    except BaseException:
        if not (path / "run.json").exists():
            shutil.rmtree(path / "export", ignore_errors=True)
            for file in (path / "shrink.json", path / "result.json", *(set(path.glob("checkpoints/*")) - before)):
                file.unlink(missing_ok=True)
        raise
    finally:
        folder.close()


def _written(folder: Folder, done: Shrunk, found: Opened, plan: Plan, more: Mapping[str, Any], seconds: float) -> Shrunk:
    """The run in its folder; run.json comes last, for it is what makes a run of it."""
    path, state = folder.path, done.state
    if state.schema is None:
        state = replace(state, schema=Schema((), None).to_json())
    try:
        artifacts = []
        for artifact in done.artifacts:
            (path / "export").mkdir(exist_ok=True)
            files = tuple(path / "export" / file.name for file in artifact.files)
            for file, target in zip(artifact.files, files, strict=True):
                write_atomic(target, file.read_bytes())
            artifacts.append(replace(artifact, path=path / "export" / artifact.path.name, files=files))
    except OSError as error:
        raise StorageError(f"cannot write {path / 'export'}: {error.strerror or error}; free some space and shrink again") from error
    written = replace(done, artifacts=tuple(artifacts), path=path)
    state.save(folder.checkpoint_path(state.position.step))
    last = next(stage for stage in reversed(done.stages) if stage.form in ("float", "int8"))
    figures = {name: figure["value"] for name, figure in last.metrics.items()} | last.tables
    write_json(path / "shrink.json", written.to_json())
    folder.finish(
        {
            "stopped": "finished",
            "signal": None,
            "steps": state.position.step,
            "epochs": None,
            "seconds": seconds,
            "best": None,
            "splits": {"test": figures},
        }
    )
    folder.write_record(record_of("shrink", done.task, found.model, plan, found.schema, torch.device("cpu")) | dict(more))
    return written
