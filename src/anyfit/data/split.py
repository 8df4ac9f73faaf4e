"""Splits that depend on the rows alone: not on their order, the seed or the machine."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader, IterableDataset

from anyfit.data.blocks import Blocks
from anyfit.data.folders import SPLITS
from anyfit.data.hashes import UInt64, mix, row_hashes
from anyfit.data.sources import Source
from anyfit.data.stream import Stream
from anyfit.errors import DataError
from anyfit.tree import first_tensor, map_tensors
from anyfit.values import digest

__all__ = ["by_column", "by_fraction", "in_tables", "read_splits", "take_fraction", "without"]


def chosen(hashes: UInt64, fraction: float, salt: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(rows,) which rows fall into a split that takes `fraction`; at least one falls on each side."""
    if not 0.0 < fraction < 1.0:
        raise DataError(f"fraction (={fraction}) of a split must be between 0 and 1")
    if len(np.unique(hashes)) < 2:
        raise DataError(f"the rows cannot be split by fraction (={fraction}): they are all equal, or of one group; give separate files")
    mask, order = _below(hashes, fraction, salt), _order(hashes, salt)
    if not mask.any():
        mask = order == order.min()
    if mask.all():
        mask = order != order.max()
    return mask


def _order(hashes: UInt64, salt: str) -> UInt64:
    key = int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "big")
    return mix(hashes ^ np.uint64(key))


def _below(hashes: UInt64, fraction: float, salt: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    mask: np.ndarray[Any, np.dtype[np.bool_]] = _order(hashes, salt) < _limit(fraction)
    return mask


def _limit(fraction: float) -> np.uint64:
    return np.uint64(int(fraction * 2**64))


def by_fraction(table: pa.Table, fraction: float, *, group: str | None = None, salt: str = "validation") -> tuple[pa.Table, pa.Table]:
    """-> the rest and the chosen part, by a hash of the row or of its group."""
    mask = chosen(row_hashes(table, None if group is None else [group]), fraction, salt)
    return table.filter(pa.array(~mask)), table.filter(pa.array(mask))


def _blocks_by_fraction(rows: Blocks, fraction: float, group: str | None, salt: str) -> tuple[Blocks, Blocks]:
    """As `by_fraction`, block by block."""
    if not 0.0 < fraction < 1.0:
        raise DataError(f"fraction (={fraction}) of a split must be between 0 and 1")

    def order_of(table: pa.Table) -> UInt64:
        return _order(row_hashes(table, None if group is None else [group]), salt)

    extremes = [(order.min(), order.max()) for order in map(order_of, rows)]
    lowest, highest = min(low for low, _ in extremes), max(high for _, high in extremes)
    if lowest == highest:
        raise DataError(f"the rows cannot be split by fraction (={fraction}): they are all equal, or of one group; give separate files")
    limit = min(max(_limit(fraction), lowest + np.uint64(1)), highest)  # one falls on each side, the same as in memory

    def part(inside: bool) -> Blocks:
        def mask_of(table: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
            return np.asarray((order_of(table) < limit) == inside)

        return rows.where(mask_of, [salt, fraction, group, inside])

    return part(False), part(True)


def _blocks_by_column(rows: Blocks, column: str) -> dict[str, Blocks]:
    words = sorted({str(word).lower() for table in rows for word in pc.unique(table[column].cast(pa.string())).to_pylist()})
    result: dict[str, Blocks] = {}
    splits = sorted({_split_of(word, column) for word in words})
    if "train" not in splits:
        raise DataError(f"split column {column!r} has no row that says train")
    for split in splits:

        def mask_of(table: pa.Table, split: str = split) -> np.ndarray[Any, np.dtype[np.bool_]]:
            return np.array([SPLITS[str(word).lower()] == split for word in table[column].cast(pa.string()).to_pylist()])

        result[split] = rows.where(mask_of, [column, split], dropped=[column])
    return result


def _split_of(word: str, column: str) -> str:
    if word.lower() not in SPLITS:
        raise DataError(f"split column {column!r} holds {word!r}; its values must be train, validation or test")
    return SPLITS[word.lower()]


def in_tables(rows: Any) -> Iterator[pa.Table]:
    """The rows as one table or several, none of which is too large; nothing for rows that are no table. A stream gives its first."""
    if isinstance(rows, pa.Table):
        yield rows
    elif isinstance(rows, Blocks):
        yield from rows
    elif isinstance(rows, Stream):
        yield rows.first()


def without(rows: Any, columns: Sequence[str]) -> Any:
    """Tables without some columns, where they have them."""
    if isinstance(rows, Blocks):
        found = [name for name in columns if name in rows.column_names]
        return dataclasses.replace(rows, dropped=(*rows.dropped, *found), sha256=digest([rows.sha256, found])) if found else rows
    return rows.drop_columns([name for name in columns if name in rows.column_names]) if isinstance(rows, pa.Table) else rows


def by_column(table: pa.Table, column: str) -> dict[str, pa.Table]:
    """One table for each of train, validation and test, as a column says; the column is dropped."""
    words = table[column].cast(pa.string())
    result: dict[str, list[pa.Table]] = {}
    for word in words.unique().to_pylist():
        split = _split_of(str(word), column)
        result.setdefault(split, []).append(table.filter(pc.equal(words, word)).drop_columns([column]))
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
            fetched: list[Any] = self.dataset.__getitems__([self.indices[index] for index in indices])  # or a batch, where it makes them
            return fetched
        return [self[index] for index in indices]


def take_fraction(rows: Any, fraction: float, *, group: str | None, salt: str) -> tuple[Any, Any]:
    """-> the rest and the chosen part of any rows: tables by their values, others by their index."""
    if isinstance(rows, pa.Table):
        return by_fraction(rows, fraction, group=group, salt=salt)
    if isinstance(rows, Blocks):
        return _blocks_by_fraction(rows, fraction, group, salt)
    if group is not None:
        raise DataError(f"group (={group!r}) needs a table; these rows have no columns")
    if isinstance(rows, DataLoader | IterableDataset | Stream):
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
        rows = parts["train"]
        if not isinstance(rows, pa.Table | Blocks):
            raise DataError(f"split (={source.split!r}) needs a table; these rows have no columns")
        parts = {**parts, **(by_column(rows, source.split) if isinstance(rows, pa.Table) else _blocks_by_column(rows, source.split))}
    for name, given in (("test", test), ("validation", validation)):
        if isinstance(given, bool):
            raise DataError(f"{name} (={given}) must be a fraction, a source or None")
        if isinstance(given, int | float):
            parts["train"], parts[name] = take_fraction(parts["train"], float(given), group=source.group, salt=name)
        elif given is not None:
            other = (
                given
                if isinstance(given, Source)
                else dataclasses.replace(source, origin=given, group=None, split=None, ignore=(), weight=None, table=None, query=None)
            )
            read = other.read()
            parts[name] = read.get("test", read["train"]) if name == "test" else read["train"]
    if wants_validation and "validation" not in parts:
        parts["train"], parts["validation"] = take_fraction(parts["train"], 0.1, group=source.group, salt="validation")
    return parts
