"""The operations of a program as C: the constants that they need, the kernels, and the calls."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from anyfit.errors import InputError
from anyfit.program.operations import HIGH, LOW, Array, Operation, Program
from anyfit.shrink.arena import Arena
from anyfit.shrink.places import RAW, is_alias, shapes_of, strided, window_of

__all__ = ["BYTES", "Code", "Field", "float_literal", "plus", "whole_literal", "words", "wrapped"]

TYPES = {"uint8": "uint8_t", "int8": "int8_t", "uint16": "uint16_t", "int32": "int32_t", "float32": "float"}
BYTES = {"int64_t": 8, "int32_t": 4, "float": 4, "int16_t": 2, "int8_t": 1}
_WIDTH = 120  # of a line of C


class Field(NamedTuple):
    """An array of the struct of constants."""

    type: str
    name: str
    values: Array

    @property
    def bytes(self) -> int:
        return BYTES[self.type] * self.values.size


class Code:
    """What the operations of a program need: constants, kernels and calls."""

    def __init__(self, program: Program, arena: Arena) -> None:
        self.program, self.arena = program, arena
        self.shapes = shapes_of(program)
        self.raw_type = TYPES[program.inputs[0].dtype]
        self.raw_bytes = np.dtype(program.inputs[0].dtype).itemsize
        self.fields: list[Field] = []
        self.shared: dict[tuple[str, bytes], str] = {}  # curves and tables that operations have in common
        self.kernels: set[str] = set()
        self.calls: list[str] = []
        self.wide_column = False
        self.answer = "0"
        before = 0
        self.starts: dict[str, int] = {}
        for given in program.inputs:
            self.starts[given.name] = (arena.offsets[RAW] + before) // self.raw_bytes
            before += given.bytes
        for index in arena.order:
            self.operation(index, program.operations[index])
        self.conclude()

    def at(self, value: str, more: int = 0) -> str:
        """The C expression of where a value lies."""
        if value in self.starts:
            return plus("arena.raw", self.starts[value] + more)
        if value == self.program.result and not is_alias(self.program.operations[-1], self.shapes):
            return plus("logits", more)
        return plus("arena.bytes", self.arena.offsets[value] + more)

    def constant(self, type_: str, name: str, values: Array, *, share: bool = False) -> str:
        """A new array of the struct; gives its C expression."""
        key = (type_, values.tobytes())
        if share and key in self.shared:
            return self.shared[key]
        self.fields.append(Field(type_, name, np.ravel(values)))
        self.shared[key] = f"model.{name}"
        return f"model.{name}"

    def call(self, kernel: str, *arguments: object, narrow: bool = False, answer: str = "", indent: int = 4) -> None:
        self.kernels.add(kernel + "_32" * narrow)
        self.calls += wrapped(f"{answer}{kernel}{'_32' * narrow}({', '.join(map(str, arguments))});", indent)

    def copy(self, source: str, target: str, dims: Iterable[tuple[int, int]]) -> None:
        """Loops that write one byte after the other."""
        loops = [(count, stride) for count, stride in dims if count > 1] or [(1, 1)]
        index = " + ".join(f"i{depth}" if stride == 1 else f"i{depth} * {stride}" for depth, (_, stride) in enumerate(loops))
        self.calls += ["    {", f"        const int8_t *in = {source};", f"        int8_t *out = {target};"]
        for depth, (count, _) in enumerate(loops):
            self.calls.append("    " * (depth + 2) + f"for (int32_t i{depth} = 0; i{depth} < {count}; i{depth}++) {{")
        self.calls.append("    " * (len(loops) + 2) + f"*out++ = in[{index}];")
        self.calls += ["    " * (depth + 1) + "}" for depth in range(len(loops), -1, -1)]

    def operation(self, index: int, operation: Operation) -> None:
        if is_alias(operation, self.shapes):
            return
        shape = " x ".join(map(str, operation.shape)) or "1"
        self.calls.append(f"    /* {words(operation.name)}: {words(operation.kind)} to {shape} */")
        getattr(self, f"emit_{operation.kind}")(index, operation)

    def conclude(self) -> None:
        """What the prediction comes to."""
        program = self.program
        last = program.operations[-1]
        size = last.bytes
        if is_alias(last, self.shapes):
            self.copy(self.at(program.result), "logits", [(size, 1)])
        if self.answer != "0":
            return  # decided by sums
        if program.task == "classes":
            self.call("largest_of", "logits", size, answer="const int32_t answer = ")
            self.answer = "answer"
        elif size == 1:
            self.answer = "logits[0] > 0" if program.task == "binary" else "logits[0]"

    # What each kind of operation calls

    def emit_quantize(self, index: int, operation: Operation) -> None:
        low, high = _bounds(operation)
        constants, given = operation.constants, operation.inputs[0]
        if "source" in operation.options:
            columns = math.prod(self.shapes[given])
            source = np.array(
                [-1 - int(s) if f else int(s) for s, f in zip(operation.options["source"], operation.options["flag"], strict=True)]
            )
            self.wide_column = self.wide_column or columns > 128
            parts = [self.constant("int16_t" if columns > 128 else "int8_t", f"source_{index}", source)]
            parts += [self.constant("float", f"{name}_{index}", constants[name]) for name in ("gain", "shift_by")]
            bounds = (float_literal(low), float_literal(high))
            self.call("quantize_columns", self.at(given), self.at(operation.output), *parts, operation.bytes, *bounds)
            return
        floats = "gain" in constants
        pairs = [constants[name] for name in (("gain", "shift_by") if floats else ("multiplier", "offset"))]
        times = max(array.size for array in pairs)
        arrays = [np.broadcast_to(array.ravel(), times) for array in pairs]
        size = operation.bytes // times
        where: tuple[str, ...] = (self.at(given), self.at(operation.output))
        indent = 4 if times == 1 else 8
        if times == 1:
            values = [(float_literal if floats else whole_literal)(array[0]) for array in arrays]
        else:
            kinds = ("float", "float") if floats else ("int32_t", _fitting(arrays[1]))
            names = ("gain", "shift_by") if floats else ("multiplier", "offset")
            values = [f"{self.constant(kind, f'{name}_{index}', array)}[c]" for kind, name, array in zip(kinds, names, arrays, strict=True)]
            self.calls.append(f"    for (int32_t c = 0; c < {times}; c++) {{")
            where = tuple(f"{place} + c * {size}" for place in where)
        if floats:
            self.call("quantize_float", *where, size, *values, float_literal(low), float_literal(high), indent=indent)
        else:
            shift = int(operation.options["shift"])
            largest = {"uint8": 255, "int8": 128, "uint16": 65535}.get(self.program.inputs[0].dtype, 2**31)
            bound = max(largest * abs(int(m)) + abs(int(o)) for m, o in zip(*arrays, strict=True))
            self.call("quantize", *where, size, *values, shift, low, high, narrow=_is_small(bound, shift), indent=indent)
        if times > 1:
            self.calls.append("    }")

    def filters(self, index: int, operation: Operation) -> tuple[list[str], bool]:
        """weight, bias, multiplier and shift of a conv, linear or rnn; the multiplier is left out where it is 1 throughout."""
        constants = operation.constants
        multiplier, shift = constants.get("multiplier"), constants["shift"]
        narrow = (multiplier is None or bool(np.all(multiplier == 1))) and int(shift.max()) < 32
        parts = [
            self.constant("int8_t", f"weight_{index}", constants["weight"]),
            self.constant("int32_t", f"bias_{index}", constants["bias"]),
        ]
        if not narrow:
            values = np.ones(shift.shape, np.int32) if multiplier is None else multiplier
            parts.append(self.constant("int32_t", f"multiplier_{index}", values))
        return [*parts, self.constant("int8_t", f"shift_{index}", shift)], narrow

    def emit_conv(self, index: int, operation: Operation) -> None:
        window = window_of(operation, self.shapes[operation.inputs[0]])
        parts, narrow = self.filters(index, operation)
        outputs, groups = operation.shape[0], int(operation.options["groups"])
        where = (self.at(operation.inputs[0]), self.at(operation.output))
        single = (window.kernel_height, window.kernel_width, window.stride_y, window.stride_x, groups) == (1, 1, 1, 1, 1)
        if single and not any(operation.options["padding"]):
            area = window.height * window.width
            self.call("pointwise", *where, *parts, outputs, window.channels, area, *_bounds(operation), narrow=narrow)
        else:
            sizes = window._replace(channels=window.channels // groups)
            self.call("convolve", *where, *parts, outputs, outputs // groups, *sizes, *_bounds(operation), narrow=narrow)

    def emit_linear(self, index: int, operation: Operation) -> None:
        parts, narrow = self.filters(index, operation)
        outputs, inputs = operation.constants["weight"].shape
        given, made = self.at(operation.inputs[0]), self.at(operation.output)
        bounds = _bounds(operation)
        decides = operation is self.program.operations[-1] and self.program.accumulates
        if decides and self.program.task == "classes":
            self.call("classify", given, made, *parts, inputs, outputs, *bounds, narrow=narrow, answer="const int32_t answer = ")
            self.answer = "answer"
        elif decides and outputs == 1:
            weight, bias, *multiplier, shift = parts
            self.call("weighted", given, weight, inputs, f"{bias}[0]", answer="const int32_t sum = ")
            value = f"(int64_t)sum * {multiplier[0]}[0]" if multiplier else "sum"
            self.call("requantized", value, f"{shift}[0]", *bounds, narrow=narrow, answer=f"{made}[0] = (int8_t)")
            self.answer = "sum > 0" if self.program.task == "binary" else "sum"
        else:
            self.call("linear", given, made, *parts, operation.bytes // outputs, inputs, outputs, *bounds, narrow=narrow)

    def emit_rnn(self, index: int, operation: Operation) -> None:
        parts, narrow = self.filters(index, operation)
        steps, inputs = self.shapes[operation.inputs[0]]
        size, last = operation.constants["weight"].shape[0], bool(operation.options["last"])
        curve = operation.constants.get("curve")
        if curve is not None:
            parts.append(self.constant("int16_t", f"curve_{index}", curve, share=True))
        made = self.at(operation.output)
        states = self.at(f"{operation.output}!scratch") if last else made
        sizes = (steps, 2 if last else steps, inputs, size, *_bounds(operation))
        self.call("recur" if curve is None else "recur_bent", self.at(operation.inputs[0]), states, *parts, *sizes, narrow=narrow)
        if last:
            self.copy(self.at(f"{operation.output}!scratch", (steps - 1) % 2 * size), made, [(size, 1)])

    def emit_add(self, index: int, operation: Operation) -> None:
        a, b = (int(m) for m in operation.constants["multiplier"])
        shift = int(operation.options["shift"])
        places = [self.at(value) for value in (*operation.inputs, operation.output)]
        self.call("add", *places, operation.bytes, a, b, shift, *_bounds(operation), narrow=_is_small(128 * (abs(a) + abs(b)), shift))

    def emit_concat(self, index: int, operation: Operation) -> None:
        axis = int(operation.options["axis"]) % len(operation.shape)
        step, before = math.prod(operation.shape[axis:]), 0
        pairs = zip(operation.constants["multiplier"], operation.constants["shift"], strict=True)
        for value, (multiplier, shift) in zip(operation.inputs, pairs, strict=True):
            size = math.prod(self.shapes[value][axis:])
            scale = (int(multiplier), int(shift), LOW, HIGH)
            rows = operation.bytes // step
            narrow = _is_small(128 * int(multiplier), int(shift))
            self.call("place", self.at(value), self.at(operation.output, before), rows, size, step, *scale, narrow=narrow)
            before += size

    def emit_maximum(self, index: int, operation: Operation) -> None:
        given = operation.inputs[0]
        self.call("maximum", self.at(given), self.at(operation.output), *window_of(operation, self.shapes[given]))

    def emit_average(self, index: int, operation: Operation) -> None:
        given = operation.inputs[0]
        window = window_of(operation, self.shapes[given])
        self.summed("average", operation, window.kernel_height * window.kernel_width, *window)

    def emit_reduce(self, index: int, operation: Operation) -> None:
        sizes = [int(operation.options[name]) for name in ("outer", "size", "inner")]
        if operation.options["how"] == "mean":
            self.summed("mean", operation, sizes[1], *sizes)
        else:
            self.call("most", self.at(operation.inputs[0]), self.at(operation.output), *sizes)

    def summed(self, kernel: str, operation: Operation, terms: int, *sizes: int) -> None:
        """An average: sums of so many terms, scaled."""
        multiplier, shift = int(operation.constants["multiplier"]), int(operation.constants["shift"])
        where = (self.at(operation.inputs[0]), self.at(operation.output))
        self.call(kernel, *where, *sizes, multiplier, shift, LOW, HIGH, narrow=_is_small(128 * terms * multiplier, shift))

    def emit_table(self, index: int, operation: Operation) -> None:
        table = self.constant("int8_t", f"table_{index}", operation.constants["table"], share=True)
        self.call("look_up", self.at(operation.inputs[0]), self.at(operation.output), operation.bytes, table)

    def emit_clamp(self, index: int, operation: Operation) -> None:
        self.call("clamp", self.at(operation.inputs[0]), self.at(operation.output), operation.bytes, *_bounds(operation))

    def emit_embedding(self, index: int, operation: Operation) -> None:
        table = operation.constants["table"]
        rows, size = table.shape
        field = self.constant("int8_t", f"table_{index}", table, share=True)
        given = operation.inputs[0]
        places = [int(place) for place in operation.options.get("source", range(math.prod(self.shapes[given])))]
        begin = 0
        for end in range(1, len(places) + 1):  # a call for each run of neighbours
            if end == len(places) or places[end] != places[end - 1] + 1:
                ids, out = self.at(given, places[begin]), self.at(operation.output, begin * size)
                self.call("embed", ids, out, end - begin, field, rows, size)
                begin = end

    def emit_permute(self, index: int, operation: Operation) -> None:
        start, dims = strided(operation, self.shapes[operation.inputs[0]])
        self.copy(self.at(operation.inputs[0], start), self.at(operation.output), dims)

    emit_slice = emit_permute


def _bounds(operation: Operation) -> tuple[int, int]:
    return int(operation.options.get("low", LOW)), int(operation.options.get("high", HIGH))


def _is_small(bound: int, shift: int) -> bool:
    """Whether 32 bits hold numbers of at most `bound` and shift them."""
    return bound < 2**31 and shift < 32


def plus(base: str, offset: int) -> str:
    """A C pointer, so many elements on."""
    return f"{base} + {offset}" if offset else base


def _fitting(values: Array) -> str:
    return "int32_t" if all(-(2**31) <= int(value) < 2**31 for value in values) else "int64_t"


def whole_literal(value: Any) -> str:
    """A whole number in C."""
    value = int(value)
    return str(value) if -(2**31) < value < 2**31 else f"INT64_C({value})"


def float_literal(value: Any) -> str:
    """A float in C, exactly."""
    value = float(value)
    if not math.isfinite(value):
        raise InputError(f"a constant of the network is {value}; its numbers must be finite to be exported")
    return f"{value:.8e}f"  # nine digits name each float


def words(text: str) -> str:
    """A name as a comment can hold it."""
    return re.sub(r"[^A-Za-z0-9 _.,:()-]", "_", text)[:80]


def wrapped(text: str, indent: int) -> list[str]:
    """Lines of C that are not too long."""
    lines = textwrap.wrap(text, _WIDTH - indent - 4, break_long_words=False, break_on_hyphens=False)
    return [" " * (indent if number == 0 else indent + 4) + line for number, line in enumerate(lines)]
