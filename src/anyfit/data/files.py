"""Files as record batches: CSV, JSON lines, Parquet, Arrow and text, packed or not, several at once, from disk or an object store.

Nothing here holds a whole file. Types are those of all rows: a reader that meets a value which its type cannot hold raises
`Wider`, and whoever reads starts again with the wider type.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.json
import pyarrow.parquet

from anyfit.errors import DataError

__all__ = ["KINDS", "MISSING", "NUMBER", "Files", "Wider", "expand", "kind_of", "plain_type"]

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".feather": "arrow",
    ".arrow": "arrow",
    ".txt": "text",
}
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
BLOCK_BYTES = 4 << 20
MOST_BLOCK_BYTES = 1 << 30  # of one row: a cell may be large
BATCH_ROWS = 65536
NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"


class Wider(Exception):
    """A column holds a value that its type so far cannot hold."""

    def __init__(self, column: str, type: pa.DataType) -> None:
        super().__init__(column, type)
        self.column, self.type = column, type


def kind_of(name: str) -> str | None:
    """csv, json, parquet, arrow or text by the name's ending, that of the packing left out."""
    path = Path(name.lower().partition("?")[0] if "://" in name else name.lower())
    suffix = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    return KINDS.get(suffix)


def expand(origin: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files that a path, a pattern or a list of them means, in the order of their names."""
    items = [os.fspath(origin)] if isinstance(origin, str | os.PathLike) else [os.fspath(item) for item in origin]
    result: list[str] = []
    for item in items:
        if "://" in item or Path(item).exists():
            result.append(item)
            continue
        found = sorted(glob.glob(item, recursive=True)) if glob.has_magic(item) else []  # noqa: PTH207  (patterns from the root too)
        if not found:
            what = "matches no file" if glob.has_magic(item) else "does not exist"
            raise DataError(f"data (={item!r}) {what}; give a file, a pattern, a folder, a URL or 'digits'")
        result += found
    return result


@dataclass
class Files:
    """Tables of one kind, one after the other, with the columns of the first."""

    paths: list[str]
    delimiter: str | None = None
    encoding: str | None = None
    missing: Sequence[str] = ()
    types: dict[str, pa.DataType] = field(default_factory=dict)  # what `Wider` has asked for
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        kinds = {path: kind_of(path) for path in self.paths}
        unknown = next((path for path, kind in kinds.items() if kind is None), None)
        if unknown is not None:
            raise DataError(
                f"data (={unknown!r}) is of no known kind; it must end in {', '.join(KINDS)} (packed: {', '.join(PACKED)}), or be an IDX "
                "file, a folder, a zip of images or a database URL"
            )
        if len(set(kinds.values())) > 1:
            raise DataError(f"data has files of several kinds ({', '.join(sorted(map(str, set(kinds.values()))))}); give them one by one")
        self.kind = str(kinds[self.paths[0]])
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.kind != "csv"):
            raise DataError(f"delimiter (={self.delimiter!r}) must be one character, and the files CSV")

    def size_bytes(self) -> int | None:
        """Of all files together; None where one is not on this disk."""
        return None if any("://" in path for path in self.paths) else sum(Path(path).stat().st_size for path in self.paths)

    def identity(self) -> list[Any] | None:
        """What changes when the files do; None where that cannot be told."""
        if self.size_bytes() is None:
            return None
        stats = [(str(Path(path).resolve()), Path(path).stat()) for path in self.paths]
        return [
            [[path, stat.st_size, stat.st_mtime_ns, stat.st_ino] for path, stat in stats],
            [self.delimiter, self.encoding, list(self.missing)],
        ]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows; every batch has the columns of the first."""
        schema: pa.Schema | None = None
        read = {"csv": self._csv, "json": self._json, "parquet": _parquet, "arrow": _arrow, "text": self._text}[self.kind]
        for path in self.paths:
            try:
                for batch in read(path):
                    plain = _plain(batch, self.types)
                    schema = plain.schema if schema is None else schema
                    yield plain if plain.schema.equals(schema) else _conformed(plain, schema, path)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, UnicodeError, EOFError, OSError) as error:
                raise DataError(f"data (={path!r}) cannot be read as a table: {_advised(error)}") from error

    def _csv(self, path: str) -> Iterator[pa.RecordBatch]:
        with _opened(path) as stream:
            head = stream.read(65536)
        if not head.strip():
            raise DataError(f"data (={path!r}) is empty; give a file with a header and at least one row")
        encoding = self.encoding or ("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf8")
        delimiter = self.delimiter or ("\t" if ".tsv" in path.lower() else _delimiter_of(head))
        with _opened(path) as stream:
            reader = self._csv_reader(stream, delimiter, encoding)
            while True:
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    return
                except pa.ArrowInvalid as error:
                    raise self._wider(error, reader.schema) from error
                for entry in batch.schema:
                    if pa.types.is_binary(entry.type):  # what pyarrow makes of text that is no UTF-8
                        raise DataError(
                            f"column {entry.name!r} of {path} holds text that is not UTF-8; say what it is, e.g. encoding='latin-1'"
                        )
                yield batch

    def _csv_reader(self, stream: Any, delimiter: str, encoding: str) -> Any:
        try:
            return pa.csv.open_csv(
                stream,
                read_options=pa.csv.ReadOptions(block_size=self.block_bytes, encoding=encoding),
                parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(
                    null_values=[*MISSING, *self.missing], strings_can_be_null=True, column_types=self.types
                ),
            )
        except pa.ArrowInvalid as error:
            raise self._wider(error, pa.schema([])) from error

    def _wider(self, error: pa.ArrowInvalid, schema: pa.Schema) -> Exception:
        """A conversion that failed asks for a wider type, a row that is too long for larger blocks; anything else is what it is."""
        if "straddling" in str(error) and self.block_bytes < MOST_BLOCK_BYTES:
            self.block_bytes *= 16
            return Wider("", pa.null())
        found = re.search(r"In CSV column #(\d+): CSV conversion error to ([^:]+): invalid value '(.*)'", str(error), re.DOTALL)
        if found is None or int(found[1]) >= len(schema):
            if "invalid UTF8" in str(error):
                return DataError(f"{error}; the file holds text that is not UTF-8; say what it is, e.g. encoding='latin-1'")
            return DataError(f"it cannot be read as a table: {_advised(error)}")
        name, kind, value = schema.names[int(found[1])], found[2], found[3]
        if kind == "null" and re.fullmatch(r"[-+]?\d{1,18}", value):
            return Wider(name, pa.int64())
        if kind in ("null", "int64") and re.fullmatch(NUMBER, value):
            return Wider(name, pa.float64())
        if kind == "null" and re.match(r"\d{4}-\d\d-\d\d", value):
            return Wider(name, pa.timestamp("us"))
        return Wider(name, pa.string())

    def _json(self, path: str) -> Iterator[pa.RecordBatch]:
        with _opened(path) as stream:
            yield from pa.json.open_json(stream, read_options=pa.json.ReadOptions(block_size=64 << 20))

    def _text(self, path: str) -> Iterator[pa.RecordBatch]:
        """A row for each line that is not blank."""
        lines: list[str] = []
        with _opened(path) as stream:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode(self.encoding or "utf-8-sig" if number == 1 else self.encoding or "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise DataError(f"line {number} of {path} is not UTF-8; say what it is, e.g. encoding='latin-1'") from error
                if text:
                    lines.append(text)
                if len(lines) == BATCH_ROWS:
                    yield pa.record_batch({"text": pa.array(lines, pa.string())})
                    lines = []
        if lines:
            yield pa.record_batch({"text": pa.array(lines, pa.string())})


def _parquet(path: str) -> Iterator[pa.RecordBatch]:
    with _seekable(path) as file:
        yield from pa.parquet.ParquetFile(file).iter_batches(BATCH_ROWS)


def _arrow(path: str) -> Iterator[pa.RecordBatch]:
    with _seekable(path) as file:
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            file.seek(0)
            yield from pa.ipc.open_stream(file)
            return
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _delimiter_of(head: bytes) -> str:
    """The most frequent of the usual delimiters in the header."""
    line = head.replace(b"\0", b"").splitlines()[0].decode("latin-1")
    counts = {delimiter: line.count(delimiter) for delimiter in ",;\t|"}
    return max(counts, key=lambda delimiter: (counts[delimiter], delimiter == ","))


def _plain(batch: pa.RecordBatch, types: Mapping[str, pa.DataType]) -> pa.RecordBatch:
    """A column's values, not how they are stored: dictionaries, views and large strings become plain ones."""
    for index, entry in enumerate(batch.schema):
        kind = types.get(entry.name) or plain_type(entry.type)
        if kind is not entry.type:
            batch = batch.set_column(index, entry.name, batch.column(index).cast(kind))
    return batch


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The plain form of a type."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        inner = plain_type(kind.value_type)
        return pa.list_(inner) if pa.types.is_large_list(kind) or inner is not kind.value_type else kind
    return kind


def _conformed(batch: pa.RecordBatch, schema: pa.Schema, path: str) -> pa.RecordBatch:
    """The batch of a later file with the columns of the first."""
    odd = sorted(set(batch.schema.names) ^ set(schema.names))
    if odd:
        where = "lacks" if odd[0] in schema.names else "has"
        raise DataError(f"data (={path!r}) {where} the column {odd[0]!r}, unlike the first file; the columns must agree")
    columns = []
    for entry in schema:
        column = batch.column(entry.name)
        if column.type != entry.type:
            numbers = pa.types.is_integer(entry.type) and pa.types.is_floating(column.type)
            if numbers or (pa.types.is_null(entry.type) or pa.types.is_string(column.type)):
                raise Wider(entry.name, pa.float64() if numbers else column.type)
            try:
                column = column.cast(entry.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(f"column {entry.name!r} of {path} holds {column.type}, in the first file {entry.type}") from error
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _advised(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if "Expected" in text and "columns, got" in text:
        return f"{text[:300]} (every row needs as many fields as the header; is the delimiter right?)"
    return text[:500]


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A stream of the unpacked bytes."""
    suffix = Path(path.partition("?")[0] if "://" in path else path).suffix.lower()
    with _seekable(path) as file:
        if suffix in PACKED:
            with pa.CompressedInputStream(file, PACKED[suffix]) as stream:
                yield stream
        else:
            yield file


@contextmanager
def _seekable(path: str) -> Iterator[Any]:
    if path.startswith(("http://", "https://")):
        with _downloaded(path) as local, pa.OSFile(local) as file:
            yield file
    elif "://" in path:
        system, inner = pa.fs.FileSystem.from_uri(path)
        with system.open_input_file(inner) as file:
            yield file
    else:
        with pa.OSFile(path) as file:
            yield file


@contextmanager
def _downloaded(url: str) -> Iterator[str]:
    """The file behind a URL, for as long as it is read."""
    with tempfile.NamedTemporaryFile(prefix="anyfit-") as local:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  (only http and https come here)
                shutil.copyfileobj(answer, local)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise DataError(f"data (={url!r}) cannot be fetched: {getattr(error, 'reason', error)}") from error
        local.flush()
        yield local.name
