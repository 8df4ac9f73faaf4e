"""ONNX: a model as it is (float), or an integer program as a graph that onnxruntime computes with integer kernels (int8).

The int8 graph is in the QDQ form: an operation with a rounding stands between DequantizeLinear and QuantizeLinear, which onnxruntime fuses
with it; what only moves bytes does so. Its scales are those that the program's multipliers and shifts stand for. onnxruntime rounds a half
to the even neighbour where a program rounds it up, and it multiplies by a float: a value may differ by one step from the program's, and
what follows from it by more. `check_int8` tells how much that is. The C artifact, not this graph, equals the program bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyfit.errors import AnyfitError, DataError, InputError, MissingExtra, RunError, StateError, TaskError
from anyfit.program.operations import HIGH, LOW, Array, Operation, Program
from anyfit.schema import Schema
from anyfit.task import Task, evaluating
from anyfit.tree import first_tensor, leaves, map_tensors
from anyfit.values import write_atomic

__all__ = ["Agreement", "check_int8", "export_float", "export_int8", "open_session", "run_onnx"]

OPSET, IR = 18, 9  # ReduceMax takes its axes as an input from 18 on
TYPES = {"float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int32": 6, "int64": 7}  # of TensorProto.DataType
ZERO = 128  # values are uint8 in the graph, 128 more than in the program: on x86 onnxruntime fuses int8 activations only by an option
TOLERANCE = 1e-4  # of the largest output
OUTPUT = "logits"
ROWS = 256  # that are compared at once: a program computes in int64, so activations of many rows would fill the memory


def _package(name: str) -> Any:
    """A package of the extra, or a module of one."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtra(name.partition(".")[0], "shrink") from error


def _described(proto: Any, about: Mapping[str, Any]) -> None:
    for name, value in about.items():
        if value is not None:
            proto.metadata_props.add(key=f"anyfit.{name}", value=value if isinstance(value, str) else json.dumps(value))


# ------------------------------------------------------------------ float


def export_float(
    task: Task, model: nn.Module, batch: Any, path: str | Path, labels: Sequence[str] | None = None, schema: Schema | None = None
) -> Path:
    """Write what `task.predict(model, batch)` computes, for any number of rows, and compare onnxruntime with torch at once.

    `batch`: a few rows as `predict` gets them, without targets. Inputs have the names of its entries ("input" for a lone tensor), the
    output is "logits". `labels`: of the classes, kept with the file as `schema`'s hash is; without them those of the schema.
    """
    path, onnx = _door(path), _package("onnx")
    for used in ("onnxscript", "onnxruntime"):  # before a long export, rather than after it
        _package(used)
    names, tensors = _entries(batch), list(leaves(batch))
    labels = schema.classes if labels is None and schema is not None else labels
    with evaluating(model), torch.no_grad():
        rows = first_tensor(batch).shape[0]
        # torch.export takes a dimension of 0 or 1 for a constant
        three = tuple(tensor[torch.arange(3, device=tensor.device) % rows] if tensor.dim() else tensor for tensor in tensors)
        wrapped = _Predicting(task, model, batch).eval()
        proto = _exported(wrapped, three, names)
        _described(proto, {"task": type(task).__name__, "schema": None if schema is None else schema.hash(), "labels": labels})
        onnx.checker.check_model(proto)
        content = proto.SerializeToString()
        for count in (1, 3):
            _compare(content, wrapped, names, [_random(tensor, count) for tensor in tensors])
    write_atomic(path, content)
    return path


class _Predicting(nn.Module):
    """`predict` with a batch's tensors one by one."""

    def __init__(self, task: Task, model: nn.Module, batch: Any) -> None:
        super().__init__()
        self.model, self._task, self._batch = model, task, batch

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        found = self._task.predict(self.model, map_tensors(lambda _: next(given), self._batch))
        if not isinstance(found, Tensor):
            raise TaskError(f"predict of {type(self._task).__name__} gave a {type(found).__name__}; it must give one tensor to be exported")
        return found


