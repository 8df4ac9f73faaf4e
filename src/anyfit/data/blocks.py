"""Rows that are larger than memory: one Arrow file on disk in even blocks, read block by block and never mapped.

(Pages of a mapped file count as resident memory, and taking rows from many mapped chunks touches all of them.)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from anyfit.data.files import Wider
from anyfit.errors import DataError, StorageError
from anyfit.values import atomic, digest, parse, write_json

__all__ = ["Blocks", "Reader", "cache_folder", "hold"]

BLOCK_BYTES = 8 << 20
HOLD_BYTES = 128 << 20  # a source of more bytes than that goes to disk
SAMPLE_ROWS = 100_000  # that names and types are inferred from


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
        with pa.OSFile(str(self.path)) as file:
            batch = pa.ipc.open_file(file).get_batch(index)
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
        return pa.concat_tables(tables).slice(0, rows)

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


def hold(reader: Reader, name: str, limit: int = HOLD_BYTES) -> pa.Table | Blocks:
    """All rows of a reader: a table where they fit into `limit` bytes, else an Arrow file that is made once."""
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
    return cache_folder() / f"{digest(['blocks', 1, BLOCK_BYTES, identity])[:32]}.arrow"


def _found(place: Path) -> Blocks | None:
    """What an earlier run left there."""
    about = place.with_suffix(".json")
    if not (place.exists() and about.exists()):
        return None
    told = parse(about.read_bytes(), str(about))
    if told["bytes"] != place.stat().st_size:
        return None
    with pa.OSFile(str(place)) as file:
        schema = pa.ipc.open_file(file).schema
    return Blocks(place, tuple(told["sizes"]), schema, told["sha256"])


def _spilled(batches: list[pa.RecordBatch], source: Iterator[pa.RecordBatch], place: Path | None) -> Blocks:
    """What was read so far and all that follows, in blocks of even size."""

    def everything() -> Iterator[pa.RecordBatch]:
        while batches:
            yield batches.pop(0)
        yield from source

    owner = None
    if place is None:  # nobody could find it again
        place, owner = Path(tempfile.mkdtemp(prefix="anyfit-")) / "rows.arrow", _Owner()
        weakref.finalize(owner, shutil.rmtree, place.parent, True)
    try:
        with atomic(place) as temporary:
            sizes, schema, sha256 = _write(temporary, everything())
        about = {"sizes": sizes, "sha256": sha256, "bytes": place.stat().st_size}
        write_json(place.with_suffix(".json"), about)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, pa.ArrowInvalid | pa.ArrowNotImplementedError):
            raise
        raise StorageError(f"cannot write {place}: {error}; free some space or set ANYFIT_CACHE to another folder") from error
    return Blocks(place, tuple(sizes), schema, sha256, _owner=owner)


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


def _write(path: Path, batches: Iterator[pa.RecordBatch]) -> tuple[list[int], pa.Schema, str]:
    sizes: list[int] = []
    waiting: list[pa.RecordBatch] = []
    rows, per_block = 0, 0
    sink, writer, schema = _Hashed(path), None, None
    try:
        for batch in batches:
            if writer is None:
                schema = batch.schema
                writer = pa.ipc.new_file(pa.PythonFile(sink, "w"), schema)
                per_block = max(1, BLOCK_BYTES * batch.num_rows // max(1, batch.nbytes))
            waiting.append(batch)
            rows += batch.num_rows
            while rows >= per_block:
                table = pa.Table.from_batches(waiting)
                block = table.slice(0, per_block).combine_chunks()
                writer.write_batch(block.to_batches()[0])
                sizes.append(per_block)
                rows -= per_block
                waiting = table.slice(per_block).to_batches()
        assert writer is not None and schema is not None
        if rows:
            writer.write_batch(pa.Table.from_batches(waiting).combine_chunks().to_batches()[0])
            sizes.append(rows)
        writer.close()
    finally:
        sink.close()
    return sizes, schema, sink.hasher.hexdigest()
