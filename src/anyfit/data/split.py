"""Splits that depend on the rows alone: not on their order, the seed or the machine."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader, IterableDataset

from anyfit.data.sources import Source, pixels_of
from anyfit.errors import DataError
from anyfit.tree import first_tensor, map_tensors

__all__ = ["by_column", "by_fraction", "read_splits", "row_hashes", "take_fraction"]

UInt64 = np.ndarray[Any, np.dtype[np.uint64]]


def _mix(values: UInt64) -> UInt64:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _column_hashes(column: pa.ChunkedArray) -> UInt64:
    """(rows,) hashes of one column's values."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        pixels = pixels_of(column).reshape(len(column), -1)
        weights = _mix(np.arange(pixels.shape[1], dtype=np.uint64)) | np.uint64(1)
        parts = [
            (block.astype(np.uint64) * weights).sum(1, dtype=np.uint64) for block in np.array_split(pixels, max(1, len(pixels) // 4096))
        ]
        return _mix(np.concatenate(parts))
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
        numbers = pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy()
        return _mix(np.where(numbers == 0, 0.0, numbers).view(np.uint64))  # -0.0 is 0.0
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
        total = total + _mix(_column_hashes(table[name]) ^ np.uint64(salt))
    return _mix(total)


def chosen(hashes: UInt64, fraction: float, salt: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(rows,) which rows fall into a split that takes `fraction`; at least one falls on each side."""
    if not 0.0 < fraction < 1.0:
        raise DataError(f"fraction (={fraction}) of a split must be between 0 and 1")
    if len(np.unique(hashes)) < 2:
        raise DataError(f"the rows cannot be split by fraction (={fraction}): they are all equal, or of one group; give separate files")
    key = int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "big")
    order = _mix(hashes ^ np.uint64(key))
    mask: np.ndarray[Any, np.dtype[np.bool_]] = order < np.uint64(int(fraction * 2**64))
    if not mask.any():
        mask = order == order.min()
    if mask.all():
        mask = order != order.max()
    return mask


def by_fraction(table: pa.Table, fraction: float, *, group: str | None = None, salt: str = "validation") -> tuple[pa.Table, pa.Table]:
    """-> the rest and the chosen part, by a hash of the row or of its group."""
    mask = chosen(row_hashes(table, None if group is None else [group]), fraction, salt)
    return table.filter(pa.array(~mask)), table.filter(pa.array(mask))


def by_column(table: pa.Table, column: str) -> dict[str, pa.Table]:
    """One table for each of train, validation and test, as a column says; the column is dropped."""
    known = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}
    words = table[column].cast(pa.string())
    result: dict[str, list[pa.Table]] = {}
    for word in words.unique().to_pylist():
        if str(word).lower() not in known:
            raise DataError(f"split column {column!r} holds {word!r}; its values must be train, validation or test")
        part = table.filter(pc.equal(words, word)).drop_columns([column])
        result.setdefault(known[str(word).lower()], []).append(part)
    if "train" not in result:
        raise DataError(f"split column {column!r} has no row that says train")
    return {split: pa.concat_tables(parts) for split, parts in result.items()}


class Part:
    """Some rows of a torch Dataset, with what it says about lengths and epochs."""

    def __init__(self, dataset: Any, indices: np.ndarray[Any, Any]) -> None:
        self.dataset, self.indices = dataset, indices.tolist()
        if hasattr(dataset, "lengths"):
            self.lengths = [int(dataset.lengths[index]) for index in self.indices]
        if hasattr(dataset, "set_epoch"):
            self.set_epoch = dataset.set_epoch
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = lambda indices: dataset.__getitems__([self.indices[index] for index in indices])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


def take_fraction(rows: Any, fraction: float, *, group: str | None, salt: str) -> tuple[Any, Any]:
    """-> the rest and the chosen part of any rows: tables by their values, others by their index."""
    if isinstance(rows, pa.Table):
        return by_fraction(rows, fraction, group=group, salt=salt)
    if group is not None:
        raise DataError(f"group (={group!r}) needs a table; these rows have no columns")
    if isinstance(rows, DataLoader | IterableDataset):
        raise DataError(
            "a stream or a DataLoader with its own sampler cannot be split by fraction; give validation and test data of their own"
        )
    tensors = isinstance(rows, tuple | Mapping)
    count = int(first_tensor(rows).shape[0]) if tensors else len(rows)
    mask = chosen(np.arange(count, dtype=np.uint64), fraction, salt)
    if not tensors:
        return Part(rows, np.nonzero(~mask)[0]), Part(rows, np.nonzero(mask)[0])
    rest, part = torch.from_numpy(~mask), torch.from_numpy(mask)
    return map_tensors(lambda t: t[rest.to(t.device)], rows), map_tensors(lambda t: t[part.to(t.device)], rows)


def read_splits(source: Source, validation: Any, test: Any, *, wants_validation: bool) -> dict[str, Any]:
    """Rows of train, validation and test. `validation` and `test` are a fraction of the training rows, a source, or None."""
    parts = source.read()
    if source.split is not None:
        if not isinstance(parts["train"], pa.Table):
            raise DataError(f"split (={source.split!r}) needs a table; these rows have no columns")
        parts = {**parts, **by_column(parts["train"], source.split)}
    for name, given in (("test", test), ("validation", validation)):
        if isinstance(given, bool):
            raise DataError(f"{name} (={given}) must be a fraction, a source or None")
        if isinstance(given, int | float):
            parts["train"], parts[name] = take_fraction(parts["train"], float(given), group=source.group, salt=name)
        elif given is not None:
            other = given if isinstance(given, Source) else dataclasses.replace(source, origin=given, group=None, split=None, ignore=())
            read = other.read()
            parts[name] = read.get("test", read["train"]) if name == "test" else read["train"]
    if wants_validation and "validation" not in parts:
        parts["train"], parts["validation"] = take_fraction(parts["train"], 0.1, group=source.group, salt="validation")
    return parts
