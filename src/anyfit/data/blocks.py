"""Rows that are larger than memory: one Arrow file on disk in even blocks, read block by block and never mapped.

(Pages of a mapped file count as resident memory, and taking rows from many mapped chunks touches all of them.)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from anyfit.data.files import NUMBER, Wider
from anyfit.errors import DataError, InputError, StorageError
from anyfit.values import atomic, canonical, digest, parse, write_json

__all__ = ["ALMOST", "ODD", "Blocks", "Reader", "cache_folder", "hold", "odd_of", "with_odd"]

BLOCK_BYTES = 8 << 20
HOLD_BYTES = 128 << 20  # a source of more bytes than that goes to disk
SAMPLE_ROWS = 100_000  # that names and types are inferred from
STALE_S = 86400  # what a killed process left half-written; who still writes does so more often
ALMOST = 0.98  # a column of words of which at least so many are numbers is a column of numbers with words for "missing" in it
ODD = b"odd"  # in the metadata of such a column: a word and its row


class Reader(Protocol):
    """A source that gives its rows from the start as often as asked."""

    types: dict[str, pa.DataType]  # what a column must be read as

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows; raises Wider where a column needs another type."""

    def identity(self) -> list[Any] | None:
        """JSON that changes when the rows do; None where that cannot be told, and nothing is kept for the next time."""


@dataclass(frozen=True)
class Blocks:
    """Rows of an Arrow file, or some of them. `kept`: for each block the rows that belong, as packed bits."""

    path: Path
    sizes: tuple[int, ...]
    schema: pa.Schema
    sha256: str
    kept: tuple[np.ndarray[Any, Any], ...] | None = None
    dropped: tuple[str, ...] = ()
    odd: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # see ALMOST
    _owner: Any = field(default=None, repr=False, compare=False)  # removes a file that nobody can find again

    @property
    def num_rows(self) -> int:
        """How many rows in all."""
        return sum(self.sizes)

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return [name for name in self.schema.names if name not in self.dropped]

    def block(self, index: int) -> pa.Table:
        """The rows of one block, in memory of their own."""
        try:
            with pa.OSFile(str(self.path)) as file:
                batch = pa.ipc.open_file(file).get_batch(index)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"cannot read {self.path}: {error}; it was deleted or damaged meanwhile; start again to make it anew"
            ) from error
        table = pa.Table.from_batches([batch]).drop_columns(list(self.dropped))
        if self.kept is not None:
            mask = np.unpackbits(self.kept[index], count=table.num_rows).astype(bool)
            table = table.filter(pa.array(mask))
        return table

    def __iter__(self) -> Iterator[pa.Table]:
        for index, size in enumerate(self.sizes):
            if size:
                yield self.block(index)

    def head(self, rows: int = SAMPLE_ROWS) -> pa.Table:
        """The first rows, or a few more."""
        tables, count = [], 0
        for table in self:
            tables.append(table)
            count += table.num_rows
            if count >= rows:
                break
        return with_odd(pa.concat_tables(tables).slice(0, rows), self.odd)  # beyond these rows, perhaps

    def where(self, mask_of: Callable[[pa.Table], np.ndarray[Any, Any]], what: Any, dropped: Sequence[str] = ()) -> Blocks:
        """The rows that `mask_of` (a block -> a mask) keeps; `what` tells this part from others in fingerprints."""
        kept, sizes = [], []
        for index, size in enumerate(self.sizes):
            before = np.ones(size, dtype=bool)
            if self.kept is not None:
                before = np.unpackbits(self.kept[index]).astype(bool)
            mask = np.zeros(len(before), dtype=bool)
            if size:
                mask[np.nonzero(before)[0]] = mask_of(self.block(index))
            kept.append(np.packbits(mask))
            sizes.append(int(mask.sum()))
        if not sum(sizes):
            raise DataError(f"a split of {self.path.name} has no row ({what}); give separate files")
        sha256 = digest([self.sha256, what])
        return replace(self, sizes=tuple(sizes), kept=tuple(kept), sha256=sha256, dropped=(*self.dropped, *dropped))


def hold(reader: Reader, name: str, limit: int | None = None) -> pa.Table | Blocks:
    """All rows of a reader: a table where they fit into `limit` bytes (None: HOLD_BYTES), else an Arrow file that is made once."""
    limit = HOLD_BYTES if limit is None else limit
    identity = reader.identity()
    place = None if identity is None else _place(identity)
    if place is not None and (found := _found(place)) is not None:
        return found
    while True:
        try:
            return _hold(reader, name, limit, place)
        except Wider as change:
            if change.column:
                if reader.types.get(change.column) == change.type:
                    raise DataError(f"column {change.column!r} of {name} cannot be read as {change.type}") from change
                reader.types[change.column] = change.type


def _hold(reader: Reader, name: str, limit: int, place: Path | None) -> pa.Table | Blocks:
    batches, size, source = [], 0, reader.batches()
    for batch in source:
        batches.append(batch)
        size += batch.nbytes
        if size > limit:
            return _spilled(batches, source, place)
    if not batches:
        raise DataError(f"data (={name!r}) has no rows; give a source with at least one")
    return pa.Table.from_batches(batches).combine_chunks()


