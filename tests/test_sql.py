"""Reading from SQL databases: SQLite, and a PostgreSQL server of the tests' own where its programs are installed."""

from __future__ import annotations

import builtins
import hashlib
import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from anyfit.data.sql import READ_AHEAD, hidden, read_sql
from anyfit.errors import DataError, MissingExtra, RunError

pytest.importorskip("sqlalchemy", reason="the extra `sql` is not installed")


def rows_of(url: str, **given: Any) -> pa.Table:
    return pa.Table.from_batches(list(read_sql(url, **given)))


def lite(path: Path, *statements: str) -> str:
    """A database with these statements done; its URL."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return f"sqlite:///{path}"


PEOPLE = (
    """CREATE TABLE people (id INTEGER PRIMARY KEY, age INT, height REAL, price NUMERIC(8, 2), alive BOOLEAN, born DATE, seen DATETIME,
    name VARCHAR(20), photo BLOB, more JSON, none TEXT, loose)""",
    "INSERT INTO people VALUES (1, 30, 1.5, 3, 1, '2001-02-03', '2024-05-06 07:08:09.000010', 'Ä', x'00ff', '{\"a\": 1}', NULL, 5)",
    "INSERT INTO people VALUES (2, NULL, NULL, 3.25, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL)",
)
PEOPLE_SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "age": pa.int64(),
        "height": pa.float64(),
        "price": pa.float64(),
        "alive": pa.bool_(),
        "born": pa.timestamp("us"),
        "seen": pa.timestamp("us"),
        "name": pa.string(),
        "photo": pa.binary(),
        "more": pa.string(),
        "none": pa.string(),
        "loose": pa.int64(),
    }
)


@pytest.fixture
def people(tmp_path: Path) -> str:
    return lite(tmp_path / "people of 50%.db", *PEOPLE)


# ------------------------------------------------------------------ SQLite: what is read


@pytest.mark.parametrize("given", [{}, {"table": "people"}, {"table": "main.people"}, {"query": "SELECT * FROM people ORDER BY id"}])
def test_a_table_and_a_query_give_the_declared_types(people: str, given: dict[str, str]) -> None:
    table = rows_of(people, **given)
    assert table.schema == PEOPLE_SCHEMA
    assert table.to_pylist() == [
        {
            "id": 1,
            "age": 30,
            "height": 1.5,
            "price": 3.0,
            "alive": True,
            "born": datetime(2001, 2, 3),  # noqa: DTZ001 - without a zone, as stored
            "seen": datetime(2024, 5, 6, 7, 8, 9, 10),  # noqa: DTZ001
            "name": "Ä",
            "photo": b"\x00\xff",
            "more": '{"a": 1}',
            "none": None,
            "loose": 5,
        },
        {**dict.fromkeys(PEOPLE_SCHEMA.names), "id": 2, "price": 3.25, "alive": False},
    ]


def test_a_view_and_odd_names_are_read(tmp_path: Path) -> None:
    url = lite(
        tmp_path / "odd.db",
        'CREATE TABLE "a.b; DROP" ("50%" INTEGER, "x.y" TEXT, "a b" TEXT, "c"":d" TEXT)',
        "INSERT INTO \"a.b; DROP\" VALUES (1, 'p', '%s', ':name')",
        'CREATE VIEW seen AS SELECT "50%" AS half FROM "a.b; DROP"',
    )
    expected = [{"50%": 1, "x.y": "p", "a b": "%s", 'c":d': ":name"}]
    assert rows_of(url).to_pylist() == rows_of(url, table="a.b; DROP").to_pylist() == expected
    assert rows_of(url, query='SELECT * FROM [a.b; DROP] WHERE "a b" LIKE \'%s%\' AND "c"":d" = \':name\'').to_pylist() == expected
    assert rows_of(url, table="seen").to_pylist() == [{"half": 1}]


def test_batches_have_one_schema_and_all_rows(tmp_path: Path) -> None:
    url = lite(
        tmp_path / "many.db",
        "CREATE TABLE t (a INTEGER, b)",
        "INSERT INTO t WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000) SELECT i, iif(i > 500, 'x', NULL) FROM n",
    )
    batches = list(read_sql(url, batch_rows=300))
    assert [batch.num_rows for batch in batches] == [300, 300, 300, 100]
    assert {str(batch.schema) for batch in batches} == {"a: int64\nb: string"}  # `b` is known by its 501st row
    assert pa.Table.from_batches(batches)["a"].to_pylist() == list(range(1, 1001))
    assert pa.Table.from_batches(batches)["b"].null_count == 500


def test_types_of_expressions_come_from_the_values(people: str) -> None:
    query = "SELECT age * 2 AS twice, height * 1.5 AS half, age / 2.0 AS mixed, NULL AS none, name || '!' AS loud FROM people"
    kinds = {"twice": pa.int64(), "half": pa.float64(), "mixed": pa.float64(), "none": pa.null(), "loud": pa.string()}
    assert rows_of(people, query=query).select(["half", "mixed", "none", "loud"]).schema == pa.schema(
        {name: kind for name, kind in kinds.items() if name != "twice"}  # newer versions of SQLite call the product NUMERIC
    )
    assert rows_of(people, query="VALUES (1, 2.5), (2, 3)").schema.types == [pa.int64(), pa.float64()]


def test_no_rows_still_give_a_schema(people: str) -> None:
    (batch,) = read_sql(people, query="SELECT * FROM people WHERE id > 9")
    assert batch.num_rows == 0
    assert batch.schema.remove(11) == PEOPLE_SCHEMA.remove(11)
    assert batch.schema.field("loose").type == pa.null()


def test_times_with_a_zone_become_utc(tmp_path: Path) -> None:
    url = lite(
        tmp_path / "zones.db",
        "CREATE TABLE t (at DATETIME)",
        "INSERT INTO t VALUES ('2024-01-01T12:00:00+02:00'), ('2024-01-01 12:00:00Z')",
    )
    table = rows_of(url)
    assert table.schema.field("at").type == pa.timestamp("us", "UTC")
    assert [value.hour for value in table["at"].to_pylist()] == [10, 12]


def test_a_database_in_write_ahead_mode_is_read(tmp_path: Path) -> None:
    path = tmp_path / "wal.db"
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("CREATE TABLE t (a INTEGER)")
        writer.execute("INSERT INTO t VALUES (1)")
        writer.commit()
        assert rows_of(f"sqlite:///{path}").num_rows == 1
    assert rows_of(f"sqlite:///file:{path}?uri=true").num_rows == 1


# ------------------------------------------------------------------ SQLite: what does not fit

LAST = 1_000_000


def test_a_value_of_another_type_is_told_by_column_row_and_value(tmp_path: Path) -> None:
    url = lite(
        tmp_path / "typed.db",
        "CREATE TABLE t (id INTEGER PRIMARY KEY, age INTEGER)",
        f"INSERT INTO t WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {LAST}) "
        f"SELECT i, iif(i < {LAST}, i % 90, 'unknown') FROM n",
    )
    batches = read_sql(url)
    assert sum(next(batches).num_rows for _ in range(LAST // 65536)) == LAST // 65536 * 65536
    with pytest.raises(DataError, match=r"column 'age' of table 't' of .* holds 'unknown' \(str\) in row 1000000, .*int64.* CAST"):
        next(batches)


@pytest.mark.parametrize(
    ("declared", "first", "second", "message"),
    [
        ("INTEGER", "1", "1.5", r"holds 1\.5 \(float\) in row 2, where the others are a whole number"),
        ("REAL", "1.0", "'1,5'", r"holds '1,5' \(str\) in row 2, where the others are a number"),
        ("NUMERIC", "1", "'n/a'", r"holds 'n/a' \(str\) in row 2, where the others are a number"),
        ("BOOLEAN", "1", "2", r"holds 2 \(int\) in row 2, where the others are true or false"),
        ("DATE", "'2024-01-01'", "'01.02.2024'", r"holds '01\.02\.2024' \(str\) in row 2, where the others are a date"),
        ("DATE", "NULL", "1700000000", r"holds 1700000000 \(int\) in row 2, where the others are a date"),
        ("DATETIME", "'2024-01-01'", "'2024-01-01T00:00Z'", r"in row 2, where the others are .*without a time zone"),
        ("TEXT", "'a'", "x'00'", r"holds b'\\x00' \(bytes\) in row 2, where the others are text"),
        ("", "1", "'a'", r"holds 'a' \(str\) in row 2, where the others are a whole number"),
        ("", "'a'", "1", r"holds 1 \(int\) in row 2, where the others are text"),
    ],
)
def test_each_type_tells_of_what_does_not_fit(tmp_path: Path, declared: str, first: str, second: str, message: str) -> None:
    url = lite(tmp_path / "t.db", f"CREATE TABLE t (c {declared})", f"INSERT INTO t VALUES ({first}), ({second})")
    with pytest.raises(DataError, match=f"column 'c' of table 't' .*{message}"):
        rows_of(url)


def test_a_value_after_many_nulls_is_told(tmp_path: Path) -> None:
    url = lite(tmp_path / "t.db", "CREATE TABLE t (c)", f"INSERT INTO t VALUES {'(NULL), ' * READ_AHEAD} (5)")
    with pytest.raises(DataError, match=rf"holds 5 \(int\) in row {READ_AHEAD + 1}, where the others are NULL"):
        list(read_sql(url, batch_rows=1))
    assert rows_of(url, batch_rows=2)["c"].to_pylist()[-1] == 5


def test_text_in_a_column_of_an_unknown_type_is_text(tmp_path: Path) -> None:
    url = lite(tmp_path / "t.db", "CREATE TABLE t (c STRING)", "INSERT INTO t VALUES (NULL), ('a')")
    assert rows_of(url).schema.field("c").type == pa.string()  # SQLite and SQLAlchemy take STRING for a number


def test_text_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    url = lite(tmp_path / "t.db", "CREATE TABLE t (c TEXT)", "INSERT INTO t VALUES (CAST(x'ff' AS TEXT))")
    with pytest.raises(DataError, match=r"table 't' .* cannot be .*: Could not decode to UTF-8 column 'c'"):
        rows_of(url)


def test_columns_need_one_name_each(people: str) -> None:
    with pytest.raises(DataError, match=r"has two columns 'id'; give each column one name"):
        rows_of(people, query="SELECT a.id, b.id FROM people a JOIN people b ON a.id = b.id")


def test_the_table_is_named_where_there_are_several(tmp_path: Path, people: str) -> None:
    url = lite(tmp_path / "two.db", "CREATE TABLE one (a)", "CREATE TABLE two (a)")
    with pytest.raises(DataError, match=r"two\.db has 2 tables; name one as table, or give a query\. Its tables are: one, two"):
        rows_of(url)
    for name in ("three", "other.one", "one.two.three", "one; DROP TABLE two"):
        with pytest.raises(DataError, match=rf"table \(='{name}'\) is not in .*two\.db; its tables are: one, two"):
            rows_of(url, table=name)
    with pytest.raises(DataError, match=r"empty\.db has 0 tables; .*: none"):
        rows_of(lite(tmp_path / "empty.db"))


def test_what_is_given_is_checked_at_the_call(people: str, tmp_path: Path) -> None:
    for message, url, given in [
        (r"batch_rows \(=0\) must be at least 1", people, {"batch_rows": 0}),
        (r"table \(='a'\) and query \(='SELECT 1'\) are both given", people, {"table": "a", "query": "SELECT 1"}),
        (r"names .*missing\.db, which is no file", f"sqlite:///{tmp_path}/missing.db", {}),
        (r"in memory; give the path of a file", "sqlite://", {}),
        (r"is no SQLAlchemy URL", "people.db", {}),
        (r"has a second @; write the one in the password as %40", "postgresql://me:p@ss@host/db", {}),
    ]:
        with pytest.raises(DataError, match=message):
            read_sql(url, **given)
    assert not (tmp_path / "missing.db").exists()


def test_a_file_that_is_no_database_or_is_missing_by_uri_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at as one\n" * 99)
    with pytest.raises(DataError, match="file is not a database"):
        rows_of(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(DataError, match="unable to open database file"):
        rows_of(f"sqlite:///file:{tmp_path}/missing.db?uri=true")
    assert not (tmp_path / "missing.db").exists()


# ------------------------------------------------------------------ what would write

WRITES = [
    ("INSERT INTO people (id) VALUES (9)", "is a INSERT statement"),
    ("UPDATE people SET age = 0", "is a UPDATE statement"),
    ("delete from people", "is a DELETE statement"),
    ("CREATE TABLE other AS SELECT * FROM people", "is a CREATE statement"),
    ("/* a /* b */ */ DROP TABLE people", "is a DROP statement"),
    ("-- SELECT\nDROP TABLE people", "is a DROP statement"),
    ("SELECT 1; DELETE FROM people", "holds several statements"),
    ("SELECT ';' AS a; -- ;\n COMMIT; DELETE FROM people;", "holds several statements"),
    ("WITH gone AS (DELETE FROM people RETURNING *) SELECT * FROM gone", r"would write \(DELETE\)"),
    ("WITH a AS (SELECT 1) INSERT INTO people (id) SELECT 9", r"would write \(INSERT\)"),
    ("SELECT * INTO other FROM people", r"would write \(INTO\)"),
    ("SELECT * FROM people FOR UPDATE", r"would write \(UPDATE\)"),
    ("EXPLAIN SELECT 1", "is a EXPLAIN statement"),
    ("SELECT 'it''s", "has a quote that does not end"),
    ("SELECT 1\0", "holds no statement"),
    (" ; -- nothing", "is no statement|holds no statement|several statements"),
]


@pytest.mark.parametrize(("query", "message"), WRITES)
def test_a_query_that_writes_is_refused_by_name(people: str, query: str, message: str) -> None:
    before = Path(people.removeprefix("sqlite:///")).read_bytes()
    for url in (
        people,
        "postgresql://nobody@127.0.0.1:1/none",
        "mssql+pyodbc://nobody@127.0.0.1/none",
        "mysql+pymysql://nobody@127.0.0.1/none",
    ):
        if "/* a /*" in query and not url.startswith(("sqlite", "postgresql")):
            continue  # comments that nest are not for all, see below
        with pytest.raises(DataError, match=message):
            read_sql(url, query=query)
    assert Path(people.removeprefix("sqlite:///")).read_bytes() == before


@pytest.mark.parametrize("query", ["PRAGMA user_version = 5", "ATTACH '{folder}/new.db' AS new", "VACUUM INTO '{folder}/new.db'"])
def test_sqlite_statements_that_write_are_refused(people: str, tmp_path: Path, query: str) -> None:
    with pytest.raises(DataError, match=f"is a {query.partition(' ')[0]} statement, and data is only read"):
        read_sql(people, query=query.format(folder=tmp_path))
    assert not (tmp_path / "new.db").exists()


def test_sqlite_itself_refuses_to_write(people: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyfit.data.sql._only_reads", lambda query, backend: query)
    for query in ("DELETE FROM people", "PRAGMA user_version = 5", "SELECT 1; DELETE FROM people"):
        with pytest.raises(DataError, match="cannot be run"):
            rows_of(people, query=query)
    assert rows_of(people).num_rows == 2


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 'INSERT; DELETE' AS \"update\" FROM people -- ; DROP",
        "select replace(name, 'a', 'b') as a, /* ; delete */ 1 as b from people;;",
        "(SELECT 1 AS a)",
        "WITH deleted AS (SELECT * FROM people) SELECT * FROM deleted",
        "VALUES (1, 'DROP')",
        "TABLE people",
        r"SELECT E'\'; DELETE' AS a, $a$ '; DELETE $$ $a$ AS b, a$1 /* /* ; */ ; */ FROM people WHERE a ~ '\d+\' ",
    ],
)
def test_words_in_quotes_and_comments_write_nothing(query: str) -> None:
    read_sql("postgresql://nobody@127.0.0.1:1/none", query=query)


@pytest.mark.parametrize(
    "query",
    [
        r"SELECT '\'; DELETE FROM people; -- '",  # a backslash escapes for some
        "SELECT 1 # '\n; DELETE FROM people -- '",  # a comment for some
        "SELECT 1 --'\n; DELETE FROM people -- '",  # no comment for some
        "SELECT 1 /*! ; DELETE FROM people */",  # not even that for some
        "SELECT $$'$$ ; DELETE FROM people -- '",
        "SELECT `'` ; DELETE FROM people -- '",
        "SELECT ['] ; DELETE FROM people -- '",
        "SELECT q'!it's!' ; DELETE FROM people -- '",
        "SELECT 1 EXEC wipe",
        "SELECT 1 TRUNCATE TABLE people",
    ],
)
def test_where_the_database_cannot_forbid_writes_doubt_refuses(query: str) -> None:
    with pytest.raises(DataError, match=r"holds several statements|would write"):
        read_sql("mssql+pyodbc://nobody@127.0.0.1/none", query=query)


# ------------------------------------------------------------------ passwords and drivers


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql+psycopg://me:s:e/c@r?e#t@host/db", "postgresql+psycopg://me:***@host/db"),
        ("mysql://me@host/db?password=secret&charset=utf8", "mysql://me@host/db?password=***&charset=utf8"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dsecret", "mssql+pyodbc:///?odbc_connect=***"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:///C:/data/a@b.db", "sqlite:///C:/data/a@b.db"),
    ],
)
def test_passwords_are_hidden(url: str, shown: str) -> None:
    assert hidden(url) == shown


@pytest.mark.parametrize("url", ["postgresql://me:se%20cret@127.0.0.1:1/db", "postgresql://me@127.0.0.1:1/db?password=se%20cret"])
def test_errors_hold_no_password(url: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(DataError, match="cannot be opened") as told:
        list(read_sql(url))
    chain: BaseException | None = told.value
    while chain is not None:
        assert "se cret" not in str(chain) and "se%20cret" not in str(chain)
        chain = chain.__cause__


def test_what_is_not_installed_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, message in [
        ("mysql://me:secret@host/db", r"mysql://me:\*\*\*@host/db.* needs the driver MySQLdb, .* pip install mysqlclient"),
        ("oracle+oracledb://me:secret@host/db", r"needs the driver oracledb, .* pip install oracledb"),
        ("nosuch://me:secret@host/db", r"asks for nosuch, which SQLAlchemy does not know here"),
    ]:
        with pytest.raises(DataError, match=message):
            list(read_sql(url))
    original = builtins.__import__

    def without(*missing: str) -> Any:
        def imported(name: str, *rest: Any) -> Any:
            if name.partition(".")[0] in missing:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return original(name, *rest)

        return imported

    monkeypatch.setattr(builtins, "__import__", without("psycopg"))
    with pytest.raises(MissingExtra, match=r"psycopg is not installed; run: pip install 'anyfit\[sql\]'"):
        list(read_sql("postgresql://me:secret@host/db"))
    monkeypatch.setattr(builtins, "__import__", without("sqlalchemy"))
    with pytest.raises(MissingExtra, match=r"sqlalchemy is not installed; run: pip install 'anyfit\[sql\]'"):
        read_sql("sqlite:///a.db")


# ------------------------------------------------------------------ PostgreSQL


def programs() -> Path | None:
    """The folder of PostgreSQL's server programs, the newest version first; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name), reverse=True)
    return next((folder for folder in [*([Path(found).parent] if found else []), *folders] if (folder / "initdb").exists()), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a server that lives as long as the tests do."""
    pytest.importorskip("psycopg")
    folder = programs()
    if folder is None:
        pytest.skip("no PostgreSQL server here (its initdb is neither on the PATH nor in /usr/lib/postgresql)")
    root = os.geteuid() == 0  # whom PostgreSQL's programs refuse
    if root and (shutil.which("runuser") is None or subprocess.run(["id", "postgres"], capture_output=True, check=False).returncode != 0):
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres (or no runuser) to run it")

    def run(*command: str) -> None:
        done = subprocess.run(
            [*(["runuser", "-u", "postgres", "--"] if root else []), *command],
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"

    # not pytest's folder, which other users may not enter, and whose name may be too long for a socket
    with tempfile.TemporaryDirectory(prefix="anyfit-") as home:
        if root:
            shutil.chown(home, "postgres")
        data, port = f"{home}/data", free_port()
        run(str(folder / "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=20 -c timezone=Asia/Tokyo"
        run(str(folder / "pg_ctl"), "-D", data, "-l", f"{home}/log", "-w", "-o", options, "start")
        try:
            yield f"postgresql://postgres:secret@127.0.0.1:{port}/postgres"
        finally:
            run(str(folder / "pg_ctl"), "-D", data, "-w", "-m", "immediate", "stop")


@contextmanager
def session(url: str) -> Iterator[Any]:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty database of this test's own."""
    name = "test_" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    with session(server) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield f"{server.rpartition('/')[0]}/{name}"
    with session(server) as connection:
        connection.execute(f"DROP DATABASE {name}")  # refused where a connection was left open


def done(url: str, *statements: str) -> None:
    with session(url) as connection:
        for statement in statements:
            connection.execute(statement)


TYPED = """
    CREATE TABLE typed (
        small smallint, big bigint, real real, price numeric(20, 4), yes boolean, day date, at timestamp, zoned timestamptz, name text,
        code varchar(5), raw bytea, document jsonb, plain json, id uuid, tags text[], counts int[], mood mood, lasts interval,
        moods mood[], none text, clock time
    )
"""
FILLED = """
    INSERT INTO typed VALUES (
        1, 9007199254740993, 0.5, 12345.6789, true, '2001-02-03', '2024-05-06 07:08:09.00001', '2024-05-06 07:08:09+02', 'Ä', 'ab', '\\x00ff',
        '{"a": [1, 2.50]}', '{"a":  1.0}', '6a2f41a3-c54c-fce8-32d2-0324e1c32e22', '{a,NULL,"b c"}', '{1,2}', 'sad', '1 day', '{sad}', NULL, '01:02'
    )
"""
TYPED_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("small", "big"), pa.int64()),
        **dict.fromkeys(("real", "price"), pa.float64()),
        "yes": pa.bool_(),
        **dict.fromkeys(("day", "at"), pa.timestamp("us")),
        "zoned": pa.timestamp("us", "UTC"),
        **dict.fromkeys(("name", "code"), pa.string()),
        "raw": pa.binary(),
        **dict.fromkeys(("document", "plain", "id"), pa.string()),
        "tags": pa.list_(pa.string()),
        "counts": pa.list_(pa.int64()),
        **dict.fromkeys(("mood", "lasts", "moods", "none", "clock"), pa.string()),
    }
)


