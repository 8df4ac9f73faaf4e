"""What a network is worth and what it costs, measured the same way at each stage: a task with its weights, an ONNX file, compiled C.

A figure is a value with its kind: "measured" on this machine or on what was written, "estimated" from the graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anyfit import data as rooms
from anyfit import engine, machine
from anyfit.data import Rows
from anyfit.errors import InputError, RunError, TaskError
from anyfit.prepare import Prepared
from anyfit.program import Program, QuantizedNetwork, entries_of
from anyfit.schema import Schema
from anyfit.shrink import compiled, onnx
from anyfit.shrink.export import RAW, Array, Artifact, program_of, raw_rows
from anyfit.shrink.opened import Opened, first_row
from anyfit.shrink.resources import Resources, program_resources, resources
from anyfit.task import Task
from anyfit.tasks.shrunk import Answered
from anyfit.values import Plan

__all__ = ["OWN", "Bench", "Stage", "compiled_stage", "onnx_stage", "stage_of"]

Kind = Literal["measured", "estimated"]
Figures = dict[str, dict[str, Any]]
BUSY_S, MOST_RUNS = 0.3, 200  # how long one latency is looked at


@dataclass(frozen=True)
class Stage:
    """One state of the network. `metrics` and `costs`: name -> {"value", "kind"}; `tables`: what else the evaluation gave, such as a
    confusion matrix.
    """

    name: str
    form: Literal["float", "int8", "c", "onnx"]
    metrics: Figures
    costs: Figures
    tables: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """A figure without its kind; None where it is not known."""
        return (self.metrics | self.costs).get(name, {}).get("value")

    def to_json(self) -> dict[str, Any]:
        """For records; tables are in the run's result."""
        return {"stage": self.name, "form": self.form, "metrics": self.metrics, "costs": self.costs, **self.about}


def _told(kind: Kind, **values: Any) -> Figures:
    return {name: {"value": value, "kind": kind} for name, value in values.items() if value is not None}


# ------------------------------------------------------------------ the rows


@dataclass(frozen=True)
class Bench:
    """The rows that every stage is evaluated on."""

    rows: Rows
    plan: Plan
    sources: Mapping[str, Any]  # what is known of the training source

    def batches(self, task: Task, schema: Schema, device: torch.device | None = None) -> rooms.Batches:
        """In the order of the rows."""
        prepared = Prepared(task, self.plan, device or torch.device("cpu"), schema, {}, dict(self.sources), task.collate)
        return prepared.batches_of(self.rows, "test")

    def evaluate(self, task: Task, model: nn.Module, schema: Schema, device: torch.device | None = None) -> dict[str, Any]:
        """As `anyfit.evaluate` does."""
        place = device or torch.device("cpu")
        return engine.evaluate(task, model, self.batches(task, schema, place), machine.autocast(self.plan, place))

    def raw(self, program: Program, task: Task, schema: Schema) -> dict[str, Array]:
        """All rows in the raw types of an integer program."""
        if program.inputs[0].name == RAW:
            return {RAW: np.concatenate([_raw_columns(table, schema) for table in rooms.in_tables(self.rows)])}
        parts = [raw_rows(program, batch) for batch in self.batches(task, schema)]
        return {given.name: np.concatenate([part[given.name] for part in parts]) for given in program.inputs}


def _raw_columns(table: Any, schema: Schema) -> Array:
    """(N, columns) float32 as a device gets them: numbers as they are, NaN where missing, then the codes of categories."""
    numbers = schema.of_type("continuous")
    plain = schema.replace(replace(column, mean=0.0, std=1.0, missing=True) for column in numbers)
    found = rooms.to_tensors(rooms.without(table, schema.targets), plain, need_target=False)
    parts = []
    if numbers:
        values, missing = found["continuous"][:, : len(numbers)], found["continuous"][:, len(numbers) :]
        parts.append(torch.where(missing.bool(), torch.nan, values).float())
    if "categorical" in found:
        parts.append(found["categorical"].float())
    return torch.cat(parts, 1).numpy()


OWN = ("step", "evaluate_step", "evaluate")  # by which a task gives figures that predictions alone do not


