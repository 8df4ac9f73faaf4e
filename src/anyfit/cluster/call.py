"""A call of fit as a file that other processes can make again, and what came of it: JSON, Arrow tables, safetensors."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor, nn

from anyfit import engine
from anyfit.cluster.launcher import OUTCOME
from anyfit.data import Source
from anyfit.errors import InputError, TaskError
from anyfit.load import load, reference
from anyfit.prepare import built
from anyfit.run import Run
from anyfit.schema import Schema
from anyfit.state import State, load_weights, save_weights
from anyfit.task import Task, task_values
from anyfit.values import parse, write_json

__all__ = ["Call", "job_of", "read_call", "read_outcome", "write_call", "write_outcome"]

NOT_HERE = "it lives in this process alone; give a path, a table, arrays, or file.py:function, or start your script with torchrun"


@dataclass(frozen=True)
class Call:
    """What fit was given."""

    task: Task
    data: Any
    options: Mapping[str, Any]  # JSON
    validation: Any = None
    test: Any = None
    weights: Any = None


def write_call(folder: Path, call: Call) -> Path:
    """Write a call into an empty folder; what cannot travel is refused by name."""
    name = reference(call.task)
    if name is None:
        raise TaskError(
            f"task (={type(call.task).__name__}) is defined in a notebook or inside a function, where other processes cannot find it; move "
            "its class to a file"
        )
    weights = call.weights
    if isinstance(weights, Run):
        weights = weights.model.state_dict()
    if isinstance(weights, Mapping):
        save_weights(folder / "weights.safetensors", weights)
        weights = folder / "weights.safetensors"
    whole, *parts = (_written(folder, what, getattr(call, what)) for what in ("data", "validation", "test"))
    value = {
        "task": {"reference": name, "values": task_values(call.task, reference)},
        "data": whole,
        "validation": parts[0],
        "test": parts[1],
        "weights": None if weights is None else str(weights),
        "options": dict(call.options),
        "argv": list(sys.argv),  # the command of the record
        "path": [os.path.abspath(entry) for entry in sys.path if entry == "" or Path(entry).is_dir()],  # noqa: PTH100 - "" is here
    }
    write_json(folder / "call.json", value)
    return folder / "call.json"


def read_call(path: Path) -> Call:
    """The call of a file; its task and data are found by name."""
    value = parse(path.read_bytes(), str(path))
    sys.path.extend(entry for entry in value["path"] if entry not in sys.path)
    sys.argv = list(value["argv"])
    task = load(value["task"]["reference"], value["task"]["values"])
    parts = {what: _read(path.parent, value[what]) for what in ("data", "validation", "test")}
    return Call(task, options=value["options"], weights=value["weights"], **parts)


def job_of(path: Path) -> Any:
    """What all nodes of one job have in common in their calls."""
    value = parse(path.read_bytes(), str(path))
    return {name: value[name] for name in ("task", "options")}


def _written(folder: Path, what: str, given: Any) -> Any:
    """A source, a fraction or nothing as JSON; tables and arrays go to files."""
    if given is None or isinstance(given, int | float):
        return given
    source = Source.of(given)
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source) if field.name != "origin"}
    fields = {name: list(value) if isinstance(value, tuple | list) else value for name, value in fields.items()}
    origin = source.origin
    if isinstance(origin, str | os.PathLike):
        return {"path": str(origin), "fields": fields}
    if isinstance(origin, list | tuple) and origin and all(isinstance(item, str | os.PathLike) for item in origin):
        return {"paths": [str(item) for item in origin], "fields": fields}
    rows = source.read()
    if set(rows) != {"train"}:
        raise InputError(f"{what} holds {', '.join(rows)}; for several processes give each as a table of its own, or a path")
    table = rows["train"]
    if isinstance(table, pa.Table):
        with pa.OSFile(str(folder / f"{what}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return {"table": f"{what}.arrow", "fields": fields}
    if isinstance(table, tuple | Mapping):
        named = dict(table) if isinstance(table, Mapping) else {str(index): value for index, value in enumerate(table)}
        if all(isinstance(value, Tensor) for value in named.values()):
            save_weights(folder / f"{what}.safetensors", {name: value.contiguous() for name, value in named.items()})
            return {"arrays": f"{what}.safetensors", "names": list(table) if isinstance(table, Mapping) else None, "fields": fields}
    raise InputError(f"{what} (a {type(origin).__name__}) cannot be given to other processes: {NOT_HERE}")


def _read(folder: Path, given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given["fields"].items()}
    origin: Any
    if "table" in given:
        with pa.OSFile(str(folder / given["table"])) as file:
            origin = pa.ipc.open_file(file).read_all()
    elif "arrays" in given:
        arrays = load_weights(folder / given["arrays"])
        origin = (
            tuple(arrays[str(index)] for index in range(len(arrays))) if given["names"] is None else {n: arrays[n] for n in given["names"]}
        )
    else:
        origin = given["path"] if "path" in given else given["paths"]
    return Source(origin, **fields)


def write_outcome(folder: Path, run: Run) -> None:
    """What came of it: written last is the file that says so."""
    run.state.save(folder / "state.safetensors")
    save_weights(folder / "model.safetensors", run.model.state_dict())
    path = None if run.path is None else str(run.path)
    write_json(folder / OUTCOME, {"record": run.record, "history": run.history, "result": run.result, "path": path})


def read_outcome(folder: Path, task: Task) -> Run:
    """The run that another process made."""
    told = parse((folder / OUTCOME).read_bytes(), OUTCOME)
    state = State.load(folder / "state.safetensors")
    model: nn.Module = built(task, Schema.from_json(state.schema or {}))
    weights = load_weights(folder / "model.safetensors")
    model.to(dtype=next((value.dtype for value in weights.values() if value.is_floating_point()), None))
    engine.load_model(model, weights)
    return Run(task, model, state, told["record"], told["history"], told["result"], None if told["path"] is None else Path(told["path"]))
