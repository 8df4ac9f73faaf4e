"""A network as a device computes it: a list of operations on int8 values, and the exact integer arithmetic of each.

This is the definition that the C kernels are tested against, bit for bit. A value is one row's activation, without batch dimension, in row-major
order (C, H, W), int8 with zero point 0: real = scale x integer. `requantized` is the only rounding there is.

kind         inputs     constants                              options
quantize     raw        multiplier, offset (C,) | gain, shift_by (C,)   shift | source, flag; low, high
conv         1          weight (O, I/g, kh, kw) int8, bias (O,), multiplier (O,), shift (O,)  stride, padding (t, l, b, r), dilation, groups, low, high
linear       1          weight (O, I) int8, bias (O,), multiplier (O,), shift (O,)            low, high
add          2          multiplier (2,)                        shift, low, high
concat       n          multiplier (n,), shift (n,)            axis
maximum      1 (C, H, W)                                       kernel, stride, padding (t, l, b, r), dilation
average      1 (C, H, W) multiplier (), shift ()                kernel, stride, padding (t, l, b, r); padding counts as zeros
reduce       1          for "mean": multiplier (), shift ()    outer, size, inner; how: "mean" | "max"
table        1          table (256,) int8, entry of q is q+128
clamp        1                                                 low, high
rnn          1 (T, I)   weight (H, I+H) int8, bias (H,), multiplier (H,), shift (H,), curve (129,) int16 | none  last: whether only the last state is kept; low, high
embedding    raw ids    table (V, D) int8                                   source: which places of the flat raw row are looked up (absent: all)
reshape      1                                                 (the same bytes)
permute      1                                                 order
slice        1                                                 axis, start, step, count
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anyfit.errors import InputError

__all__ = ["HIGH", "LOW", "Array", "Input", "Operation", "Program", "Result", "accumulated", "compute", "requantized"]

LOW, HIGH = -128, 127
BLOCK = 256  # rows at once: values are 64 bits wide here

Array = NDArray[Any]
Raw = Literal["uint8", "int8", "uint16", "int32", "float32"]


@dataclass(frozen=True)
class Input:
    """What is written into the arena before a prediction: raw values, as the data has them."""

    name: str
    dtype: Raw
    shape: tuple[int, ...]  # of one row

    @property
    def bytes(self) -> int:
        """Of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Operation:
    """One operation. `name` is where its weights come from in the model; `output` is the name of the value that it makes."""

    kind: str
    name: str
    inputs: tuple[str, ...]  # names of values, or of an input
    output: str
    shape: tuple[int, ...]  # of the output
    options: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Array] = field(default_factory=dict)

    @cached_property
    def wide(self) -> dict[str, Tensor]:
        """The constants as int64, kept for the next batch."""
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in self.constants.items() if array.dtype.kind != "f"}

    @cached_property
    def real(self) -> tuple[Tensor, Tensor]:
        """Weight and bias in the narrowest floats that hold every sum of theirs exactly."""
        weight, bias = self.wide["weight"], self.wide["bias"]
        largest = int((weight.abs().flatten(1).sum(1) * 128 + bias.abs()).max())
        dtype = torch.float32 if largest < 2**24 else torch.float64
        return weight.to(dtype), bias.to(dtype)

    @property
    def bytes(self) -> int:
        """Of the output."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def scratch(self) -> int:
        """Bytes that it needs beside inputs and output while it runs."""
        return 2 * self.shape[-1] if self.kind == "rnn" and self.options["last"] else 0


@dataclass(frozen=True)
class Program:
    """Operations in an order in which they may run. All `inputs` have one dtype: a device is handed one array, one after the other.

    `result`: the value that is predicted, made by the last operation. Where that is a `linear` on one row, its accumulators before requantization
    are the result: their largest is the class, and `result_scale` makes real numbers of them; else the int8 values are.
    """

    inputs: tuple[Input, ...]
    operations: tuple[Operation, ...]
    result: str
    scales: Mapping[str, float]  # of each int8 value
    result_scale: float
    labels: tuple[str, ...] | None = None
    task: Literal["classes", "binary", "numbers"] = "classes"
    power_of_two: bool = False  # every multiplier is 1
    about: tuple[str, ...] = ()  # what the raw values are, in words

    def run(self, raw: Mapping[str, Array]) -> Result:
        """What a device computes for rows of raw values, (B, ...) by the name of each input."""
        values: dict[str, Tensor] = {}
        for given in self.inputs:
            if given.name not in raw:
                raise InputError(f"raw has no {given.name!r}; it needs {', '.join(each.name for each in self.inputs)}")
            rows = np.asarray(raw[given.name])
            if rows.dtype != np.dtype(given.dtype) or rows.shape[1:] != given.shape:
                raise InputError(
                    f"raw {given.name!r} is {rows.dtype} {rows.shape[1:]} a row; the network was made for {given.dtype} {given.shape}"
                )
            values[given.name] = torch.from_numpy(np.array(rows if rows.dtype != np.uint16 else rows.astype(np.int32)))
        count = len(next(iter(values.values())))
        with torch.no_grad():
            parts = [
                self._result({name: rows[start : start + BLOCK] for name, rows in values.items()})
                for start in range(0, max(count, 1), BLOCK)
            ]
        sums = [part.accumulators for part in parts if part.accumulators is not None]
        return Result(
            np.concatenate([part.logits for part in parts]),
            np.concatenate(sums) if sums else None,
            np.concatenate([part.answers for part in parts]),
        )

    def _result(self, values: dict[str, Tensor]) -> Result:
        last = self.operations[-1]
        accumulators: Tensor | None = None
        for operation in self.operations:
            if operation is last and self.accumulates:
                accumulators = accumulated(operation, values[operation.inputs[0]]).flatten(1)
                values[operation.output] = _narrowed(accumulators, operation).view(-1, *operation.shape)
            else:
                values[operation.output] = compute(operation, values)
        logits = values[self.result].flatten(1)
        deciding = logits if accumulators is None else accumulators
        if self.task == "classes":
            answers = deciding.argmax(1)
        elif deciding.shape[1] == 1:
            answers = (deciding[:, 0] > 0).long() if self.task == "binary" else deciding[:, 0].long()
        else:
            answers = torch.zeros(len(deciding), dtype=torch.long)
        return Result(
            logits.to(torch.int8).numpy(), None if accumulators is None else accumulators.to(torch.int32).numpy(), answers.numpy()
        )

    @property
    def accumulates(self) -> bool:
        """Whether the accumulators of the last operation are the result."""
        last = self.operations[-1]
        return last.kind == "linear" and not last.options.get("bounded") and last.output == self.result and last.bytes == last.shape[-1]

    @property
    def constant_bytes(self) -> int:
        """Of weights, biases, multipliers, shifts and tables, as they are stored."""
        return sum(array.nbytes for operation in self.operations for array in operation.constants.values())


@dataclass(frozen=True)
class Result:
    """What a program gives for B rows: its int8 outputs (B, N), the accumulators beneath them where there are, and what `predict` returns."""

    logits: Array
    accumulators: Array | None
    answers: Array


def requantized(sums: Tensor, multiplier: Tensor, shift: Tensor, low: int, high: int) -> Tensor:
    """clamp((sums x multiplier + half) >> shift): rounds half up. int64 throughout."""
    half = torch.where(shift > 0, torch.ones_like(shift) << (shift - 1).clamp(min=0), 0)
    return ((sums * multiplier + half) >> shift).clamp(low, high)


def compute(operation: Operation, values: Mapping[str, Tensor]) -> Tensor:
    """One operation on rows (B, ...) of integers as int64; raw inputs as they are."""
    given = [values[name] for name in operation.inputs]
    out = _COMPUTE[operation.kind](operation, *given)
    return out.reshape(given[0].shape[0], *operation.shape)


def accumulated(operation: Operation, x: Tensor) -> Tensor:
    """The sums of a conv or linear before requantization, (B, ...): whole numbers in floats that hold them exactly."""
    weight, bias = operation.real
    if operation.kind == "linear":
        return (x.to(weight.dtype) @ weight.t() + bias).long()
    top, left, bottom, right = operation.options["padding"]
    padded = nn.functional.pad(x.to(weight.dtype), (left, right, top, bottom))
    stride, dilation = tuple(operation.options["stride"]), tuple(operation.options["dilation"])
    return nn.functional.conv2d(padded, weight, bias, stride, 0, dilation, operation.options["groups"]).long()


def _wide(operation: Operation, name: str) -> Tensor:
    return operation.wide[name]


def _bounds(operation: Operation) -> tuple[int, int]:
    return int(operation.options.get("low", LOW)), int(operation.options.get("high", HIGH))


def _narrowed(sums: Tensor, operation: Operation) -> Tensor:
    """Accumulators (B, O, ...) of a conv, or (B, ..., O) of a linear, to int8."""
    shape = (-1, 1, 1) if operation.kind == "conv" else (-1,)
    shift = _wide(operation, "shift").view(shape)
    multiplier = _wide(operation, "multiplier").view(shape) if "multiplier" in operation.constants else torch.ones_like(shift)
    return requantized(sums, multiplier, shift, *_bounds(operation))


def _filtered(operation: Operation, x: Tensor) -> Tensor:
    return _narrowed(accumulated(operation, x), operation)


def _quantize(operation: Operation, raw: Tensor) -> Tensor:
    low, high = _bounds(operation)
    if "gain" in operation.constants:
        return _quantize_floats(operation, raw, low, high)
    shape = (-1, *[1] * (raw.dim() - 2))
    multiplier, offset = (_wide(operation, name).view(shape) for name in ("multiplier", "offset"))
    shift = torch.tensor(operation.options["shift"])
    return requantized(raw.long() * multiplier + offset, torch.tensor(1), shift, low, high)


def _quantize_floats(operation: Operation, raw: Tensor, low: int, high: int) -> Tensor:
    """In float32 with a rounding after each step, as the C does; what is missing (not a number) becomes 0."""
    x: Array = raw.float().numpy()
    gain, offset = (operation.constants[name].astype(np.float32) for name in ("gain", "shift_by"))
    if "source" in operation.options:
        x = x.reshape(len(x), -1)[:, operation.options["source"]]
        flags = np.asarray(operation.options["flag"], dtype=bool)
        missing = np.isnan(x) & ~flags
        x = np.where(flags, np.isnan(x).astype(np.float32), x)
    else:
        missing = np.isnan(x)
        if gain.ndim == 1:
            gain, offset = (each.reshape(-1, *[1] * (x.ndim - 2)) for each in (gain, offset))
    scaled = (np.where(missing, np.float32(0), x) * gain).astype(np.float32) + offset
    missing |= np.isnan(scaled)
    scaled = np.clip(np.where(missing, np.float32(0), scaled).astype(np.float32), np.float32(low), np.float32(high)) + np.float32(128.5)
    return torch.from_numpy(np.where(missing, 0, scaled.astype(np.float32).astype(np.int64) - 128))


def _add(operation: Operation, a: Tensor, b: Tensor) -> Tensor:
    first, second = operation.constants["multiplier"].astype(np.int64).tolist()
    return requantized(a * first + b * second, torch.tensor(1), torch.tensor(operation.options["shift"]), *_bounds(operation))


def _concat(operation: Operation, *given: Tensor) -> Tensor:
    multiplier, shift = _wide(operation, "multiplier"), _wide(operation, "shift")
    parts = [requantized(x, m, s, LOW, HIGH) for x, m, s in zip(given, multiplier, shift, strict=True)]
    return torch.cat(parts, 1 + int(operation.options["axis"]) % len(operation.shape))


def _maximum(operation: Operation, x: Tensor) -> Tensor:
    windows = _windows(operation, x, -1000)
    return windows.amax(-1)


def _average(operation: Operation, x: Tensor) -> Tensor:
    return requantized(_windows(operation, x, 0).sum(-1), *_scalars(operation), LOW, HIGH)


def _windows(operation: Operation, x: Tensor, filler: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H', W', taps); what lies outside is `filler`, also beyond the padding where a last window is cut."""
    options = operation.options
    (kernel_y, kernel_x), (stride_y, stride_x) = options["kernel"], options["stride"]
    dilation_y, dilation_x = options.get("dilation", (1, 1))
    top, left, bottom, right = options["padding"]
    _, height, width = operation.shape
    need_y = (height - 1) * stride_y + (kernel_y - 1) * dilation_y + 1 - (x.shape[2] + top)
    need_x = (width - 1) * stride_x + (kernel_x - 1) * dilation_x + 1 - (x.shape[3] + left)
    padded = nn.functional.pad(x, (left, max(right, need_x), top, max(bottom, need_y)), value=filler)
    taps = [
        padded[:, :, y * dilation_y :: stride_y, z * dilation_x :: stride_x][:, :, :height, :width]
        for y in range(kernel_y)
        for z in range(kernel_x)
    ]
    return torch.stack(taps, -1)


