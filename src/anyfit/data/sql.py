"""SQL databases: a table or one query over any SQLAlchemy URL becomes a stream of batches. What is read is never written."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote_plus
from uuid import UUID

import pyarrow as pa

from anyfit.errors import AnyfitError, DataError, MissingExtra, RunError

if TYPE_CHECKING:
    import sqlalchemy
    from sqlalchemy.engine.interfaces import ReflectedColumn

__all__ = ["hidden", "read_sql"]

READ_AHEAD = 16  # batches to look for a value that tells the type of a column which the database says nothing of
SECRET = re.compile(r"([?&][^=&]*(?:pass|pwd|secret|token|odbc_connect)[^=&]*=)([^&]*)", re.IGNORECASE)  # in what follows the ?
MOST_NAMES = 20  # of tables in a message
POSTGRES = "postgresql"
MYSQL = ("mysql", "mariadb")
SNAPSHOT = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}  # one read sees one state of the database
PROBE = "anyfit_probe"
PACKAGES = {"MySQLdb": "mysqlclient", "psycopg2": "psycopg2-binary", "mysql": "mysql-connector-python"}  # modules named otherwise


def read_sql(url: str, *, table: str | None = None, query: str | None = None, batch_rows: int = 65536) -> Iterator[pa.RecordBatch]:
    """The rows of `table` (or `schema.table`), of `query` or of the only table there is; at least one batch, all of one schema.

    Arguments are checked at the call; the database is opened at the first batch and left, rolled back, after the last one.
    """
    try:
        import sqlalchemy
    except ImportError as error:
        raise MissingExtra("sqlalchemy", "sql") from error
    if batch_rows < 1:
        raise DataError(f"batch_rows (={batch_rows!r}) must be at least 1")
    if table is not None and query is not None:
        raise DataError(f"table (={table!r}) and query (={_short(query)}) are both given; give one of them")
    try:
        address = sqlalchemy.make_url(url)
        backend = address.get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise DataError(f"url (={hidden(url)!r}) is no SQLAlchemy URL; give one like postgresql://user@host/database") from None
    if "@" in (address.host or ""):  # what comes after the first @ would show up as the host
        raise DataError(f"url (={hidden(url)!r}) has a second @; write the one in the password as %40")
    if address.drivername in ("postgresql", "postgres"):
        address, backend = address.set(drivername="postgresql+psycopg"), POSTGRES
    if query is not None:
        query = _only_reads(query, backend)
    if backend == "sqlite":
        address = _existing_file(address, url)
    return _read(_Place(url, address), table, query, batch_rows)


# ------------------------------------------------------------------ what is told


def hidden(url: str) -> str:
    """The URL as it may be shown: without passwords."""
    shown = re.sub(r"(?<=://)([^:/]*):.*@", r"\1:***@", url, flags=re.DOTALL)
    return SECRET.sub(r"\1***", shown)


@dataclass
class _Place:
    """What is read, and how far: for messages."""

    url: str
    address: sqlalchemy.URL
    what: str = ""
    rows: int = 0

    def __str__(self) -> str:
        return f"{self.what} of {hidden(self.url)}"

    def without_secrets(self, text: str) -> str:
        """A driver's message may repeat what it was given."""
        found = re.match(r"[^:]*://[^:/]*:(.*)@", self.url, re.DOTALL)
        secrets = [self.address.password or "", found[1] if found else ""]
        secrets += [value for _, value in SECRET.findall(self.url)]
        for secret in sorted({*secrets, *map(unquote_plus, secrets)} - {""}, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    @contextmanager
    def telling(self, doing: str) -> Iterator[None]:
        """Make what SQLAlchemy and drivers raise one of our errors."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except AnyfitError:
            raise
        except (SQLAlchemyError, ValueError, ArithmeticError, OSError) as error:
            self._tell(doing, error)

    def _tell(self, doing: str, error: Exception) -> NoReturn:
        from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

        origin: Any = (error.orig if isinstance(error, DBAPIError) else None) or error
        reason = self.without_secrets(" ".join(str(origin).split()))
        cause = error if str(error) == self.without_secrets(str(error)) else None  # a traceback shows it too
        if _wrote(origin):
            raise DataError(f"{self} would write, and the database refused it: {reason}; give a query that only reads") from cause
        lost = isinstance(error, DBAPIError) and error.connection_invalidated
        if doing == "read" and self.address.get_backend_name() != "sqlite":
            lost = lost or isinstance(error, OperationalError | InterfaceError | OSError)  # a timeout, a full disk
        if lost and doing != "opened":
            raise RunError(
                f"the connection to {self} broke after {self.rows} rows: {reason}; nothing was trained, as a read is whole or none; "
                "see that the server stays up and start again, or export the rows to a Parquet file and train from that"
            ) from cause
        after = f" (after {self.rows} rows)" if doing == "read" else ""
        raise DataError(f"{self} cannot be {doing}{after}: {reason}") from cause


def _wrote(origin: Any) -> bool:
    """Whether a driver's error says that a write met a read-only transaction; codes, as messages are translated."""
    code = getattr(origin, "sqlstate", None) or getattr(origin, "pgcode", None)
    first = origin.args[0] if getattr(origin, "args", None) else None
    if isinstance(first, dict):  # pg8000
        code = first.get("C")
    return code == "25006" or first == 1792 or str(getattr(origin, "sqlite_errorname", "")).startswith("SQLITE_READONLY")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (", ".join(names[:MOST_NAMES]) or "none") + more


# ------------------------------------------------------------------ what may be asked

READS = ("SELECT", "WITH", "VALUES", "TABLE")
WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "INTO"})
# Where nothing but our own look at the query forbids writes. Transact-SQL needs no semicolon between statements.
STATEMENTS = WRITES | {
    *("ALTER", "ATTACH", "BACKUP", "BEGIN", "BULK", "CALL", "COMMIT", "COPY", "CREATE", "DBCC", "DECLARE", "DENY", "DETACH", "DO", "DROP"),
    *("EXEC", "EXECUTE", "EXPORT", "GRANT", "IMPORT", "INSTALL", "KILL", "LOAD", "LOCK", "PRAGMA", "PUT", "RECONFIGURE", "RENAME"),
    *("RESTORE", "REVOKE", "ROLLBACK", "SAVE", "SET", "SHUTDOWN", "TRUNCATE", "UNLOAD", "USE", "VACUUM", "WAITFOR"),
}
PIECES = r"""(?P<quoted>'(?:[^']|'')*' | "(?:[^"]|"")*"{more}) | --[^\r\n]* | (?P<word>[^\W\d][\w$]*) | (?P<mark>\S)"""