def _entries(batch: Any) -> list[str]:
    """A name for each tensor: where it stands in the batch."""
    found: list[str] = []

    def walk(tree: Any, path: str) -> None:
        if isinstance(tree, Tensor):
            found.append(f"input{path}" if not path or path.isdigit() else path)
        else:
            items: Any = tree.items() if isinstance(tree, Mapping) else None
            if items is None and isinstance(tree, tuple | list):
                items = zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True)
            elif items is None and hasattr(tree, "__dataclass_fields__"):
                items = ((name, getattr(tree, name)) for name in tree.__dataclass_fields__)
            for key, value in items or ():
                walk(value, f"{path}_{key}" if path else str(key))

    walk(batch, "")
    return found


def _exported(wrapped: nn.Module, tensors: tuple[Tensor, ...], names: list[str]) -> Any:
    rows = torch.export.Dim("rows")
    shapes = {"tensors": tuple({0: rows} if tensor.dim() else {} for tensor in tensors)}
    try:
        with _quiet():
            made = torch.onnx.export(
                wrapped, tensors, dynamo=True, input_names=names, output_names=[OUTPUT], dynamic_shapes=shapes, verbose=False
            )
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, AnyfitError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from error
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise TaskError(
            f"predict of this task cannot be exported ({type(error.__cause__ or error).__name__}: {(lines or ['no reason given'])[0][:300]}); it must "
            "compute the same operations for every number of rows, with operations that ONNX has"
        ) from error
    assert made is not None
    return made.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says of itself: deprecations in its own code, and operators of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", ".*The axis name: .* will not be used", UserWarning)  # all entries have the same rows
            yield
    finally:
        logger.setLevel(level)


def _random(tensor: Tensor, rows: int) -> Tensor:
    """Random rows like those of `tensor`: numbers of its mean and deviation, ids and flags within its range."""
    if not tensor.dim():
        return tensor
    shape = (rows, *tensor.shape[1:])
    generator = torch.Generator().manual_seed(rows)
    if tensor.is_floating_point():
        wide = tensor.double().cpu()
        made = torch.randn(shape, generator=generator) * wide.std(correction=0) + wide.mean()
    else:
        made = torch.randint(int(tensor.min()), int(tensor.max()) + 1, shape, generator=generator)
    return made.to(device=tensor.device, dtype=tensor.dtype)


def _compare(content: bytes, wrapped: nn.Module, names: list[str], tensors: list[Tensor]) -> None:
    expected = wrapped(*tensors).double().cpu().numpy()
    session = open_session(content)
    wanted = {given.name for given in session.get_inputs()}  # an input that predict does not look at is none of the graph's
    fed = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True) if name in wanted}
    (found,) = session.run([OUTPUT], fed)
    if found.shape != expected.shape:
        raise RunError(
            f"the ONNX graph gives {found.shape} for {len(expected)} rows where torch gives {expected.shape}; nothing was written"
        )
    apart = float(np.abs(found - expected).max(initial=0.0))
    # `not <=`: a NaN where torch has none is a difference too
    if not np.array_equal(np.isnan(found), np.isnan(expected)) or (
        not math.isnan(apart) and not apart <= TOLERANCE * float(np.nanmax(np.abs(expected), initial=1e-3))
    ):
        raise RunError(f"the ONNX graph differs from torch by {apart:.3g} on {len(expected)} random rows; nothing was written")


# ------------------------------------------------------------------ int8


def export_int8(program: Program, path: str | Path) -> Path:
    """Write an integer program as a QDQ graph: raw inputs by the program's names, any number of rows, real numbers ("logits") as output."""
    path = _door(path)
    write_atomic(path, _int8(program).SerializeToString())
    return path


def run_onnx(path: str | Path, raw: Mapping[str, Array], threads: int = 1) -> Array:
    """The output of an ONNX file for rows of inputs, (B, ...) by name, through onnxruntime on the CPU."""
    return _computed(open_session(_door(path), threads), path, raw)


