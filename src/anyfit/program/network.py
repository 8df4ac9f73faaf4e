"""A network of int8 operations as a module: with gradients while it trains, with the device's own integers while it evaluates.

Each value has a scale of its own, range / 127, and zero point 0; weights have one scale for each output channel, the last layer's one for all.
Ranges are parameters that calibration sets (the largest magnitude that was seen), so that they travel with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyfit.errors import DataError, StateError, TaskError
from anyfit.program.lower import Layer, Layers, entries_of
from anyfit.program.operations import HIGH, LOW, Input, Operation, Program, accumulated, compute

__all__ = ["QuantizedNetwork"]

SAME = ("maximum", "clamp", "reshape", "permute", "slice")  # whose output has the scale of their input
BIAS_BITS = 29  # that a bias may take of an accumulator's 31


def _same(layer: Layer) -> bool:
    """Whether what a layer makes has the scale of its input."""
    return layer.kind in SAME or (layer.kind == "reduce" and layer.options["how"] == "max")


class _Weights(nn.Module):
    """The tensors of one layer: those that train as parameters, the others as buffers."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        for name, tensor in layer.weights.items():
            if name in ("weight", "bias", "table"):
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)


def _keys(layers: Iterable[Layer]) -> dict[str, str]:
    """By output, a name for the weights of each layer that no other has, nor a ModuleDict itself."""
    taken, found = set(dir(nn.ModuleDict)), {}
    for layer in layers:
        if layer.weights:
            key = layer.name.replace(".", "_")
            while key in taken:
                key += "_"
            taken.add(key)
            found[layer.output] = key
    return found


