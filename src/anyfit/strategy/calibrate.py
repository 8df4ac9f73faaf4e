"""Calibration of a quantized network over sites: histograms of magnitudes add up, and their highest bins are the ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from anyfit.errors import InputError, TaskError
from anyfit.program import BINS, QuantizedNetwork, magnitudes, ranges_of
from anyfit.strategy.base import WEIGHTS, Server, Strategy
from anyfit.tree import first_tensor
from anyfit.update import WIDE, Layout, Update

if TYPE_CHECKING:
    from anyfit.guard import Shapes
    from anyfit.worker import Turn

__all__ = ["Calibrate"]

RANGES = "ranges"


@dataclass(frozen=True, kw_only=True)
class Calibrate(Strategy):
    """Ranges of int8 values in one round: each site sends how many of its activations have which magnitude, for `rows` of its rows."""

    trains: ClassVar[bool] = False
    rows: int = 2000

    def sends(self, layout: Layout) -> Shapes:
        if RANGES not in layout.shapes:
            raise InputError("Calibrate measures the ranges of a quantized network, which this task does not have; give a Quantized task")
        (channels,) = layout.shapes[RANGES]
        return {WEIGHTS: {"histograms": (channels, BINS)}}

    def local(self, turn: Turn) -> Update:
        model = turn.model.eval()
        if not isinstance(model, QuantizedNetwork):
            raise TaskError(f"{type(turn.task).__name__} builds a {type(model).__name__}, not a quantized network; give a Quantized task")
        total = torch.zeros(len(model.ranges), BINS, dtype=torch.float64)
        seen = 0
        with torch.no_grad():
            for batch in turn.batches:
                total += magnitudes(model, batch)
                seen += first_tensor(batch).shape[0]
                if seen >= self.rows:
                    break
        return Update.of(WEIGHTS, {"histograms": total}, turn.rows, WIDE)

    def finish(self, server: Server, total: Update) -> Tensor:
        found = ranges_of(total.groups[WEIGHTS].decoded()["histograms"])
        parts = dict(zip(server.layout.shapes, server.layout.views(server.weights.clone()), strict=True))
        parts[RANGES] = found.to(server.weights.dtype)
        return torch.cat([part.reshape(-1) for part in parts.values()])