@pytest.mark.parametrize(
    "given", [{}, {"table": "typed"}, {"table": "public.typed"}, {"query": "SELECT * FROM typed"}, {"query": "TABLE typed"}]
)
def test_postgres_types(database: str, given: dict[str, str]) -> None:
    done(database, "CREATE TYPE mood AS ENUM ('sad', 'glad')", TYPED)
    (empty,) = read_sql(database, **given)
    assert (empty.num_rows, empty.schema) == (0, TYPED_SCHEMA)
    done(database, FILLED, "INSERT INTO typed (price) VALUES ('NaN')")
    table = rows_of(database, **given)
    assert table.schema == TYPED_SCHEMA
    assert list(table.to_pylist()[0].values()) == [
        *(1, 9007199254740993, 0.5, 12345.6789, True),
        *(datetime(2001, 2, 3), datetime(2024, 5, 6, 7, 8, 9, 10), datetime(2024, 5, 6, 5, 8, 9, tzinfo=UTC)),  # noqa: DTZ001 - as stored
        *("Ä", "ab", b"\x00\xff", '{"a": [1, 2.50]}', '{"a":  1.0}', "6a2f41a3-c54c-fce8-32d2-0324e1c32e22", ["a", None, "b c"], [1, 2]),
        *("sad", "1 day, 0:00:00", "{sad}", None, "01:02:00"),
    ]
    second = table.to_pylist()[1]
    assert second.pop("price") != 0 and set(second.values()) == {None}