def _pieces(more: str) -> re.Pattern[str]:
    return re.compile(PIECES.format(more=more), re.VERBOSE | re.DOTALL)


PLAIN_PIECES = _pieces("")
POSTGRES_PIECES = _pieces(r" | [eE]'(?:[^'\\]|\\.|'')*' | (?P<dollar>\$(?:[^\W\d]\w*)?\$).*?(?P=dollar)")
SQLITE_PIECES = _pieces(r" | `[^`]*` | \[[^\]]*\]")
# Dialects read these in different ways (escapes, comments, quotes), and a write must not hide in the difference.
AMBIGUOUS = re.compile(r"[\\#$`\[]|/\*|--(?!\s)|\bn?q'", re.IGNORECASE)


def _only_reads(query: str, backend: str) -> str:
    """The query without its last semicolon; an error where it is anything but one statement that reads.

    The database forbids writes as well, where it can; a second statement could end the transaction that does so.
    """
    text = query.strip().rstrip("; \t\r\n")
    plain = backend in (POSTGRES, "sqlite") or not AMBIGUOUS.search(text)
    words = _words(text, backend) if plain else re.findall(r"[^\W\d]\w*|;", text)
    words = [word.upper() for word in words]
    told = f"query (={_short(query)})"
    allowed = "; give one SELECT, WITH ... SELECT, VALUES or TABLE"
    if not words or "\0" in text:
        raise DataError(f"{told} holds no statement{allowed}")
    if ";" in words:
        raise DataError(f"{told} holds several statements{allowed}")
    if words[0] not in READS:
        raise DataError(f"{told} is a {words[0]} statement, and data is only read{allowed}")
    forbidden = WRITES if backend in (POSTGRES, "sqlite", *MYSQL) else STATEMENTS
    found = next((word for word in words if word in forbidden), None)
    if found:
        where = "if it is the name of a column, quote it" if plain else f"{backend} could hide one in what looks like text; use a view"
        raise DataError(f"{told} would write ({found}), and data is only read{allowed} ({where})")
    return text


