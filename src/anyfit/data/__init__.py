"""Where rows come from and how they become batches: sources, splits, tables to tensors, windows of batches."""

from anyfit.data.batches import Batches, LoaderBatches, RowBatches, TensorBatches, Uniform, make_batches, mix_seed, taken_apart, uniform
from anyfit.data.hashes import pixels_of, row_hashes
from anyfit.data.sources import Rows, Source, fingerprint, num_rows
from anyfit.data.split import by_column, by_fraction, read_splits, take_fraction
from anyfit.data.tables import fitted, infer_schema, statistics, tensor_schema, to_tensors

__all__ = [
    "Batches",
    "LoaderBatches",
    "RowBatches",
    "Rows",
    "Source",
    "TensorBatches",
    "Uniform",
    "by_column",
    "by_fraction",
    "fingerprint",
    "fitted",
    "infer_schema",
    "make_batches",
    "mix_seed",
    "num_rows",
    "pixels_of",
    "read_splits",
    "row_hashes",
    "statistics",
    "take_fraction",
    "taken_apart",
    "tensor_schema",
    "to_tensors",
    "uniform",
]
