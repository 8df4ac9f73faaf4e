"""Files as record batches: CSV, JSON lines, Parquet, Arrow and text, packed or not, several at once, from disk or an object store.

Nothing here holds a whole file. Types are those of all rows: a reader that meets a value which its type cannot hold raises
`Wider`, and whoever reads starts again with the wider type.
"""

from __future__ import annotations

import csv
import glob
import http.client
import io
import json
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
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs
import pyarrow.json
import pyarrow.parquet

from anyfit.errors import DataError
from anyfit.values import without_secrets

__all__ = ["KINDS", "MISSING", "NUMBER", "Files", "Wider", "expand", "kind_of", "plain_column", "plain_type", "without_words"]

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
JSON_BLOCK_BYTES = 64 << 20  # its reader takes the types of the first block for all
BATCH_BYTES = 64 << 20  # of rows with large cells a batch holds fewer
NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"


class Wider(Exception):
    """A column holds a value that its type so far cannot hold."""

    def __init__(self, column: str, type: pa.DataType) -> None:
        super().__init__(column, type)
        self.column, self.type = column, type


def kind_of(name: str) -> str | None:
    """csv, json, parquet, arrow or text by the name's ending, that of the packing left out."""
    return KINDS.get(_suffix(name))


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
            raise DataError(f"data (={without_secrets(item)!r}) {what}; give a file, a pattern, a folder, a URL or 'digits'")
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
    block_bytes: int = field(default_factory=lambda: BLOCK_BYTES)
    threads: bool = True

    def __post_init__(self) -> None:
        folder = next((path for path in self.paths if "://" not in path and Path(path).is_dir()), None)
        if folder is not None:
            raise DataError(f"data (={folder!r}) is a folder among several paths; give the files in it, e.g. as a pattern")
        kinds = {path: kind_of(path) for path in self.paths}
        unknown = next((path for path, kind in kinds.items() if kind is None), None)
        if unknown is not None:
            raise DataError(
                f"data (={without_secrets(unknown)!r}) is of no known kind; it must end in {', '.join(KINDS)} (packed: {', '.join(PACKED)}), or be an IDX "
                "file, a folder, a zip of images or a database URL"
            )
        if len(set(kinds.values())) > 1:
            raise DataError(f"data has files of several kinds ({', '.join(sorted(map(str, set(kinds.values()))))}); give them one by one")
        self.kind = str(kinds[self.paths[0]])
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.kind != "csv"):
            raise DataError(f"delimiter (={self.delimiter!r}) must be one character, and the files CSV")
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError as error:
            raise DataError(f"encoding (={self.encoding!r}) is not known; give one of Python's, e.g. 'latin-1'") from error

    def size_bytes(self) -> int | None:
        """Of all files together; None where one is not on this disk."""
        return None if any("://" in path for path in self.paths) else sum(Path(path).stat().st_size for path in self.paths)

    def identity(self) -> list[Any] | None:
        """What changes when the files do; None where that cannot be told."""
        if self.size_bytes() is None:
            return None
        stats = [(str(Path(path).resolve()), Path(path).stat()) for path in self.paths]
        return [
            [[path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for path, stat in stats],
            [self.delimiter, self.encoding, list(self.missing)],
        ]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows; every batch has the columns of the first."""
        schema: pa.Schema | None = None
        read = {"csv": self._csv, "json": self._json, "parquet": _parquet, "arrow": _arrow, "text": self._text}[self.kind]
        with tempfile.TemporaryDirectory(prefix="anyfit-") as folder:
            for index, path in enumerate(self.paths):
                local = _downloaded(path, Path(folder) / str(index)) if path.startswith(("http://", "https://")) else path
                try:
                    for batch in read(path, local):
                        plain = self._plain(batch, path)
                        schema = plain.schema if schema is None else schema
                        yield plain if plain.schema.equals(schema) else _conformed(plain, schema, path)
                except (pa.ArrowException, UnicodeError, EOFError, OSError) as error:
                    raise DataError(f"data (={without_secrets(path)!r}) cannot be read as a table: {_advised(error)}") from error

    def _plain(self, batch: pa.RecordBatch, path: str) -> pa.RecordBatch:
        """A column's values, not how they are stored: dictionaries, views and large strings become plain ones."""
        names = batch.schema.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"column {twice!r} stands twice in {path}; rename one of them")
        for index, entry in enumerate(batch.schema):
            plain = plain_type(entry.type)
            kind = self.types.get(entry.name, plain)
            column = batch.column(index)
            if kind is not entry.type:
                if (wider := _common(kind, plain)) != kind:
                    raise Wider(entry.name, wider)
                try:
                    column = plain_column(column, kind)
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                    raise Wider(entry.name, _beyond(kind, plain)) from error
                batch = batch.set_column(index, entry.name, column)
        return batch if self.kind == "csv" else without_words(batch, self.missing)  # a CSV reader has seen to it

    def _csv(self, path: str, local: str) -> Iterator[pa.RecordBatch]:
        with _opened(path, local) as stream:
            head = stream.read(65536)
        if not head.strip():
            raise DataError(f"data (={without_secrets(path)!r}) is empty; give a file with a header and at least one row")
        encoding = self.encoding or _marked(head) or "utf8"
        if encoding == "utf8" and b"\0" in head:
            raise DataError(
                f"data (={without_secrets(path)!r}) holds null bytes: it is no text, or of another encoding; say which, e.g. encoding='utf-16-le'"
            )
        delimiter = self.delimiter or ("\t" if _suffix(path) == ".tsv" else _delimiter_of(head.decode(encoding, "replace")))
        with _opened(path, local) as stream:
            try:
                reader = self._csv_reader(stream, delimiter, encoding, self.types)
            except pa.ArrowInvalid as error:
                with _opened(path, local) as again:  # its names, to tell of which column the first block does not fit
                    words = dict.fromkeys(self.types, pa.string())
                    schema = self._csv_reader(again, delimiter, encoding, words).schema if "conversion error" in str(error) else None
                raise self._wider(error, schema, path) from error
            rows, batch = 0, None
            while True:
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    if batch is not None and batch.num_rows:
                        self._check_end(batch, path, local, rows)
                    return
                except pa.ArrowInvalid as error:
                    raise self._wider(error, reader.schema, path) from error
                for entry in batch.schema:
                    if pa.types.is_binary(entry.type):  # what pyarrow makes of text that is no UTF-8
                        raise _not_utf8(batch.column(entry.name), entry.name, path, rows)
                rows += batch.num_rows
                yield batch

    def _check_end(self, batch: pa.RecordBatch, path: str, local: str, rows: int) -> None:
        """A quotation mark that never closes takes all rows to the end into one cell, which Arrow accepts."""
        for entry, column in zip(batch.schema, batch.columns, strict=True):
            if not (pa.types.is_string(entry.type) and "\n" in (column[-1].as_py() or "")):
                continue
            with _opened(path, local) as stream:
                marks = sum(block.count(b'"') for block in iter(lambda: stream.read(BLOCK_BYTES), b""))
            if marks % 2:
                raise DataError(
                    f"data (={without_secrets(path)!r}): the quotation mark that opens in row {rows}, column {entry.name!r}, never closes, "
                    "and takes all that follows into one cell; close it, or double it"
                )

    def _csv_reader(self, stream: Any, delimiter: str, encoding: str, types: Mapping[str, pa.DataType]) -> Any:
        return pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(block_size=self.block_bytes, encoding=encoding, use_threads=self.threads),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(null_values=[*MISSING, *self.missing], strings_can_be_null=True, column_types=types),
        )

    def _wider(self, error: pa.ArrowInvalid, schema: pa.Schema | None, path: str) -> Exception:
        """A conversion that failed asks for a wider type, a row that is too long for larger blocks; anything else is what it is."""
        if "straddling" in str(error) and self.block_bytes < MOST_BLOCK_BYTES:
            self.block_bytes *= 16
            return Wider("", pa.null())
        found = re.search(
            r"In CSV column #(\d+): (?:Row #\d+: )?CSV conversion error to .*?(?:value|zone offset in) '(.*)'", str(error), re.DOTALL
        )
        if found is None or schema is None:
            if self.threads:  # Arrow tells the row only where one thread reads
                self.threads = False
                return Wider("", pa.null())
            text = _advised(error)
            if schema is not None:
                text = re.sub(r"In CSV column #(\d+)", lambda match: f"In column {schema.names[int(match[1])]!r}", text)
            return DataError(f"data (={without_secrets(path)!r}) cannot be read as a table: {text}")
        name, value = schema.names[int(found[1])], found[2]
        kind = self.types.get(name) or schema.field(name).type
        return Wider(name, _beyond(kind, _type_of(value)))

    def _json(self, path: str, local: str) -> Iterator[pa.RecordBatch]:
        schema = pa.schema(list(self.types.items()))
        with _opened(path, local) as stream:
            try:
                reader = pa.json.open_json(
                    stream,
                    read_options=pa.json.ReadOptions(block_size=max(self.block_bytes, JSON_BLOCK_BYTES)),
                    parse_options=pa.json.ParseOptions(explicit_schema=schema if self.types else None),
                )
                schema = reader.schema
                yield from reader
            except pa.ArrowInvalid as error:
                if "straddling" in str(error) and self.block_bytes < MOST_BLOCK_BYTES:
                    self.block_bytes = 16 * max(self.block_bytes, JSON_BLOCK_BYTES)
                    raise Wider("", pa.null()) from error
                if "changed from" in str(error) or "Failed to convert" in str(error):
                    raise _misfit(path, local, schema, error) from error
                raise

    def _text(self, path: str, local: str) -> Iterator[pa.RecordBatch]:
        """A row for each line that is not blank."""
        lines: list[str] = []
        with _opened(path, local) as stream:
            encoding = self.encoding or _marked(stream.read(2)) or "utf-8-sig"
        number = 0
        with _opened(path, local) as stream, io.TextIOWrapper(io.BufferedReader(_Bytes(stream)), encoding, newline=None) as text:
            while True:
                try:
                    line = text.readline()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"line {number + 1} of {without_secrets(path)}, or one soon after, is not {encoding}; say what it is, e.g. encoding='latin-1'"
                    ) from error
                number += 1
                if line.strip():
                    lines.append(line.strip())
                if lines and (len(lines) == BATCH_ROWS or not line):
                    yield pa.record_batch({"text": pa.array(lines, pa.string())})
                    lines = []
                if not line:
                    return