def test_postgres_tables_by_schema(database: str) -> None:
    done(database, "CREATE SCHEMA shop", 'CREATE TABLE shop."Sales; of 50%" ("a%" int)', 'INSERT INTO shop."Sales; of 50%" VALUES (7)')
    for given in ({}, {"table": "shop.Sales; of 50%"}):
        assert rows_of(database, **given).to_pylist() == [{"a%": 7}]
    done(database, "CREATE TABLE one (a int)")
    with pytest.raises(DataError, match=r"has 2 tables; .*: one, shop\.Sales; of 50%") as told:
        rows_of(database)
    assert "secret" not in str(told.value)
    for missing in ("Sales; of 50%", "two.one", "shop.one"):
        with pytest.raises(DataError, match=rf"table \(='{missing}'\) is not in .*: one, shop\.Sales; of 50%"):
            rows_of(database, table=missing)


def test_postgres_queries_keep_percent_signs_and_colons(database: str) -> None:
    query = "SELECT 'a%sb%(x)s%%' AS a, '1'::int AS b, ':name' AS c, 7 % 4 AS d WHERE 'abc' LIKE '%b%' -- 50%"
    assert rows_of(database, query=query).to_pylist() == [{"a": "a%sb%(x)s%%", "b": 1, "c": ":name", "d": 3}]