def _words(text: str, backend: str) -> Iterator[str]:
    """Words and semicolons outside of quotes and comments."""
    pieces = {POSTGRES: POSTGRES_PIECES, "sqlite": SQLITE_PIECES}.get(backend, PLAIN_PIECES)
    position = 0
    while position < len(text):
        if text.startswith("/*", position):
            position = _after_comment(text, position, nested=backend == POSTGRES)
            continue
        found = pieces.match(text, position)
        if found and found["word"]:
            yield found["word"]
        elif found and found["mark"] == ";":
            yield ";"
        elif found and found["mark"] in ("'", '"'):
            raise DataError(f"query (={_short(text)}) has a quote that does not end: {_short(text[position:])}")
        position = found.end() if found else position + 1


def _after_comment(text: str, position: int, nested: bool) -> int:
    depth = 0
    for mark in re.compile(r"/\*|\*/").finditer(text, position):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0 or (mark[0] == "*/" and not nested):
            return mark.end()
    return len(text)


# ------------------------------------------------------------------ the connection


def _existing_file(address: sqlalchemy.URL, url: str) -> sqlalchemy.URL:
    """SQLite makes the file that it does not find; this address does not."""
    name = address.database or ":memory:"
    if name.startswith("file:") and "uri" in address.query:
        return address if address.query.get("mode") == "memory" else address.update_query_dict({"mode": "ro"})
    if name == ":memory:":
        raise DataError(f"url (={hidden(url)!r}) is a new, empty database in memory; give the path of a file: sqlite:///path")
    path = Path(name).absolute()
    if not path.is_file():
        raise DataError(f"url (={hidden(url)!r}) names {path}, which is no file; give one that exists: sqlite:///path (four / for /path)")
    return address.set(database=path.as_uri()).update_query_dict({"mode": "ro", "uri": "true"})


def _engine(place: _Place) -> sqlalchemy.Engine:
    import sqlalchemy
    from sqlalchemy.pool import NullPool

    address = place.address
    # documents stay the text that they are
    options: dict[str, Any] = {"json_deserializer": lambda text: text} if address.get_backend_name() == POSTGRES else {}
    try:
        engine = sqlalchemy.create_engine(address, poolclass=NullPool, pool_logging_name="anyfit", hide_parameters=True, **options)
    except sqlalchemy.exc.NoSuchModuleError as error:
        raise DataError(
            f"url (={hidden(place.url)!r}) asks for {address.drivername}, which SQLAlchemy does not know here: {error}"
        ) from error
    except ImportError as error:
        module = (error.name or address.drivername.partition("+")[2]).partition(".")[0]
        if module == "psycopg":
            raise MissingExtra("psycopg", "sql") from error
        raise DataError(
            f"url (={hidden(place.url)!r}) needs the driver {module}, which is not installed; run: pip install {PACKAGES.get(module, module)}"
            " (or name another: mysql+pymysql://...)"
        ) from error
    # drivers fail to close what is broken; why it broke is told by the error
    logging.getLogger("sqlalchemy.pool.impl.NullPool.anyfit").setLevel(logging.CRITICAL)
    if engine.dialect.is_async:
        raise DataError(f"url (={hidden(place.url)!r}) names an asynchronous driver; take the plain one, e.g. postgresql+psycopg://")
    return engine


@contextmanager
def _connection(place: _Place) -> Iterator[sqlalchemy.Connection]:
    with place.telling("opened"):
        connection = _engine(place).connect()
    try:
        with place.telling("opened"):
            if connection.dialect.name == POSTGRES:
                connection = connection.execution_options(**SNAPSHOT)
            elif connection.dialect.name in MYSQL:
                connection.exec_driver_sql("SET SESSION TRANSACTION READ ONLY")  # for what would end this transaction, too
                connection.exec_driver_sql("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        yield connection
    finally:
        connection.close()  # rolls back; no pool keeps it


# ------------------------------------------------------------------ types


@dataclass(frozen=True)
class _Kind:
    """What a column holds: its Arrow type, what values that is in words, types that Arrow takes as they are, and how to make one of others."""

    arrow: pa.DataType
    words: str
    plain: frozenset[type]
    one: Callable[[Any], Any]


def _refuse(value: Any) -> NoReturn:
    raise TypeError(f"{type(value).__name__} does not fit")


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float | Decimal) and value == int(value) else _refuse(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float | Decimal) else _refuse(value)