class _Bytes(io.RawIOBase):
    """Arrow's stream as Python's: only these can be read by lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data = self._stream.read(len(target))
        target[: len(data)] = data
        return len(data)


def _misfit(path: str, local: str, schema: pa.Schema, error: Exception) -> Exception:
    """Which value of JSON lines is of another type than those before it; Arrow does not say."""
    kinds: dict[str, str] = {}
    with _opened(path, local) as stream:
        for number, line in enumerate(io.BufferedReader(_Bytes(stream)), 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError:
                break
            for name, value in row.items() if isinstance(row, dict) else ():
                kind = "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
                if value is not None and kinds.setdefault(name, kind) != kind:
                    return DataError(
                        f"column {name!r} of {without_secrets(path)} holds {str(value)[:40]!r} in row {number}, unlike the {kinds[name]} before it; write that "
                        "column as one type"
                    )
                entry = schema.field(name).type if name in schema.names else pa.null()
                if pa.types.is_integer(entry) and isinstance(value, float):
                    return Wider(name, pa.float64())
                if pa.types.is_timestamp(entry) and isinstance(value, str) and not pa.types.is_timestamp(_type_of(value)):
                    return Wider(name, pa.string())
    return DataError(f"data (={without_secrets(path)!r}) cannot be read as a table: {_advised(error)}")


def _parquet(path: str, local: str) -> Iterator[pa.RecordBatch]:
    with _seekable(local) as file:
        parquet = pa.parquet.ParquetFile(file)
        groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
        yield from parquet.iter_batches(max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest))))


def _arrow(path: str, local: str) -> Iterator[pa.RecordBatch]:
    with _seekable(local) as file:
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            file.seek(0)
            yield from pa.ipc.open_stream(file)
            return
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _not_utf8(column: pa.Array, name: str, path: str, before: int) -> DataError:
    for place, value in enumerate(column.to_pylist()):
        try:
            (value or b"").decode()
        except UnicodeDecodeError:
            return DataError(
                f"column {name!r} of {without_secrets(path)} holds text that is not UTF-8, {value[:40]!r} in row {before + place + 1}; say what it is, e.g. "
                "encoding='latin-1'"
            )
    return DataError(f"column {name!r} of {without_secrets(path)} holds bytes")


def _marked(head: bytes) -> str | None:
    """UTF-16 by its byte order mark."""
    return "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else None


def _delimiter_of(head: str) -> str:
    """The most frequent of the usual delimiters in the header, outside quotation marks."""
    line = next((line for line in head.splitlines() if line.strip()), "")
    counts = {delimiter: len(next(csv.reader([line], delimiter=delimiter))) for delimiter in ",;\t|"}
    return max(counts, key=lambda delimiter: (counts[delimiter], delimiter == ","))


def _type_of(value: str) -> pa.DataType:
    """What a CSV reader takes one value for."""
    return (
        pa.csv.read_csv(
            io.BytesIO(b"v,w\n0," + b'"' + value.replace('"', '""').encode("utf-8", "replace") + b'"'),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        )
        .schema.field("w")
        .type
    )


def plain_column(column: Any, kind: pa.DataType) -> Any:
    """A column as one of another type. (A cast of a dictionary of views has no kernel, on its own or within lists.)"""
    if isinstance(column, pa.ChunkedArray):
        return pa.chunked_array([plain_column(chunk, kind) for chunk in column.chunks], kind)
    if pa.types.is_dictionary(column.type):
        return plain_column(column.dictionary, kind).take(column.indices)
    if pa.types.is_list(kind) and (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        lists = pa.array([0, *pc.cumulative_sum(pc.fill_null(pc.list_value_length(column), 0)).to_pylist()], pa.int32())
        return pa.ListArray.from_arrays(lists, plain_column(column.flatten(), kind.value_type), mask=column.is_null())
    return column.cast(kind)


def _common(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """A type for the values of both: numbers or moments where both are, else words."""
    kinds = (first, second)
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if all(pa.types.is_integer(kind) for kind in kinds) and pa.uint64() not in kinds:
        return pa.int64()
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        return pa.float64()
    if all(pa.types.is_date(kind) or pa.types.is_timestamp(kind) for kind in kinds):
        zones = {kind.tz if pa.types.is_timestamp(kind) else None for kind in kinds}
        units = [kind.unit if pa.types.is_timestamp(kind) else "s" for kind in kinds]
        if len(zones) == 1:
            return pa.timestamp(max(units, key=("s", "ms", "us", "ns").index), zones.pop())
    return pa.string()


def _beyond(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """A type for the values of both where the first does not hold the second."""
    both = _common(first, second)
    return pa.string() if both == first else both


def without_words(rows: Any, words: Sequence[str]) -> Any:
    """A table or record batch in whose columns of text some words stand for a missing value."""
    for index, entry in enumerate(rows.schema if words else ()):
        if pa.types.is_string(entry.type):
            column = rows.column(index)
            rows = rows.set_column(index, entry.name, pc.if_else(pc.is_in(column, pa.array(list(words), pa.string())), None, column))
    return rows


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
        raise DataError(f"data (={without_secrets(path)!r}) {where} the column {odd[0]!r}, unlike the first file; the columns must agree")
    columns = []
    for entry in schema:
        column = batch.column(entry.name)
        if column.type != entry.type and not pa.types.is_null(column.type):
            if pa.types.is_nested(column.type) or pa.types.is_nested(entry.type):
                raise DataError(
                    f"column {entry.name!r} of {without_secrets(path)} holds {column.type}, in the first file {entry.type}; make them alike"
                )
            raise Wider(entry.name, _common(entry.type, column.type))
        columns.append(column.cast(entry.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _advised(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if "Expected" in text and "columns, got" in text:
        return f"{text[:300]} (every row needs as many fields as the header; is the delimiter right, is each quotation mark closed?)"
    if "straddling" in text:
        return f"{text[:300]} (a row of more than {MOST_BLOCK_BYTES >> 20} MB; is each quotation mark closed?)"
    if isinstance(error, UnicodeError) or "UTF8" in text:
        return f"{text[:300]}; it holds text that is not UTF-8; say what it is, e.g. encoding='latin-1'"
    if "changed from" in text:
        return f"{text[:300]}; write that column as one type"
    return text[:500]


def _suffix(path: str) -> str:
    """The ending that tells the kind, that of the packing left out."""
    name = Path(path.lower().partition("?")[0] if "://" in path else path.lower())
    return name.with_suffix("").suffix if name.suffix in PACKED else name.suffix


@contextmanager
def _opened(path: str, local: str) -> Iterator[Any]:
    """A stream of the unpacked bytes."""
    suffix = Path(path.partition("?")[0] if "://" in path else path).suffix.lower()
    with _seekable(local) as file:
        if suffix in PACKED:
            with pa.CompressedInputStream(file, PACKED[suffix]) as stream:
                yield stream
        else:
            yield file


@contextmanager
def _seekable(path: str) -> Iterator[Any]:
    if "://" in path:
        system, inner = pa.fs.FileSystem.from_uri(path)
        with system.open_input_file(inner) as file:
            yield file
    else:
        with pa.OSFile(path) as file:
            yield file


def _downloaded(url: str, local: Path) -> str:
    """The file behind a URL."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, local.open("wb") as file:  # noqa: S310  (only http and https come here)
            shutil.copyfileobj(answer, file)
    except urllib.error.HTTPError as error:
        with error:
            raise DataError(
                f"data (={without_secrets(url)!r}) cannot be fetched: the server answers {error.code} {error.reason}; is it spelt right?"
            ) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise DataError(
            f"data (={without_secrets(url)!r}) cannot be fetched: {getattr(error, 'reason', error)}; is the server up?"
        ) from error
    return str(local)