def test_postgres_streams_through_a_cursor_of_the_server(server: str) -> None:
    # a server that made all rows first would need hours and fill the disk
    batches = read_sql(server, query="SELECT generate_series(1, 100000000000) AS i, repeat('x', 100) AS text", batch_rows=1000)
    assert next(batches)["i"].to_pylist() == list(range(1, 1001))
    with session(server) as connection:
        read_only, isolation = connection.execute(
            "SELECT count(*), max(query) FROM pg_stat_activity WHERE query LIKE 'FETCH FORWARD %' AND state = 'idle in transaction'"
        ).fetchone()
        assert read_only == 1, isolation
    batches.close()
    with session(server) as connection:
        others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        assert connection.execute(others).fetchone() == (0,)


def test_postgres_reads_one_snapshot_and_only_reads(database: str) -> None:
    done(database, "CREATE TABLE t (a int)", "INSERT INTO t SELECT generate_series(1, 100)")
    query = "SELECT a, current_setting('transaction_read_only') AS ro, current_setting('transaction_isolation') AS level FROM t ORDER BY a"
    batches = read_sql(database, query=query, batch_rows=10)
    first = next(batches)
    done(database, "DELETE FROM t")
    rest = [value for batch in batches for value in batch["a"].to_pylist()]
    assert len(first) + len(rest) == 100
    assert first.to_pylist()[0] == {"a": 1, "ro": "on", "level": "repeatable read"}


