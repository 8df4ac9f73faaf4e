"""From a graph to layers: what int8 kernels exist for, with batch normalisation folded and activations fused, still in floats.

Values here are of one row: the graph's batch dimension of 1 is gone. What has no int8 form is refused by the name of its layer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from anyfit.errors import TaskError
from anyfit.program.trace import Traced

__all__ = ["FILTERS", "Layer", "Layers", "describe_row", "entries_of", "lower", "row_of"]

WAY_OUT = {
    "group_norm": "batch normalisation folds into the layer before it; use nn.BatchNorm2d",
    "layer_norm": "batch normalisation folds into the layer before it; use nn.BatchNorm1d",
    "instance_norm": "batch normalisation folds into the layer before it; use nn.BatchNorm2d",
    "softmax": "return the logits; the largest is the same class",
    "log_softmax": "return the logits; the largest is the same class",
    "lstm": "a plain nn.RNN (tanh or relu) has a kernel",
    "gru": "a plain nn.RNN (tanh or relu) has a kernel",
    "scaled_dot_product_attention": "attention has no int8 kernel here; export it to ONNX as floats",
    "masked_fill": "rows of one length need no mask; pad them in build_dataset and leave lengths out",
    "batch_norm": "it needs running statistics; leave track_running_stats on",
}


@dataclass
class Layer:
    """One operation in floats. `kind` and `options` are those of `operations.Operation`, with bounds and coefficients as real numbers."""

    kind: str
    name: str
    inputs: list[str]
    output: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Layers:
    """A network as a list of layers in their order."""

    layers: tuple[Layer, ...]
    inputs: tuple[dict[str, Any], ...]  # name, dtype and shape of what a row brings
    result: str
    shape: tuple[int, ...]  # of the result


# ------------------------------------------------------------------ rows


def describe_row(batch: Any) -> list[dict[str, Any]]:
    """Names, types and shapes of a batch's entries (without its target), as JSON."""
    named = {"named": True} if isinstance(batch, Mapping) else {}
    return [
        {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape[1:]), **named}
        for name, tensor in entries_of(batch).items()
    ]


def row_of(inputs: Sequence[Mapping[str, Any]]) -> Any:
    """A batch of one row of zeros that `describe_row` has described."""
    found = {str(e["name"]): torch.zeros(1, *e["shape"], dtype=getattr(torch, str(e["dtype"]))) for e in inputs}
    if set(found) == {"input"} and not inputs[0].get("named"):
        return found["input"]
    if all(name.removeprefix("input").isdigit() for name in found) and not inputs[0].get("named"):
        return tuple(found.values())
    return found


