"""What a trained run is good for: open it, evaluate it, predict with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anyfit import data, engine, machine
from anyfit.data import Blocks, Rows, without
from anyfit.errors import DataError, StateError
from anyfit.load import load
from anyfit.prepare import Prepared, built, opened
from anyfit.record import weights_file
from anyfit.run import Run, read_record
from anyfit.schema import Schema
from anyfit.state import State
from anyfit.task import Task
from anyfit.tree import leaves
from anyfit.values import Plan

__all__ = ["evaluate", "open_run", "predict"]

Origin = str | Path | Run


def open_run(run: str | Path, task: Task | None = None) -> tuple[Task, State]:
    """The task of a run folder and its state: the best if one is kept, else the last. A task that cannot be found by name is given."""
    path = Path(run)
    record = read_record(path)
    if task is None:
        if record["task"]["reference"] is None:
            raise StateError(f"the task of run (={str(path)!r}) lives in no file ({record['task']['class']}); pass it as task=")
        task = load(record["task"]["reference"], record["task"]["values"])
    return task, State.load(weights_file(path))


def _opened(run: Origin, task: Task | None, plan: Mapping[str, Any]) -> tuple[Task, nn.Module, Prepared]:
    """A trained model with what is needed to give it rows."""
    if isinstance(run, Run):
        task, schema_json, model, record = run.task, run.state.schema, run.model, run.record
    else:
        task, state = open_run(run, task)
        schema_json, record = state.schema, read_record(Path(run))
        model = built(task, Schema.from_json(schema_json or {}))
        engine.load_model(model, state.model)
    final = Plan(**record["plan"]).updated(**{"device": "auto", **plan})
    device = machine.pick_device(final.device)
    model.to(device=device, dtype=getattr(torch, final.dtype))
    schema = Schema.from_json(schema_json or {})
    return task, model, Prepared(task, final, device, schema, {}, record["data"], task.collate)


def _given_rows(origin: Any, prepared: Prepared, split: str) -> Rows:
    schema = prepared.schema
    source = opened(origin)
    if isinstance(source.origin, DataLoader) and (apart := data.taken_apart(source.origin)) is not None:
        return apart[0]
    told = prepared.sources.get("train", {})  # what training said of its source holds for these rows too
    source = replace(
        source, missing=source.missing or told.get("missing", ()), size=source.size or (tuple(told["size"]) if "size" in told else None)
    )
    images = {column.name: column.type for column in schema.of_type("image") if column.name not in source.types}
    read = replace(source, types={**source.types, **images}).read()  # names of images are read as such again
    rows = read.get("test", read["train"])
    names = rows.column_names if isinstance(rows, pa.Table | Blocks) else None
    absent = [name for name in schema.targets if names is not None and name not in names]
    if split == "test" and absent:
        raise DataError(f"target (={absent[0]!r}) is not a column of {source.name}; the columns are: {', '.join(names or ())}")
    return rows


def evaluate(run: Origin, data: Any, *, task: Task | None = None, **plan: Any) -> dict[str, Any]:
    """Figures of a trained run on data with targets."""
    task, model, prepared = _opened(run, task, plan)
    batches = prepared.batches_of(_given_rows(data, prepared, "test"), "test")
    return engine.evaluate(task, model, batches, machine.autocast(prepared.plan, prepared.device))


def predict(run: Origin, data: Any, *, task: Task | None = None, **plan: Any) -> Any:
    """Predictions of a trained run for data whose targets may be absent: tensors (rows first) as `Task.predict` gives them."""
    task, model, prepared = _opened(run, task, plan)
    rows = _given_rows(data, prepared, "predict")
    rows = without(rows, prepared.schema.targets)
    batches = prepared.batches_of(rows, "predict")
    return _joined(list(engine.predict(task, model, batches, machine.autocast(prepared.plan, prepared.device))))


def _joined(parts: list[Any]) -> Any:
    """Batches of one structure, one after the other."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], Mapping):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], tuple | list):
        return tuple(_joined(list(column)) for column in zip(*parts, strict=True))
    if not list(leaves(parts)):
        return [item for part in parts for item in (part if isinstance(part, list) else [part])]
    raise DataError(f"predict gave a {type(parts[0]).__name__}; it must give a tensor, or a dict or tuple of tensors")