def _computed(session: Any, path: str | Path, raw: Mapping[str, Array]) -> Array:
    wanted = [given.name for given in session.get_inputs()]
    absent = [name for name in wanted if name not in raw]
    if absent:
        raise DataError(f"raw has no {absent[0]!r}; {path} needs {', '.join(wanted)}")
    try:
        (found,) = session.run([OUTPUT], {name: np.asarray(raw[name]) for name in wanted})
    except _failures() as error:
        raise DataError(f"raw does not fit {path}: {str(error).splitlines()[0]}") from error
    return np.asarray(found)


@dataclass(frozen=True)
class Agreement:
    """How far an int8 graph is from its program. `steps`: the largest difference of an output, in steps of the program's int8 output.

    `agreeing`: the share of rows with the same answer: the class, the sign, or numbers that differ by less than a step.
    """

    rows: int
    agreeing: float
    steps: float


def check_int8(program: Program, path: str | Path, raw: Mapping[str, Array]) -> Agreement:
    """Compare what onnxruntime computes from an int8 graph with what the program computes, for rows of raw values."""
    rows = len(next(iter(raw.values()), ()))
    if not rows:
        raise DataError("raw has no rows; give some to compare with")
    session, step = open_session(_door(path)), program.scales[program.result]
    same, apart = 0, 0.0
    for start in range(0, rows, ROWS):
        part = {name: np.asarray(values)[start : start + ROWS] for name, values in raw.items()}
        made = program.run(part)
        expected = made.logits * step if made.accumulators is None else made.accumulators * program.result_scale
        found = _computed(session, path, part).reshape(expected.shape)
        between = np.abs(found - expected)
        apart = max(apart, float(between.max() / step))
        if program.task == "classes":
            same += int((found.argmax(1) == expected.argmax(1)).sum())
        elif program.task == "binary":
            same += int(((found > 0) == (expected > 0)).all(1).sum())
        else:
            same += int((between < step).all(1).sum())
    return Agreement(rows, same / rows, apart)


def _int8(program: Program) -> Any:
    onnx, helper = _package("onnx"), _package("onnx.helper")
    graph, last = _Graph(program), program.operations[-1]
    for operation in program.operations:
        write = KINDS.get(operation.kind)
        if write is None:
            raise InputError(
                f"operation {operation.name!r} (kind={operation.kind!r}) has no int8 counterpart in ONNX; export the program as C, or the model in "
                "float"
            )
        if operation is last and program.accumulates:
            real = graph.add("Gemm", _layer(graph, operation, program.result_scale / graph.step(operation.inputs[0])), transB=1)
        else:
            write(graph, operation)
            real = ""
    real = real or graph.real(program.result, graph.step(program.result))
    graph.add("Reshape", [real, graph.whole(-1, *last.shape)], OUTPUT)
    inputs = [helper.make_tensor_value_info(given.name, TYPES[given.dtype], ["rows", *given.shape]) for given in program.inputs]
    output = helper.make_tensor_value_info(OUTPUT, TYPES["float32"], ["rows", *last.shape])
    made = helper.make_graph(graph.nodes, "anyfit", inputs, [output], graph.constants)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="anyfit")
    _described(proto, {"task": program.task, "labels": program.labels})
    onnx.checker.check_model(proto)
    return proto


