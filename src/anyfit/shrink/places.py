"""A program as an arena sees it: which values are the same bytes, and which may be written over what they are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from anyfit.program.operations import Array, Operation, Program
from anyfit.shrink.arena import Arena, Step, arranged

__all__ = ["RAW", "Window", "is_alias", "plan", "shapes_of", "steps_of", "strided", "window_of"]

RAW = "!raw"  # the buffer of all inputs, one after the other; no value of a program is called so


def plan(program: Program) -> Arena:
    """The arena of a program's C export."""
    steps, sources = steps_of(program)
    return arranged(steps, sources, [program.result], align={RAW: np.dtype(program.inputs[0].dtype).itemsize})


def steps_of(program: Program) -> tuple[list[Step], dict[str, int]]:
    """A program as the arena sees it. What is predicted is written to the caller's memory, so it takes none."""
    shapes = shapes_of(program)
    raw = {given.name for given in program.inputs}
    item = np.dtype(program.inputs[0].dtype).itemsize
    readers: dict[str, int] = {}
    for operation in program.operations:
        for value in set(operation.inputs):
            readers[value] = readers.get(value, 0) + 1
    steps = []
    for operation in program.operations:
        alias = operation.inputs[0] if is_alias(operation, shapes) else None
        predicted = operation.output == program.result and alias is None
        place = None if alias is not None or predicted else _place(operation, shapes, readers, item)
        inputs = tuple(RAW if value in raw else value for value in operation.inputs)
        steps.append(
            Step(
                name=operation.output,
                inputs=inputs,
                output=operation.output,
                bytes=0 if predicted else operation.bytes,
                replaces=RAW if place in raw else place,
                alias=alias,
                scratch=operation.scratch,
            )
        )
    return steps, {RAW: sum(given.bytes for given in program.inputs)}


def shapes_of(program: Program) -> dict[str, tuple[int, ...]]:
    """Of all inputs and values."""
    return {given.name: given.shape for given in program.inputs} | {each.output: each.shape for each in program.operations}


def is_alias(operation: Operation, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the output is the input's bytes as they are."""
    if operation.kind == "reshape":
        return True
    if operation.kind in ("permute", "slice"):
        start, dims = strided(operation, shapes[operation.inputs[0]])
        size = math.prod(shapes[operation.inputs[0]])
        return start == 0 and math.prod(count for count, _ in dims) == size and len(dims) <= 1
    return False


def _place(operation: Operation, shapes: Mapping[str, tuple[int, ...]], readers: Mapping[str, int], item: int) -> str | None:
    """The input whose place the output may take while the kernel runs; a raw value has `item` bytes."""
    first = operation.inputs[0]
    match operation.kind:
        case "table" | "clamp":
            return first  # value by value
        case "add":  # likewise; rather over an input that nobody else reads
            return min(operation.inputs, key=lambda value: readers[value])
        case "rnn":
            return first if operation.options["last"] else None  # its states are in scratch until all is read
        case "embedding":  # an id is read before its row is written, and rows are no longer than ids
            whole = operation.options.get("source", list(range(math.prod(shapes[first])))) == list(range(math.prod(shapes[first])))
            return first if whole and (operation.constants["table"].shape[1] <= item or math.prod(shapes[first]) == 1) else None
        case "quantize" if "source" not in operation.options:
            return first  # forwards, from elements of at least a byte
    reads = _first_reads(operation, shapes[first])
    # Output i is written once all that it needs is read, so it destroys what a later one needs only if that begins before it.
    return first if reads is not None and bool(np.all(reads >= np.arange(len(reads)))) else None


def _first_reads(operation: Operation, shape: tuple[int, ...]) -> Array | None:
    """The first byte of the input that each byte of the output needs, in the order in which they are written; None: not one by one."""
    if operation.kind in ("conv", "maximum", "average"):
        return _first_of_windows(operation, shape)
    if operation.kind == "reduce":
        outer, size, inner = (int(operation.options[name]) for name in ("outer", "size", "inner"))
        return (np.arange(outer)[:, None] * size * inner + np.arange(inner)).ravel()
    if operation.kind == "slice":
        start, dims = strided(operation, shape)
        reads = np.array([start], dtype=np.int64)
        for count, stride in dims:
            reads = (reads[:, None] + np.arange(count) * stride).ravel()
        return reads
    if operation.kind == "quantize":  # columns of floats
        return np.asarray(operation.options["source"]) * 4
    return None


def _first_of_windows(operation: Operation, shape: tuple[int, ...]) -> Array:
    window = window_of(operation, shape)
    first_y, first_x = (
        np.where(start < 0, start + -(start // dilation) * dilation, start)
        for start, dilation in (
            (np.arange(window.out_height) * window.stride_y - window.top, window.dilation_y),
            (np.arange(window.out_width) * window.stride_x - window.left, window.dilation_x),
        )
    )
    out = operation.bytes // (window.out_height * window.out_width)
    if operation.kind == "conv":  # channels before the group's are not read
        groups = int(operation.options["groups"])
        plane = np.arange(out) // (out // groups) * (window.channels // groups)
    else:
        plane = np.arange(out)
    return ((plane[:, None, None] * window.height + first_y[:, None]) * window.width + first_x).ravel()


class Window(NamedTuple):
    """Sizes of an operation that slides over (C, H, W), in the order of the kernels' arguments."""

    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride_y: int
    stride_x: int
    top: int
    left: int
    dilation_y: int
    dilation_x: int


def window_of(operation: Operation, shape: tuple[int, ...]) -> Window:
    """The sizes of a conv, maximum or average over an input of that shape."""
    options = operation.options
    channels, height, width = shape
    kernel = operation.constants["weight"].shape[2:] if operation.kind == "conv" else options["kernel"]
    top, left = options["padding"][:2]
    dilation = options.get("dilation", (1, 1))
    out, taps, stride = operation.shape[1:], tuple(kernel), tuple(options["stride"])
    return Window._make((channels, height, width, *out, *taps, *stride, top, left, *dilation))


def strided(operation: Operation, shape: tuple[int, ...]) -> tuple[int, list[tuple[int, int]]]:
    """A permute or slice: where it starts to read, and (count, stride) of loops that write one byte after the other; few, for those that
    follow each other in memory are one.
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    counts, start = list(shape), 0
    if operation.kind == "permute":
        order = [int(axis) for axis in operation.options["order"]]
        counts, strides = [counts[axis] for axis in order], [strides[axis] for axis in order]
    else:
        axis = int(operation.options["axis"]) % len(shape)
        start = int(operation.options["start"]) * strides[axis]
        counts[axis], strides[axis] = operation.shape[axis], strides[axis] * int(operation.options["step"])
    dims: list[tuple[int, int]] = []
    for count, stride in zip(counts, strides, strict=True):
        if count == 1:
            continue
        if dims and dims[-1][1] == count * stride:
            dims[-1] = (dims[-1][0] * count, stride)
        else:
            dims.append((count, stride))
    if len(dims) == 1 and dims[0][1] != 1:
        dims.append((1, 1))  # one loop over what does not lie side by side is no alias
    return start, dims