def cache_folder() -> Path:
    """Where what was read once is kept: ANYFIT_CACHE, or anyfit in the user's cache folder. It can be deleted at any time."""
    base = os.environ.get("ANYFIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anyfit"
    return Path(base)


def _place(identity: list[Any]) -> Path:
    return cache_folder() / f"{digest(['blocks', 2, BLOCK_BYTES, identity])[:32]}.arrow"


def _found(place: Path) -> Blocks | None:
    """What an earlier run left there, where it is whole."""
    about = place.with_suffix(".json")
    try:
        told = parse(about.read_bytes(), str(about))
        with place.open("rb") as rows:
            if hashlib.file_digest(rows, "sha256").hexdigest() != told["sha256"]:
                return None
        with pa.OSFile(str(place)) as file:
            reader = pa.ipc.open_file(file)
            if reader.num_record_batches != len(told["sizes"]):
                return None
        odd = {name: (str(word), int(row)) for name, (word, row) in told["odd"].items()}
        return Blocks(place, tuple(map(int, told["sizes"])), reader.schema, told["sha256"], odd=odd)
    except (OSError, InputError, KeyError, TypeError, ValueError, AttributeError, pa.ArrowException):
        return None  # it is made anew


def _spilled(batches: list[pa.RecordBatch], source: Iterator[pa.RecordBatch], place: Path | None) -> Blocks:
    """What was read so far and all that follows, in blocks of even size."""

    def everything() -> Iterator[pa.RecordBatch]:
        while batches:
            yield batches.pop(0)
        yield from source

    owner = None
    if place is None:  # nobody could find it again
        place, owner = _own_folder() / "rows.arrow", _Owner()
        weakref.finalize(owner, shutil.rmtree, place.parent, True)
    _sweep(place)
    try:
        with atomic(place) as temporary:
            sizes, schema, sha256, odd = _write(temporary, everything())
        write_json(place.with_suffix(".json"), {"sizes": sizes, "sha256": sha256, "odd": odd})
    except StorageError as error:
        raise StorageError(f"{error} ANYFIT_CACHE names the folder for rows that are larger than memory.") from error
    return Blocks(place, tuple(sizes), schema, sha256, odd=odd, _owner=owner)


def _own_folder() -> Path:
    base = cache_folder()
    try:
        base.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="anyfit-", dir=base))
    except OSError as error:
        raise StorageError(f"cannot write {base}: {error.strerror or error}; set ANYFIT_CACHE to another folder") from error


def _sweep(place: Path) -> None:
    """Remove what killed processes left half-written beside it."""
    for file in place.parent.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > STALE_S:
                file.unlink()


class _Owner:
    """Lives as long as any part of the rows; their folder goes with it."""


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self.file, self.hasher = path.open("wb"), hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hasher.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    @property
    def closed(self) -> bool:
        return self.file.closed


def _write(path: Path, batches: Iterator[pa.RecordBatch]) -> tuple[list[int], pa.Schema, str, dict[str, tuple[str, int]]]:
    sizes: list[int] = []
    waiting: list[pa.RecordBatch] = []
    bytes_waiting = 0
    sink, writer, schema = _Hashed(path), None, None
    words: dict[str, _Words] = {}

    def write(table: pa.Table) -> None:
        assert writer is not None
        writer.write_batch(table.combine_chunks().to_batches()[0])
        sizes.append(table.num_rows)

    try:
        for batch in batches:
            if writer is None:
                schema = batch.schema
                writer = pa.ipc.new_file(pa.PythonFile(sink, "w"), schema)
                words = {entry.name: _Words() for entry in schema if pa.types.is_string(entry.type)}
            for name, seen in words.items():
                seen.add(batch.column(name))
            waiting.append(batch)
            bytes_waiting += batch.nbytes
            while bytes_waiting >= BLOCK_BYTES and (rows := sum(part.num_rows for part in waiting)) > 1:
                table = pa.Table.from_batches(waiting)
                size = max(1, rows * BLOCK_BYTES // bytes_waiting)
                write(table.slice(0, size))
                waiting = table.slice(size).to_batches()
                bytes_waiting = sum(part.nbytes for part in waiting)
        assert writer is not None and schema is not None
        if any(part.num_rows for part in waiting):
            write(pa.Table.from_batches(waiting))
        writer.close()
    finally:
        sink.close()
    return sizes, schema, sink.hasher.hexdigest(), {name: seen.odd for name, seen in words.items() if seen.odd is not None}


def with_odd(table: pa.Table, odd: Mapping[str, tuple[str, int]]) -> pa.Table:
    """The table, in whose columns it is written which word stands among their numbers, and in which row."""
    for name, (word, row) in odd.items():
        if name in table.column_names:
            place = table.column_names.index(name)
            table = table.set_column(place, table.field(place).with_metadata({ODD: canonical([word, row])}), table.column(place))
    return table


def odd_of(table: pa.Table) -> dict[str, tuple[str, int]]:
    """The first word and its row in each column of words that are almost all numbers."""
    found = {}
    for entry in table.schema:
        if pa.types.is_string(entry.type):
            words = _Words()
            for chunk in table[entry.name].chunks:
                words.add(chunk.slice(0, 2000))  # enough to see a text
                words.add(chunk.slice(2000))
            found[entry.name] = words.odd
    return {name: odd for name, odd in found.items() if odd is not None}


class _Words:
    """Whether a column of words is one of numbers, but for a few."""

    def __init__(self) -> None:
        self.rows, self.known, self.numbers = 0, 0, 0
        self.first: tuple[str, int] | None = None

    def add(self, column: pa.Array) -> None:
        if self.known > 1000 and self.numbers < ALMOST / 2 * self.known:
            return
        numeric = pc.match_substring_regex(column, NUMBER)
        self.known += len(column) - column.null_count
        self.numbers += pc.sum(numeric).as_py() or 0
        if self.first is None and (place := pc.index(numeric, False).as_py()) >= 0:
            self.first = (column[place].as_py()[:40], self.rows + place + 1)
        self.rows += len(column)

    @property
    def odd(self) -> tuple[str, int] | None:
        """The first word and its row."""
        return self.first if self.numbers >= ALMOST * max(1, self.known) else None
