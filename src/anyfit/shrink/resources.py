"""What one prediction costs: parameters, multiply-accumulates, bytes of weights as stored, and memory at its peak.

All figures follow from the graph of `task.predict`, so they are estimates: what is flashed is compiled and measured. The memory of activations
is planned as a device would do it: a view is the memory that it views; what works element by element or row by row does so in the place of
an input that nobody needs any more. Weights are no activations; only those that a prediction reads count.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from anyfit.errors import InputError
from anyfit.program import QuantizedNetwork
from anyfit.program.operations import Program
from anyfit.program.trace import Traced, trace
from anyfit.shrink.arena import Arena, Step, arranged
from anyfit.shrink.opened import open_model
from anyfit.task import Task
from anyfit.tree import map_tensors

__all__ = ["Footprint", "Resources", "Row", "Stored", "program_resources", "resources"]

Kind = Literal["float", "int8"]

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_PRODUCTS = {
    "matmul": 0,
    "mm": 0,
    "bmm": 0,
    "mv": 0,
    "dot": 0,
    "vdot": 0,
    "addmm": 1,
    "addmv": 1,
    "baddbmm": 1,
    "addbmm": 1,
}  # -> left factor
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_CELLS = {"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
# beside those that torch calls pointwise: each output needs its own place of the input, or its own row, so they work in place
_IN_PLACE = re.compile(
    r"(batch|layer|group|instance|rms)_norm|(log_)?softmax|hardswish|prelu|log_sigmoid|true_divide|divide|multiply|subtract|rsub|where|"
    r"masked_fill|to|type_as|_to_copy|fill|cumsum|__\w+__"
)
# no products of weights or of two activations
_NO_PRODUCTS = re.compile(
    r"(adaptive_)?(max|avg)_pool\dd(_with_indices)?|embedding|cat|concat|stack|[hv]stack|pad|constant_pad_nd|(reflection|replication)_pad\dd|"
    r"index|index_(select|put)|gather|take(_along_dim)?|scatter(_add)?|topk|sort|argsort|(arg)?(max|min)|a(max|min)|sum|mean|prod|median|mode|"
    r"(var|std)(_mean)?|norm|linalg_(vector_)?norm|logsumexp|any|all|count_nonzero|arange|linspace|eye|scalar_tensor|lift_fresh(_copy)?|"
    r"(new_)?(zeros|ones|full|empty)(_like)?|repeat(_interleave)?|tile|tri[lu]|one_hot|roll|flip|glu|upsample_(nearest|bilinear)\dd|"
    r"(pixel|channel)_(un)?shuffle|im2col|col2im|copy|diff|bucketize|searchsorted|(feature_|alpha_)?dropout|reshape(_as)?|contiguous|flatten"
)
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout"}


@dataclass(frozen=True)
class Stored:
    """Bytes of weights as they are stored, each tensor in its smallest form: all values, or those that are not zero and where they stand."""

    values: int = 0
    indices: int = 0  # bitmaps, or columns and rows
    scales: int = 0
    biases: int = 0  # and what else has one dimension
    dense: int = 0  # of all together, zeros stored too

    @property
    def bytes(self) -> int:
        """All together."""
        return self.values + self.indices + self.scales + self.biases

    def __add__(self, other: Stored) -> Stored:
        return Stored(*(mine + its for mine, its in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Footprint:
    """Weights and activations in one type of number."""

    weights: Stored
    arena: Arena
    live: tuple[
        tuple[str, Mapping[str, int]], ...
    ]  # in the arena's order, views left out: the value that is made, and what is in memory then
    per_layer: int  # largest input and output of any one operation: what is live beside them (a skip) is not seen


@dataclass(frozen=True)
class Row:
    """One operation. `live` is all that is in memory while it runs, `bytes` what its weights take."""

    layer: str
    operation: str
    value: str  # that it makes
    shape: tuple[int, ...]  # of the value, without the batch
    parameters: int
    macs: int
    bytes: Mapping[Kind, int]
    live: Mapping[Kind, int]


@dataclass(frozen=True)
class Resources:
    """What one prediction costs, estimated from its graph. `unknown`: operations whose multiply-accumulates nobody counts here."""

    parameters: int
    nonzero: int
    macs: int
    footprints: Mapping[Kind, Footprint]  # of a model both types, of an integer program int8
    rows: tuple[Row, ...]  # in the order of the first footprint
    unknown: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)  # value -> the name of the input that it is

    def memory(self, kind: Kind | None = None) -> dict[str, Any]:
        """Which value holds which bytes of the arena, and when: what `report.memory` draws. By default of the first footprint."""
        chosen = kind if kind is not None else next(iter(self.footprints))
        footprint = self.footprints[chosen]
        arena = footprint.arena
        made = {row.value: {"layer": row.layer, "operation": row.operation} for row in self.rows}
        values: list[dict[str, Any]] = []
        latest: dict[str, dict[str, Any]] = {}
        for position, (_, live) in enumerate(footprint.live):
            for name, size in live.items():
                if name not in latest or latest[name]["bytes"] != size:  # a value that took a larger place has two parts
                    value, _, scratch = name.partition("!")
                    told = made.get(value, {"layer": self.inputs.get(name, name), "operation": "input"}) | (
                        {"operation": scratch} if scratch else {}
                    )
                    latest[name] = {"name": name, **told, "offset": arena.offsets[name], "bytes": size, "first": position}
                    values.append(latest[name])
                latest[name]["last"] = position
        return {
            "type": chosen, "bytes": arena.bytes, "lower_bound": arena.lower_bound, "exact": arena.exact,
            "weights_bytes": footprint.weights.bytes, "steps": [made[value] for value, _ in footprint.live], "values": values,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        figures: dict[str, Any] = {
            kind: {
                "weights": {**asdict(footprint.weights), "bytes": footprint.weights.bytes},
                "activations_bytes": footprint.arena.lower_bound,
                "arena_bytes": footprint.arena.bytes,
                "per_layer_bytes": footprint.per_layer,
                "exact": footprint.arena.exact,
            }
            for kind, footprint in self.footprints.items()
        }
        return {
            "kind": "estimated", "parameters": self.parameters, "nonzero": self.nonzero, "macs": self.macs, **figures,
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows], "unknown": list(self.unknown), "memory": self.memory(),
        }  # fmt: skip


def resources(task: Task, model: Any, inputs: Any = None) -> Resources:
    """What `task.predict(model, inputs)` costs for one row; `model`: a module, State, Run or the path of a run. `inputs`: one row without its target; None takes `task.example`."""
    if isinstance(model, nn.Module):
        network = model
        if inputs is None and not isinstance(model, QuantizedNetwork):
            raise InputError(
                "inputs (=None) of a model that comes without its schema must be given: one row without its target, as a batch"
            )
    else:
        found = open_model(task, model)
        network = found.model
        inputs = found.row() if inputs is None and not isinstance(network, QuantizedNetwork) else inputs
    if isinstance(network, QuantizedNetwork):
        return program_resources(network.program())
    tensor = next(network.parameters(), None)
    if tensor is not None:
        inputs = map_tensors(lambda given: given.to(tensor.device), inputs)
    return _Reading(trace(task.predict, network, inputs)).resources()


# From a graph to steps


@dataclass
class _Operation:
    name: str
    value: str
    layer: str
    node: fx.Node
    inputs: tuple[str, ...]  # activations
    weights: tuple[str, ...]  # placeholders
    alias: str | None
    places: tuple[str, ...]  # inputs in whose place it could work
    macs: int = 0


class _Reading:
    """Operations of a traced prediction, with the activations that they read and make."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.sources: dict[str, str] = {}  # value -> the name of the input
        self.tensors: dict[str, list[Tensor]] = {}  # value -> what it consists of
        self.roots: dict[str, str] = {}  # value -> whose memory it is
        self.operations: list[_Operation] = []
        self.unknown: set[str] = set()
        self.values: dict[fx.Node, str] = {}
        self.weights: dict[fx.Node, tuple[str, ...]] = {}  # parameters, buffers, constants and views of them
        self.live = _needed(traced)
        for node in traced.nodes:
            if node in self.live:
                self._read(node)
        for node in traced.outputs:
            self._place_input(node)
        self.results = [self.values[node] for node in traced.outputs if node in self.values]

    def _place_input(self, node: fx.Node) -> None:
        if node.op != "placeholder" or node in self.values:
            return
        if node.name in self.traced.tensors:
            self.weights[node] = (node.name,)
        else:
            self._add(node, node.name, [node.meta["val"]])
            self.sources[node.name] = self.traced.inputs.get(node.name, node.name)

    def _add(self, node: fx.Node, root: str, tensors: list[Tensor]) -> None:
        self.values[node] = node.name
        self.roots[node.name], self.tensors[node.name] = root, tensors

    def _read(self, node: fx.Node) -> None:
        tensors = self._made(node)
        if not tensors:
            return  # an assertion, or a size
        for given in node.all_input_nodes:
            self._place_input(given)
        viewed, written = _memory(node)
        if viewed in self.weights:
            self.weights[node] = self.weights[viewed]
            return
        alias = None if viewed is None else self.values[viewed]
        inputs = tuple(dict.fromkeys(self.values[given] for given in node.all_input_nodes if given in self.values))
        weights = tuple(dict.fromkeys(name for given in node.all_input_nodes for name in self.weights.get(given, ())))
        name = _name(node)
        self._add(node, node.name if alias is None else self.roots[alias], tensors)
        operation = _Operation(name, node.name, self._layer(node, weights), node, inputs, weights, alias, ())
        if alias is None or written:
            macs = _macs(name, node)
            operation.macs = macs or 0
            if macs is None and not _is_pointwise(node) and _NO_PRODUCTS.fullmatch(name) is None:
                self.unknown.add(name)
        if alias is None and _is_pointwise(node):
            operation.places = tuple(
                value for value in inputs if self._is_whole(value) and _elements(self.tensors[value]) == _elements(tensors)
            )
        if written and viewed is not None:
            for other, value in self.values.items():  # who reads that memory from now on reads what was written
                if self.roots[value] == self.roots[node.name]:
                    self.values[other] = node.name
        self.operations.append(operation)

    def _made(self, node: fx.Node) -> list[Tensor]:
        """What a node gives; of several tensors those that somebody takes."""
        value = node.meta.get("val")
        users = [user for user in node.users if user in self.live]
        if isinstance(value, tuple | list) and users and all(user.target is operator.getitem for user in users):
            indices: set[Any] = {user.args[1] for user in users}
            value = [value[index] for index in sorted(indices)]
        return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]

    def _is_whole(self, value: str) -> bool:
        """Whether a view sees all of the memory."""
        return _elements(self.tensors[value]) == _elements(self.tensors[self.roots[value]])

    def _layer(self, node: fx.Node, weights: Sequence[str]) -> str:
        if weights:
            name = self.traced.names[weights[0]]
            return name.rpartition(".")[0] or name
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        return (stack[-1].removeprefix("model").removeprefix(".") if stack else "") or node.name

    # From steps to figures

    def resources(self) -> Resources:
        users: dict[str, int] = {}
        for operation in self.operations:
            for root in {self.roots[value] for value in operation.inputs}:
                users[root] = users.get(root, 0) + 1
        seen: set[int] = set()
        parameters: dict[str, list[Tensor]] = {}
        stored: dict[str, dict[Kind, Stored]] = {}
        for operation in self.operations:
            new = {name: self.traced.tensors[name] for name in operation.weights if id(self.traced.tensors[name]) not in seen}
            seen |= {id(tensor) for tensor in new.values()}
            parameters[operation.value] = [tensor for tensor in new.values() if isinstance(tensor, nn.Parameter)]
            stored[operation.value] = {
                "float": sum((_stored(tensor, tensor.element_size()) for tensor in new.values()), Stored()),
                "int8": self._stored_int8(operation, list(new.values()), users),
            }
        footprints: dict[Kind, Footprint] = {}
        for kind in ("float", "int8"):
            weights = sum((each[kind] for each in stored.values()), Stored())
            footprints[kind] = _footprint(weights, *self._steps(kind, users), self.results)
        lives = {kind: {value: sum(live.values()) for value, live in footprint.live} for kind, footprint in footprints.items()}
        by_value = {operation.value: operation for operation in self.operations}
        rows = tuple(
            Row(
                layer=operation.layer,
                operation=operation.name,
                value=value,
                shape=tuple(self.tensors[value][0].shape[1:]),
                parameters=sum(tensor.numel() for tensor in parameters[value]),
                macs=operation.macs,
                bytes={kind: each.bytes for kind, each in stored[value].items()},
                live={kind: lives[kind][value] for kind in footprints},
            )
            for value, operation in ((value, by_value[value]) for value, _ in footprints["float"].live)
        )
        used = [tensor for tensors in parameters.values() for tensor in tensors]
        return Resources(
            parameters=sum(tensor.numel() for tensor in used),
            nonzero=sum(int(tensor.count_nonzero()) for tensor in used),
            macs=sum(operation.macs for operation in self.operations),
            footprints=footprints,
            rows=rows,
            unknown=tuple(sorted(self.unknown)),
            inputs=self.sources,
        )

    def _size(self, value: str, kind: Kind) -> int:
        narrow = kind == "int8" and value not in self.sources  # inputs are raw, and ids stay what they are
        return sum(
            tensor.numel() * (1 if narrow and tensor.is_floating_point() else tensor.element_size()) for tensor in self.tensors[value]
        )

    def _steps(self, kind: Kind, users: Mapping[str, int]) -> tuple[list[Step], dict[str, int]]:
        steps = []
        for operation in self.operations:
            place = min(operation.places, key=lambda value: users[self.roots[value]], default=None)  # whoever else reads it may come later
            size = 0 if operation.alias is not None else self._size(operation.value, kind)
            steps.append(Step(operation.value, operation.inputs, operation.value, size, place, operation.alias))
        return steps, {value: self._size(value, kind) for value in self.sources}

    def _stored_int8(self, operation: _Operation, tensors: Iterable[Tensor], users: Mapping[str, int]) -> Stored:
        """As an integer program has it: a multiplier and a shift for each channel, whole biases; a batch norm goes into what is before it."""
        tensors, node = list(tensors), operation.node
        layers = _CONVOLUTIONS | {"linear"}
        if operation.name == "batch_norm" and tensors:
            before = node.all_input_nodes[0]
            folded = _name(before) in layers and users.get(before.name) == 1
            size = 0 if folded else 8 * tensors[0].numel()
            return Stored(scales=size // 2, biases=size // 2, dense=size)
        total = Stored()
        for tensor in tensors:
            if not tensor.is_floating_point():
                total += _stored(tensor, tensor.element_size())
            elif tensor.dim() > 1:
                channels = 0 if operation.name.startswith("embedding") else tensor.shape[0]
                if operation.name.startswith("conv_transpose"):
                    channels = self.tensors[operation.value][0].shape[1]
                total += _stored(tensor, 1) + Stored(scales=5 * channels, dense=5 * channels)
                if operation.name in layers:  # with or without a bias in the model: zero points, batch norms and rounding go there
                    total += Stored(biases=4 * channels, dense=4 * channels)
            elif operation.name not in layers:
                total += _stored(tensor, 4)
        return total


def _footprint(
    weights: Stored, steps: Sequence[Step], sources: Mapping[str, int], results: Sequence[str], arena: Arena | None = None
) -> Footprint:
    if arena is None:
        arena = arranged(steps, sources, results)
    placed = [(steps[index], live) for index, live in zip(arena.order, arena.live, strict=True) if steps[index].alias is None]
    roots = {name: name for name in sources}
    sizes, per_layer = dict(sources), 0
    for step in steps:
        roots[step.output] = step.output if step.alias is None else roots[step.alias]
        sizes[step.output] = step.bytes
        given = sum(sizes[root] for root in {roots[value] for value in step.inputs})
        per_layer = max(per_layer, given + step.scratch + (step.bytes if step.replaces is None else 0))
    return Footprint(weights, arena, tuple((step.output, live) for step, live in placed), per_layer)


def _needed(traced: Traced) -> set[fx.Node]:
    """Nodes that the outputs follow from; what else is computed (attention weights that nobody asked for) is left out."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in traced.nodes:
        viewed, _ = _memory(node)
        roots[node] = node if viewed is None else roots.get(viewed, viewed)
    needed = set(traced.outputs)
    memory = {roots.get(node, node) for node in needed}
    for node in reversed(traced.nodes):
        _, written = _memory(node)
        if node in needed or (written and roots[node] in memory):
            needed |= {node, *node.all_input_nodes}
            memory |= {roots.get(given, given) for given in node.all_input_nodes}
    return needed


def _name(node: fx.Node) -> str:
    """The operation, without overload and without the underscore of one that writes into its input."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema is not None else str(getattr(node.target, "__name__", node.target))
    return name.removesuffix("_") if not name.startswith("_") else name


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or _IN_PLACE.fullmatch(_name(node)) is not None


def _memory(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The input whose memory the output is, if any, and whether that is written."""
    if node.target is operator.getitem or (_name(node) in _DROPOUTS and node.args[2] is False):
        return node.all_input_nodes[0], False
    schema = getattr(node.target, "_schema", None)
    if schema is None or all(value.alias_info is None for value in schema.returns):
        return None, False
    for argument, given in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and isinstance(given, fx.Node):
            written = argument.alias_info.is_write
            return (given if written or _is_view(node, given) else None), written
    return None, False


def _is_view(node: fx.Node, given: fx.Node) -> bool:
    """Whether an operation that copies where it must (reshape, contiguous, to) did not have to."""
    before, after = given.meta["val"], node.meta["val"]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return True
    if before.dtype != after.dtype:
        return False
    if _name(node) == "contiguous":
        return before.is_contiguous()
    if _name(node) in ("reshape", "reshape_as", "flatten"):
        try:
            torch.empty_strided(before.shape, before.stride(), device="meta").view(after.shape)
        except RuntimeError:
            return False
    return True


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


# Multiply-accumulates


def _macs(name: str, node: fx.Node) -> int | None:
    """Of one operation; None where there is no rule."""
    values: list[Any] = pytree.tree_map(lambda each: each.meta["val"] if isinstance(each, fx.Node) else each, list(node.args))
    made = node.meta["val"]
    if name in _CONVOLUTIONS:
        transposed = name.startswith("conv_transpose") or (name == "convolution" and bool(values[6]))
        return int((values[0] if transposed else made).numel() * math.prod(values[1].shape[1:]))
    if name == "linear":
        return int(made.numel() * values[0].shape[-1])
    if name in _PRODUCTS:
        left = values[_PRODUCTS[name]]
        batches = left.shape[0] if name == "addbmm" else 1
        return int(made.numel() * left.shape[-1] * batches)
    if name == "scaled_dot_product_attention":
        query, keys, given = values[:3]
        return int(query.shape[:-1].numel() * keys.shape[-2] * (query.shape[-1] + given.shape[-1]))
    if name in _RECURRENT or name in _CELLS:
        lengths = values[0].shape[:-1].numel()
        weights = [each.meta["val"] for each in node.all_input_nodes[1:] if each.op == "placeholder" and each.meta["val"].dim() == 2]
        return int(lengths * _elements(weights))
    if name == "einsum":
        return _einsum_macs(values[0], [each.shape for each in values[1]], made.numel())
    if name == "bilinear":
        return int(values[0].shape[:-1].numel() * values[2].numel() + made.numel() * values[1].shape[-1])
    return None


def _einsum_macs(equation: str, shapes: Sequence[Sequence[int]], outputs: int) -> int:
    """Each output sums over the indices that it lacks."""
    if len(shapes) == 1:
        return 0
    given, arrow, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    letters = "".join(terms)
    if not arrow:
        result = "".join(letter for letter in letters if letters.count(letter) == 1)
    lengths: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        front, dots, back = term.partition("...")
        lengths |= dict(zip(front, shape, strict=not dots))
        lengths |= dict(zip(back, shape[len(shape) - len(back) :], strict=True))
    return outputs * math.prod(length for letter, length in lengths.items() if letter not in result)


# Bytes


def _stored(tensor: Tensor, size: int) -> Stored:
    """A tensor whose values take `size` bytes each, in its smallest form."""
    dense = tensor.numel() * size
    if tensor.dim() < 2:
        return Stored(biases=dense, dense=dense)
    values = int(tensor.count_nonzero()) * size
    indices = _indices(tensor)
    return Stored(values=values, indices=indices, dense=dense) if values + indices < dense else Stored(values=dense, dense=dense)


def _indices(tensor: Tensor) -> int:
    """Bytes that say where the values stand: a bit for each place, or each value's column and where each row begins."""
    rows, count = tensor.shape[0], int(tensor.count_nonzero())
    columns = tensor.numel() // max(rows, 1)
    return min(-(-tensor.numel() // 8), count * _width(columns) + (rows + 1) * _width(count + 1))


def _width(numbers: int) -> int:
    """Bytes of an index among so many."""
    return 1 if numbers <= 1 << 8 else 2 if numbers <= 1 << 16 else 4


# Integer programs


def program_resources(program: Program) -> Resources:
    """What one run of an integer program costs: the constants and the arena of its C code, and multiply-accumulates."""
    from anyfit.shrink.c import flash_bytes, plan, steps_of  # here, for the C code is nothing that a model needs

    steps, sources = steps_of(program)
    macs, stored, parameters = {}, {}, {}
    shapes = {given.name: given.shape for given in program.inputs} | {each.output: each.shape for each in program.operations}
    nonzero = 0
    for operation in program.operations:
        constants = operation.constants
        weights = [constants[name] for name in ("weight", "bias") if name in constants]
        if operation.kind == "embedding":
            weights = [constants["table"]]
        value, size = operation.output, sum(array.nbytes for name, array in constants.items() if array.ndim)
        parameters[value] = sum(array.size for array in weights)
        nonzero += sum(int((array != 0).sum()) for array in weights)
        stored[value] = size
        rows = math.prod(operation.shape) // constants["weight"].shape[0] if "weight" in constants else 0
        if operation.kind == "rnn":
            rows = shapes[operation.inputs[0]][0]
        macs[value] = rows * math.prod(constants["weight"].shape) if "weight" in constants else 0
        if operation.kind == "conv":
            macs[value] = math.prod(operation.shape) * math.prod(constants["weight"].shape[1:])
    biases = sum(operation.constants["bias"].size * 4 for operation in program.operations if "bias" in operation.constants)
    values = sum(parameters.values()) - biases // 4
    flash = flash_bytes(program)
    weights_stored = Stored(values=values, biases=biases, scales=flash - values - biases, dense=flash)
    footprint = _footprint(weights_stored, steps, sources, [program.result], plan(program))
    live = {value: sum(held.values()) for value, held in footprint.live}
    made = {operation.output: operation for operation in program.operations}
    rows_made = tuple(
        Row(
            layer=made[value].name, operation=made[value].kind, value=value, shape=made[value].shape, parameters=parameters[value],
            macs=macs[value], bytes={"int8": stored[value]}, live={"int8": live[value]},
        )
        for value, _ in footprint.live
    )  # fmt: skip
    return Resources(sum(parameters.values()), nonzero, sum(macs.values()), {"int8": footprint}, rows_made)