def _scalars(operation: Operation) -> tuple[Tensor, Tensor]:
    return torch.tensor(int(operation.constants["multiplier"])), torch.tensor(int(operation.constants["shift"]))


def _reduce(operation: Operation, x: Tensor) -> Tensor:
    parts = x.reshape(len(x), operation.options["outer"], operation.options["size"], operation.options["inner"])
    if operation.options["how"] == "max":
        return parts.amax(2)
    return requantized(parts.sum(2), *_scalars(operation), LOW, HIGH)


def _table(operation: Operation, x: Tensor) -> Tensor:
    return _wide(operation, "table")[x + 128]


def _rnn(operation: Operation, x: Tensor) -> Tensor:
    weight, bias = operation.real
    multiplier, shift = (_wide(operation, name) for name in ("multiplier", "shift"))
    low, high = _bounds(operation)
    hidden = len(weight)
    state, states = torch.zeros(len(x), hidden, dtype=torch.long), []
    for step in x.unbind(1):
        sums = (torch.cat((step, state), 1).to(weight.dtype) @ weight.t() + bias).long()
        if "curve" in operation.constants:
            state = _curved(requantized(sums, multiplier, shift, -2048, 2047), _wide(operation, "curve")).clamp(low, high)
        else:
            state = requantized(sums, multiplier, shift, low, high)
        states.append(state)
    return state if operation.options["last"] else torch.stack(states, 1)


