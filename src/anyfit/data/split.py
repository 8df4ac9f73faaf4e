"""Splits that depend on the rows alone: not on their order, the seed or the machine."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader, IterableDataset

from anyfit.data.hashes import UInt64, mix, row_hashes
from anyfit.data.sources import Source
from anyfit.errors import DataError
from anyfit.tree import first_tensor, map_tensors

__all__ = ["by_column", "by_fraction", "read_splits", "row_hashes", "take_fraction"]


def chosen(hashes: UInt64, fraction: float, salt: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(rows,) which rows fall into a split that takes `fraction`; at least one falls on each side."""
    if not 0.0 < fraction < 1.0:
        raise DataError(f"fraction (={fraction}) of a split must be between 0 and 1")
    if len(np.unique(hashes)) < 2:
        raise DataError(f"the rows cannot be split by fraction (={fraction}): they are all equal, or of one group; give separate files")
    key = int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "big")
    order = mix(hashes ^ np.uint64(key))
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
    """Some rows of a torch Dataset, with what it says about lengths, order and epochs."""

    def __init__(self, dataset: Any, indices: np.ndarray[Any, Any]) -> None:
        self.dataset, self.indices = dataset, indices.tolist()
        if hasattr(dataset, "lengths"):
            self.lengths = [int(dataset.lengths[index]) for index in self.indices]

    def __getattr__(self, name: str) -> Any:
        """`order` and `set_epoch` exist where the data set has them. (No closures: a part goes to worker processes.)"""
        if name not in ("order", "set_epoch"):
            raise AttributeError(name)
        found = getattr(self.dataset, name)
        return found if name == "set_epoch" else partial(self._order, found)

    def _order(self, order: Callable[[int], Sequence[int]], epoch: int) -> list[int]:
        places = {index: place for place, index in enumerate(self.indices)}
        return [places[index] for index in map(int, order(epoch)) if index in places]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """A batched fetch where the data set has one."""
        if hasattr(self.dataset, "__getitems__"):
            return list(self.dataset.__getitems__([self.indices[index] for index in indices]))
        return [self[index] for index in indices]


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
