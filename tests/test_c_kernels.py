"""Every kernel of the C export against the definition of programs, bit for bit: random shapes and constants, compiled with sanitizers.

A compilation takes many cases at once: a program has an input for each, and joins what they give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from anyfit.program.operations import Array, Input, Operation, Program
from anyfit.shrink import c, compiled
from anyfit.shrink.arena import Arena

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="no C compiler")
ROWS, CASES = 3, 24
SEEDS = st.integers(0, 2**64 - 1)  # of all that is drawn: shapes that hypothesis draws itself are mostly small and alike
# shrinking would compile for minutes; what differs is told case by case instead
QUICK: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": (Phase.explicit, Phase.generate)}


# ------------------------------------------------------------------ random operations


class Maker:
    """Makes the operations of one case."""

    def __init__(self, random: np.random.Generator, name: str) -> None:
        self.random, self.name, self.operations = random, name, list[Operation]()

    def whole(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high + 1))

    def one_of(self, *choices: Any) -> Any:
        return choices[self.whole(0, len(choices) - 1)]

    def put(self, kind: str, inputs: tuple[str, ...], shape: tuple[int, ...], options: Mapping[str, Any], **constants: Array) -> str:
        output = f"{self.name}.{len(self.operations)}"
        self.operations.append(Operation(kind, output, inputs, output, shape, options, constants))
        return output

    def bounds(self) -> dict[str, int]:
        low, high = self.one_of((-128, 127), (0, 127), (-127, 127), (-5, 100), (0, 0))
        return {"low": low, "high": high}

    def scales(self, count: int, terms: int, *, signed: bool = False) -> tuple[Array, Array]:
        """Multipliers and shifts of sums of so many products: some fit well, some are at their limits, some are powers of two."""
        way = self.whole(0, 4)
        if way == 0:
            multiplier, shift = np.ones(count), self.random.integers(0, 8 + max(terms, 1).bit_length(), count)
        elif way == 1:
            multiplier = self.random.choice([1, 2, 2**31 - 1, 2**30], count)
            shift = self.random.choice([0, 1, 31, 32, 33, 61, 62], count)
        else:
            multiplier = self.random.integers(2**30, 2**31, count)
            shift = np.full(count, min(62, 30 + 7 + max(terms, 1).bit_length() // 2)) + self.random.integers(-3, 3, count)
        if signed:
            multiplier = multiplier * self.random.choice([-1, 1], count)
        return multiplier.astype(np.int32), shift.clip(0, 62).astype(np.int8)

    def filters(self, shape: tuple[int, ...]) -> dict[str, Array]:
        multiplier, shift = self.scales(shape[0], math.prod(shape[1:]))
        largest = 2**31 - 1 - 2**14 * math.prod(shape[1:]) if self.whole(0, 5) == 0 else 2**14
        constants = {
            "weight": self.random.integers(-128, 128, shape).astype(np.int8),
            "bias": self.random.integers(-largest, largest + 1, shape[0]).astype(np.int32),
            "multiplier": multiplier,
            "shift": shift,
        }
        if self.whole(0, 3) == 0 and (multiplier == 1).all():
            del constants["multiplier"]
        return constants


def sliding(make: Maker) -> tuple[tuple[int, int, int], tuple[int, int, int], dict[str, Any]]:
    """Shape before and after, and options, of a window."""
    kernel = (make.whole(1, 3), make.whole(1, 4))
    stride, dilation = (make.whole(1, 3), make.whole(1, 2)), (make.whole(1, 2), make.whole(1, 3))
    padding = tuple(make.whole(0, 2) for _ in range(4))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    height = make.whole(max(1, reach[0] - padding[0] - padding[2]), 8)
    width = make.whole(max(1, reach[1] - padding[1] - padding[3]), 10)
    out = (
        (height + padding[0] + padding[2] - reach[0]) // stride[0] + 1,
        (width + padding[1] + padding[3] - reach[1]) // stride[1] + 1,
    )
    channels = make.whole(1, 4)
    return (channels, height, width), (channels, *out), {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}


def conv(make: Maker, value: str) -> tuple[int, ...]:
    shape, out, options = sliding(make)
    if make.whole(0, 2) == 0:  # one tap: a kernel of its own
        out, options = shape, {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1)}
    groups = make.one_of(*(g for g in range(1, shape[0] + 1) if shape[0] % g == 0))
    outputs = groups * make.whole(1, 3)
    kernel = options.pop("kernel")
    filters = make.filters((outputs, shape[0] // groups, *kernel))
    make.put("conv", (value,), (outputs, *out[1:]), options | {"groups": groups} | make.bounds(), **filters)
    return shape


def linear(make: Maker, value: str) -> tuple[int, ...]:
    shape = (*(make.whole(1, 4) for _ in range(make.whole(0, 2))), make.whole(1, 20))
    outputs = make.whole(1, 6)
    make.put("linear", (value,), (*shape[:-1], outputs), make.bounds(), **make.filters((outputs, shape[-1])))
    return shape


def add(make: Maker, value: str) -> tuple[int, ...]:
    shape = (make.whole(1, 5), make.whole(1, 9))
    other = make.put("table", (value,), shape, {}, table=make.random.integers(-128, 128, 256).astype(np.int8))
    multiplier, shift = make.scales(2, 1, signed=True)
    inputs = (value, other) if make.whole(0, 1) else (other, value)
    make.put("add", inputs, shape, {"shift": int(shift[0])} | make.bounds(), multiplier=multiplier)
    return shape


def concat(make: Maker, value: str) -> tuple[int, ...]:
    shape = (make.whole(1, 3), make.whole(1, 4), make.whole(1, 4))
    axis = make.whole(0, 2)
    other = make.put("clamp", (value,), shape, {"low": -9, "high": 20})
    multiplier, shift = make.scales(3, 1)
    out = tuple(size * 3 if index == axis else size for index, size in enumerate(shape))
    make.put("concat", (value, other, value), out, {"axis": axis}, multiplier=multiplier, shift=shift)
    return shape


def maximum(make: Maker, value: str) -> tuple[int, ...]:
    shape, out, options = sliding(make)
    make.put("maximum", (value,), out, options)
    return shape


def average(make: Maker, value: str) -> tuple[int, ...]:
    shape, out, options = sliding(make)
    multiplier, shift = make.scales(1, math.prod(options["kernel"]))
    make.put("average", (value,), out, options, multiplier=multiplier[0], shift=shift[0])
    return shape


def reduce(make: Maker, value: str) -> tuple[int, ...]:
    shape = (make.whole(1, 4), make.whole(1, 9), make.whole(1, 5))
    options = dict(zip(("outer", "size", "inner"), shape, strict=True))
    if make.whole(0, 1):
        make.put("reduce", (value,), (shape[0], shape[2]), options | {"how": "max"})
    else:
        multiplier, shift = make.scales(1, shape[1])
        make.put("reduce", (value,), (shape[0], shape[2]), options | {"how": "mean"}, multiplier=multiplier[0], shift=shift[0])
    return shape


def table(make: Maker, value: str) -> tuple[int, ...]:
    size = make.whole(1, 20)
    make.put("table", (value,), (size,), {}, table=make.random.integers(-128, 128, 256).astype(np.int8))
    return (size,)


def clamp(make: Maker, value: str) -> tuple[int, ...]:
    size = make.whole(1, 20)
    make.put("clamp", (value,), (size,), make.bounds())
    return (size,)


def rnn(make: Maker, value: str) -> tuple[int, ...]:
    steps, inputs, hidden, last = make.whole(1, 6), make.whole(1, 5), make.whole(1, 5), bool(make.whole(0, 1))
    constants = {"multiplier": np.ones(hidden, np.int32)} | make.filters((hidden, inputs + hidden))
    if make.whole(0, 1):
        curve = np.tanh((np.arange(129) - 64) / 8) * 32767
        constants["curve"] = (np.rint(curve) if make.whole(0, 1) else make.random.integers(-32768, 32768, 129)).astype(np.int16)
    make.put("rnn", (value,), (hidden,) if last else (steps, hidden), {"last": last} | make.bounds(), **constants)
    return (steps, inputs)


def permute(make: Maker, value: str) -> tuple[int, ...]:
    shape = tuple(make.whole(1, 3) for _ in range(make.whole(1, 5)))
    order = make.random.permutation(len(shape)).tolist()
    make.put("permute", (value,), tuple(shape[axis] for axis in order), {"order": tuple(order)})
    return shape


def slice_(make: Maker, value: str) -> tuple[int, ...]:
    shape = tuple(make.whole(1, 5) for _ in range(make.whole(1, 3)))
    axis = make.whole(0, len(shape) - 1)
    start, step = make.whole(0, shape[axis] - 1), make.whole(1, 3)
    count = make.whole(1, -(-(shape[axis] - start) // step))
    out = (*shape[:axis], count, *shape[axis + 1 :])
    make.put("slice", (value,), out, {"axis": axis, "start": start, "step": step, "count": count})
    return shape


KINDS = (conv, conv, linear, add, concat, maximum, average, reduce, table, clamp, rnn, permute, slice_)


def program_of(seed: int, cases: int = CASES, kinds: tuple[Callable[[Maker, str], tuple[int, ...]], ...] = KINDS) -> Program:
    """A program whose inputs are int8 values, each taken by one of the kinds; what they give stands side by side."""
    random = np.random.default_rng(seed)
    inputs, operations, parts = [], list[Operation](), []
    for index in range(cases):
        name = f"case{index}"
        make = Maker(random, name)
        shape = make.one_of(*kinds)(make, f"{name}.in")
        inputs.append(Input(name, "int8", shape))
        operations.append(identity(name, f"{name}.in", shape))
        operations += make.operations
        parts.append(operations[-1])
    return joined(inputs, operations, parts)


def identity(given: str, output: str, shape: tuple[int, ...]) -> Operation:
    return Operation("quantize", output, (given,), output, shape, {"shift": 0}, {"multiplier": np.array([1]), "offset": np.array([0])})


def joined(inputs: list[Input], operations: list[Operation], parts: list[Operation]) -> Program:
    flat = [Operation("reshape", "", (part.output,), f"{part.output}.flat", (part.bytes,)) for part in parts]
    ones = {"multiplier": np.ones(len(parts), np.int32), "shift": np.zeros(len(parts), np.int8)}
    size = sum(part.bytes for part in parts)
    join = Operation("concat", "join", tuple(each.output for each in flat), "joined", (size,), {"axis": 0}, ones)
    operations = [*operations, *flat, join]
    return Program(tuple(inputs), tuple(operations), "joined", {each.output: 1.0 for each in operations}, 1.0)


def raw_rows(program: Program, rows: int = ROWS, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    raw = {}
    for each in program.inputs:
        if each.dtype == "float32":
            values = (random.normal(0, 3, (rows, *each.shape)) * random.choice([0.1, 1, 100], (rows, *each.shape))).astype(np.float32)
            values[random.random(values.shape) < 0.2] = np.nan
            values[random.random(values.shape) < 0.05] = np.inf
        else:
            limits = np.iinfo(each.dtype)
            values = random.integers(limits.min, limits.max + 1, (rows, *each.shape)).astype(each.dtype)
        raw[each.name] = values
    return raw


def side_by_side(program: Program, raw: Mapping[str, Array]) -> Array:
    """The inputs of a row one after the other, as a device is handed them."""
    return np.concatenate([raw[each.name].reshape(ROWS if not len(raw) else len(raw[each.name]), -1) for each in program.inputs], 1)


def written(program: Program, folder: Path, arena: Arena | None = None, name: str = "net") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in c.emit(program, name, arena or apart(program)).items():
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def apart(program: Program) -> Arena:
    """An arena in the given order, in which values share memory only where an output may be written over an input that ends with it."""
    steps, sources = c.steps_of(program)
    offsets, sizes, end = dict.fromkeys(sources, 0), dict(sources), sum(sources.values())
    readers: dict[str, int] = {}
    for step in steps:
        for value in set(step.inputs):
            readers[value] = readers.get(value, 0) + 1
    for step in steps:
        over = step.alias if step.alias is not None else step.replaces
        if over is not None and (step.alias is not None or (readers[over] == 1 and step.bytes <= sizes[over])):
            offsets[step.output], sizes[step.output] = offsets[over], step.bytes
        else:
            offsets[step.output], sizes[step.output], end = end, step.bytes, end + step.bytes
        offsets[f"{step.name}!scratch"], end = end, end + step.scratch
    return Arena(tuple(range(len(steps))), offsets, end, end, (), True)


def check(program: Program, folder: Path, raw: Mapping[str, Array] | None = None, *, arena: Arena | None = None, **options: Any) -> None:
    raw = raw_rows(program) if raw is None else raw
    expected = program.run(raw)
    binary = compiled.build(written(program, folder, arena), "net", folder, **({"sanitize": True, "flags": ("-O1", "-g0")} | options))
    ran = compiled.run(binary, side_by_side(program, raw), expected.logits.shape[1])
    told = differing(program, ran.logits, expected.logits)
    if told:
        pytest.fail(told)
    assert np.array_equal(ran.answers, expected.answers)


def differing(program: Program, got: Array, expected: Array) -> str:
    """The cases whose outputs differ, where a program joins cases."""
    told, before = "", 0
    last = program.operations[-1]
    sizes = {value.removesuffix(".flat"): each.bytes for each in program.operations for value in [each.output] if value in last.inputs}
    for name, size in (sizes or {last.output: last.bytes}).items():
        one, other = got[:, before : before + size], expected[:, before : before + size]
        if not np.array_equal(one, other):
            case = [each for each in program.operations if each.output.split(".")[0] == name.split(".")[0]]
            told += f"{case}\ngives {one.tolist()}\nrather than {other.tolist()}\n\n"
        before += size
    return told


# ------------------------------------------------------------------ the claims


@settings(max_examples=8, **QUICK)
@given(seed=SEEDS)
def test_kernels_are_what_programs_are_defined_to_be(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(program_of(seed), tmp_path_factory.mktemp("net"))


@pytest.mark.slow
@settings(max_examples=100, **QUICK)
@given(seed=SEEDS)
def test_many_kernels_are_what_programs_are_defined_to_be(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(program_of(seed), tmp_path_factory.mktemp("net"))


@pytest.mark.parametrize("kind", sorted({kind.__name__ for kind in KINDS}))
def test_each_kind_has_cases(kind: str) -> None:
    found = 0
    kinds = tuple(each for each in KINDS if each.__name__ == kind)

    @settings(max_examples=5, **QUICK)
    @given(seed=SEEDS)
    def look(seed: int) -> None:
        nonlocal found
        program = program_of(seed, 4, kinds)
        found += sum(operation.kind == kind.strip("_") for operation in program.operations)
        run, alone = program.run(raw_rows(program)).logits, second_definition(program, raw_rows(program))
        assert np.array_equal(run, alone)

    look()
    assert found >= 4


# ------------------------------------------------------------------ raw inputs


def raw_program_of(seed: int) -> Program:
    """A program with one raw input, which the first operation reads and may overwrite."""
    make = Maker(np.random.default_rng(seed), "raw")
    way = make.one_of("whole", "whole", "float", "columns", "columns", "embedding")
    dtypes = {"whole": ["uint8", "int8", "uint16", "int32"], "embedding": ["uint8", "uint16", "int32", "float32"]}
    dtype = make.one_of(*dtypes.get(way, ["float32"]))
    shape = tuple(make.whole(1, 6) for _ in range(make.whole(1, 3)))
    if way == "embedding":
        table = make.random.integers(-128, 128, (make.whole(1, 300), make.whole(1, 6))).astype(np.int8)
        source = make.random.permutation(math.prod(shape))[: make.whole(1, 5)].tolist() if make.whole(0, 1) else None
        out = shape if source is None else (len(source),)
        value = make.put("embedding", ("x",), (*out, table.shape[1]), {} if source is None else {"source": source}, table=table)
    elif way == "columns":
        shape = (make.whole(1, 150) if make.whole(0, 3) == 0 else make.whole(1, 6),)
        size = make.whole(1, 3 * shape[0])
        source = make.random.integers(0, shape[0], size)
        source = source if make.whole(0, 1) else np.sort(source)
        options = {"source": source.tolist(), "flag": (make.random.random(size) < 0.3).tolist()} | make.bounds()
        floats = make.random.normal(0, 20, (2, size)).astype(np.float32)
        value = make.put("quantize", ("x",), (size,), options, gain=floats[0], shift_by=floats[1])
    elif way == "float":
        floats = make.random.normal(0, 20, (2, shape[0] if make.whole(0, 1) else 1)).astype(np.float32)
        value = make.put("quantize", ("x",), shape, make.bounds(), gain=floats[0], shift_by=floats[1])
    else:
        count = shape[0] if make.whole(0, 1) else 1
        largest = {"uint8": 8, "int8": 7, "uint16": 16, "int32": 31}[dtype]
        if make.whole(0, 2) == 0:
            multiplier, offset, shift = np.ones(count, np.int64), np.zeros(count, np.int64), make.whole(0, largest)
        else:
            shift = make.whole(16, 30)
            multiplier = np.maximum(1, (2.0 ** (shift + 7 - largest) * make.random.uniform(0.5, 1.5, count)).astype(np.int64))
            offset = make.random.integers(-(128 << shift), 128 << shift, count)
        value = make.put("quantize", ("x",), shape, {"shift": shift} | make.bounds(), multiplier=multiplier, offset=offset)
    make.put("clamp", (value,), make.operations[-1].shape, {"low": -128, "high": 126})
    operations = tuple(make.operations)
    return Program(
        (Input("x", dtype, shape),), operations, operations[-1].output, dict.fromkeys([each.output for each in operations], 1.0), 1.0
    )


def check_raw(program: Program, folder: Path) -> None:
    raw = raw_rows(program)
    if program.operations[0].kind == "embedding":  # about as many ids within the table as beyond it
        ids = np.random.default_rng(1).integers(-3, 2 * len(program.operations[0].constants["table"]) + 3, raw["x"].shape)
        limits = (-3e9, 3e9) if program.inputs[0].dtype == "float32" else (np.iinfo(raw["x"].dtype).min, np.iinfo(raw["x"].dtype).max)
        raw["x"] = np.where(np.isfinite(raw["x"]), ids.clip(*limits), raw["x"]).astype(raw["x"].dtype)
    check(program, folder, raw, arena=c.plan(program))


@settings(max_examples=14, **QUICK)
@given(seed=SEEDS)
def test_raw_inputs_are_read_as_programs_are_defined(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_raw(raw_program_of(seed), tmp_path_factory.mktemp("net"))


@pytest.mark.slow
@settings(max_examples=100, **QUICK)
@given(seed=SEEDS)
def test_many_raw_inputs_are_read_as_programs_are_defined(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_raw(raw_program_of(seed), tmp_path_factory.mktemp("net"))


# ------------------------------------------------------------------ limits


def test_every_place_of_a_curve_is_exact(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    for curve in (np.rint(np.tanh((np.arange(129) - 64) / 8) * 32767), random.integers(-32768, 32768, 129)):
        weight = np.zeros((16, 17), np.int8)
        weight[:, 0] = 16  # 16 x + 0 to 15: all of -2048 to 2047
        constants = {
            "weight": weight,
            "bias": np.arange(16, dtype=np.int32),
            "multiplier": np.ones(16, np.int32),
            "shift": np.zeros(16, np.int8),
        }
        options = {"last": False, "low": -128, "high": 127}
        cell = Operation("rnn", "h", ("q",), "h", (1, 16), options, constants | {"curve": curve.astype(np.int16)})
        program = Program((Input("x", "int8", (1, 1)),), (identity("x", "q", (1, 1)), cell), "h", {"q": 1.0, "h": 1.0}, 1.0)
        check(program, tmp_path, {"x": np.arange(-128, 128).astype(np.int8).reshape(-1, 1, 1)})


def test_sums_and_shifts_at_their_limits_are_exact(tmp_path: Path) -> None:
    bias = np.array([2**31 - 1 - 2**14, -(2**31) + 2**14, 0, 2**30, -1, 12345], np.int64)
    for multiplier in (1, 2, 2**31 - 1):
        parts, operations = [], [identity("x", "q", (1,))]
        for shift in (0, 1, 2, 23, 30, 31, 32, 33, 40, 61, 62):
            each = {"weight": np.array([[127], [-128], [1], [0], [1], [-77]], np.int8), "bias": bias.astype(np.int32)}
            each |= {"multiplier": np.full(6, multiplier, np.int32), "shift": np.full(6, shift, np.int8)}
            operations.append(Operation("linear", "", ("q",), f"l{shift}", (6,), {}, each))
            parts.append(operations[-1])
        program = joined([Input("x", "int8", (1,))], operations, parts)
        raw = {"x": np.arange(-128, 128).astype(np.int8).reshape(-1, 1)}
        assert np.array_equal(program.run(raw).logits, second_definition(program, raw))
        check(program, tmp_path, raw)


@pytest.mark.parametrize("columns", [128, 200])
def test_columns_and_whether_they_are_missing_are_exact(columns: int, tmp_path: Path) -> None:
    random = np.random.default_rng(columns)
    source = [*range(columns), *range(columns)]
    options = {"source": source, "flag": [False] * columns + [True] * columns, "low": -127, "high": 127}
    floats = {
        "gain": random.normal(0, 40, 2 * columns).astype(np.float32),
        "shift_by": random.normal(0, 40, 2 * columns).astype(np.float32),
    }
    first = Operation("quantize", "", ("x",), "q", (2 * columns,), options, floats)
    second = Operation("clamp", "", ("q",), "c", (2 * columns,), {"low": -128, "high": 127})
    program = Program((Input("x", "float32", (columns,)),), (first, second), "c", {"q": 1.0, "c": 1.0}, 1.0)
    assert c.steps_of(program)[0][0].replaces is None  # whether one is missing is looked up after it was overwritten
    check(program, tmp_path, raw_rows(program, rows=20), arena=c.plan(program))


# ------------------------------------------------------------------ in place


def accesses(operation: Operation, shape: tuple[int, ...], item: int) -> Iterator[tuple[set[int], set[int]]]:
    """(bytes of the input read, bytes of the output written) of each turn of a kernel that writes in order, by its definition."""
    options = operation.options
    match operation.kind:
        case "conv" | "maximum" | "average":
            kernel = operation.constants["weight"].shape[2:] if operation.kind == "conv" else options["kernel"]
            groups = options.get("groups", shape[0])
            for at, (out, *place) in enumerate(np.ndindex(operation.shape)):
                first = out // (operation.shape[0] // groups) * (shape[0] // groups)
                reads = set()
                for channel, *taps in np.ndindex(shape[0] // groups, *kernel):
                    row, column = (
                        p * s - b + t * d
                        for p, s, b, t, d in zip(place, options["stride"], options["padding"], taps, options["dilation"], strict=False)
                    )
                    if 0 <= row < shape[1] and 0 <= column < shape[2]:
                        reads.add(((first + channel) * shape[1] + row) * shape[2] + column)
                yield reads, {at}
        case "reduce" | "slice":
            bytes_ = np.arange(math.prod(shape)).reshape(shape)
            if operation.kind == "reduce":
                parts = bytes_.transpose(0, 2, 1).reshape(-1, shape[1]).tolist()
            else:
                taken = options["start"] + np.arange(options["count"]) * options["step"]
                parts = np.take(bytes_, taken, options["axis"]).reshape(-1, 1).tolist()
            yield from ((set(part), {at}) for at, part in enumerate(parts))
        case "quantize":
            sources = options.get("source", range(operation.bytes))
            yield from ((set(range(s * item, s * item + item)), {at}) for at, s in enumerate(sources))
        case "embedding":
            size = operation.constants["table"].shape[1]
            for at, place in enumerate(options.get("source", range(operation.bytes // size))):
                yield set(range(place * item, place * item + item)), set(range(at * size, at * size + size))


def is_safe(operation: Operation, shape: tuple[int, ...], item: int) -> bool:
    written: set[int] = set()
    for reads, writes in accesses(operation, shape, item):
        if reads & written:
            return False
        written |= writes
    return True


PROVEN = ("conv", "maximum", "average", "reduce", "slice", "quantize", "embedding")


def test_what_is_written_over_an_input_destroys_nothing_that_is_read_later() -> None:
    told: dict[tuple[str, bool], int] = {}

    @settings(max_examples=60, **QUICK)
    @given(seed=SEEDS)
    def look(seed: int) -> None:
        compare(program_of(seed, kinds=(conv, maximum, average, reduce, slice_)), told)
        compare(raw_program_of(seed), told)

    look()
    assert all(told.get((kind, True)) for kind in PROVEN), str(sorted(told.items()))
    assert all(told.get((kind, False)) for kind in PROVEN if kind not in ("reduce", "slice")), str(sorted(told.items()))


def compare(program: Program, told: dict[tuple[str, bool], int]) -> None:
    shapes = {each.name: each.shape for each in program.inputs} | {each.output: each.shape for each in program.operations}
    item = np.dtype(program.inputs[0].dtype).itemsize
    for operation, step in zip(program.operations, c.steps_of(program)[0], strict=True):
        if operation.kind in PROVEN and step.alias is None:
            raw = item if operation.inputs[0] in {each.name for each in program.inputs} else 1
            safe = is_safe(operation, shapes[operation.inputs[0]], raw)
            # exact, but for windows that lie on padding alone and ids that are picked, which it takes for unsafe
            exact = all(reads for reads, _ in accesses(operation, shapes[operation.inputs[0]], raw))
            exact = exact and (operation.kind, "source" in operation.options) != ("embedding", True)
            if (step.replaces is not None) != safe and (exact or not safe):
                pytest.fail(f"in place: {step.replaces}, safe: {safe}, over {shapes[operation.inputs[0]]}: {operation}")
            told[operation.kind, safe] = told.get((operation.kind, safe), 0) + 1


# ------------------------------------------------------------------ a second definition, in plain whole numbers


def second_definition(program: Program, raw: Mapping[str, Array]) -> Array:
    """What a program gives, row by row and number by number."""
    rows = []
    for row in range(len(next(iter(raw.values())))):
        values = {name: given[row].astype(object) for name, given in raw.items()}
        for operation in program.operations:
            given = [values[name] for name in operation.inputs]
            values[operation.output] = np.array(list(plain(operation, given)), dtype=object).reshape(operation.shape)
        rows.append(values[program.result].ravel().astype(np.int8))
    return np.stack(rows)


def scaled(value: int, multiplier: int, shift: int, low: int = -128, high: int = 127) -> int:
    exact = int(value) * int(multiplier) * 2 + (1 << int(shift))  # twice the value, and a half more
    return min(max(exact // (2 << int(shift)), low), high)


def plain(operation: Operation, given: list[Array]) -> Iterator[int]:
    x, o, k = given[0], operation.options, operation.constants
    low, high = o.get("low", -128), o.get("high", 127)
    multiplier, shift = k.get("multiplier", itertools.repeat(1)), k.get("shift", itertools.repeat(o.get("shift")))
    match operation.kind:
        case "conv" | "maximum" | "average":
            kernel = k["weight"].shape[2:] if operation.kind == "conv" else o["kernel"]
            per = x.shape[0] // o.get("groups", x.shape[0])
            for out, y, z in np.ndindex(operation.shape):
                first = out // (operation.shape[0] // o.get("groups", x.shape[0])) * per
                taps = []
                for channel, i, j in np.ndindex(per, *kernel):
                    row, column = (
                        at * step - before + tap * apart
                        for at, step, before, tap, apart in zip((y, z), o["stride"], o["padding"], (i, j), o["dilation"], strict=False)
                    )
                    if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                        taps.append((int(x[first + channel, row, column]), (out, channel, i, j)))
                if operation.kind == "maximum":
                    yield max((value for value, _ in taps), default=-128)
                elif operation.kind == "average":
                    yield scaled(sum(value for value, _ in taps), multiplier, shift)
                else:
                    total = int(k["bias"][out]) + sum(value * int(k["weight"][place]) for value, place in taps)
                    yield scaled(total, k["multiplier"][out] if "multiplier" in k else 1, shift[out], low, high)
        case "linear":
            for row in x.reshape(-1, x.shape[-1]):
                for w, b, m, s in zip(k["weight"], k["bias"], multiplier, shift, strict=False):
                    yield scaled(int(b) + sum(int(p) * int(q) for p, q in zip(w, row, strict=True)), m, s, low, high)
        case "rnn":
            state = [0] * len(k["bias"])
            for t, step in enumerate(x):
                seen, state_of = [*step, *state], []
                for w, b, m, s in zip(k["weight"], k["bias"], multiplier, shift, strict=False):
                    total = int(b) + sum(int(p) * int(q) for p, q in zip(w, seen, strict=True))
                    if "curve" in k:
                        at = scaled(total, m, s, -2048, 2047) + 2048
                        left, right = int(k["curve"][at // 32]), int(k["curve"][at // 32 + 1])
                        between = left + ((right - left) * (at % 32) + 16) // 32
                        state_of.append(min(max((between * 127 + 16384) // 32768, low), high))
                    else:
                        state_of.append(scaled(total, m, s, low, high))
                state = state_of
                if not o["last"] or t == len(x) - 1:
                    yield from state
        case "add":
            weights = [int(m) for m in multiplier]
            for a, b in zip(x.ravel(), given[1].ravel(), strict=True):
                yield scaled(a * weights[0] + b * weights[1], 1, o["shift"], low, high)
        case "concat":
            parts = [
                np.vectorize(lambda q, m=m, s=s: scaled(q, m, s), otypes=[object])(v)
                for v, m, s in zip(given, multiplier, shift, strict=True)
            ]
            yield from np.concatenate(parts, o["axis"]).ravel()
        case "reduce":
            parts = x.reshape(o["outer"], o["size"], o["inner"])
            yield from parts.max(1).ravel() if o["how"] == "max" else (scaled(each, multiplier, shift) for each in parts.sum(1).ravel())
        case "table":
            yield from (int(k["table"][q + 128]) for q in x.ravel())
        case "clamp":
            yield from (min(max(q, low), high) for q in x.ravel())
        case "permute":
            yield from x.transpose(o["order"]).ravel()
        case "slice":
            end = o["start"] + o["count"] * o["step"]
            yield from x[(slice(None),) * o["axis"] + (slice(o["start"], end, o["step"]),)].ravel()
        case _:  # quantize by 1, reshape
            yield from x.ravel()