def test_postgres_refuses_a_function_that_writes(database: str) -> None:
    done(
        database,
        "CREATE TABLE t (a int)",
        "CREATE SEQUENCE numbers",
        "CREATE FUNCTION wipe() RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES (1) RETURNING a'",
    )
    for call in ("wipe()", "nextval('numbers')", "set_config('transaction_read_only', 'off', true)"):
        with pytest.raises(DataError, match=r"would write, and the database refused it|must be set before any query") as told:
            rows_of(database, query=f"SELECT {call} AS a")
        assert call in str(told.value)
    assert rows_of(database, table="t").num_rows == 0


@pytest.mark.parametrize(
    "query", ["SELECT 1; COMMIT; DELETE FROM t", "DELETE FROM t", "WITH x AS (DELETE FROM t RETURNING *) TABLE x", "DROP TABLE t"]
)
def test_postgres_itself_refuses_to_write(database: str, monkeypatch: pytest.MonkeyPatch, query: str) -> None:
    done(database, "CREATE TABLE t (a int)", "INSERT INTO t VALUES (1)")
    monkeypatch.setattr("anyfit.data.sql._only_reads", lambda query, backend: query)
    with pytest.raises(DataError, match="cannot be run"):
        rows_of(database, query=query)
    assert rows_of(database).num_rows == 1