def _boolean(value: Any) -> bool:
    return bool(value) if isinstance(value, int | float | Decimal) and value in (0, 1) else _refuse(value)


def _bytes(value: Any) -> bytes:
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else _refuse(value)


def _document(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode()
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _moment(aware: bool) -> _Kind:
    def one(value: Any) -> datetime:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        if isinstance(moment, date) and not isinstance(moment, datetime):
            moment = datetime.combine(moment, time())
        if not isinstance(moment, datetime) or (moment.tzinfo is not None) != aware:
            _refuse(value)
        return moment.astimezone(UTC) if aware else moment

    words = "a date, or a date and time (as the first row: " + ("with" if aware else "without") + " a time zone)"
    return _Kind(pa.timestamp("us", "UTC" if aware else None), words, frozenset(), one)


def _list(item: _Kind) -> _Kind:
    def one(values: Any) -> list[Any]:
        if not isinstance(values, list | tuple):
            _refuse(values)
        return [value if value is None or type(value) in item.plain else item.one(value) for value in values]

    return _Kind(pa.list_(item.arrow), f"a list, each of it {item.words}", frozenset(), one)


NOTHING = _Kind(pa.null(), f"NULL (as in the first {READ_AHEAD} batches)", frozenset(), _refuse)
WHOLE = _Kind(pa.int64(), "a whole number of 64 bits", frozenset({int}), _whole)
NUMBER = _Kind(pa.float64(), "a number", frozenset({float}), _number)
BOOLEAN = _Kind(pa.bool_(), "true or false", frozenset({bool}), _boolean)
MOMENT, ZONED = _moment(aware=False), _moment(aware=True)
TEXT = _Kind(pa.string(), "text", frozenset({str}), _refuse)
BINARY = _Kind(pa.binary(), "bytes", frozenset({bytes}), _bytes)
DOCUMENT = _Kind(pa.string(), "JSON", frozenset({str}), _document)
PRINTED = _Kind(pa.string(), "text", frozenset({str}), str)

# PostgreSQL's fixed numbers of types (pg_type.dat), and those of their arrays; all others are printed.
POSTGRES_CODES: dict[int, _Kind] = {
    **dict.fromkeys((20, 21, 23, 26), WHOLE),
    **dict.fromkeys((700, 701, 1700), NUMBER),
    **dict.fromkeys((18, 19, 25, 1042, 1043), TEXT),
    **dict.fromkeys((1082, 1114), MOMENT),
    **dict.fromkeys((114, 3802), DOCUMENT),
    **dict.fromkeys((1005, 1007, 1016, 1028), _list(WHOLE)),
    **dict.fromkeys((1021, 1022, 1231), _list(NUMBER)),
    **dict.fromkeys((1002, 1003, 1009, 1014, 1015), _list(TEXT)),
    **dict.fromkeys((1115, 1182), _list(MOMENT)),
    16: BOOLEAN,
    17: BINARY,
    1184: ZONED,
    1000: _list(BOOLEAN),
    1185: _list(ZONED),
    2951: _list(PRINTED),
}

# MySQL's protocol; text and bytes share their numbers.
MYSQL_CODES: dict[int, _Kind] = {
    **dict.fromkeys((1, 2, 3, 8, 9, 13), WHOLE),
    **dict.fromkeys((0, 4, 5, 246), NUMBER),
    **dict.fromkeys((7, 10, 12), MOMENT),
    245: DOCUMENT,
}

_Choice = Callable[[list[Any]], _Kind]  # from the values of the first batches


def _by_values(values: list[Any]) -> _Kind:
    types = {type(value) for value in values}
    if not types:
        return NOTHING
    for kind, fitting in ((BOOLEAN, {bool}), (WHOLE, {int}), (NUMBER, {int, float, Decimal}), (TEXT, {str}), (PRINTED, {UUID})):
        if types <= fitting:
            return kind
    if types <= {bytes, bytearray, memoryview}:
        return BINARY
    if types <= {datetime, date}:
        return _moment_by_values(values)
    if types <= {list, tuple} and all(type(item) in (str, type(None)) for value in values for item in value):
        return _list(TEXT)
    if types <= {dict, list}:
        return DOCUMENT
    # a mix: the first value is right, so that the message is about another one
    return _by_values(values[:1]) if len(values) > 1 else PRINTED


def _number_by_values(values: list[Any]) -> _Kind:
    return _by_values(values) if any(isinstance(value, str | bytes) for value in values[:1]) else NUMBER


def _moment_by_values(values: list[Any]) -> _Kind:
    first = values[0] if values else None
    if isinstance(first, str):
        try:
            first = datetime.fromisoformat(first)
        except ValueError:
            return MOMENT  # which tells of the value and its row
    return ZONED if isinstance(first, datetime) and first.tzinfo else MOMENT


def _declared(column: ReflectedColumn, backend: str) -> _Kind | _Choice:
    """What a table's column is said to hold. SQLite keeps no such promise, and takes words that it does not know for NUMERIC."""
    from sqlalchemy import types

    kind = column["type"]
    if isinstance(kind, types.ARRAY):
        return _by_values
    if isinstance(kind, types.DateTime):
        return _moment_by_values if backend == "sqlite" else (ZONED if kind.timezone else MOMENT)
    if isinstance(kind, types.Numeric) and not isinstance(kind, types.Float):
        return _number_by_values if backend == "sqlite" else NUMBER
    choices: tuple[tuple[type[Any], _Kind], ...] = (
        (types.Boolean, BOOLEAN),
        (types.Integer, WHOLE),
        (types.Numeric, NUMBER),
        (types.Float, NUMBER),
        (types.Date, MOMENT),
        (types.JSON, DOCUMENT),
        (types.LargeBinary, BINARY),
        (types.BINARY, BINARY),
        (types.VARBINARY, BINARY),
        (types.Uuid, PRINTED),
        (types.Time, PRINTED),
        (types.Interval, PRINTED),
        (types.String, TEXT),
    )
    return next((found for declared, found in choices if isinstance(kind, declared)), _by_values)


# ------------------------------------------------------------------ rows


def _read(place: _Place, table: str | None, query: str | None, batch_rows: int) -> Iterator[pa.RecordBatch]:
    place.what = f"query (={_short(query)})" if query is not None else "the database"
    with _connection(place) as connection:
        with place.telling("run"):
            result, reflected = _run(place, connection, table, query)
        with closing(result), place.telling("read"):
            yield from _batches(place, result.partitions(batch_rows), _columns(place, result, reflected))


def _run(
    place: _Place, connection: sqlalchemy.Connection, table: str | None, query: str | None
) -> tuple[sqlalchemy.CursorResult[Any], list[ReflectedColumn]]:
    """Start the read; what the database says of its columns, where one must ask."""
    import sqlalchemy

    backend = connection.dialect.name
    # without parameters no % or : in a query means anything
    options = {"stream_results": True, "no_parameters": True, "sqlite_raw_colnames": True}
    reflected: list[ReflectedColumn] = []
    if query is None:
        schema, name = _choose(place, connection, table)
        place.what = f"table {'.'.join(filter(None, (schema, name)))!r}"
        reflected = _reflected(connection, name, schema)
    elif backend == "sqlite":  # its cursors tell no types; its views do
        connection.exec_driver_sql(f"CREATE TEMP VIEW {PROBE} AS {query}")
        reflected = _reflected(connection, PROBE, "temp")
    if backend == "sqlite":
        connection.exec_driver_sql("PRAGMA query_only=ON")
    if query is None:
        # columns without types: values come as the driver makes them, and _Kind tells which of them do not fit
        rows = sqlalchemy.table(name, *(sqlalchemy.column(column["name"]) for column in reflected), schema=schema)
        result = connection.execute(sqlalchemy.select(*rows.c), execution_options={**options, "no_parameters": False})
    else:
        result = connection.exec_driver_sql(query, execution_options=options)
    return result, reflected


def _columns(place: _Place, result: sqlalchemy.CursorResult[Any], reflected: Sequence[ReflectedColumn]) -> dict[str, _Kind | _Choice]:
    """The columns of what is read, and what each holds or how that is found out."""
    names = list(result.keys())
    twice = sorted({column for column in names if names.count(column) > 1})
    if twice or not names or "" in names:
        problem = f"has two columns {twice[0]!r}" if twice else "has a column without a name" if names else "has no columns"
        raise DataError(f"{place} {problem}; give each column one name of its own: SELECT a.id AS a_id, ...")
    backend = place.address.get_backend_name()
    description: Any = result.cursor.description if result.cursor is not None else None
    kinds: list[_Kind | _Choice]
    if backend == POSTGRES:
        kinds = [POSTGRES_CODES.get(entry[1], PRINTED) for entry in description]
    elif reflected:
        kinds = [_declared(column, backend) for column in reflected]
    elif backend in MYSQL and description:
        kinds = [MYSQL_CODES.get(entry[1], _by_values) for entry in description]
    else:
        kinds = [_by_values] * len(names)
    return dict(zip(names, kinds, strict=True))


def _choose(place: _Place, connection: sqlalchemy.Connection, table: str | None) -> tuple[str | None, str]:
    """The schema (None: the default one) and name of a table."""
    import sqlalchemy

    inspector = sqlalchemy.inspect(connection)
    if table is not None:
        schema, _, name = table.rpartition(".")
        if inspector.has_table(table):
            return None, table
        if schema and (schema in inspector.get_schema_names() or "." in schema) and inspector.has_table(name, schema):
            return schema, name
    found: list[tuple[str | None, str]] = [(None, name) for name in inspector.get_table_names()]
    if connection.dialect.name == POSTGRES:
        others = sorted({*inspector.get_schema_names()} - {inspector.default_schema_name, "information_schema"})
        found += [(schema, name) for schema in others for name in inspector.get_table_names(schema)]
    if table is None and len(found) == 1:
        return found[0]
    names = _listed(sorted(f"{schema}.{name}" if schema else name for schema, name in found))
    if table is not None:
        raise DataError(f"table (={table!r}) is not in {hidden(place.url)}; its tables are: {names}")
    raise DataError(f"{hidden(place.url)} has {len(found)} tables; name one as table, or give a query. Its tables are: {names}")


def _reflected(connection: sqlalchemy.Connection, name: str, schema: str | None) -> list[ReflectedColumn]:
    import warnings

    import sqlalchemy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sqlalchemy.exc.SAWarning)  # types that it does not know; their values tell
        return sqlalchemy.inspect(connection).get_columns(name, schema)


