"""Export: what a device runs. C and ONNX, checked against what was trained, with every byte measured on what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from anyfit.errors import InputError, TaskError
from anyfit.program import Input, Operation, Program, QuantizedNetwork, entries_of
from anyfit.schema import Schema
from anyfit.shrink import c, compiled, onnx
from anyfit.shrink.opened import Opened, open_model
from anyfit.task import Task
from anyfit.tasks.shrunk import Quantized, Shrunk
from anyfit.values import write_atomic

__all__ = ["Artifact", "export", "program_of"]

Array = np.ndarray[Any, Any]
MARK = "Written by anyfit"
RAW = "raw"  # the one input of a table's network: its columns, side by side


@dataclass(frozen=True)
class Artifact:
    """What an export wrote. Figures are `measured` on the compiled object or the file; `estimated` says which are not."""

    kind: str  # c or onnx
    path: Path
    files: tuple[Path, ...]
    program: Program | None = field(repr=False)  # of an int8 export: what it computes, exactly
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For records."""
        return {"kind": self.kind, "path": str(self.path), "files": [str(path) for path in self.files], **self.figures}


def export(task: Task, state: Any, path: str | Path, *, name: str | None = None, inputs: Any = None) -> Artifact:
    """Write a network for a device: NAME.c (with NAME.h and main.c) of a quantized task, or NAME.onnx of any.

    C is C99 with integer arithmetic alone, compiled and measured at once where there is a compiler. What the task does to raw values
    (standardizing pixels and columns) is part of it; what cannot be is refused by name. `name`: of its functions and files (None: the file's).
    `inputs`: a batch of one row to trace a float ONNX export with.
    """
    path = Path(path)
    if path.suffix not in (".c", ".onnx"):
        raise InputError(f"path (={str(path)!r}) must end in .c or .onnx")
    found = open_model(task, state)
    if found.position.step == 0:
        raise InputError("state is that of an untrained network (step 0); train it first, then export")
    if path.suffix == ".onnx" and not isinstance(found.model, QuantizedNetwork):
        row = inputs if inputs is not None else found.row()
        labels = found.schema.classes or ()
        onnx.export_float(task, found.model, row, path, labels=labels)
        return Artifact("onnx", path, (path,), None, {"int8": False, "bytes": path.stat().st_size})
    program = program_of(task, found)
    if path.suffix == ".onnx":
        onnx.export_int8(program, path)
        return Artifact("onnx", path, (path,), program, {"int8": True, "bytes": path.stat().st_size})
    return _export_c(program, path if name is None else path.with_name(f"{name}.c"))


def _export_c(program: Program, path: Path) -> Artifact:
    name, arena = path.stem, c.plan(program)
    files = c.emit(program, name, arena)
    targets = {path.with_name(file): text for file, text in files.items()}
    for target in targets:
        if target.exists() and MARK not in target.read_text(encoding="utf-8", errors="replace")[:400]:
            raise InputError(f"{target} is there and was not written by anyfit; move it, or give a folder of its own")
    figures: dict[str, Any] = {
        "name": name,
        "flash_bytes": c.flash_bytes(program),
        "ram_bytes": arena.bytes,
        "compiled": compiled.compiler() is not None,
        "measured": False,
        "arena_bytes": arena.bytes,
        "weights_bytes": program.constant_bytes,
    }
    if figures["compiled"]:
        with TemporaryDirectory(prefix="anyfit-c-") as folder:
            for file, text in files.items():
                write_atomic(Path(folder, file), text.encode())
            measured = compiled.measure(Path(folder), name)
        if measured is not None:
            figures |= {"measured": True, "flash_bytes": measured.flash, "ram_bytes": measured.ram, "text_bytes": measured.text}
            figures |= {"stack_bytes": measured.stack, "compiler": measured.compiler, "flags": list(measured.flags)}
    for target, text in targets.items():
        write_atomic(target, text.encode())
    return Artifact("c", path, tuple(targets), program, figures)