class _Graph:
    """Nodes and constants of an int8 graph as they are made."""

    def __init__(self, program: Program) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs = {given.name: given for given in program.inputs}
        self.shapes = {given.name: given.shape for given in program.inputs}
        self._program = program
        self._names = {given.name: given.name for given in program.inputs}  # of a program's value here
        self._bounds: dict[str, tuple[int, int]] = {}  # what a value is still to be clipped to
        self._numbers: dict[tuple[str, float], str] = {}

    def step(self, value: str) -> float:
        """The scale of an int8 value."""
        return self._program.scales[value]

    def constant(self, array: Array) -> str:
        """An array that the graph holds."""
        name = f"constant.{len(self.constants)}"
        self.constants.append(_package("onnx.numpy_helper").from_array(np.array(array, order="C"), name))
        return name

    def number(self, value: float, kind: str = "float32") -> str:
        """One number, held once."""
        if (kind, value) not in self._numbers:
            self._numbers[kind, value] = self.constant(np.array(value, kind))
        return self._numbers[kind, value]

    def whole(self, *numbers: int) -> str:
        """Whole numbers: a shape, axes, bounds."""
        return self.constant(np.array(numbers, np.int64))

    def add(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """A node; the name of what it makes."""
        output = output or f"{kind}.{len(self.nodes)}"
        self.nodes.append(_package("onnx.helper").make_node(kind, list(inputs), [output], name=f"{kind}_{len(self.nodes)}", **attributes))
        return output

    def value(self, name: str) -> str:
        """A program's value, as uint8 with zero point 128, or a raw input."""
        if name in self._bounds:
            low, high = self._bounds.pop(name)
            self._names[name] = self.add("Clip", [self._names[name], self.number(low + ZERO, "uint8"), self.number(high + ZERO, "uint8")])
        return self._names[name]

    def unclipped(self, name: str) -> tuple[str, tuple[int, int]]:
        """A program's value before it is clipped, and to what that is to be done."""
        return self._names[name], self._bounds.get(name, (LOW, HIGH))

    def real(self, name: str, scale: float) -> str:
        """A program's value as real numbers."""
        return self.dequantized(self.value(name), scale)

    def dequantized(self, value: str, scale: float) -> str:
        """A uint8 value as real numbers."""
        return self.add("DequantizeLinear", [value, self.number(scale), self.number(ZERO, "uint8")])

    def parameter(self, array: Array, scale: Array) -> str:
        """Weights or biases as real numbers, with a scale for each channel."""
        # onnxruntime has no integer Gemm for weights whose zero point is left out
        zero = self.constant(np.zeros(len(scale), array.dtype))
        return self.add("DequantizeLinear", [self.constant(array), self.constant(scale.astype(np.float32)), zero], axis=0)

    def store(self, real: str, operation: Operation) -> None:
        """Real numbers as the value of an operation: rounded, in the range of int8, then in its own (a ReLU ends at 0)."""
        self.keep(self.add("QuantizeLinear", [real, self.number(self.step(operation.output)), self.number(ZERO, "uint8")]), operation)

    def keep(self, made: str, operation: Operation, bounds: tuple[int, int] | None = None) -> None:
        """What was made is the value of an operation, to be clipped to its bounds where it is used."""
        self._names[operation.output], self.shapes[operation.output] = made, operation.shape
        bounds = bounds or (operation.options.get("low", LOW), operation.options.get("high", HIGH))
        if bounds != (LOW, HIGH):
            self._bounds[operation.output] = bounds

    def reshaped(self, value: str, *shape: int) -> str:
        """The same bytes in another shape of each row."""
        return self.add("Reshape", [value, self.whole(-1, *shape)])


def _ratio(operation: Operation) -> Array:
    """What multiplier and shift stand for: steps of the output for a unit of the accumulator."""
    shift = operation.constants["shift"] if "shift" in operation.constants else np.array(operation.options["shift"])
    multiplier = operation.constants.get("multiplier", np.ones(1))
    return np.ldexp(multiplier.astype(np.float64), -shift.astype(np.int64))


def _quantize(graph: _Graph, operation: Operation) -> None:
    (name,) = operation.inputs
    raw, given = graph.value(name), graph.inputs[name]
    if "gain" in operation.constants:
        made = _quantized_floats(graph, operation, raw, len(given.shape))
    else:
        made = _quantized_integers(graph, operation, raw, given.dtype, len(given.shape))
    graph.keep(made if operation.shape == given.shape else graph.reshaped(made, *operation.shape), operation, (LOW, HIGH))


def _quantized_integers(graph: _Graph, operation: Operation, raw: str, dtype: str, dims: int) -> str:
    """To the last bit: 8 bits as floats where those give the same for all 256 values, else by a table; more bits by arithmetic on int64."""
    low, high = int(operation.options.get("low", LOW)), int(operation.options.get("high", HIGH))
    shift = int(operation.options["shift"])
    multiplier, offset = (operation.constants[name].astype(np.int64).reshape(-1) for name in ("multiplier", "offset"))
    offset = offset + ((1 << shift) >> 1)
    shape = (-1, *[1] * (dims - 1))
    if dtype in ("uint8", "int8"):
        span = np.arange(256).astype(dtype)
        table = (np.clip((span.astype(np.int64) * multiplier[:, None] + offset[:, None]) >> shift, low, high) + ZERO).astype(np.uint8)
        gain, start = (np.ldexp(each.astype(np.float64), -shift).astype(np.float32) for each in (multiplier, offset + (ZERO << shift)))
        bounds = np.float32(low + ZERO), np.float32(high + ZERO)
        if np.array_equal(np.clip(span * gain[:, None] + start[:, None], *bounds).astype(np.uint8), table):  # several times faster
            x = graph.add("Mul", [graph.add("Cast", [raw], to=TYPES["float32"]), graph.constant(gain.reshape(shape))])
            x = graph.add("Clip", [graph.add("Add", [x, graph.constant(start.reshape(shape))]), *map(graph.number, map(float, bounds))])
            return graph.add("Cast", [x], to=TYPES["uint8"])
        index = raw if dtype == "uint8" else graph.add("Cast", [raw], to=TYPES["uint8"])
        index = graph.add("Cast", [index], to=TYPES["int32"])
        if len(table) > 1:
            starts = (256 * np.arange(len(table))).astype(np.int32)
            index = graph.add("Add", [index, graph.constant(starts.reshape(shape))])
        return graph.add("Gather", [graph.constant(table.reshape(-1)), index])
    sums = graph.add("Mul", [graph.add("Cast", [raw], to=TYPES["int64"]), graph.constant(multiplier.reshape(shape))])
    sums = graph.add("Add", [sums, graph.constant(offset.reshape(shape))])
    # clipped first and moved above 0, where a division rounds down as a shift does
    sums = graph.add("Clip", [sums, graph.number(low << shift, "int64"), graph.number(high << shift, "int64")])
    sums = graph.add("Add", [sums, graph.number(ZERO << shift, "int64")])
    return graph.add("Cast", [graph.add("Div", [sums, graph.number(1 << shift, "int64")])], to=TYPES["uint8"])


def _quantized_floats(graph: _Graph, operation: Operation, raw: str, dims: int) -> str:
    """The program's own float32 operations, one by one; what is missing becomes 0."""
    gain, offset = (operation.constants[name].astype(np.float32) for name in ("gain", "shift_by"))
    if "source" in operation.options:
        flags = np.asarray(operation.options["flag"], dtype=bool)
        x = graph.add(
            "Gather",
            [
                graph.reshaped(raw, math.prod(graph.shapes[operation.inputs[0]])) if dims > 1 else raw,
                graph.whole(*operation.options["source"]),
            ],
            axis=1,
        )
        lacks = graph.add("IsNaN", [x])
        missing = graph.add("And", [lacks, graph.constant(~flags)])
        x = graph.add("Where", [graph.constant(flags), graph.add("Cast", [lacks], to=TYPES["float32"]), x])
    else:
        x, missing = raw, graph.add("IsNaN", [raw])
        if gain.ndim == 1:
            gain, offset = (each.reshape(-1, *[1] * (dims - 1)) for each in (gain, offset))
    x = graph.add("Mul", [graph.add("Where", [missing, graph.number(0.0), x]), graph.constant(gain)])
    x = graph.add("Add", [x, graph.constant(offset)])
    low, high = (float(operation.options.get(name, default)) for name, default in (("low", LOW), ("high", HIGH)))
    x = graph.add("Add", [graph.add("Clip", [x, graph.number(low), graph.number(high)]), graph.number(ZERO + 0.5)])
    return graph.add("Where", [missing, graph.number(ZERO, "uint8"), graph.add("Cast", [x], to=TYPES["uint8"])])


def _layer(graph: _Graph, operation: Operation, scale: float | Array) -> list[str]:
    """Input, weight and bias as real numbers, such that a unit of the accumulator is a step of the input x `scale`."""
    (name,), weight, bias = operation.inputs, operation.constants["weight"], operation.constants["bias"].astype(np.int32)
    scale_O, step, value = np.broadcast_to(np.asarray(scale), bias.shape), graph.step(name), graph.value(name)
    if operation.kind == "linear" and graph.shapes[name] != weight.shape[1:]:
        value = graph.reshaped(value, weight.shape[1])  # each place of a row becomes a row
    return [graph.dequantized(value, step), graph.parameter(weight, scale_O), graph.parameter(bias, step * scale_O)]


def _scale(graph: _Graph, operation: Operation) -> Array:
    """Of the weights, for each channel."""
    return _ratio(operation) * graph.step(operation.output) / graph.step(operation.inputs[0])


def _conv(graph: _Graph, operation: Operation) -> None:
    options = operation.options
    real = graph.add(
        "Conv",
        _layer(graph, operation, _scale(graph, operation)),
        kernel_shape=list(operation.constants["weight"].shape[2:]),
        strides=list(options["stride"]),
        pads=list(options["padding"]),
        dilations=list(options["dilation"]),
        group=int(options["groups"]),
    )
    graph.store(real, operation)


def _linear(graph: _Graph, operation: Operation) -> None:
    graph.store(graph.add("Gemm", _layer(graph, operation, _scale(graph, operation)), transB=1), operation)
    if operation.shape != operation.constants["bias"].shape:
        flat, bounds = graph.unclipped(operation.output)
        graph.keep(graph.reshaped(flat, *operation.shape), operation, bounds)


def _parts(graph: _Graph, operation: Operation) -> list[str]:
    """All inputs as real numbers, in the scale of the output."""
    scales = _ratio(operation) * graph.step(operation.output)
    return [graph.real(name, float(scale)) for name, scale in zip(operation.inputs, scales, strict=True)]


def _add(graph: _Graph, operation: Operation) -> None:
    graph.store(graph.add("Add", _parts(graph, operation)), operation)


def _concat(graph: _Graph, operation: Operation) -> None:
    axis = int(operation.options["axis"]) + 1
    if (_ratio(operation) == 1).all():
        graph.keep(graph.add("Concat", [graph.value(name) for name in operation.inputs], axis=axis), operation)
    else:
        graph.store(graph.add("Concat", _parts(graph, operation), axis=axis), operation)


def _window(graph: _Graph, operation: Operation) -> dict[str, Any]:
    """Of a pooling. A last window that is cut goes on beyond the padding."""
    options, (_, *before), (_, *after) = operation.options, graph.shapes[operation.inputs[0]], operation.shape
    kernel, stride, dilation = list(options["kernel"]), list(options["stride"]), list(options.get("dilation", (1, 1)))
    top, left, *ends = options["padding"]
    for axis, start in enumerate((top, left)):
        reach = (after[axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1
        ends[axis] = max(ends[axis], reach - before[axis] - start)
    return {"kernel_shape": kernel, "strides": stride, "pads": [top, left, *ends]}


def _maximum(graph: _Graph, operation: Operation) -> None:
    # onnxruntime has a fast kernel for it right behind a convolution, without a Clip between them; it is the same one after the other
    value, bounds = graph.unclipped(operation.inputs[0])
    dilations = list(operation.options.get("dilation", (1, 1)))
    graph.keep(graph.add("MaxPool", [value], dilations=dilations, **_window(graph, operation)), operation, bounds)


def _average(graph: _Graph, operation: Operation) -> None:
    cells = math.prod(operation.options["kernel"])
    real = graph.real(operation.inputs[0], _ratio(operation).item() * cells * graph.step(operation.output))
    graph.store(graph.add("AveragePool", [real], count_include_pad=1, **_window(graph, operation)), operation)


def _reduce(graph: _Graph, operation: Operation) -> None:
    outer, size, inner = (int(operation.options[name]) for name in ("outer", "size", "inner"))
    parts = graph.reshaped(graph.value(operation.inputs[0]), outer, size, inner)
    if operation.options["how"] == "max":
        made = graph.add("ReduceMax", [parts, graph.whole(2)], keepdims=0)
    else:  # as a pooling, which has an integer kernel
        step = graph.step(operation.output)
        real = graph.add("AveragePool", [graph.dequantized(parts, _ratio(operation).item() * size * step)], kernel_shape=[size, 1])
        made = graph.add("QuantizeLinear", [real, graph.number(step), graph.number(ZERO, "uint8")])
    graph.keep(graph.reshaped(made, *operation.shape), operation)


def _clamp(graph: _Graph, operation: Operation) -> None:
    graph.keep(graph.value(operation.inputs[0]), operation)


def _table(graph: _Graph, operation: Operation) -> None:
    index = graph.add("Cast", [graph.value(operation.inputs[0])], to=TYPES["int32"])
    graph.keep(graph.add("Gather", [graph.constant(_shifted(operation.constants["table"])), index]), operation)


def _embedding(graph: _Graph, operation: Operation) -> None:
    """Of an id that is no row of the table, the first one."""
    table, ids = _shifted(operation.constants["table"]), graph.value(operation.inputs[0])
    if "source" in operation.options:  # places of a flat row
        flat = ids if len(graph.shapes[operation.inputs[0]]) == 1 else graph.reshaped(ids, math.prod(graph.shapes[operation.inputs[0]]))
        ids = graph.add("Gather", [flat, graph.whole(*operation.options["source"])], axis=1)
    floats = any(given.dtype == "float32" for given in graph.inputs.values())
    kind = "float32" if floats else "int32"
    ids = ids if floats else graph.add("Cast", [ids], to=TYPES["int32"])
    inside = [
        graph.add("GreaterOrEqual", [ids, graph.number(0, kind)]),
        graph.add("Less", [ids, graph.number(len(table), kind)]),
    ]
    ids = graph.add("Where", [graph.add("And", inside), ids, graph.number(0, kind)])
    ids = graph.add("Cast", [ids], to=TYPES["int32"]) if floats else ids
    graph.keep(graph.reshaped(graph.add("Gather", [graph.constant(table), ids]), *operation.shape), operation)


def _shifted(array: Array) -> Array:
    return (array.astype(np.int16) + ZERO).astype(np.uint8)


def _reshape(graph: _Graph, operation: Operation) -> None:
    graph.keep(graph.reshaped(graph.value(operation.inputs[0]), *operation.shape), operation)


def _permute(graph: _Graph, operation: Operation) -> None:
    order = [0, *(int(axis) + 1 for axis in operation.options["order"])]
    graph.keep(graph.add("Transpose", [graph.value(operation.inputs[0])], perm=order), operation)


def _slice(graph: _Graph, operation: Operation) -> None:
    axis, start, step, count = (int(operation.options[name]) for name in ("axis", "start", "step", "count"))
    stop = start + step * count
    stop = stop if stop >= 0 else -(2**62)  # -1 would be the last element
    bounds = [graph.whole(number) for number in (start, stop, axis + 1, step)]
    graph.keep(graph.add("Slice", [graph.value(operation.inputs[0]), *bounds]), operation)


KINDS: dict[str, Callable[[_Graph, Operation], None]] = {
    "quantize": _quantize,
    "conv": _conv,
    "linear": _linear,
    "add": _add,
    "concat": _concat,
    "maximum": _maximum,
    "average": _average,
    "reduce": _reduce,
    "clamp": _clamp,
    "table": _table,
    "embedding": _embedding,
    "reshape": _reshape,
    "permute": _permute,
    "slice": _slice,
}


# ------------------------------------------------------------------ files and sessions


def _door(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".onnx" or path.is_dir():
        raise InputError(f"path (={str(path)!r}) must name a file that ends in .onnx")
    return path


def open_session(model: bytes | Path, threads: int = 1) -> Any:
    """Onnxruntime on the CPU, with a file or what stands in one."""
    onnxruntime = _package("onnxruntime")
    if isinstance(model, Path) and not model.is_file():
        raise StateError(f"path (={str(model)!r}) does not exist; give a file that export_float or export_int8 wrote")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"])
    except _failures() as error:
        what = f"path (={str(model)!r})" if isinstance(model, Path) else "the graph"
        raise StateError(f"{what} is no ONNX model that onnxruntime can run: {str(error).splitlines()[0]}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: classes of its own, which have no base in common."""
    state = _package("onnxruntime.capi.onnxruntime_pybind11_state")
    return (ValueError, *(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)))