def test_postgres_that_goes_away_stops_the_read(server: str) -> None:
    batches = read_sql(server, query="SELECT i FROM generate_series(1, 1000000) AS i", batch_rows=1000)
    assert next(batches).num_rows == next(batches).num_rows == 1000
    with session(server) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
    with pytest.raises(
        RunError, match=r"generate_series.* of postgresql://postgres:\*\*\*@.* broke after 2000 rows: .*; nothing was trained"
    ) as told:
        list(batches)
    assert "start again, or export the rows to a Parquet file" in str(told.value)
    assert list(batches) == []


def test_postgres_errors_are_told(database: str) -> None:
    for query, message in [
        ("SELECT * FROM nowhere", r"cannot be run: relation \"nowhere\" does not exist"),
        ("SELECT 1 AS a, 2 AS a", r"has two columns 'a'"),
        ("SELECT", r"has no columns"),
        ("SELECT 100 / (i - 15) AS a FROM generate_series(1, 20) AS i", r"cannot be read \(after 10 rows\): division by zero"),
        ("SELECT 'infinity'::timestamp AS a", r"timestamp too large"),
        ("SELECT pg_sleep(i) AS a FROM generate_series(0, 9) AS i", r"broke after 0 rows: canceling statement due to statement timeout"),
    ]:
        with pytest.raises((DataError, RunError), match=message):
            list(read_sql(database + "?options=-c%20statement_timeout%3D500", query=query, batch_rows=10))
    with pytest.raises(DataError, match=r"the database of .*/nowhere cannot be opened: .*\"nowhere\" does not exist"):
        rows_of(database.rpartition("/")[0] + "/nowhere")