class QuantizedNetwork(nn.Module):
    """`layers` with int8 arithmetic. (B, ...) batches as the model that they came from takes them."""

    def __init__(self, layers: Layers, *, power_of_two: bool = False) -> None:
        super().__init__()
        self.plan, self.power_of_two = layers, power_of_two
        self.keys = _keys(layers.layers)
        self.layers = nn.ModuleDict({self.keys[layer.output]: _Weights(layer) for layer in layers.layers if layer.weights})
        self.places: dict[str, slice] = {}  # of each value's channels among the ranges
        size = 0
        for layer in layers.layers:
            if self._ranged(layer):
                channels = layer.shape[0] if layer.shape else 1
                self.places[layer.output] = slice(size, size + channels)
                size += channels
        self.ranges = nn.Parameter(torch.zeros(size), requires_grad=False)
        self._built: tuple[Any, Program] | None = None
        last = layers.layers[-1]
        if last.output != layers.result:
            raise TaskError("the result must be made by the last operation; return one tensor that nothing else is computed from")

    @staticmethod
    def _ranged(layer: Layer) -> bool:
        """Whether the scale of what a layer makes is measured."""
        return not _same(layer) and layer.kind not in ("concat", "embedding") and not (layer.kind == "rnn" and layer.options["tanh"])

    @property
    def calibrated(self) -> bool:
        """Whether ranges are known."""
        return bool(self.ranges.any())

    def weights(self, layer: Layer) -> Any:
        """The tensors of a layer, by name."""
        return self.layers[self.keys[layer.output]]

    # -------------------------------------------------------------- floats

    def float_values(self, batch: Any) -> dict[str, Tensor]:
        """All values of the network in floats, without any rounding: what ranges are measured on."""
        return self._floats(batch, lambda layer, value: value, lambda layer, weight: weight)

    def forward(self, batch: Any) -> Tensor:
        """Predictions (B, ...) as real numbers: of integers in evaluation, of rounded floats in training."""
        if not self.calibrated:
            raise StateError("this network is not calibrated yet, so its int8 scales are not known; quantize(task, state, data) does it")
        if self.training:
            scales = self.scales()

            def rounded(layer: Layer, value: Tensor) -> Tensor:
                if self._decides(layer):
                    return value  # its accumulators are the result
                return _fake(value, scales[layer.output], *self._bounds(layer, scales))

            def stepped(layer: Layer, weight: Tensor) -> Tensor:
                return self._fake_weight(layer, weight, scales)

            result = self._floats(batch, rounded, stepped)[self.plan.result]
        else:
            result = self._integers(batch)
        return result.reshape(len(result), *self.plan.shape)

    def _entries(self, batch: Any) -> dict[str, Tensor]:
        """What a batch brings, by the names that the network was traced with; where there is one input only, its place is enough."""
        entries, names = entries_of(batch), [entry["name"] for entry in self.plan.inputs]
        if len(names) == 1 and names[0] not in entries and entries:
            return {names[0]: next(iter(entries.values()))}
        absent = [name for name in names if name not in entries]
        if absent:
            raise DataError(f"a batch has no {absent[0]!r}, which the network was traced with; it has: {', '.join(entries)}")
        return {name: entries[name] for name in names}

    def _integers(self, batch: Any) -> Tensor:
        program = self.program()
        values = {name: tensor.cpu() for name, tensor in self._entries(batch).items()}
        with torch.no_grad():
            for operation in program.operations[:-1]:
                values[operation.output] = compute(operation, values)
            last = program.operations[-1]
            made = accumulated(last, values[last.inputs[0]]) if program.accumulates else compute(last, values)
        device = self.ranges.device
        return (made.double() * program.result_scale).to(device, self.ranges.dtype)

    def _floats(
        self, batch: Any, rounded: Callable[[Layer, Tensor], Tensor], weight_of: Callable[[Layer, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = self._entries(batch)
        for layer in self.plan.layers:
            given = [values[name] for name in layer.inputs]
            made = _FLOATS[layer.kind](self, layer, weight_of, *given)
            rows = given[0].shape[0]
            values[layer.output] = (
                rounded(layer, made.reshape(rows, *layer.shape)) if not _same(layer) else made.reshape(rows, *layer.shape)
            )
        return values

    def _fake_weight(self, layer: Layer, weight: Tensor, scales: Mapping[str, float]) -> Tensor:
        """A weight as its integers would be, with the gradient of the weight itself."""
        scale = self._steps(layer, scales).to(weight.device, weight.dtype)
        with torch.no_grad():
            steps = torch.clamp(torch.round(weight / scale), -127, 127) * scale
        return weight + (steps - weight).detach()

    # -------------------------------------------------------------- scales

    def range_of(self, value: str) -> float:
        """The largest magnitude that was seen."""
        return float(self.ranges[self.places[value]].abs().max())

    def scales(self) -> dict[str, float]:
        """Of each int8 value: what one step of it means."""
        found: dict[str, float] = {}
        for layer in self.plan.layers:
            if _same(layer):
                found[layer.output] = found[layer.inputs[0]]
            elif layer.kind == "concat":
                found[layer.output] = max(found[name] for name in layer.inputs)
            elif layer.kind == "embedding":
                found[layer.output] = max(float(self.weights(layer).table.detach().abs().max()), 1e-12) / HIGH
            elif layer.kind == "rnn" and layer.options["tanh"]:
                found[layer.output] = 1.0 / HIGH
            else:
                found[layer.output] = (self.range_of(layer.output) or 1.0) / HIGH  # 0: nothing but zeros was seen
        return found

    def _bounds(self, layer: Layer, scales: Mapping[str, float]) -> tuple[int, int]:
        """Of a value's integers: those of int8, or of the activation that was fused in."""
        low, high = layer.options.get("bounds", (-math.inf, math.inf))
        scale = scales[layer.output]
        least = LOW if low == -math.inf else max(LOW, math.floor(low / scale + 0.5))
        return min(least, HIGH), HIGH if high == math.inf else max(LOW, min(HIGH, math.floor(high / scale + 0.5)))

    def _weight_scales(self, layer: Layer, scales: Mapping[str, float]) -> Tensor:
        """(O,) float64. Where a bias would not fit into an accumulator, weights get coarser."""
        tensors = self.weights(layer)
        weight, bias = tensors.weight.detach().double().cpu(), tensors.bias.detach().double().cpu()
        into, out = scales[layer.inputs[0]], scales[layer.output]
        if layer.kind == "rnn":  # states have a scale of their own, and one accumulator takes both
            width = weight.shape[1] - weight.shape[0]
            weight = torch.cat((weight[:, :width], weight[:, width:] * (out / into)), 1)
        magnitudes = weight.flatten(1).abs()
        least = torch.maximum(bias.abs() / (into * 2.0**BIAS_BITS), torch.tensor(out / into * 2.0**-30))
        sums = magnitudes.sum(1) / (1.45 * 2.0**23)  # of inputs of 128, beside a bias: 31 bits in all
        found = torch.maximum(torch.maximum(magnitudes.amax(1) / HIGH, least), sums)
        if self._decides(layer):
            found = found.max().expand(len(found))  # accumulators must compare
        if self.power_of_two:
            target = self._target(layer, scales)
            shift = torch.floor(torch.log2(target / (into * found)) + 1e-9).clamp(0, 31)
            found = target / into * torch.exp2(-shift)
        return found

    def _decides(self, layer: Layer) -> bool:
        """Whether the accumulators of a layer are the result: nothing bounds them."""
        return layer.output == self.plan.result and layer.kind == "linear" and "bounds" not in layer.options

    def _steps(self, layer: Layer, scales: Mapping[str, float]) -> Tensor:
        """The scales in the shape of the weight. Those of a recurrent layer's states count in units of its inputs."""
        weight = self.weights(layer).weight
        steps = self._weight_scales(layer, scales).view(-1, *[1] * (weight.dim() - 1))
        if layer.kind != "rnn":
            return steps
        columns = torch.ones(weight.shape[1], dtype=steps.dtype)
        columns[weight.shape[1] - weight.shape[0] :] = scales[layer.inputs[0]] / scales[layer.output]
        return steps * columns

    @staticmethod
    def _target(layer: Layer, scales: Mapping[str, float]) -> float:
        """What a requantized accumulator counts in."""
        return 1.0 / 256 if layer.kind == "rnn" and layer.options["tanh"] else scales[layer.output]

    # ------------------------------------------------------------- program

    def program(self, labels: tuple[str, ...] | None = None, task: Any = "classes") -> Program:
        """The exact integers that the weights and ranges stand for."""
        versions = (labels, task, *((id(tensor), tensor._version) for tensor in (*self.parameters(), *self.buffers())))
        if self._built is None or self._built[0] != versions:
            self._built = (versions, self._program(labels, task))
        return self._built[1]

    def _program(self, labels: tuple[str, ...] | None, task: Any) -> Program:
        if not self.calibrated:
            raise StateError("this network is not calibrated yet, so there are no integers; quantize(task, state, data) does it")
        scales = self.scales()
        operations = tuple(self._operation(layer, scales) for layer in self.plan.layers)
        inputs = tuple(Input(e["name"], _raw_type(e["dtype"], e["name"]), tuple(e["shape"])) for e in self.plan.inputs)  # type: ignore[arg-type]
        last = self.plan.layers[-1]
        result_scale = scales[self.plan.result]
        program = Program(inputs, operations, self.plan.result, scales, result_scale, labels, task, self.power_of_two)
        if program.accumulates:
            scale = float(self._weight_scales(last, scales)[0]) * scales[last.inputs[0]]
            program = Program(inputs, operations, self.plan.result, scales, scale, labels, task, self.power_of_two)
        return program

    def _operation(self, layer: Layer, scales: Mapping[str, float]) -> Operation:
        options: dict[str, Any] = {key: value for key, value in layer.options.items() if key not in ("bounds", "axis", "function", "tanh")}
        constants: dict[str, Any] = {}
        if "bounds" in layer.options or layer.kind in ("quantize", "conv", "linear", "add", "rnn", "clamp"):
            options["low"], options["high"] = self._bounds(layer, scales)
        if "bounds" in layer.options and layer.output == self.plan.result:
            options["bounded"] = True
        out = scales[layer.output]
        into = [scales[name] for name in layer.inputs if name in scales]
        if layer.kind in ("conv", "linear", "rnn"):
            constants = self._filters(layer, scales)
        elif layer.kind == "quantize":
            constants, more = self._quantize(layer, out)
            options |= more
        elif layer.kind == "add":
            ratios = [scale * c / out for scale, c in zip(into, options.pop("coefficients"), strict=True)]
            constants["multiplier"], options["shift"] = _common(ratios)
        elif layer.kind == "concat":
            options["axis"] = layer.options["axis"]
            pairs = [_fixed(scale / out) for scale in into]
            constants = {"multiplier": _int32(m for m, _ in pairs), "shift": _uint8(s for _, s in pairs)}
        elif layer.kind == "average" or (layer.kind == "reduce" and layer.options["how"] == "mean"):
            multiplier, shift = _fixed(into[0] / out / options["divisor"])
            constants = {"multiplier": np.array(multiplier, np.int32), "shift": np.array(shift, np.uint8)}
        elif layer.kind == "table":
            points = torch.arange(LOW, HIGH + 1, dtype=torch.float64) * into[0]
            reals = layer.options["function"](points)
            constants["table"] = torch.floor(torch.nan_to_num(reals / out) + 0.5).clamp(LOW, HIGH).to(torch.int8).numpy()
        elif layer.kind == "embedding":
            table = self.weights(layer).table.detach().double().cpu()
            constants["table"] = torch.floor(table / out + 0.5).clamp(LOW, HIGH).to(torch.int8).numpy()
        elif layer.kind == "slice":
            options["axis"] = layer.options["axis"]
        options.pop("divisor", None)
        return Operation(layer.kind, layer.name, tuple(layer.inputs), layer.output, layer.shape, options, constants)

    def _filters(self, layer: Layer, scales: Mapping[str, float]) -> dict[str, Any]:
        tensors = self.weights(layer)
        weight, bias = tensors.weight.detach().double().cpu(), tensors.bias.detach().double().cpu()
        into, scale = scales[layer.inputs[0]], self._weight_scales(layer, scales)
        # torch's rounding of halves to even is as good as any here, and is what training rounds by
        steps = torch.round(weight / self._steps(layer, scales)).clamp(-127, 127)
        constants: dict[str, Any] = {
            "weight": steps.to(torch.int8).numpy(),
            "bias": torch.round(bias / (into * scale)).to(torch.int32).numpy(),
        }
        ratios = (into * scale / self._target(layer, scales)).tolist()
        if self.power_of_two:
            constants["shift"] = _uint8(round(-math.log2(ratio)) for ratio in ratios)
        else:
            pairs = [_fixed(ratio) for ratio in ratios]
            constants |= {"multiplier": _int32(m for m, _ in pairs), "shift": _uint8(s for _, s in pairs)}
        if layer.kind == "rnn" and layer.options["tanh"]:
            constants["curve"] = np.round(32767 * np.tanh(np.arange(-64, 65) / 8)).astype(np.int16)
        return constants

    def _quantize(self, layer: Layer, out: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """What turns raw values into int8: whole numbers by a multiplication and a shift, floats in floats."""
        tensors = self.weights(layer)
        gain, offset = (getattr(tensors, name).detach().double().cpu().numpy() / out for name in ("scale", "offset"))
        entry = next(e for e in self.plan.inputs if e["name"] == layer.inputs[0])
        if _raw_type(entry["dtype"], entry["name"]) == "float32":
            return {"gain": gain.astype(np.float32), "shift_by": offset.astype(np.float32)}, {}
        largest = max(float(np.abs(gain).max()), float(np.abs(offset).max()) / 256, 1e-30)
        shift = max(0, min(30, 21 - math.ceil(math.log2(largest))))
        constants = {"multiplier": np.round(gain * 2**shift).astype(np.int32), "offset": np.round(offset * 2**shift).astype(np.int32)}
        return constants, {"shift": shift}


# --------------------------------------------------------------- numbers


def _fixed(ratio: float) -> tuple[int, int]:
    """Ratio = multiplier / 2^shift, with 31 bits."""
    part, exponent = math.frexp(ratio)
    multiplier, shift = round(part * 2**31), 31 - exponent
    if multiplier == 2**31:
        multiplier, shift = 2**30, shift - 1
    if shift > 62:
        multiplier, shift = multiplier >> min(shift - 62, 31), 62
    if shift < 0:
        raise TaskError(f"a scale ratio of {ratio} has no fixed-point form; is a range 0?")
    return multiplier, shift


def _common(ratios: list[float]) -> tuple[Any, int]:
    """Multipliers of one shift, of 24 bits: what they multiply is int8, so that sums fit in 32."""
    largest = max(abs(ratio) for ratio in ratios)
    shift = max(0, min(30, 22 - math.frexp(largest)[1]))
    return np.array([round(ratio * 2**shift) for ratio in ratios], np.int32), shift


def _int32(numbers: Iterable[int]) -> Any:
    return np.array(list(numbers), np.int32)


def _uint8(numbers: Iterable[int]) -> Any:
    return np.array(list(numbers), np.uint8)


def _raw_type(dtype: str, name: str) -> str:
    found = {"uint8": "uint8", "int8": "int8", "int16": "int32", "int32": "int32", "int64": "int32", "bool": "uint8"}.get(dtype)
    if found is None:
        if not dtype.startswith(("float", "bfloat")):
            raise TaskError(f"input {name!r} is of type {dtype}, which has no raw form; give numbers or ids")
        return "float32"
    return found


def _fake(value: Tensor, scale: float, low: int, high: int) -> Tensor:
    """Rounded to int8 steps; the gradient passes where nothing was cut off."""
    inside = value.clamp(low * scale, high * scale)
    with torch.no_grad():
        steps = torch.floor(inside / scale + 0.5).clamp(low, high) * scale
    return inside + (steps - inside).detach()


# ----------------------------------------------------------- float layers

_Weighs = Callable[[Layer, Tensor], Tensor]


def _bounded(layer: Layer, value: Tensor) -> Tensor:
    low, high = layer.options.get("bounds", (-math.inf, math.inf))
    if low == 0 and high == math.inf:
        return value.relu()
    return value if (low, high) == (-math.inf, math.inf) else value.clamp(low, high)


def _quantize(network: QuantizedNetwork, layer: Layer, weigh: _Weighs, x: Tensor) -> Tensor:
    tensors = network.weights(layer)
    shape = (-1, *[1] * (x.dim() - 2))
    dtype = network.ranges.dtype
    scale, offset = (getattr(tensors, name).to(dtype).view(shape) for name in ("scale", "offset"))
    made: Tensor = x.to(network.ranges.device, dtype) * scale + offset
    return made


def _conv(network: QuantizedNetwork, layer: Layer, weigh: _Weighs, x: Tensor) -> Tensor:
    tensors, options = network.weights(layer), layer.options
    top, left, bottom, right = options["padding"]
    even = top == bottom and left == right
    x = x if even else nn.functional.pad(x, (left, right, top, bottom))
    padding = (top, left) if even else (0, 0)
    weight = weigh(layer, tensors.weight)
    stride, dilation = tuple(options["stride"]), tuple(options["dilation"])
    return _bounded(layer, nn.functional.conv2d(x, weight, tensors.bias, stride, padding, dilation, options["groups"]))


def _linear(network: QuantizedNetwork, layer: Layer, weigh: _Weighs, x: Tensor) -> Tensor:
    tensors = network.weights(layer)
    return _bounded(layer, nn.functional.linear(x, weigh(layer, tensors.weight), tensors.bias))


def _add(network: QuantizedNetwork, layer: Layer, weigh: _Weighs, a: Tensor, b: Tensor) -> Tensor:
    first, second = layer.options["coefficients"]
    return _bounded(layer, a * first + b * second)


def _maximum(network: QuantizedNetwork, layer: Layer, weigh: _Weighs, x: Tensor) -> Tensor:
    options = layer.options
    top, left, bottom, right = options["padding"]
    need = [
        max(0, (layer.shape[1 + axis] - 1) * options["stride"][axis] + (options["kernel"][axis] - 1) * options["dilation"][axis] + 1)
        for axis in (0, 1)
    ]
    bottom, right = max(bottom, need[0] - x.shape[2] - top), max(right, need[1] - x.shape[3] - left)
    if top or left or bottom or right:
        x = nn.functional.pad(x, (left, right, top, bottom), value=-torch.inf)
    return nn.functional.max_pool2d(x, options["kernel"], options["stride"], 0, options["dilation"])[
        :, :, : layer.shape[1], : layer.shape[2]
    ]


def _average(network: QuantizedNetwork, layer: Layer, weigh: _Weighs, x: Tensor) -> Tensor:
    options = layer.options
    up, aside = options["padding"][:2]
    return nn.functional.avg_pool2d(x, options["kernel"], options["stride"], (up, aside), divisor_override=options["divisor"])


def _reduce(network: QuantizedNetwork, layer: Layer, weigh: _Weighs, x: Tensor) -> Tensor:
    parts = x.reshape(len(x), layer.options["outer"], layer.options["size"], layer.options["inner"])
    return parts.amax(2) if layer.options["how"] == "max" else parts.mean(2)


def _rnn(network: QuantizedNetwork, layer: Layer, weigh: _Weighs, x: Tensor) -> Tensor:
    tensors = network.weights(layer)
    weight = weigh(layer, tensors.weight)
    hidden, states = len(weight), []
    state = x.new_zeros(len(x), hidden)
    for step in x.unbind(1):
        sums = torch.cat((step, state), 1) @ weight.t() + tensors.bias
        state = sums.tanh() if layer.options["tanh"] else _bounded(layer, sums.relu())
        states.append(state)
    return state if layer.options["last"] else torch.stack(states, 1)


def _embedding(network: QuantizedNetwork, layer: Layer, weigh: _Weighs, ids: Tensor) -> Tensor:
    places = torch.tensor(layer.options["source"], device=ids.device)
    return nn.functional.embedding(ids.flatten(1)[:, places], network.weights(layer).table)


_FLOATS: dict[str, Callable[..., Tensor]] = {
    "quantize": _quantize,
    "conv": _conv,
    "linear": _linear,
    "add": _add,
    "concat": lambda network, layer, weigh, *given: torch.cat(given, 1 + layer.options["axis"]),
    "maximum": _maximum,
    "average": _average,
    "reduce": _reduce,
    "table": lambda network, layer, weigh, x: layer.options["function"](x),
    "clamp": lambda network, layer, weigh, x: _bounded(layer, x),
    "rnn": _rnn,
    "embedding": _embedding,
    "reshape": lambda network, layer, weigh, x: x,
    "permute": lambda network, layer, weigh, x: x.permute(0, *(1 + axis for axis in layer.options["order"])),
    "slice": lambda network, layer, weigh, x: x.index_select(
        1 + layer.options["axis"],
        torch.arange(
            layer.options["start"],
            layer.options["start"] + layer.options["count"] * layer.options["step"],
            layer.options["step"],
            device=x.device,
        ),
    ),
}
