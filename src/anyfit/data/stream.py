"""Rows that come one by one: no length, no permutation, but a seeded shuffle buffer whose order a resume repeats exactly."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from anyfit.errors import DataError

__all__ = ["Stream"]

Row = Mapping[str, Any]
HEAD_ROWS = 10_000


@dataclass(frozen=True)
class Stream:
    """Rows (dicts), tables or record batches from `rows`: a function that starts anew at each call, or something iterable again.

    `buffer` rows are held and each step draws from them. `head` rows from the start tell names, types and preprocessing.
    A resume reads again from the start of the epoch up to where it was, so the source must give the same rows in the same order.
    """

    rows: Callable[[], Iterable[Any]] | Iterable[Any]
    buffer: int = 1000
    head: int = HEAD_ROWS
    _first: Any = field(default=None, init=False, repr=False, compare=False)  # types, statistics and columns all ask for it
    _last: Any = field(default=None, init=False, repr=False, compare=False)  # a reference: the place of a dead one may be taken again

    def __post_init__(self) -> None:
        if isinstance(self.rows, Iterator):
            raise DataError(
                f"rows (a {type(self.rows).__name__}) can be read once only, and each epoch and each resume reads from the start; "
                "give the function that makes it: Stream(make_rows)"
            )
        for name in ("buffer", "head"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} (={getattr(self, name)}) must be at least 1")

    @property
    def sha256(self) -> str:
        """Of the first rows: all that can be told without reading everything."""
        return hashlib.sha256(repr(list(itertools.islice(self, 3))).encode()).hexdigest()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        source = self.rows() if callable(self.rows) else self.rows
        if isinstance(source, Iterator):
            if source is self._last:
                raise DataError(
                    f"rows gave the same {type(source).__name__} twice, which can be read once only; let the function make a new one at each call"
                )
            object.__setattr__(self, "_last", source)
        for item in source:
            if isinstance(item, pa.Table | pa.RecordBatch):
                yield from item.to_pylist()
            elif isinstance(item, Mapping):
                yield dict(item)
            else:
                raise DataError(f"a stream gave a {type(item).__name__}; it must give rows as dicts, or pyarrow tables")

    def shuffled(self, seed: int) -> Iterator[dict[str, Any]]:
        """All rows once, each drawn from the buffer; the same seed gives the same order."""
        generator = torch.Generator().manual_seed(seed)
        held: list[dict[str, Any]] = []
        for row in self:
            if len(held) < self.buffer:
                held.append(row)
                continue
            place = int(torch.randint(self.buffer, (), generator=generator))
            chosen, held[place] = held[place], row
            yield chosen
        for place in torch.randperm(len(held), generator=generator).tolist():
            yield held[place]

    def table(self, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> pa.Table:
        """Rows as a table, in the types of `schema`; else with every column that one of them has."""
        names = list(dict.fromkeys(name for row in rows for name in row)) if schema is None else schema.names
        columns = []
        for name in names:
            values = [row.get(name) for row in rows]
            try:
                kind = None if schema is None else schema.field(name).type
                whole = kind is not None and pa.types.is_integer(kind)  # told of the type, pyarrow cuts 2.5 to 2 in silence
                columns.append(pa.array(values).cast(kind) if whole else pa.array(values, kind))
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
                what = "" if schema is None else f" ({schema.field(name).type} by the first {self.head} rows; raise head, or give one type)"
                raise DataError(f"column {name!r} of a stream holds what does not fit it{what}: {error}") from error
        return pa.Table.from_arrays(columns, names=names)

    def first(self) -> pa.Table:
        """The rows at the start, as a table."""
        if self._first is None:
            rows = list(itertools.islice(self, self.head))
            if not rows:
                raise DataError("the stream gave no row; give at least one")
            object.__setattr__(self, "_first", self.table(rows))
        return self._first
