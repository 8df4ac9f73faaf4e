"""Ranges of a network's values from histograms of magnitudes, which add up over batches and sites; and channels brought to one range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyfit.errors import DataError
from anyfit.program.lower import FILTERS, Layer
from anyfit.program.network import QuantizedNetwork

__all__ = ["BINS", "equalize", "magnitudes", "ranges_of"]

BINS, FIRST, PER_OCTAVE = 1536, -48, 16  # from 2^-48 to 2^48, each 4.4 % wide
WIDEST = 2.0**8  # by which a channel is scaled at most


def magnitudes(network: QuantizedNetwork, batch: Any) -> Tensor:
    """(channels of all values, BINS) how many numbers of each channel have which magnitude; zero has none."""
    values = network.float_values(batch)
    found = torch.zeros(len(network.ranges), BINS, dtype=torch.float64)
    for name, place in network.places.items():
        if not bool(torch.isfinite(values[name]).all()):
            raise DataError(f"{name!r} is not finite (NaN or infinite) on the rows that ranges are measured on; leave such rows out")
        channels = place.stop - place.start
        rows = values[name].detach().abs().double().cpu().reshape(values[name].shape[0], channels, -1).transpose(0, 1).reshape(channels, -1)
        bins = ((torch.log2(rows.clamp(min=2.0 ** (FIRST - 1))) - FIRST) * PER_OCTAVE).floor().clamp(0, BINS - 1).long()
        found[place].scatter_add_(1, bins, (rows > 0).double())
    return found


def ranges_of(histograms: Tensor) -> Tensor:
    """(channels,) the upper edge of the highest bin that holds something: nothing is cut off. 0 where all was zero."""
    highest = torch.where(histograms > 0, torch.arange(1, BINS + 1, dtype=torch.float64), 0.0).amax(1)
    return torch.where(highest > 0, torch.exp2(highest / PER_OCTAVE + FIRST), 0.0)


def equalize(network: QuantizedNetwork) -> int:
    """Scale channels between two layers so that each uses int8 as well as its neighbours; what the network computes stays the same, because
    what stands between scales with its input (Nagel et al. 2019). How many pairs of layers there were.
    """
    pairs = list(_pairs(network))
    with torch.no_grad():
        for first, values, second in pairs * 2:
            _equalized(network, first, values, second)
    return len(pairs)


def _pairs(network: QuantizedNetwork) -> Any:
    """Layers of filters, the values between them, and the layer of filters that alone takes them in."""
    users: dict[str, list[Layer]] = {}
    for layer in network.plan.layers:
        for name in layer.inputs:
            users.setdefault(name, []).append(layer)
    for first in network.plan.layers:
        low, high = first.options.get("bounds", (-float("inf"), float("inf")))
        if first.kind not in FILTERS or low not in (0.0, -float("inf")) or high != float("inf"):
            continue
        if first.kind == "linear" and len(first.shape) != 1:
            continue
        values, at = [first.output], first
        while len(following := users.get(at.output, [])) == 1:
            at = following[0]
            if at.kind in FILTERS:
                if at.kind == "conv" or len(at.shape) == 1:  # a linear layer on rows sums over another dimension
                    yield first, values, at
                break
            scaling = at.kind in ("maximum", "average") or (at.kind == "reshape" and _keeps_channels(first, at))
            scaling = scaling or (at.kind == "reduce" and at.options["outer"] == first.shape[0] and at.options["inner"] == 1)
            if not scaling:
                break
            values.append(at.output)


def _keeps_channels(first: Layer, layer: Layer) -> bool:
    return bool(layer.shape) and layer.shape[0] % first.shape[0] == 0


def _equalized(network: QuantizedNetwork, first: Layer, values: list[str], second: Layer) -> None:
    before, after = network.weights(first), network.weights(second)
    channels = len(before.weight)
    seen = network.ranges[network.places[values[0]]].double()
    depthwise = second.kind == "conv" and second.options["groups"] > 1
    if depthwise and second.options["groups"] != channels:
        return
    if depthwise:  # each filter has a scale of its own, so that it takes any factor without loss
        factor = seen
        columns = None
    else:
        columns = after.weight.reshape(len(after.weight), channels, -1)
        factor = (seen / columns.abs().amax((0, 2)).double().clamp(min=1e-12)).sqrt()
    alive = seen > 0
    if not bool(alive.any()):
        return
    factor = torch.where(alive, factor, 0.0)
    factor = torch.where(alive, factor / factor.max(), 1.0).clamp(min=1 / WIDEST).to(before.weight.dtype)
    before.weight.div_(factor.view(-1, *[1] * (before.weight.dim() - 1)))
    before.bias.div_(factor)
    if columns is None:
        repeats = len(after.weight) // channels
        after.weight.mul_(factor.repeat_interleave(repeats).view(-1, 1, 1, 1))
    else:
        after.weight.copy_((columns * factor.view(1, -1, 1)).reshape(after.weight.shape))
    for name in values:
        place = network.places.get(name)
        if place is not None:
            width = (place.stop - place.start) // channels
            network.ranges[place].div_(factor.repeat_interleave(width))
