"""Which entries of a network's tensors are one channel: labels, joined by a walk over the traced graph.

Every entry along every dimension of a parameter or buffer has a label of its own. Each operation joins labels that must go together, hands
them on to its output, or freezes what must stay; one that is not known here freezes all that it touches. The idea is that of DepGraph (Fang
et al. 2023), which ties layers; here single channels are tied, so that concatenation, groups and heads need no special cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from anyfit.program.trace import Traced

__all__ = ["Labels", "Place", "Walk"]

Labels = NDArray[np.int64]
Dims = list[Labels | None]  # of a value: None where a dimension cannot be cut (rows, steps, pixels, constants)
Place = tuple[str, int]  # a tensor's name and one of its dimensions


@dataclass
class _Value:
    dims: Dims
    weight: bool = False  # made of parameters alone
    zeros: bool = False  # made by the network out of nothing: it follows the sizes of the rest


@dataclass
class Walk:
    """The labels of a network's tensors; `OPERATIONS` below say what each operation does to them."""

    traced: Traced
    model: nn.Module
    parent: list[int] = field(default_factory=list)
    frozen: dict[int, str] = field(default_factory=dict)  # label -> why
    made: list[Labels] = field(default_factory=list)
    read: list[Labels] = field(default_factory=list)
    normalised: list[Labels] = field(default_factory=list)
    sums: list[tuple[str, Labels]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    labels: dict[Place, Labels] = field(default_factory=dict)
    here: str = ""  # the operation at hand

    def run(self) -> None:
        own = [*self.model.named_parameters(), *self.model.named_buffers()]
        by_memory: dict[tuple[int, tuple[int, ...]], _Value] = {}
        taps = {id(module.weight) for module in self.model.modules() if isinstance(module, _ConvNd)}
        for name, tensor in own:
            dims: Dims = [None if id(tensor) in taps and dim >= 2 else self.fresh(size) for dim, size in enumerate(tensor.shape)]
            self.labels |= {(name, dim): labels for dim, labels in enumerate(dims) if labels is not None}
            by_memory[tensor.data_ptr(), tuple(tensor.shape)] = _Value(dims, weight=True)
        for placeholder, tensor in self.traced.tensors.items():
            found = by_memory.get((tensor.data_ptr(), tuple(tensor.shape)))
            self.values[placeholder] = found or _Value([None] * tensor.dim(), weight=True)
        for path, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self.here = f"{path or 'the network'}, a MultiheadAttention"
                inside = [labels for (name, _), labels in self.labels.items() if name.startswith(f"{path}." if path else "")]
                self.freeze(*inside)
        for node in self.traced.nodes:
            self.here = _where(node)
            result = self.step(node)
            if result is not None:
                self.values[node.name] = result
        self.here = "an output of the network"
        for node in self.traced.outputs:
            for value in _values(self.values.get(node.name)):
                self.freeze(*value.dims)

    def step(self, node: fx.Node) -> Any:
        for argument in node.all_input_nodes:
            if argument.name not in self.values and argument.op == "placeholder":  # an input
                self.values[argument.name] = _like(argument, lambda shape: _Value([None] * len(shape)))
        given = [self.values[argument.name] for argument in node.all_input_nodes if argument.name in self.values]
        name = _operation(node)
        if name == "getitem":
            return self.values[node.all_input_nodes[0].name][node.args[1]]
        method = OPERATIONS.get(name)
        values = [value for found in given for value in _values(found)]
        if _shapes(node) is None:  # an assertion
            return None
        if method is not None:
            result = method(self, node)
            if result is not None and _fits(result, _shapes(node)):
                weight = bool(values) and all(value.weight for value in values)
                for value in _values(result):
                    value.weight = weight
                return result
        elif any(labels is not None for value in values for labels in value.dims):
            self.here += ", which is not known here"
        for value in values:
            self.freeze(*value.dims)
        return _like(node, lambda shape: _Value([None] * len(shape)))

    # labels

    def fresh(self, size: int) -> Labels:
        start = len(self.parent)
        self.parent.extend(range(start, start + size))
        out = np.arange(start, start + size)
        if size == 1:
            self.frozen.setdefault(start, "the only entry of its dimension")
        return out

    def root(self, label: int) -> int:
        parent = self.parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def roots(self, labels: Labels) -> Labels:
        return np.array([self.root(label) for label in labels.tolist()], dtype=np.int64)

    def join(self, first: Labels | None, second: Labels | None) -> Labels | None:
        """Labels that are one channel, pair by pair; where one side cannot be cut, neither can the other."""
        if first is None or second is None or len(first) != len(second):
            self.freeze(first, second)
            return None
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            a, b = self.root(one), self.root(other)
            if a != b:
                a, b = min(a, b), max(a, b)
                self.parent[b] = a
                if b in self.frozen:
                    self.frozen.setdefault(a, self.frozen[b])
        return first

    def together(self, labels: Labels) -> None:
        """All of these as one channel."""
        if len(labels) > 1:
            self.join(np.repeat(labels[:1], len(labels) - 1), labels[1:])

    def freeze(self, *given: Labels | None) -> None:
        for labels in given:
            if labels is not None:
                for label in labels.tolist():
                    self.frozen.setdefault(self.root(label), self.here)

    def contract(self, values: Labels | None, weight: Labels | None, *, reads: bool = True) -> None:
        """A sum runs over both."""
        self.join(values, weight)
        if weight is not None and reads:
            self.read.append(weight)

    def makes(self, labels: Labels | None) -> Labels | None:
        if labels is not None:
            self.made.append(labels)
        return labels

    def argument(self, node: fx.Node, name: str, default: Any = None) -> Any:
        """An argument by its name in the operation's schema; nodes become their values."""
        operation: Any = node.target
        found = default
        if name in node.kwargs:
            found = node.kwargs[name]
        else:
            for index, argument in enumerate(operation._schema.arguments):
                if argument.name == name:
                    found = node.args[index] if index < len(node.args) else argument.default_value if argument.has_default_value() else None
        return fx.map_arg(found, lambda argument: self.values.get(argument.name)) if found is not None else default


def _operation(node: fx.Node) -> str:
    """Without its overload, and without the underscore of one in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    name = str(schema.name).partition("::")[2]
    return name if name.startswith("__") else name.rstrip("_").lstrip("_")


def _where(node: fx.Node) -> str:
    """An operation in words: what it is, and in which module."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]).removeprefix("model").strip(".") if stack else ""
    return f"{_operation(node)} in {path}" if path else f"{_operation(node)} ({node.name})"


def _values(found: Any) -> list[_Value]:
    if isinstance(found, _Value):
        return [found]
    return [value for part in found for value in _values(part)] if isinstance(found, list | tuple) else []


def _shapes(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(int(size) for size in value.shape)
    return (
        [tuple(int(size) for size in part.shape) for part in value if isinstance(part, Tensor)] if isinstance(value, list | tuple) else None
    )


def _fits(found: Any, shapes: Any) -> bool:
    """Whether labels are those of values of these shapes."""
    given = _values(found)
    sizes = [shapes] if isinstance(shapes, tuple) else shapes
    return len(given) == len(sizes) and all(
        len(value.dims) == len(shape) and all(labels is None or len(labels) == size for labels, size in zip(value.dims, shape, strict=True))
        for value, shape in zip(given, sizes, strict=True)
    )


def _like(node: fx.Node, make: Callable[[tuple[int, ...]], _Value]) -> Any:
    shapes = _shapes(node)
    return None if shapes is None else make(shapes) if isinstance(shapes, tuple) else [make(shape) for shape in shapes]


# Operations


def _elementwise(walk: Walk, node: fx.Node) -> Any:
    """Arithmetic with broadcasting."""
    shape = _shapes(node)
    if not isinstance(shape, tuple):
        return None
    operands = [(value, _shapes(argument)) for argument in node.all_input_nodes for value in _values(walk.values.get(argument.name))]
    out: Dims = []
    for dim in range(-len(shape), 0):
        labels: list[Labels] = []
        plain = False
        for value, its in operands:
            if len(value.dims) < -dim:
                continue
            found = value.dims[dim]
            if found is not None and len(found) == shape[dim]:
                labels.append(found)
            elif found is not None:  # one channel, over all entries of the other
                walk.freeze(found)
            elif isinstance(its, tuple) and its[dim] == shape[dim] > 1:
                plain = True
        if plain:
            walk.freeze(*labels)
        for other in labels[1:]:
            if sum(not value.weight for value, _ in operands) > 1 and (walk.roots(labels[0]) != walk.roots(other)).any():
                walk.sums.append((walk.here, labels[0]))  # what ties two layers
            walk.join(labels[0], other)
        out.append(labels[0] if labels and not plain else None)
    return _Value(out)


def _same(walk: Walk, node: fx.Node) -> Any:
    """What changes no dimension; labels follow the first input."""
    (first, *_) = _values(walk.values.get(node.all_input_nodes[0].name))
    return _Value(list(first.dims))


def _linear(walk: Walk, node: fx.Node) -> Any:
    x, weight, bias = (walk.argument(node, name) for name in ("input", "weight", "bias"))
    if len(weight.dims) != 2:
        return None
    walk.contract(x.dims[-1], weight.dims[1], reads=weight.weight)
    if bias is not None:
        walk.join(weight.dims[0], bias.dims[0])
    return _Value([*x.dims[:-1], walk.makes(weight.dims[0])])


def _convolution(walk: Walk, node: fx.Node) -> Any:
    x, weight, bias = (walk.argument(node, name) for name in ("input", "weight", "bias"))
    groups, turned = int(walk.argument(node, "groups", 1)), "transpose" in _operation(node)
    if len(x.dims) != len(weight.dims):
        return None
    walk.freeze(*weight.dims[2:], *x.dims[2:])
    into, out = (weight.dims[0], weight.dims[1]) if turned else (weight.dims[1], weight.dims[0])
    if groups == 1:
        walk.contract(x.dims[1], into)
    else:  # a group goes whole, with what it reads
        walk.freeze(weight.dims[1])
        if x.dims[1] is None or weight.dims[0] is None:
            walk.freeze(x.dims[1], weight.dims[0])
            out = None
        else:
            for channels, filters in zip(np.split(x.dims[1], groups), np.split(weight.dims[0], groups), strict=True):
                walk.together(np.concatenate((channels, filters)))
            out = weight.dims[0]
            if turned:
                out = np.repeat(weight.dims[0][:: len(weight.dims[0]) // groups], _shapes(node)[1] // groups)
    if bias is not None:
        walk.join(out, bias.dims[0])
    return _Value([x.dims[0], walk.makes(out), *[None] * (len(x.dims) - 2)])


def _batch_norm(walk: Walk, node: fx.Node) -> Any:
    x = walk.argument(node, "input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        found = walk.argument(node, name)
        if found is not None:
            walk.join(x.dims[1], found.dims[0])
    return _Value(list(x.dims))


def _layer_norm(walk: Walk, node: fx.Node) -> Any:
    x, weight, bias = (walk.argument(node, name) for name in ("input", "weight", "bias"))
    over = len(walk.argument(node, "normalized_shape"))
    dims = x.dims[-over:]
    if weight is None or over > 1:  # its size is a number of the module that no tensor follows
        walk.freeze(*dims, *([] if weight is None else weight.dims), *([] if bias is None else bias.dims))
        return _Value(list(x.dims))
    for found in (weight, bias):
        if found is not None:
            walk.join(dims[0], found.dims[0])
    if dims[0] is not None:
        walk.normalised.append(dims[0])
    return _Value(list(x.dims))


def _group_norm(walk: Walk, node: fx.Node) -> Any:
    x, weight, bias = (walk.argument(node, name) for name in ("input", "weight", "bias"))
    groups, channels = int(walk.argument(node, "num_groups")), x.dims[1]
    for found in (weight, bias):
        if found is not None:
            walk.join(channels, found.dims[0])
    if weight is None:
        walk.freeze(channels)
    elif channels is not None and groups == 1:
        walk.normalised.append(channels)
    elif channels is not None:
        for part in np.split(channels, groups):
            walk.together(part)
    return _Value(list(x.dims))


def _embedding(walk: Walk, node: fx.Node) -> Any:
    weight = walk.argument(node, "weight")
    walk.freeze(weight.dims[0])
    return _Value([*[None] * (len(_shapes(node)) - 1), walk.makes(weight.dims[1])])


def _recurrent(walk: Walk, node: fx.Node) -> Any:
    """Layers and directions share one width, so a unit goes out of all of them. Rows of weights are gates x units."""
    x, params, state = (walk.argument(node, name) for name in ("input", "params", "hx"))
    layers, ways = int(walk.argument(node, "num_layers")), 2 if walk.argument(node, "bidirectional") else 1
    each = 4 if walk.argument(node, "has_biases") else 2
    if len(params) != layers * ways * each or any(labels is None for value in params for labels in value.dims):
        return None
    units = params[1].dims[1]
    gates, into = len(params[1].dims[0]) // len(units), x.dims[-1]
    for layer in range(layers):
        for way in range(ways):
            weights = params[(layer * ways + way) * each :][:each]
            walk.contract(into, weights[0].dims[1])
            for value in weights:
                walk.join(np.tile(units, gates), value.dims[0])
            if weights[1].dims[1] is not units:
                walk.join(units, weights[1].dims[1])
            walk.read.append(weights[1].dims[1])
        into = np.tile(units, ways)
    for value in _values(state):
        if not value.zeros:
            walk.join(units, value.dims[-1])
    walk.makes(params[1].dims[0])
    states, *last = _shapes(node)
    return [_Value([None] * (len(states) - 1) + [into]), *[_Value([None] * (len(shape) - 1) + [units]) for shape in last]]


MULTIPLIED = {"matmul": ("self", "other"), "mm": ("self", "mat2"), "bmm": ("self", "mat2"), "addmm": ("mat1", "mat2")}


def _matmul(walk: Walk, node: fx.Node) -> Any:
    first, second = (walk.argument(node, name) for name in MULTIPLIED[_operation(node)])
    a, b = first.dims, second.dims
    if len(a) < 2 or len(b) < 2:
        return None
    inner = a[-1], b[-2]
    walk.join(*inner)
    walk.read += [labels for labels, value in zip(inner, (first, second), strict=True) if labels is not None and value.weight]
    walk.makes(a[-2] if first.weight else None)
    out: Dims = [None] * (max(len(a), len(b)) - 2)
    shapes = [_shapes(argument) for argument in node.all_input_nodes]
    for dim in range(-len(out), 0):
        one, other = (dims[dim - 2] if len(dims) >= 2 - dim else None for dims in (a, b))
        if one is not None and other is not None and len(one) == len(other):
            out[dim] = walk.join(one, other)
        elif (one is None) == (other is None) or any(len(shape) >= 2 - dim and shape[dim - 2] > 1 for shape in shapes):
            walk.freeze(one, other)
    out += [a[-2], walk.makes(b[-1]) if second.weight else b[-1]]
    if _operation(node) == "addmm":
        added = walk.argument(node, "self")
        for dim in range(-len(added.dims), 0):
            walk.join(out[dim], added.dims[dim])
    return _Value(out)


def _attention(walk: Walk, node: fx.Node) -> Any:
    query, key, value, mask = (walk.argument(node, name) for name in ("query", "key", "value", "attn_mask"))
    if walk.argument(node, "enable_gqa") or len({len(found.dims) for found in (query, key, value)}) != 1:
        return None
    walk.freeze(query.dims[-1], key.dims[-1], query.dims[-2], key.dims[-2], value.dims[-2])  # the scale follows a head's width
    heads: Dims = []
    for dim in range(len(query.dims) - 2):
        labels = query.dims[dim]
        for other in (key.dims[dim], value.dims[dim]):
            labels = walk.join(labels, other) if labels is not None or other is not None else None
        heads.append(labels)
    if mask is not None:
        walk.freeze(*mask.dims)
        shape = _shapes(node.all_input_nodes[3])
        for dim, size in enumerate(reversed(shape[:-2]), 1):
            if size > 1 and dim <= len(heads):
                walk.freeze(heads[-dim])
    return _Value([*heads, None, value.dims[-1]])


def _spatial(walk: Walk, node: fx.Node) -> Any:
    """Pools and resizing, over the last dimensions."""
    (x, *_) = _values(walk.values.get(node.all_input_nodes[0].name))
    over = next((int(letter) for letter in _operation(node) if letter.isdigit()), 0)
    walk.freeze(*x.dims[len(x.dims) - over :])
    dims = [*x.dims[: len(x.dims) - over], *[None] * over]
    return _like(node, lambda shape: _Value(list(dims)))


def _pad(walk: Walk, node: fx.Node) -> Any:
    x, margins = walk.argument(node, "self"), walk.argument(node, "pad")
    dims = list(x.dims)
    for dim, (before, after) in enumerate(zip(margins[::2], margins[1::2], strict=True), 1):
        if before or after:
            walk.freeze(dims[-dim])
            dims[-dim] = None
    return _Value(dims)


def _permute(walk: Walk, node: fx.Node) -> Any:
    (x, *_) = _values(walk.values.get(node.all_input_nodes[0].name))
    name, count = _operation(node), len(x.dims)
    if name == "permute":
        return _Value([x.dims[dim] for dim in walk.argument(node, "dims")])
    dims = list(x.dims)
    if name in ("t", "numpy_T", "mT", "adjoint"):
        one, other = -1, -2
        if count < 2:
            return _Value(dims)
    else:
        one, other = walk.argument(node, "dim0"), walk.argument(node, "dim1")
    dims[one], dims[other] = dims[other], dims[one]
    return _Value(dims)


def _reshape(walk: Walk, node: fx.Node) -> Any:
    """Dimensions that are merged or taken apart. Of a channel dimension that is taken apart, the outermost part is cut, whole."""
    (argument,) = node.all_input_nodes[:1]
    before, after, dims = _shapes(argument), _shapes(node), walk.values[argument.name].dims
    old = [dim for dim, size in enumerate(before) if size != 1]
    new = [dim for dim, size in enumerate(after) if size != 1]
    out: Dims = [None] * len(after)
    while old and new:
        parts, sizes = [old.pop(0)], [new.pop(0)]
        while (one := math.prod(before[dim] for dim in parts)) != (other := math.prod(after[dim] for dim in sizes)):
            if one < other:
                parts.append(old.pop(0))
            else:
                sizes.append(new.pop(0))
        labelled = [dim for dim in parts if dims[dim] is not None]
        if len(labelled) > 1:
            walk.freeze(*(dims[dim] for dim in labelled))
        elif labelled:
            shape = [before[dim] if dim == labelled[0] else 1 for dim in parts]
            flat = np.broadcast_to(np.reshape(dims[labelled[0]], shape), [before[dim] for dim in parts]).reshape(
                [after[dim] for dim in sizes]
            )
            for place, labels in _apart(walk, flat):
                out[sizes[place]] = labels
    return _Value(out)


def _apart(walk: Walk, flat: Labels) -> Iterator[tuple[int, Labels]]:
    """Along which of its dimensions an array of labels is cut."""
    for dim in range(flat.ndim):
        rows = np.moveaxis(flat, dim, 0).reshape(flat.shape[dim], -1)
        if (rows == rows[:, :1]).all():
            yield dim, np.ascontiguousarray(rows[:, 0])
            return
    rows = flat.reshape(flat.shape[0], -1)
    for row in rows:
        walk.together(row)
    yield 0, np.ascontiguousarray(rows[:, 0])


def _unsqueeze(walk: Walk, node: fx.Node) -> Any:
    dims, dim = list(walk.argument(node, "self").dims), walk.argument(node, "dim")
    dims.insert(dim if dim >= 0 else dim + len(dims) + 1, None)
    return _Value(dims)


def _squeeze(walk: Walk, node: fx.Node) -> Any:
    (argument,) = node.all_input_nodes
    dims, shape = walk.values[argument.name].dims, _shapes(argument)
    given = walk.argument(node, "dim")
    over = range(len(dims)) if given is None else [dim % len(dims) for dim in ([given] if isinstance(given, int) else given)]
    return _Value([labels for dim, labels in enumerate(dims) if not (dim in over and shape[dim] == 1)])


def _expand(walk: Walk, node: fx.Node) -> Any:
    argument, shape = node.all_input_nodes[0], _shapes(node)
    dims, before = walk.values[argument.name].dims, _shapes(argument)
    out: Dims = [None] * (len(shape) - len(dims)) + list(dims)
    for dim in range(-len(before), 0):
        if before[dim] != shape[dim]:
            walk.freeze(out[dim])
            out[dim] = None
    return _Value(out)


def _select(walk: Walk, node: fx.Node) -> Any:
    dims, dim = list(walk.argument(node, "self").dims), int(walk.argument(node, "dim", 0))
    walk.freeze(dims.pop(dim))
    return _like(node, lambda shape: _Value(list(dims)))


def _slice(walk: Walk, node: fx.Node) -> Any:
    argument, dim = node.all_input_nodes[0], int(walk.argument(node, "dim", 0))
    dims, before, after = list(walk.argument(node, "self").dims), _shapes(argument), _shapes(node)
    labels = dims[dim]
    if labels is not None and before[dim] != after[dim]:
        size, start = before[dim], int(walk.argument(node, "start") or 0) % before[dim]
        part = after[dim]
        same = walk.roots(labels).reshape(-1, part) if size % part == 0 and start % part == 0 else None
        if same is not None and (same == same[0]).all():  # parts that lose the same channels, such as the directions of a recurrent layer
            dims[dim] = labels[start : start + part]
        else:
            walk.freeze(labels)
            dims[dim] = None
    return _Value(dims)


def _chunk(walk: Walk, node: fx.Node) -> Any:
    """Equal parts lose the same channels, so that they stay equal."""
    x, dim, count = walk.argument(node, "self"), int(walk.argument(node, "dim", 0)), int(walk.argument(node, "chunks"))
    labels = x.dims[dim]
    if labels is None:
        return [_Value(list(x.dims)) for _ in range(count)]
    if len(labels) % count:
        return None
    parts = np.split(labels, count)
    for part in parts[1:]:
        walk.join(parts[0], part)
    return [_Value([*x.dims[: dim % len(x.dims)], part, *x.dims[dim % len(x.dims) + 1 :]]) for part in parts]


def _split(walk: Walk, node: fx.Node) -> Any:
    """The sizes are numbers of the program, so what is split stays."""
    x, dim = walk.argument(node, "self"), int(walk.argument(node, "dim", 0))
    dims = list(x.dims)
    walk.freeze(dims[dim])
    dims[dim] = None
    return _like(node, lambda shape: _Value(list(dims)))


def _concat(walk: Walk, node: fx.Node) -> Any:
    parts, dim = walk.argument(node, "tensors"), int(walk.argument(node, "dim", 0))
    given: Any = node.args[0]
    shapes = [_shapes(argument) for argument in given]
    kept = [index for index, shape in enumerate(shapes) if shape != (0,)]
    dim %= len(parts[kept[0]].dims)
    joined: list[Labels] = []
    for index in kept:
        found = parts[index].dims[dim]
        if found is None:
            found = walk.fresh(shapes[index][dim])
            walk.freeze(found)
        joined.append(found)
    out: Dims = [None] * len(parts[kept[0]].dims)
    for other in range(len(out)):
        every = [parts[index].dims[other] for index in kept]
        if other != dim and any(labels is not None for labels in every):
            first = every[0]
            for labels in every[1:]:
                first = walk.join(first, labels)
            out[other] = first
    out[dim] = np.concatenate(joined) if any(parts[index].dims[dim] is not None for index in kept) else None
    return _Value(out)


def _stack(walk: Walk, node: fx.Node) -> Any:
    parts, dim = walk.argument(node, "tensors"), int(walk.argument(node, "dim", 0))
    out = list(parts[0].dims)
    for part in parts[1:]:
        out = [None if a is None and b is None else walk.join(a, b) for a, b in zip(out, part.dims, strict=True)]
    out.insert(dim if dim >= 0 else dim + len(out) + 1, None)
    return _Value(out)


def _reduce(walk: Walk, node: fx.Node) -> Any:
    """Over dimensions that are not cut: a sum or a maximum over channels has other values without one."""
    if len(node.all_input_nodes) > 1:  # max and min of two tensors
        return _elementwise(walk, node)
    (x, *_) = _values(walk.values.get(node.all_input_nodes[0].name))
    given, kept = walk.argument(node, "dim"), bool(walk.argument(node, "keepdim", False))
    over = list(range(len(x.dims))) if given is None or given == [] else [given] if isinstance(given, int) else given
    over = [dim % len(x.dims) for dim in over]
    walk.freeze(*(x.dims[dim] for dim in over))
    dims = [None if dim in over else labels for dim, labels in enumerate(x.dims) if kept or dim not in over]
    return _like(node, lambda shape: _Value(list(dims)))


def _along(walk: Walk, node: fx.Node) -> Any:
    """What mixes the entries along one dimension and keeps the shape (softmax, cumulative sums)."""
    (x, *_) = _values(walk.values.get(node.all_input_nodes[0].name))
    dims, dim = list(x.dims), int(walk.argument(node, "dim"))
    walk.freeze(dims[dim])
    dims[dim] = None
    return _Value(dims)


def _index(walk: Walk, node: fx.Node) -> Any:
    x, indices = walk.argument(node, "self"), walk.argument(node, "indices")
    given = [dim for dim, index in enumerate(indices) if index is not None]
    walk.freeze(*(x.dims[dim] for dim in given))
    rest = [labels for dim, labels in enumerate(x.dims) if dim not in given]
    more = len(_shapes(node)) - len(rest)
    start = given[0] if given == list(range(given[0], given[-1] + 1)) else 0
    return _Value([*rest[:start], *[None] * more, *rest[start:]])


def _zeros(walk: Walk, node: fx.Node) -> Any:
    return None if node.all_input_nodes else _like(node, lambda shape: _Value([None] * len(shape), zeros=True))


def _prelu(walk: Walk, node: fx.Node) -> Any:
    x, weight = walk.argument(node, "self"), walk.argument(node, "weight")
    if len(weight.dims) and weight.dims[0] is not None and len(weight.dims[0]) > 1:
        walk.join(x.dims[1], weight.dims[0])
    return _Value(list(x.dims))


def _named(method: Callable[[Walk, fx.Node], Any], names: str) -> dict[str, Callable[[Walk, fx.Node], Any]]:
    return dict.fromkeys(names.split(), method)


OPERATIONS: dict[str, Callable[[Walk, fx.Node], Any]] = {
    **_named(
        _elementwise,
        "add sub mul div rsub true_divide floor_divide maximum minimum fmod remainder pow where masked_fill eq ne ge gt le lt "
        "logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_not __and__ __or__ atan2 lerp addcmul addcdiv "
        "relu relu6 gelu silu tanh sigmoid hardtanh hardswish hardsigmoid elu selu celu leaky_relu softplus softsign mish log_sigmoid "
        "exp expm1 log log1p sqrt rsqrt square abs neg sign reciprocal erf sin cos clamp clamp_min clamp_max clip threshold nan_to_num "
        "hardshrink softshrink tanhshrink rrelu isnan isinf round floor ceil",
    ),
    **_named(
        _same,
        "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout contiguous clone detach alias to type_as to_copy "
        "lift_fresh_copy zeros_like ones_like full_like float double half",
    ),
    **_named(_linear, "linear"),
    **_named(_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_named(_batch_norm, "batch_norm instance_norm"),
    **_named(_layer_norm, "layer_norm rms_norm"),
    **_named(_group_norm, "group_norm"),
    **_named(_embedding, "embedding"),
    **_named(_recurrent, "rnn_tanh rnn_relu gru lstm"),
    **_named(_matmul, "matmul mm bmm addmm"),
    **_named(_attention, "scaled_dot_product_attention"),
    **_named(
        _spatial,
        "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d",
    ),
    **_named(_pad, "pad constant_pad_nd"),
    **_named(_permute, "permute transpose t numpy_T mT adjoint swapaxes"),
    **_named(_reshape, "reshape view unsafe_view flatten unflatten"),
    **_named(_unsqueeze, "unsqueeze"),
    **_named(_squeeze, "squeeze"),
    **_named(_expand, "expand expand_as broadcast_to"),
    **_named(_select, "select unbind"),
    **_named(_slice, "slice"),
    **_named(_chunk, "chunk"),
    **_named(_split, "split split_with_sizes"),
    **_named(_concat, "cat concat concatenate"),
    **_named(_stack, "stack"),
    **_named(_reduce, "sum mean amax amin max min var std argmax argmin any all prod logsumexp"),
    **_named(_along, "softmax log_softmax cumsum cumprod"),
    **_named(_index, "index"),
    **_named(_zeros, "zeros ones full empty arange"),
    **_named(_prelu, "prelu"),
}