def program_of(task: Task, state: Any) -> Program:
    """The exact integers of a quantized task, from raw values on: what `export` writes as C."""
    found = state if isinstance(state, Opened) else open_model(task, state)
    model = found.model
    if not isinstance(model, QuantizedNetwork) or not isinstance(task, Quantized):
        raise InputError(
            f"{type(task).__name__} is not quantized, and C is written for int8 only; task, state = quantize(task, state, data) comes before"
        )
    if not model.calibrated:
        raise InputError("state is not calibrated: int8 ranges are not known; quantize(task, state, data) measures them")
    schema = found.schema
    labels = schema.classes if schema.columns else None
    outputs = int(np.prod(model.plan.shape)) if model.plan.shape else 1
    classes = schema.columns and schema.classes is not None and not schema.multilabel
    kind = ("classes" if outputs > 1 else "binary") if classes else "numbers"
    if not schema.columns or not schema.targets:  # nothing is known of the target
        kind = "classes" if outputs > 1 else "numbers"
    program = model.program(labels, kind)
    return _of_columns(program, task, schema) if _is_table(program, task, schema) else program


# ------------------------------------------------------------ raw columns


def _innermost(task: Task) -> Task:
    while isinstance(task, Shrunk):
        task = task.task
    return task


def _is_table(program: Program, task: Task, schema: Schema) -> bool:
    """Whether the default preprocessing of columns stands between raw values and the network."""
    if _innermost(task).own_method("build_dataset"):
        texts = schema.of_type("text") if schema.columns else ()
        if texts:
            raise TaskError(
                f"column {texts[0].name!r} is text, whose words no C export can look up: its tokenizer cannot be folded in; export a task whose "
                "inputs are ids or numbers"
            )
        return False
    return any(given.name in ("continuous", "categorical") for given in program.inputs)


def _of_columns(program: Program, task: Task, schema: Schema) -> Program:
    """The same with one input of float32, the raw columns: numbers as they are (NaN where missing), categories as codes."""
    moments = schema.of_type("datetime")
    if moments:
        raise TaskError(
            f"column {moments[0].name!r} is a datetime, which cannot be folded into C; give its parts as columns of numbers, or leave it out"
        )
    numbers, categories = schema.of_type("continuous"), schema.of_type("categorical")
    raw = Input(RAW, "float32", (len(numbers) + len(categories),))
    operations = []
    for operation in program.operations:
        if operation.inputs == ("continuous",) and operation.kind == "quantize":
            operations.append(_of_numbers(operation, numbers))
        elif operation.inputs == ("categorical",) and operation.kind == "embedding":
            places = [len(numbers) + place for place in operation.options.get("source", range(len(categories)))]
            operations.append(replace(operation, inputs=(RAW,), options={**operation.options, "source": places}))
        elif any(name in ("continuous", "categorical") for name in operation.inputs):
            raise TaskError(f"{operation.name!r} takes {operation.inputs[0]} as something that cannot be folded into C; use an embedding")
        else:
            operations.append(operation)
    told = [f"{place}: {column.name}, a number, NaN where it is missing" for place, column in enumerate(numbers)]
    for place, column in enumerate(categories, len(numbers)):
        told.append(f"{place}: {column.name}, a code, of which 0 is missing, 1 any other,")
        told += [f"   {code} {category}" for code, category in enumerate(column.categories or (), 2)]
    return replace(program, inputs=(raw,), operations=tuple(operations), about=tuple(told))


def _of_numbers(operation: Operation, columns: Any) -> Operation:
    """Standardizing and quantizing as one multiplication and one addition for each output."""
    gain, offset = (operation.constants[name].astype(np.float64).reshape(-1) for name in ("gain", "shift_by"))
    flags = [place for place, column in enumerate(columns) if column.missing]
    source = [*range(len(columns)), *flags]
    flag = [False] * len(columns) + [True] * len(flags)
    gain, offset = (np.broadcast_to(each, (len(source),)).copy() for each in (gain, offset))
    for place, column in enumerate(columns):
        std = float(column.std or 1.0) if column.std != 0.0 else 0.0  # nothing was known of it: it is always missing
        mean = float(column.mean or 0.0)
        scale = 0.0 if std == 0.0 else 1.0 / std
        offset[place] -= mean * scale * gain[place]
        gain[place] *= scale
    constants = {"gain": gain.astype(np.float32), "shift_by": offset.astype(np.float32)}
    return replace(operation, inputs=(RAW,), options={**operation.options, "source": source, "flag": flag}, constants=constants)


def raw_rows(program: Program, batch: Mapping[str, Any] | Any) -> dict[str, Array]:
    """A batch as a network without folded columns takes it, in the raw types of its program."""
    entries = entries_of(batch)
    return {given.name: np.ascontiguousarray(entries[given.name].cpu().numpy().astype(given.dtype)) for given in program.inputs}
