"""Hashes of rows by their values: the same wherever, in whatever order, chunks or encoding they stand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from anyfit.errors import DataError

__all__ = ["UInt64", "image_column", "mix", "pixels_of", "row_hashes"]

UInt64 = np.ndarray[Any, np.dtype[np.uint64]]


def pixels_of(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """(N, C, H, W) of an image column, without a copy where it is one chunk. (to_numpy_ndarray refuses some valid strides.)"""
    array = column.combine_chunks()
    if array.null_count:
        raise DataError(f"{array.null_count} images are missing; drop those rows")
    values = array.storage.flatten().to_numpy(zero_copy_only=True)
    return np.asarray(values.reshape(len(array), *column.type.shape))


def image_column(pixels: np.ndarray[Any, Any]) -> pa.Array:
    """(N, C, H, W) as a column. (from_numpy_ndarray guesses the shape from strides, which say nothing where a dimension is 1.)"""
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(pixels.dtype), pixels.shape[1:])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(pixels).reshape(-1)), int(np.prod(pixels.shape[1:])))
    return pa.ExtensionArray.from_storage(kind, storage)


def mix(values: UInt64) -> UInt64:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _column_hashes(column: pa.ChunkedArray) -> UInt64:
    """(rows,) hashes of one column's values."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        pixels = np.ascontiguousarray(pixels_of(column).reshape(len(column), -1)).view(np.uint8)
        weights = mix(np.arange(pixels.shape[1], dtype=np.uint64)) | np.uint64(1)
        parts = [
            (block.astype(np.uint64) * weights).sum(1, dtype=np.uint64) for block in np.array_split(pixels, max(1, len(pixels) // 4096))
        ]
        return mix(np.concatenate(parts))
    if pa.types.is_integer(column.type):
        whole = pc.fill_null(column, 0).to_numpy().astype(np.uint64)
        return mix(np.where(column.is_null().to_numpy(), np.uint64(0x6E756C6C), mix(whole)))
    if pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
        numbers = pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy()
        numbers = np.where(numbers == 0, 0.0, np.where(np.isnan(numbers), np.nan, numbers))  # -0.0 is 0.0, and there is one NaN
        return mix(numbers.view(np.uint64))
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        column = pa.chunked_array([pa.array([repr(value) for value in column.to_pylist()], pa.string())])
    encoded: Any = column.cast(pa.string()).combine_chunks().dictionary_encode(null_encoding="encode")
    words = [b"\0" if word is None else str(word).encode() for word in encoded.dictionary.to_pylist()]
    hashes = np.array([int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "big") for word in words], dtype=np.uint64)
    result: UInt64 = hashes[encoded.indices.to_numpy()]
    return result


def row_hashes(table: pa.Table, columns: Sequence[str] | None = None) -> UInt64:
    """(rows,) hash of each row's values in `columns`; equal rows have equal hashes, wherever and in whatever order they stand."""
    total = np.zeros(table.num_rows, dtype=np.uint64)
    for name in sorted(columns or table.column_names):
        salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
        total = total + mix(_column_hashes(table[name]) ^ np.uint64(salt))
    return mix(total)
