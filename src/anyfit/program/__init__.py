"""A model as a device computes it: traced to a graph, lowered to layers, and as exact operations on int8 values."""

from anyfit.program.calibrate import BINS, equalize, magnitudes, ranges_of
from anyfit.program.lower import Layer, Layers, describe_row, entries_of, lower, row_of
from anyfit.program.network import QuantizedNetwork
from anyfit.program.operations import Input, Operation, Program, Result
from anyfit.program.trace import Traced, trace

__all__ = [
    "BINS",
    "Input",
    "Layer",
    "Layers",
    "Operation",
    "Program",
    "QuantizedNetwork",
    "Result",
    "Traced",
    "describe_row",
    "entries_of",
    "equalize",
    "lower",
    "magnitudes",
    "ranges_of",
    "row_of",
    "trace",
]