def entries_of(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch by the names that a graph gives its inputs."""
    if isinstance(batch, Tensor):
        return {"input": batch}
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items() if isinstance(value, Tensor)}
    if isinstance(batch, tuple | list):
        return {f"input{index}": value for index, value in enumerate(batch) if isinstance(value, Tensor)}
    raise TaskError(f"a batch of {type(batch).__name__} cannot be lowered; give a tensor, a tuple or a dict of tensors")


# ------------------------------------------------------------------ the walk


def lower(traced: Traced) -> Layers:
    """The graph's operations as layers that have an int8 form."""
    found = _Lowering(traced)
    found.walk()
    found.fold()
    return found.done()


@dataclass
class _Raw:
    """An input that is still as the data has it: numbers to quantize, or ids to look up."""

    name: str
    places: list[int]  # of its flat row that are meant
    shape: tuple[int, ...]


@dataclass
class _States:
    """The last states of a recurrent layer's layers, (layers, batch, H)."""

    values: list[str]


IDENTITY = {
    "dropout",
    "dropout_",
    "feature_dropout",
    "alpha_dropout",
    "contiguous",
    "clone",
    "detach",
    "detach_",
    "alias",
    "lift_fresh_copy",
    "to",
}
IDENTITY |= {"_to_copy", "float", "type_as", "identity"}
RESHAPE = {"flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "view_as"}
UNARY = {"sigmoid", "tanh", "gelu", "silu", "hardswish", "hardsigmoid", "elu", "leaky_relu", "softplus", "abs", "neg", "exp", "sin", "cos"}
UNARY |= {"selu", "celu", "mish", "softsign", "square", "sqrt", "log", "erf", "sign", "hardshrink", "softshrink", "log_sigmoid", "prelu"}
FILTERS = ("conv", "linear")


class _Lowering:
    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.layers: list[Layer] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, Any] = {}  # node -> name of a value, a constant tensor, _Raw, or what a tuple holds
        self.inputs: dict[str, Tensor] = {}  # that are used, as the trace had them
        self.quantized: dict[str, str] = {}  # input -> its int8 value

    def walk(self) -> None:
        """Each node in its turn."""
        for node in self.traced.nodes:
            self.values[node.name] = self._node(node)

    def _of(self, argument: Any) -> Any:
        """A node's argument: a constant tensor, the name of a value, a _Raw; or what was written there."""
        if not isinstance(argument, fx.Node):
            return argument
        if argument.name in self.values:
            return self.values[argument.name]
        if argument.name in self.traced.tensors:
            return self.traced.tensors[argument.name].detach()
        name = self.traced.inputs[argument.name]
        self.inputs[name] = argument.meta["val"]
        shape = tuple(self.inputs[name].shape)[1:]
        return self.values.setdefault(argument.name, _Raw(name, list(range(math.prod(shape))), shape))

    def _node(self, node: fx.Node) -> Any:
        if node.meta.get("val") is None:
            return None  # an assertion about types
        if node.target is operator.getitem:
            return self._of(node.args[0])[node.args[1]]
        kind = str(getattr(node.target, "_schema", node.target)).partition("(")[0].removeprefix("aten::").partition(".")[0]
        arguments = self._arguments(node)
        given = [self._of(argument) for argument in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(argument, fx.Node)]
        if all(isinstance(value, Tensor) for value in given):  # of constants alone
            args, kwargs = pytree.tree_map(self._of, (node.args, node.kwargs))
            return node.target(*args, **kwargs)  # type: ignore[operator]
        first = next(iter(arguments.values()))
        if isinstance(first, _States):
            return self._last_states(node, kind, first, arguments)
        if kind in ("unbind", "split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split"):
            return self._parts(kind, first, node, arguments)
        if isinstance(first, _Raw) and kind in ("select", "slice", *RESHAPE, *IDENTITY):
            return self._raw(kind, first, node, arguments)
        if kind in IDENTITY:
            return self._value(first)
        shape = self._shape(node)
        if kind in RESHAPE:
            return self._layer("reshape", node, [self._value(first)], shape)
        handler = getattr(self, f"_{kind.rstrip('_')}", None)
        if handler is not None:
            return handler(node, arguments, shape)
        if kind.rstrip("_") in UNARY:
            return self._unary(node, arguments, shape)
        raise self.refused(node, kind)

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """By the names of the operation's schema."""
        schema = node.target._schema  # type: ignore[union-attr]
        found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        found |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
        ordered = [a.name for a in schema.arguments if a.name in found]
        return {name: pytree.tree_map(self._of, found[name]) for name in ordered}

    def refused(self, node: fx.Node, kind: str, why: str = "") -> TaskError:
        """An error that names the layer."""
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
        place = stack[-1].removeprefix("L['self'].").removeprefix("model.") if stack else ""
        way = why or WAY_OUT.get(kind.rstrip("_"), "take it out, or export the network to ONNX as floats")
        return TaskError(f"{kind}{f' (layer {place!r})' if place else ''} has no int8 form: {way}")

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        value = node.meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        if not value.shape or value.shape[0] != 1:
            raise self.refused(node, str(node.target).removeprefix("aten."), "it moves the batch dimension, which must stay first")
        return tuple(value.shape)[1:]

    def _layer(
        self, kind: str, node: fx.Node | str, inputs: Sequence[str], shape: tuple[int, ...], weights: Any = None, **options: Any
    ) -> str:
        output = node if isinstance(node, str) else node.name
        name = output
        if not isinstance(node, str):
            for argument in pytree.tree_leaves((node.args, node.kwargs)):
                if isinstance(argument, fx.Node) and argument.name in self.traced.names:
                    name = self.traced.names[argument.name].rpartition(".")[0] or name
                    break
        self.layers.append(Layer(kind, name, list(inputs), output, shape, options, dict(weights or {})))
        self.shapes[output] = shape
        return output

    def _value(self, given: Any) -> str:
        """The name of an int8 value; a raw input is quantized here."""
        if isinstance(given, str):
            return given
        if isinstance(given, _Raw):
            if given.places != list(range(math.prod(given.shape))):
                raise TaskError(f"parts of the input {given.name!r} are used as numbers; give each part as an entry of its own")
            if given.name not in self.quantized:
                output = f"{given.name}_quantized"
                one, zero = torch.ones(1), torch.zeros(1)
                self.quantized[given.name] = self._layer("quantize", output, [given.name], given.shape, {"scale": one, "offset": zero})
            at = self.quantized[given.name]
            if self.shapes[at] == given.shape:
                return at
            return self._layer("reshape", f"{at}_{len(self.layers)}", [at], given.shape)
        raise TaskError("a constant stands where an activation is needed; it cannot be lowered")

    def _raw(self, kind: str, raw: _Raw, node: fx.Node, arguments: Mapping[str, Any]) -> _Raw:
        """Views of an input."""
        if kind in IDENTITY:
            return raw
        shape = self._shape(node)
        places = torch.tensor(raw.places).view(1, *raw.shape)
        if kind == "select":
            places = places.select(arguments["dim"], arguments["index"])
        elif kind == "slice":
            places = places[(slice(None),) * arguments["dim"] + (slice(arguments["start"], arguments["end"], arguments["step"]),)]
        return _Raw(raw.name, places.reshape(-1).tolist(), shape)

    def _parts(self, kind: str, given: Any, node: fx.Node, arguments: Mapping[str, Any]) -> list[Any]:
        """Consecutive parts of a value along a dimension; of unbind each without that dimension."""
        shapes = [tuple(part.shape)[1:] for part in node.meta["val"]]
        dim = arguments.get("dim", 0)
        dim += (len(given.shape if isinstance(given, _Raw) else self.shapes[given]) + 1) * (dim < 0)
        found: list[Any] = []
        start = 0
        for number, shape in enumerate(shapes):
            size = 1 if kind == "unbind" else shape[dim - 1]
            if dim == 0:
                raise self.refused(node, kind, "it takes rows of the batch apart")
            if isinstance(given, _Raw):
                places = torch.tensor(given.places).view(1, *given.shape).narrow(dim, start, size)
                found.append(_Raw(given.name, places.reshape(-1).tolist(), shape))
            else:
                into = self.shapes[given]
                kept = (*into[: dim - 1], size, *into[dim:])
                options = {"axis": dim - 1, "start": start, "step": 1, "count": size}
                part = self._layer("slice", f"{node.name}_{number}_part", [given], kept, {}, **options)
                found.append(self._layer("reshape", f"{node.name}_{number}", [part], shape))
            start += size
        return found

    # -------------------------------------------------------------- layers

    def _conv2d(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        weight = self._constant(node, a["weight"])
        weight = weight if weight.dim() == 4 else weight.unsqueeze(2)
        flat = len(shape) == 2  # one dimension of steps: images of height 1
        stride, dilation = (_pair(a[name], flat, 1) for name in ("stride", "dilation"))
        if isinstance(a["padding"], str):
            spread = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)] if a["padding"] == "same" else [0, 0]
            padding = [spread[0] // 2, spread[1] // 2, spread[0] - spread[0] // 2, spread[1] - spread[1] // 2]
        else:
            up, aside = _pair(a["padding"], flat, 0)
            padding = [up, aside, up, aside]
        x, inner = self._value(a["input"]), (shape[0], 1, shape[1]) if flat else shape
        if flat:
            x = self._layer("reshape", f"{node.name}_in", [x], (self.shapes[x][0], 1, self.shapes[x][1]))
        weights = {"weight": weight, "bias": self._bias(node, a["bias"], len(weight))}
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": a["groups"]}
        if not flat:
            return self._layer("conv", node, [x], inner, weights, **options)
        made = self._layer("conv", node, [x], inner, weights, **options)
        return self._layer("reshape", f"{node.name}_out", [made], shape)

    _conv1d = _conv2d

    def _linear(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        weight = self._constant(node, a["weight"])
        return self._layer(
            "linear", node, [self._value(a["input"])], shape, {"weight": weight, "bias": self._bias(node, a["bias"], len(weight))}
        )

    def _matmul(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        other = a.get("other", a.get("mat2"))
        if not isinstance(other, Tensor) or other.dim() != 2:
            raise self.refused(node, "matmul", "products of two activations have no int8 kernel here; export it to ONNX as floats")
        first = a.get("self", a.get("input"))
        return self._layer("linear", node, [self._value(first)], shape, {"weight": other.t(), "bias": other.new_zeros(other.shape[1])})

    _mm = _matmul

    def _addmm(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        weight, bias = self._constant(node, a["mat2"]), self._constant(node, a["self"])
        return self._layer("linear", node, [self._value(a["mat1"])], shape, {"weight": weight.t(), "bias": bias.expand(weight.shape[1])})

    def _constant(self, node: fx.Node, given: Any) -> Tensor:
        if not isinstance(given, Tensor):
            raise self.refused(node, str(node.target).removeprefix("aten."), "its weights are computed from the inputs")
        return given

    def _bias(self, node: fx.Node, given: Any, size: int) -> Tensor:
        return torch.zeros(size) if given is None else self._constant(node, given)

    def _batch_norm(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        if a["running_mean"] is None or a["running_var"] is None:
            raise self.refused(node, "batch_norm")
        mean, variance = a["running_mean"].double(), a["running_var"].double()
        scale = torch.rsqrt(variance + a["eps"]) * (1.0 if a["weight"] is None else a["weight"].double())
        offset = -mean * scale + (0.0 if a["bias"] is None else a["bias"].double())
        return self._affine(node, a["input"], shape, scale, offset, 0)

    def _affine(self, node: fx.Node, given: Any, shape: tuple[int, ...], scale: Tensor, offset: Tensor, axis: int) -> str:
        return self._layer("affine", node, [self._value(given)], shape, {"scale": scale, "offset": offset}, axis=axis)

    def _elementwise(self, node: fx.Node, shape: tuple[int, ...], x: Any, constant: Any, how: str) -> str:
        """An activation and a constant: x + c, x - c, c - x, x * c, x / c."""
        value = torch.as_tensor(constant).double()
        value, axis = self._aligned(node, value, shape)
        one, zero = torch.ones_like(value), torch.zeros_like(value)
        scale, offset = {
            "add": (one, value),
            "sub": (one, -value),
            "rsub": (-one, value),
            "mul": (value, zero),
            "div": (1.0 / value, zero),
        }[how]
        return self._affine(node, x, shape, scale, offset, axis)

    def _aligned(self, node: fx.Node, value: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        """A constant as numbers along one axis of a value."""
        if value.numel() == 1:
            return value.reshape(1), 0
        sizes = [1] * (len(shape) + 1 - value.dim()) + list(value.shape)
        wide = [index for index, size in enumerate(sizes) if size > 1]
        if len(wide) != 1 or wide[0] == 0:
            raise self.refused(
                node, str(node.target).removeprefix("aten."), f"a constant of shape {tuple(value.shape)} differs from place to place"
            )
        return value.reshape(-1), wide[0] - 1

    def _add(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...], sign: float = 1.0) -> str:
        x, y, alpha = a["self"], a["other"], float(a.get("alpha", 1)) * sign
        if not isinstance(y, str | _Raw):
            value = torch.as_tensor(y).double() * alpha
            return self._elementwise(node, shape, x, value, "add")
        if not isinstance(x, str | _Raw):
            made = self._elementwise(node, shape, y, torch.tensor(alpha), "mul") if alpha != 1 else self._value(y)
            value, axis = self._aligned(node, torch.as_tensor(x).double(), shape)
            return self._layer("affine", f"{node.name}_sum", [made], shape, {"scale": torch.ones_like(value), "offset": value}, axis=axis)
        names = [self._value(x), self._value(y)]
        if self.shapes[names[0]] != shape or self.shapes[names[1]] != shape:
            raise self.refused(node, "add", "values of different shapes are added; only equal shapes have a kernel")
        return self._layer("add", node, names, shape, {}, coefficients=[1.0, alpha])

    def _sub(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        return self._add(node, a, shape, -1.0)

    def _rsub(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        return self._elementwise(node, shape, a["self"], a["other"], "rsub")

    def _mul(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        x, y = a["self"], a["other"]
        if isinstance(x, str | _Raw) and isinstance(y, str | _Raw):
            raise self.refused(node, "mul", "products of two activations have no int8 kernel here")
        moving, constant = (x, y) if isinstance(x, str | _Raw) else (y, x)
        return self._elementwise(node, shape, moving, constant, "mul")

    def _div(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        if isinstance(a["other"], str | _Raw) or a.get("rounding_mode") is not None:
            raise self.refused(node, "div", "only a division by a constant has an int8 form")
        return self._elementwise(node, shape, a["self"], a["other"], "div")

    def _clamped(self, node: fx.Node, given: Any, shape: tuple[int, ...], low: Any, high: Any) -> str:
        bounds = [-math.inf if low is None else float(low), math.inf if high is None else float(high)]
        return self._layer("clamp", node, [self._value(given)], shape, {}, bounds=bounds)

    def _relu(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        return self._clamped(node, a["self"], shape, 0.0, None)

    def _relu6(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        return self._clamped(node, a["self"], shape, 0.0, 6.0)

    def _hardtanh(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        return self._clamped(node, a["self"], shape, a["min_val"], a["max_val"])

    def _clamp(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        return self._clamped(node, a["self"], shape, a.get("min"), a.get("max"))

    _clamp_min = _clamp_max = _clamp

    def _unary(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        first, *rest = a
        others = {name: a[name] for name in rest}
        if any(isinstance(value, str) and value in self.shapes for value in others.values()):
            raise self.refused(node, str(node.target).removeprefix("aten."))
        if any(isinstance(value, Tensor) and value.numel() > 1 for value in others.values()):
            raise self.refused(node, str(node.target).removeprefix("aten."), "its parameters differ by channel; share one")
        target: Callable[..., Tensor] = node.target  # type: ignore[assignment]
        return self._layer("table", node, [self._value(a[first])], shape, {}, function=partial(_applied, target, others))

    def _max_pool2d(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        flat = len(shape) == 2
        kernel = _pair(a["kernel_size"], flat, 1)
        stride = _pair(a["stride"], flat, 1) if a.get("stride") else kernel
        up, aside = _pair(a["padding"], flat, 0)
        options = {"kernel": kernel, "stride": stride, "padding": [up, aside, up, aside], "dilation": _pair(a["dilation"], flat, 1)}
        return self._pooled("maximum", node, a["self"], shape, options)

    _max_pool1d = _max_pool2d

    def _max_pool2d_with_indices(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
        return [self._max_pool2d(node, a, shape)]

    def _avg_pool2d(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        flat = len(shape) == 2
        kernel = _pair(a["kernel_size"], flat, 1)
        stride = _pair(a["stride"], flat, 1) if a.get("stride") else kernel
        up, aside = _pair(a["padding"], flat, 0)
        divisor = a.get("divisor_override")
        if (up or aside) and not a["count_include_pad"] and divisor is None:
            raise self.refused(node, "avg_pool2d", "its windows have different sizes at the border; set count_include_pad")
        if a["ceil_mode"]:
            raise self.refused(node, "avg_pool2d", "ceil_mode makes windows of different sizes; leave it out")
        count = int(divisor or kernel[0] * kernel[1])
        options = {"kernel": kernel, "stride": stride, "padding": [up, aside, up, aside], "divisor": count}
        return self._pooled("average", node, a["self"], shape, options)

    _avg_pool1d = _avg_pool2d

    def _adaptive_avg_pool2d(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        kernel = self._adaptive(node, a["self"], shape)
        return self._pooled(
            "average", node, a["self"], shape, {"kernel": kernel, "stride": kernel, "padding": [0] * 4, "divisor": kernel[0] * kernel[1]}
        )

    _adaptive_avg_pool1d = _adaptive_avg_pool2d

    def _adaptive_max_pool2d(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
        kernel = self._adaptive(node, a["self"], shape)
        options = {"kernel": kernel, "stride": kernel, "padding": [0] * 4, "dilation": [1, 1]}
        return [self._pooled("maximum", node, a["self"], shape, options)]

    _adaptive_max_pool1d = _adaptive_max_pool2d

    def _adaptive(self, node: fx.Node, given: Any, shape: tuple[int, ...]) -> list[int]:
        into = self.shapes[self._value(given)]
        if any(size % out for size, out in zip(into[1:], shape[1:], strict=True)):
            raise self.refused(node, "adaptive pooling", f"its windows have different sizes from {into} to {shape}")
        kernel = [size // out for size, out in zip(into[1:], shape[1:], strict=True)]
        return kernel if len(kernel) == 2 else [1, *kernel]

    def _pooled(self, kind: str, node: fx.Node, given: Any, shape: tuple[int, ...], options: dict[str, Any]) -> str:
        x = self._value(given)
        if len(shape) == 3:
            return self._layer(kind, node, [x], shape, {}, **options)
        into = self.shapes[x]
        x = self._layer("reshape", f"{node.name}_in", [x], (into[0], 1, into[1]))
        made = self._layer(kind, f"{node.name}_pooled", [x], (shape[0], 1, shape[1]), {}, **options)
        return self._layer("reshape", node, [made], shape)

    def _mean(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        return self._reduced(node, a["self"], a.get("dim"), shape, "mean")

    def _sum(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        into = self.shapes[self._value(a["self"])]
        made = self._reduced(node, a["self"], a.get("dim"), shape, "mean")
        count = torch.tensor([math.prod(into) / math.prod(shape)], dtype=torch.float64)
        return self._layer("affine", f"{node.name}_sum", [made], shape, {"scale": count, "offset": torch.zeros(1)}, axis=0)

    def _amax(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        return self._reduced(node, a["self"], a["dim"], shape, "max")

    def _max(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
        if "dim" not in a:
            raise self.refused(node, "max", "give the dimension that it is taken over")
        return [self._reduced(node, a["self"], [a["dim"]], shape, "max")]

    def _reduced(self, node: fx.Node, given: Any, dims: Any, shape: tuple[int, ...], how: str) -> str:
        x = self._value(given)
        into = self.shapes[x]
        wanted = sorted(dim % (len(into) + 1) - 1 for dim in ([dims] if isinstance(dims, int) else dims or range(1, len(into) + 1)))
        if not wanted or wanted[0] < 0 or wanted != list(range(wanted[0], wanted[-1] + 1)):
            raise self.refused(node, how, f"dimensions {dims} do not stand side by side, or the batch is among them")
        outer, size = math.prod(into[: wanted[0]]), math.prod(into[wanted[0] : wanted[-1] + 1])
        return self._layer(
            "reduce", node, [x], shape, {}, outer=outer, size=size, inner=math.prod(into[wanted[-1] + 1 :]), how=how, divisor=size
        )

    def _cat(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        axis = a["dim"] % (len(shape) + 1) - 1
        if axis < 0 or not all(isinstance(part, str | _Raw) for part in a["tensors"]):
            raise self.refused(node, "cat", "constants, or rows of a batch, are joined")
        return self._layer("concat", node, [self._value(part) for part in a["tensors"]], shape, {}, axis=axis)

    _concat = _cat

    def _permute(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        dims = [dim % (len(shape) + 1) for dim in a["dims"]]
        if dims[0] != 0:
            raise self.refused(node, "permute", "the batch dimension must stay first")
        return self._layer("permute", node, [self._value(a["self"])], shape, {}, order=[dim - 1 for dim in dims[1:]])

    def _transpose(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        dims = list(range(len(shape) + 1))
        one, two = a["dim0"] % len(dims), a["dim1"] % len(dims)
        dims[one], dims[two] = dims[two], dims[one]
        return self._permute(node, {"self": a["self"], "dims": dims}, shape)

    def _select(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        x = self._value(a["self"])
        into = self.shapes[x]
        axis = a["dim"] % (len(into) + 1) - 1
        if axis < 0:
            raise self.refused(node, "select", "it takes a row of the batch")
        kept = (*into[:axis], 1, *into[axis + 1 :])
        part = self._layer("slice", f"{node.name}_part", [x], kept, {}, axis=axis, start=a["index"] % into[axis], step=1, count=1)
        return self._layer("reshape", node, [part], shape)

    def _slice(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        x = self._value(a["self"])
        into = self.shapes[x]
        axis = a["dim"] % (len(into) + 1) - 1
        if shape == into:
            return x
        if axis < 0:
            raise self.refused(node, "slice", "it takes rows of the batch")
        start = slice(a["start"], a["end"], a["step"]).indices(into[axis])[0]
        return self._layer("slice", node, [x], shape, {}, axis=axis, start=start, step=a["step"], count=shape[axis])

    def _embedding(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        ids = a["indices"]
        if not isinstance(ids, _Raw):
            raise self.refused(node, "embedding", "its ids are computed; they must be an input")
        return self._layer("embedding", node, [ids.name], shape, {"table": self._constant(node, a["weight"])}, source=ids.places)

    def _rnn(self, node: fx.Node, a: Mapping[str, Any], tanh: bool) -> tuple[Any, ...]:
        if a["bidirectional"] or not a["batch_first"]:
            what = "bidirectional" if a["bidirectional"] else "batch_first=False"
            raise self.refused(node, "rnn", f"{what} has no kernel; use one direction and batch_first=True")
        start = a["hx"]
        if not isinstance(start, Tensor) or bool(start.any()):
            raise self.refused(node, "rnn", "its first state must be zero")
        parameters, value = list(a["params"]), self._value(a["input"])
        each = 4 if a["has_biases"] else 2
        bounds = {} if tanh else {"bounds": [0.0, math.inf]}
        states = []
        for layer in range(a["num_layers"]):
            into, back, *biases = parameters[layer * each : (layer + 1) * each]
            weights = {"weight": torch.cat((into, back), 1), "bias": sum(biases) if biases else torch.zeros(len(into))}
            shape = (self.shapes[value][0], len(into))
            last = layer + 1 == a["num_layers"]
            value = self._layer("rnn", node if last else f"{node.name}_{layer}", [value], shape, weights, tanh=tanh, last=False, **bounds)
            states.append(value)
        return value, _States(states)

    def _rnn_tanh(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[Any, ...]:
        return self._rnn(node, a, True)

    def _rnn_relu(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[Any, ...]:
        return self._rnn(node, a, False)

    def _last_states(self, node: fx.Node, kind: str, states: _States, a: Mapping[str, Any]) -> Any:
        """hidden[-1] and hidden.squeeze(0): the last state of a layer."""
        if kind in IDENTITY:
            return states
        index = a["index"] if kind == "select" and a["dim"] == 0 else 0 if kind == "squeeze" and len(states.values) == 1 else None
        if index is None:
            raise self.refused(node, kind, "of a recurrent layer's last states, take one layer: hidden[-1]")
        value = states.values[index]
        steps, width = self.shapes[value]
        part = self._layer("slice", f"{node.name}_part", [value], (1, width), {}, axis=0, start=steps - 1, step=1, count=1)
        return self._layer("reshape", node, [part], (width,))

    def _pad(self, node: fx.Node, a: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        zeros = a.get("mode", "constant") == "constant" and a.get("value") in (None, 0, 0.0)
        if not zeros or len(shape) != 3 or min(a["pad"]) < 0 or any(a["pad"][4:]):
            raise self.refused(node, "pad", "only zeros around images fold into the convolution that follows")
        sizes = [*a["pad"], 0, 0, 0, 0][:4]
        return self._layer("pad", node, [self._value(a["self"])], shape, {}, padding=[sizes[2], sizes[0], sizes[3], sizes[1]])

    _constant_pad_nd = _pad

    # ------------------------------------------------------------- folding

    def fold(self) -> None:
        """Until nothing changes: affine operations into what makes their input, bounds into what they bound, zeros into convolutions."""
        out = self.traced.outputs
        result = self._of(out[0]) if len(out) == 1 else None
        if not isinstance(result, str):
            raise TaskError(f"predict must give one tensor, made from the inputs; it gives {len(out)}: define predict(self, model, batch)")
        self.result, self.shape = result, self.shapes[result]
        while any(self._folded(layer) for layer in list(self.layers)):
            pass
        used = {self.result}
        for layer in reversed(self.layers):
            if layer.output in used:
                used.update(layer.inputs)
        self.layers = [layer for layer in self.layers if layer.output in used]
        while (last := self._maker(self.result)) is not None and last.kind == "reshape":
            self.layers.remove(last)
            self.result = last.inputs[0]

    def _maker(self, value: str) -> Layer | None:
        return next((layer for layer in self.layers if layer.output == value), None)

    def _users(self, value: str) -> list[Layer]:
        return [layer for layer in self.layers if value in layer.inputs]

    def _folded(self, layer: Layer) -> bool:
        if layer.kind == "affine":
            return self._fold_affine(layer)
        if layer.kind not in ("clamp", "pad", "slice", "add"):
            return False
        before = self._maker(layer.inputs[0])
        if layer.kind == "add":
            return any(self._fold_coefficient(layer, place) for place in (0, 1))
        if layer.kind == "pad":
            users = self._users(layer.output)
            if any(user.kind != "conv" for user in users) or layer.output == self.result:
                raise TaskError(f"pad (layer {layer.name!r}) has no int8 form: its zeros fold into convolutions only")
            for user in users:
                user.options["padding"] = [a + b for a, b in zip(user.options["padding"], layer.options["padding"], strict=True)]
                user.inputs = [layer.inputs[0]]
            self.layers.remove(layer)
            return True
        if before is None or len(self._users(before.output)) > 1 or before.output == self.result:
            return False
        if layer.kind == "clamp" and before.kind in (*FILTERS, "add", "clamp"):
            low, high = before.options.get("bounds", (-math.inf, math.inf))
            bounds = [min(max(edge, layer.options["bounds"][0]), layer.options["bounds"][1]) for edge in (low, high)]
            return self._replace(layer, before, bounds=bounds)
        if layer.kind == "slice" and before.kind == "rnn" and layer.options["axis"] == 0 and not before.options["last"]:
            if layer.options["start"] == before.shape[0] - 1 and layer.options["count"] == 1:
                width = before.shape[1]
                state = f"{before.output}_last"
                self.layers[self.layers.index(layer)] = Layer("reshape", layer.name, [state], layer.output, layer.shape)
                before.options["last"], before.shape, before.output = True, (width,), state
                self.shapes[state] = (width,)
                return True
            return False
        return False

    def _replace(self, layer: Layer, before: Layer, **options: Any) -> bool:
        """Let `before` make what `layer` made."""
        before.options.update(options)
        before.output, before.shape = layer.output, layer.shape
        self.layers.remove(layer)
        return True

    def _fold_affine(self, layer: Layer) -> bool:
        before = self._maker(layer.inputs[0])
        scale, offset, axis = layer.weights["scale"].double(), layer.weights["offset"].double(), layer.options["axis"]
        alone = (
            before is not None and len(self._users(before.output)) == 1 and before.output != self.result and "bounds" not in before.options
        )
        if before is not None and alone and before.kind in ("affine", "quantize"):
            its_axis = before.options.get("axis", 0)
            ours, theirs = scale.numel(), before.weights["scale"].numel()
            if (ours == 1 or theirs == 1 or axis == its_axis) and (before.kind == "affine" or ours == 1 or axis == 0):
                its_scale, its_offset = before.weights["scale"].double(), before.weights["offset"].double()
                before.weights = {"scale": its_scale * scale, "offset": its_offset * scale + offset}
                return self._replace(layer, before, axis=axis if ours > 1 else its_axis)
        if before is not None and alone and before.kind in FILTERS:
            along = 0 if before.kind == "conv" else len(layer.shape) - 1
            if scale.numel() == 1 or axis == along:
                weight, bias = before.weights["weight"].double(), before.weights["bias"].double()
                wide = scale.expand(len(bias)) if scale.numel() == 1 else scale
                before.weights = {"weight": weight * wide.view(-1, *[1] * (weight.dim() - 1)), "bias": bias * wide + offset}
                return self._replace(layer, before)
        if before is not None and alone and before.kind == "reshape" and scale.numel() == 1:  # a scalar moves before a change of shape
            value = f"{layer.output}_before"
            at = self.layers.index(before)
            self.layers.insert(
                at, Layer("affine", layer.name, [before.inputs[0]], value, self.shapes[before.inputs[0]], {"axis": 0}, layer.weights)
            )
            self.shapes[value] = self.shapes[before.inputs[0]]
            before.inputs = [value]
            return self._replace(layer, before)
        if all(self._scalar_into(user, layer) for user in self._users(layer.output)) and layer.output != self.result:
            return False  # the sum takes it as a coefficient, in its own turn
        return self._standing(layer, scale, offset, axis)

    @staticmethod
    def _scalar_into(user: Layer, layer: Layer) -> bool:
        return user.kind == "add" and layer.weights["scale"].numel() == 1 and not bool(layer.weights["offset"].any())

    def _fold_coefficient(self, layer: Layer, place: int) -> bool:
        before = self._maker(layer.inputs[place])
        if before is None or before.kind != "affine" or not self._scalar_into(layer, before) or before.output == self.result:
            return False
        layer.options["coefficients"][place] *= float(before.weights["scale"])
        layer.inputs[place] = before.inputs[0]
        if not self._users(before.output):
            self.layers.remove(before)
        return True

    def _standing(self, layer: Layer, scale: Tensor, offset: Tensor, axis: int) -> bool:
        """An affine operation that nothing takes in becomes a convolution of one tap by channel."""
        if axis != 0 and scale.numel() > 1:
            raise TaskError(f"{layer.name!r}: numbers along dimension {axis} are no channels, so they have no int8 form")
        channels = layer.shape[0] if layer.shape else 1
        inner = (channels, 1, math.prod(layer.shape[1:]))
        at, name = self.layers.index(layer), layer.output
        into, made = f"{name}_in", f"{name}_out"
        weights = {"weight": scale.expand(channels).reshape(-1, 1, 1, 1), "bias": offset.expand(channels)}
        options = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": channels}
        self.layers[at : at + 1] = [
            Layer("reshape", into, [layer.inputs[0]], into, inner),
            Layer("conv", layer.name, [into], made, inner, options, weights),
            Layer("reshape", name, [made], name, layer.shape),
        ]
        self.shapes |= {into: inner, made: inner}
        return True

    def done(self) -> Layers:
        """The layers, with weights of their own in float32."""
        twice: dict[str, int] = {}
        for layer in self.layers:
            layer.weights = {name: tensor.detach().clone().float() for name, tensor in layer.weights.items()}
            twice[layer.name] = twice.get(layer.name, 0) + 1
            if twice[layer.name] > 1:  # one layer of the model that is used again
                layer.name = f"{layer.name}_{twice[layer.name]}"
        given = {name for layer in self.layers for name in layer.inputs}
        inputs = []
        for name in self.traced.inputs.values():
            if name in given:
                value = self.inputs[name]
                inputs.append({"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape[1:])})
        if not inputs:
            raise TaskError("predict uses no entry of the batch; it must compute its result from the inputs")
        return Layers(tuple(self.layers), tuple(inputs), self.result, self.shape)


def _applied(target: Callable[..., Tensor], others: Mapping[str, Any], x: Tensor) -> Tensor:
    return target(x, **others)


def _pair(given: Any, flat: bool, filler: int) -> list[int]:
    numbers = [given] if isinstance(given, int) else list(given)
    if flat:
        return [filler, numbers[0]]
    return numbers * 2 if len(numbers) == 1 else numbers