def _curved(pre: Tensor, curve: Tensor) -> Tensor:
    """Tanh of pre / 256, by 128 straight pieces: x 32767, then x 127."""
    place = pre + 2048
    index, part = place >> 5, place & 31
    between = curve[index] + (((curve[index + 1] - curve[index]) * part + 16) >> 5)
    return (between * 127 + 16384) >> 15


def _embedding(operation: Operation, ids: Tensor) -> Tensor:
    table = _wide(operation, "table")
    if "source" in operation.options:
        ids = ids.flatten(1)[:, operation.options["source"]]
    if not ids.is_floating_point():
        ids = ids.long()  # a comparison of bytes would wrap the number of rows
    inside = (ids >= 0) & (ids < len(table))  # neither holds for what is not a number
    return table[torch.where(inside, ids, torch.zeros_like(ids)).long()]


def _slice(operation: Operation, x: Tensor) -> Tensor:
    axis, start, step = (int(operation.options[name]) for name in ("axis", "start", "step"))
    count = int(operation.options["count"])
    return x.index_select(1 + axis % len(operation.shape), torch.arange(start, start + count * step, step))


_COMPUTE: dict[str, Callable[..., Tensor]] = {
    "quantize": _quantize,
    "conv": _filtered,
    "linear": _filtered,
    "add": _add,
    "concat": _concat,
    "maximum": _maximum,
    "average": _average,
    "reduce": _reduce,
    "table": _table,
    "clamp": lambda operation, x: x.clamp(*_bounds(operation)),
    "rnn": _rnn,
    "embedding": _embedding,
    "reshape": lambda operation, x: x,
    "permute": lambda operation, x: x.permute(0, *(1 + axis for axis in operation.options["order"])),
    "slice": _slice,
}