class _Answers(nn.Module):
    """Results that are known already, handed out in the order of the rows."""

    def __init__(self, results: Tensor) -> None:
        super().__init__()
        self.results, self.at = results, 0

    def forward(self, batch: Any) -> Tensor:
        count = len(next(iter(entries_of(batch).values())))
        self.at += count
        return self.results[self.at - count : self.at]


def _worth(figures: Mapping[str, Any]) -> tuple[Figures, dict[str, Any]]:
    """An evaluation as metrics, and what it gave beside them."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float) and name != "rows"}
    return _told("measured", **numbers), {name: value for name, value in figures.items() if name not in numbers}


# ------------------------------------------------------------------ a task with its weights


class _Predicted(Answered):
    """A task whose figures are those of its predictions, as they are of a network that runs elsewhere."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return self.task.predict(model, batch)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return self.task.predict(model, batch)


def stage_of(name: str, found: Opened, bench: Bench, row: Any, *, predicted: bool = False) -> tuple[Stage, Resources | None]:
    """A task with its weights, in floats or in simulated int8. `row`: a batch of one row without its target. `predicted`: figures are
    computed of predictions, whatever the task has of its own, so that they compare with those of other stages.
    """
    task = found.task
    int8 = isinstance(found.model, QuantizedNetwork)
    costs, note = _costs(task, found, row)
    figures: Figures
    if costs is not None:
        exact = {"parameters": costs.parameters, "nonzero": costs.nonzero}
        figures = _told("measured", **exact) | _told("estimated", macs=costs.macs)
        kinds: tuple[Literal["float", "int8"], ...] = ("int8",) if int8 else ("float", "int8")
        for kind in kinds:
            footprint, suffix = costs.footprints[kind], "" if int8 or kind == "float" else "_in_int8"
            figures |= _told(
                "estimated", **{f"weights_bytes{suffix}": footprint.weights.bytes, f"ram_bytes{suffix}": footprint.arena.bytes}
            )
    else:
        tensors = list(found.model.parameters())
        counts = {"parameters": sum(t.numel() for t in tensors), "nonzero": sum(int(t.count_nonzero()) for t in tensors)}
        figures = _told("measured", **counts)
    if not int8:  # simulated int8 is no measure of anything that runs
        with torch.no_grad():
            figures |= _told("measured", latency_us=_latency(lambda: task.predict(found.model, row)))
    device = machine.pick_device(bench.plan.device)
    judge = _Predicted(task=task) if predicted and not int8 else task
    worth, tables = _worth(bench.evaluate(judge, found.model.to(device), found.schema, device))
    found.model.to("cpu")
    return Stage(name, "int8" if int8 else "float", worth, figures, tables, {"note": note} if note else {}), costs


def _costs(task: Task, found: Opened, row: Any) -> tuple[Resources | None, str]:
    """What the graph says; of a network that has none, why."""
    if isinstance(found.model, QuantizedNetwork):
        return program_resources(program_of(task, found)), ""
    try:
        return resources(task, found.model, row), ""
    except TaskError as error:
        return None, f"costs not estimated: {error}"