def _batches(place: _Place, parts: Iterable[Sequence[Any]], columns: dict[str, _Kind | _Choice]) -> Iterator[pa.RecordBatch]:
    chunks = (tuple(zip(*rows, strict=True)) for rows in parts)
    ahead: list[tuple[tuple[Any, ...], ...]] = []
    untold = {index for index, kind in enumerate(columns.values()) if not isinstance(kind, _Kind)}
    while (untold or not ahead) and len(ahead) < READ_AHEAD:
        chunk = next(chunks, None)
        if chunk is None:
            break
        ahead.append(chunk)
        untold = {index for index in untold if all(value is None for value in chunk[index])}
    kinds = [
        kind if isinstance(kind, _Kind) else kind([value for chunk in ahead for value in chunk[index] if value is not None])
        for index, kind in enumerate(columns.values())
    ]
    schema = pa.schema([(name, kind.arrow) for name, kind in zip(columns, kinds, strict=True)])
    if not ahead:
        yield pa.RecordBatch.from_pylist([], schema)
    for chunk in itertools.chain(_emptied(ahead), chunks):
        arrays = [_array(place, name, kind, values) for name, kind, values in zip(columns, kinds, chunk, strict=True)]
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        place.rows += batch.num_rows
        yield batch


def _emptied(ahead: list[Any]) -> Iterator[Any]:
    while ahead:
        yield ahead.pop(0)


def _array(place: _Place, column: str, kind: _Kind, values: Iterable[Any]) -> pa.Array:
    def made(values: Iterable[Any]) -> pa.Array:
        return pa.array([value if value is None or type(value) in kind.plain else kind.one(value) for value in values], kind.arrow)

    wrong = (TypeError, ValueError, ArithmeticError, NotImplementedError)
    try:
        array = made(values)
    except wrong as error:
        for row, value in enumerate(values, place.rows + 1):
            try:
                made([value])
            except wrong:
                raise DataError(
                    f"column {column!r} of {place} holds {_short(value)} ({type(value).__name__}) in row {row}, where the others are "
                    f"{kind.words} ({kind.arrow}); mend that row, or CAST the column in a query"
                ) from None
        raise DataError(f"column {column!r} of {place} does not become {kind.arrow}: {error}") from error
    if isinstance(array, pa.ChunkedArray):  # more than 2 GiB of text
        raise DataError(f"column {column!r} of {place} has too much text for one batch; pass a smaller batch_rows")
    return array
