"""Where rows come from and how they become batches: sources, splits, tables to tensors, windows of batches."""

from anyfit.data.batches import Batches, Indexed, LoaderBatches, RowBatches, Share, TensorBatches, Uniform, mix_seed, taken_apart, uniform
from anyfit.data.blocks import Blocks
from anyfit.data.hashes import pixels_of, row_hashes
from anyfit.data.large import make_batches
from anyfit.data.partition import Partition, partition
from anyfit.data.ragged import LENGTHS, Ragged, packed
from anyfit.data.sources import Rows, Source, fingerprint, num_rows
from anyfit.data.split import by_column, by_fraction, in_tables, read_splits, take_fraction, without
from anyfit.data.stream import Stream
from anyfit.data.tables import describe, example, fitted, infer_schema, statistics, targets_of, tensor_schema, to_tensors
from anyfit.data.text import encoded, joined_texts, padding_of, tokenizer_of, trained_tokenizer, word_statistics

__all__ = [
    "LENGTHS",
    "Batches",
    "Blocks",
    "Indexed",
    "LoaderBatches",
    "Partition",
    "Ragged",
    "RowBatches",
    "Rows",
    "Share",
    "Source",
    "Stream",
    "TensorBatches",
    "Uniform",
    "by_column",
    "by_fraction",
    "describe",
    "encoded",
    "example",
    "fingerprint",
    "fitted",
    "in_tables",
    "infer_schema",
    "joined_texts",
    "make_batches",
    "mix_seed",
    "num_rows",
    "packed",
    "padding_of",
    "partition",
    "pixels_of",
    "read_splits",
    "row_hashes",
    "statistics",
    "take_fraction",
    "taken_apart",
    "targets_of",
    "tensor_schema",
    "to_tensors",
    "tokenizer_of",
    "trained_tokenizer",
    "uniform",
    "without",
    "word_statistics",
]