def _latency(predict: Callable[[], object]) -> float:
    """Microseconds of one row, the median of many, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            predict()
        spent: list[float] = []
        while len(spent) < MOST_RUNS and sum(spent) < BUSY_S:
            begun = time.perf_counter()
            predict()
            spent.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return float(np.median(spent)) * 1e6


# ------------------------------------------------------------------ what was exported


def compiled_stage(artifact: Artifact, task: Task, schema: Schema, bench: Bench) -> Stage:
    """The C, compiled and run over all rows: each answer and each logit must be that of the integer program. Without a compiler, as planned."""
    program, told = artifact.program, artifact.figures
    assert program is not None
    bytes_of = {"weights_bytes": told["flash_bytes"], "ram_bytes": told["ram_bytes"]}
    if not told["compiled"]:
        return Stage("c", "c", {}, _told("estimated", **bytes_of), about={"note": f"not compiled: {compiled.absence()}"})
    raw = bench.raw(program, task, schema)
    expected = program.run(raw)
    rows = len(expected.logits)
    with TemporaryDirectory(prefix="anyfit-c-") as folder:
        binary = compiled.build(artifact.path.parent, told["name"], Path(folder))
        side_by_side = np.concatenate([raw[given.name].reshape(rows, -1) for given in program.inputs], 1)
        ran = compiled.run(binary, side_by_side, expected.logits.shape[1])
    answers, logits = ran.answers != expected.answers, (ran.logits != expected.logits).any(1)
    if answers.any() or logits.any():
        raise RunError(
            f"the compiled C differs from the integer program in {int((answers | logits).sum())} of {rows} rows, first in row "
            f"{int((answers | logits).argmax())}; compiler: {compiled.compiler()}. Nothing was written; try another compiler (CC=...), or report it"
        )
    real = expected.logits * program.scales[program.result]
    if expected.accumulators is not None:  # equal answers say that they were equal
        real = expected.accumulators * program.result_scale
    shape = (rows, *program.operations[-1].shape)
    worth, tables = _worth(bench.evaluate(Answered(task=task), _Answers(torch.from_numpy(real).float().reshape(shape)), schema))
    about: dict[str, Any] = {"equal": {"rows": rows, "answers": True, "logits": True}}
    figures = _told("measured", latency_us=ran.microseconds)
    if told["measured"]:
        figures |= _told("measured", **bytes_of, code_bytes=told["text_bytes"], stack_bytes=told["stack_bytes"])
        about["compiler"] = f"{told['compiler']}: bytes with {' '.join(told['flags'])}, latency with -O2"
    else:  # an object of another form than ELF
        figures |= _told("estimated", **bytes_of)
        about["compiler"] = f"{compiled.compiler()}: its objects are no ELF files, so bytes are estimated; latency with -O2"
    return Stage("c", "c", worth, figures, tables, about)


def onnx_stage(artifact: Artifact, task: Task, schema: Schema, bench: Bench) -> Stage:
    """The ONNX file, run by onnxruntime over all rows."""
    session = onnx.open_session(artifact.path)
    wanted = [given.name for given in session.get_inputs()]
    if artifact.program is not None:
        raw = bench.raw(artifact.program, task, schema)
    else:
        parts = [entries_of(first_rows) for first_rows in map(_without_target, bench.batches(task, schema))]
        shapes = {given.name: tuple(given.shape[1:]) for given in session.get_inputs()}
        raw = {
            name: np.concatenate([_padded(part[name].cpu().numpy(), shapes[name]) for part in parts]) for name in wanted if name in parts[0]
        }
    absent = [name for name in wanted if name not in raw]
    if absent:
        raise InputError(f"export (='onnx'): the rows have no {absent[0]!r}, which {artifact.path.name} takes")
    count = len(raw[wanted[0]])
    step = max(1, min(count, (bench.plan.batch_size or 32) * 4))
    results = [session.run(None, {name: raw[name][start : start + step] for name in wanted})[0] for start in range(0, count, step)]
    worth, tables = _worth(bench.evaluate(Answered(task=task), _Answers(torch.from_numpy(np.concatenate(results))), schema))
    one = {name: raw[name][:1] for name in wanted}
    figures = _told("measured", weights_bytes=artifact.figures["bytes"], latency_us=_latency(lambda: session.run(None, one)))
    about: dict[str, Any] = {"int8": artifact.program is not None}
    if artifact.program is not None:
        agreement = onnx.check_int8(artifact.program, artifact.path, raw)
        about["agreement"] = {"rows": agreement.rows, "answers": agreement.agreeing, "steps": agreement.steps}
    return Stage("onnx", "onnx", worth, figures, tables, about)


def _padded(rows: Array, shape: tuple[Any, ...]) -> Array:
    """Rows filled up with 0, as `collate` does, to the length that a file takes."""
    more = [(0, 0), *((0, int(to) - now) for to, now in zip(shape, rows.shape[1:], strict=True))]
    if any(after < 0 for _, after in more):
        raise InputError(f"export (='onnx'): rows of {rows.shape[1:]} are longer than the file takes ({shape})")
    return np.pad(rows, more)


def _without_target(batch: Any) -> Any:
    """All rows of a batch, without target and weight."""
    if isinstance(batch, Mapping):
        keep = set(first_row(batch))
        return {name: value for name, value in batch.items() if name in keep}
    return tuple(batch[:-1]) if isinstance(batch, tuple | list) and len(batch) > 1 else batch
