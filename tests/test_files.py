"""Files of every kind become one table, and what is wrong in one is told by file, column, row and value."""

from __future__ import annotations

import gzip
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyfit import Source
from anyfit.data import files, infer_schema, read_splits, statistics
from anyfit.data.blocks import hold
from anyfit.data.files import Files, expand, kind_of
from anyfit.errors import DataError

TEXT = "n,word,x\n1,één,2.5\n2,twee,\n3,drie,-1e3\n"
ROWS = [{"n": 1, "word": "één", "x": 2.5}, {"n": 2, "word": "twee", "x": None}, {"n": 3, "word": "drie", "x": -1000.0}]


def read(path: Any, **fields: Any) -> pa.Table:
    return Source(path, **fields).read()["train"]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def arrow_file(path: Path, stream: bool) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "w") as sink, (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


# Kinds


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_delimiter_mark_and_utf_16_are_found_out(delimiter: str, encoding: str, tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", TEXT.replace(",", delimiter).encode(encoding))
    assert read(path).to_pylist() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "fields"),
    [
        ("t.tsv", TEXT.replace(",", "\t").encode(), {}),
        ("t.csv", TEXT.replace(",", "~").encode(), {"delimiter": "~"}),
        ("t.csv", TEXT.encode("latin-1"), {"encoding": "latin-1"}),
        ("t.csv", TEXT.encode("utf-16-le"), {"encoding": "utf-16-le"}),
        ("t.csv.gz", gzip.compress(TEXT.encode()), {}),
        ("t.csv.gz", gzip.compress(TEXT.encode()[:20]) + gzip.compress(TEXT.encode()[20:]), {}),
        ("T.CSV.ZST", pa.compress(TEXT.encode(), codec="zstd", asbytes=True), {}),
        ("a.tsv.notes.csv", TEXT.encode(), {}),
        ("t.csv", b"\n\n" + TEXT.replace("\n", "\r\n").encode(), {}),
        ("t.csv", TEXT.replace("twee", "NVT").replace("één", "één").encode(), {"missing": ["NVT"]}),
        ("t.jsonl", "\n".join(map(json.dumps, ROWS)).encode(), {}),
        ("t.ndjson.gz", gzip.compress(b"\xef\xbb\xbf" + "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()), {}),
    ],
    ids=range(12),
)
def test_text_formats_packed_and_encoded_give_the_same_rows(name: str, content: bytes, fields: dict[str, Any], tmp_path: Path) -> None:
    expected = [{**row, "word": None if row["word"] == "twee" and "missing" in fields else row["word"]} for row in ROWS]
    assert read(written(tmp_path, name, content), **fields).to_pylist() == expected


@pytest.mark.parametrize("missing", [(), ("twee",)])
@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow file", "arrow stream"])
def test_column_formats_give_the_same_rows_and_the_words_for_missing(kind: str, missing: tuple[str, ...], tmp_path: Path) -> None:
    table, path = pa.Table.from_pylist(ROWS), tmp_path / f"t.{kind.split(maxsplit=1)[0]}"
    table = table.set_column(1, "word", table["word"].dictionary_encode())
    if kind == "parquet":
        pa.parquet.write_table(table, path, row_group_size=2)
    elif kind == "feather":
        pa.feather.write_feather(table, str(path), compression="lz4")
    else:
        arrow_file(path, kind == "arrow stream")
    expected = [{**row, "word": None if row["word"] in missing else row["word"]} for row in ROWS]
    found = read(path, missing=missing)
    assert found.to_pylist() == expected and found.schema.field("word").type == pa.string()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_a_text_file_is_a_row_for_each_line_that_is_not_blank(encoding: str, tmp_path: Path) -> None:
    path = written(tmp_path, "t.txt", "één\n\n  twee \r\ndrie".encode(encoding))
    fields = {"encoding": encoding} if encoding == "latin-1" else {}
    assert read(path, **fields).to_pydict() == {"text": ["één", "twee", "drie"]}
    with pytest.raises(DataError, match=r"line 1 of .*bad\.txt, or one soon after, is not utf-8.*encoding='latin-1'"):
        read(written(tmp_path, "bad.txt", "één".encode("latin-1")))


def test_a_packed_text_file_of_many_lines_comes_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BATCH_ROWS", 4)
    path = written(tmp_path, "t.txt.gz", gzip.compress("\n".join(map(str, range(10))).encode()))
    assert [batch.num_rows for batch in Files([str(path)]).batches()] == [4, 4, 2]


# Several files


def test_lists_patterns_and_folders_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        written(tmp_path, f"part{index}.csv", f"a,b\n{index},x\n")
    written(tmp_path, ".hidden.csv", "c\n1\n")
    written(tmp_path, "._part0.csv", b"\x00\x05")
    for origin in (tmp_path, str(tmp_path / "part*.csv"), [tmp_path / "part[01].csv", str(tmp_path / "part2.csv")]):
        assert read(origin)["a"].to_pylist() == [0, 1, 2]
    assert Source([tmp_path / "part0.csv", tmp_path / "part1.csv"]).name == f"2 files from {tmp_path / 'part0.csv'}"


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.csv", "test.csv"], {"train": 1, "test": 1}),
        (["train-00000-of-00002.csv", "train-00001-of-00002.csv", "validation-00000-of-00001.csv"], {"train": 2, "validation": 1}),
        (["train.csv", "more.csv"], {"train": 2}),
        (["test.csv"], {"train": 1}),
    ],
)
def test_a_folder_whose_files_are_named_for_splits_has_them(names: list[str], splits: dict[str, int], tmp_path: Path) -> None:
    for name in names:
        written(tmp_path, name, "a\n1\n")
    assert {split: rows.num_rows for split, rows in Source(tmp_path).read().items()} == splits


def test_columns_in_another_order_are_one_table_and_other_columns_are_refused(tmp_path: Path) -> None:
    first, second = written(tmp_path, "1.csv", "a,b\n1,x\n"), written(tmp_path, "2.csv", "b,a\ny,2\n")
    assert read([first, second]).to_pydict() == {"a": [1, 2], "b": ["x", "y"]}
    for text, message in (("a\n1\n", "lacks the column 'b'"), ("a,b,c\n1,2,3\n", "has the column 'c'")):
        with pytest.raises(DataError, match=rf"3\.csv'\) {message}, unlike the first file"):
            read([first, written(tmp_path, "3.csv", text)])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1], [2.5], [1.0, 2.5]),
        ([2.5], [1], [2.5, 1.0]),
        ([None], [7], [None, 7]),
        ([1], ["x"], ["1", "x"]),
        (["x"], [1], ["x", "1"]),
        ([True], [5], ["true", "5"]),
        ([1], [None], [1, None]),
    ],
    ids=range(7),
)
def test_the_types_of_several_files_are_those_of_all_rows(
    kind: str, first: list[Any], second: list[Any], expected: list[Any], tmp_path: Path
) -> None:
    """And no value changes on the way: true is not 5."""
    paths = []
    for index, values in enumerate((first, second)):
        paths.append(tmp_path / f"{index}.{kind}")
        table = pa.table({"v": values, "w": [index]})
        (pa.csv.write_csv if kind == "csv" else pa.parquet.write_table)(table, paths[-1])
    assert read(paths)["v"].to_pylist() == expected


def test_moments_of_several_files_take_the_finer_unit_and_zones_do_not_mix(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.parquet" for index in range(3)]
    for path, kind, value in zip(paths, (pa.date32(), pa.timestamp("ms"), pa.timestamp("us")), (1, -1, 1), strict=True):
        pa.parquet.write_table(pa.table({"v": pa.array([value], pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)}), path)
    assert read(paths)["v"].type == pa.timestamp("us") and read(paths)["v"].cast(pa.int64()).to_pylist() == [86_400_000_000, -1000, 1]
    pa.parquet.write_table(pa.table({"v": pa.array([0], pa.timestamp("s", "UTC"))}), paths[2])
    assert read(paths)["v"].type == pa.string()


def test_kinds_and_what_paths_mean(tmp_path: Path) -> None:
    assert [kind_of(name) for name in ("a.CSV", "a.tsv.gz", "http://h/a.parquet?x=1.csv", "a.gz", "a", "b.jsonl.zst")] == [
        "csv",
        "csv",
        "parquet",
        None,
        None,
        "json",
    ]
    odd = written(tmp_path, "a[1].csv", "a\n1\n")
    assert expand(odd) == [str(odd)], "a file may have a name that looks like a pattern"
    for origin, message in ((tmp_path / "*.parquet", "matches no file"), (tmp_path / "x.csv", "does not exist")):
        with pytest.raises(DataError, match=message):
            expand(origin)
    for given_, message in (
        ([odd, tmp_path], "is a folder among several paths"),
        ([odd, written(tmp_path, "b.jsonl", "{}")], "files of several kinds"),
    ):
        with pytest.raises(DataError, match=message):
            read(given_)
    for fields, message in (
        ({"delimiter": ";;"}, "delimiter (=';;') must be one character"),
        ({"encoding": "klingon"}, "encoding (='klingon') is not known"),
        ({"size": (0, 3)}, "size (=(0, 3)) must be (height, width)"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            read(odd, **fields)


# A web server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            file = tmp_path / urllib.parse.urlparse(self.path).path.strip("/")
            self.send_response(200 if file.exists() else 404)
            self.end_headers()
            if file.exists():
                self.wfile.write(file.read_bytes())

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_a_url_is_fetched_once_and_read_as_its_ending_says(server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = server
    written(tmp_path, "t.csv.gz", gzip.compress(TEXT.encode()))
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    assert read(f"{url}/t.csv.gz?key=1").to_pylist() == ROWS and asked == ["/t.csv.gz?key=1"]
    assert read([f"{url}/t.parquet", f"{url}/t.parquet"]).to_pylist() == ROWS * 2


def test_a_url_that_is_not_there_says_so(server: tuple[str, list[str]]) -> None:
    url, _ = server
    with pytest.raises(DataError, match=rf"{re.escape(url)}/none\.csv'\) cannot be fetched: the server answers 404 Not Found"):
        read(f"{url}/none.csv")
    with pytest.raises(DataError, match=r"cannot be fetched: .*is the server up"):
        read("http://127.0.0.1:1/t.csv")


# A type that does not hold to the end


def types_of(path: Path, **fields: Any) -> dict[str, str]:
    return {field.name: str(field.type) for field in read(path, **fields).schema}


@pytest.mark.parametrize(
    ("first", "late", "kind"),
    [
        ("1", "2.5", "double"),
        ("1", "123456789012345678901234567890", "double"),
        ("", "7", "int64"),
        ("", "7.5", "double"),
        ("", "word", "string"),
        ("", "true", "bool"),
        ("true", "maybe", "string"),
        ("", "2020-01-02", "date32[day]"),
        ("2020-01-02", "2020-01-02 10:00:00", "timestamp[s]"),
        ("2020-01-02 10:00:00", "2020-01-02 10:00:00.5", "timestamp[ns]"),
        ("2020-01-02 10:00:00", "2020-01-02T10:00:00Z", "string"),
        ("2020-01-02", "soon", "string"),
        ("1.5", 'a "quoted" word', "string"),
    ],
    ids=range(13),
)
def test_a_type_is_that_of_all_rows_though_a_block_shows_the_first_only(
    first: str, late: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 200)
    quoted = '"' + late.replace('"', '""') + '"'
    path = written(tmp_path, "t.csv", "a,b\n" + f"{first},x\n" * 100 + f"{quoted},y\n" + f"{first},x\n" * 100)
    table = read(path)
    assert str(table["a"].type) == kind and table.num_rows == 201 and table["a"].null_count == (200 if not first else 0)
    if kind == "string":
        assert table["a"][100].as_py() == late


def test_a_word_far_down_a_column_of_numbers_is_named_with_its_row(tmp_path: Path) -> None:
    """At row one million; forcing the type or naming the word is the way out, as the message says."""
    rows = "\n".join(map(str, range(1000))) + "\n"
    path = written(tmp_path, "t.csv", "a\n" + rows * 1000 + "unknown\n" + rows)
    table = read(path)
    with pytest.raises(DataError, match=r"column 'a' holds numbers, but 'unknown' in row 1000001; name what stands for a missing value"):
        infer_schema(table, None)
    with pytest.raises(DataError, match=r"column 'a' is continuous but holds 'unknown' in row 1000001"):
        statistics(table, infer_schema(table, None, types={"a": "continuous"}))
    for part in read_splits(Source(path), 0.3, None, wants_validation=False).values():
        with pytest.raises(DataError, match=r"'unknown' in row 1000001"):  # of the file, whichever part it fell into
            infer_schema(part, None)
    assert infer_schema(table, None, types={"a": "categorical"})["a"].type == "categorical"
    assert types_of(path, missing=["unknown"]) == {"a": "int64"}


def test_a_change_of_type_in_json_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "JSON_BLOCK_BYTES", 300)
    monkeypatch.setattr(files, "BLOCK_BYTES", 300)
    path = written(tmp_path, "t.jsonl", '{"a": 1}\n' * 100 + '{"a": "x"}\n')
    with pytest.raises(DataError, match=r"column 'a' of .*t\.jsonl holds 'x' in row 101, unlike the number before it"):
        read(path)
    assert types_of(written(tmp_path, "u.jsonl", '{"a": 1}\n' * 100 + '{"a": 2.5}\n')) == {"a": "double"}
    long = written(tmp_path, "v.jsonl", '{"a": "' + "x" * 9000 + '"}\n{"a": "y"}\n')
    assert read(long).num_rows == 2


def test_nested_objects_are_refused_by_name_or_left_out(tmp_path: Path) -> None:
    table = read(written(tmp_path, "t.jsonl", '{"a": 1, "b": {"c": 2}}\n{"a": 2, "b": {"c": 3}}\n'))
    with pytest.raises(DataError, match=r"column 'b' holds struct<c: int64>, which has no semantic type; leave it out \(ignore\)"):
        infer_schema(table, None)
    assert [column.name for column in infer_schema(table, None, ["b"]).columns] == ["a"]


# What is wrong in a file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", r"empty.csv'\) is empty; give a file with a header"),
        ("blank.csv", "\n \n", r"blank.csv'\) is empty"),
        ("header.csv", "a,b\n", "header.csv'.* has no rows"),
        ("ragged.csv", "a,b\n1,2\n1,2,3\n", r"ragged.csv'\) .*Row #3: Expected 2 columns, got 3: 1,2,3 \(every row needs as many fields"),
        ("short.csv", "a,b\n" + "1,2\n" * 99 + "1\n", r"short.csv'\) .*Row #101: Expected 2 columns, got 1"),
        ("open.csv", 'a,b\n"1,2\n' + "1,2\n" * 9, r"(?s)open.csv'\) .*is each quotation mark closed\?"),
        ("twice.csv", "a,b,a\n1,2,3\n", "column 'a' stands twice in .*twice.csv; rename one"),
        (
            "late.csv",
            b"a,b\n" + b"1,x\n" * 9 + "2,é\n".encode("latin-1"),
            r"column 'b' of .*late.csv .*UTF-8, b'\\xe9' in row 10; .*encoding=",
        ),
        ("head.csv", "é,b\n1,2\n".encode("latin-1"), r"head.csv'\) .*not UTF-8; .*encoding='latin-1'"),
        ("null.csv", b"a,b\n1\x00,2\n", r"null.csv'\) holds null bytes.*encoding='utf-16-le'"),
        ("bare16.csv", "a,b\n1,2\n".encode("utf-16-le"), r"bare16.csv'\) holds null bytes"),
        ("torn.csv.gz", gzip.compress(TEXT.encode() * 99)[:60], r"torn.csv.gz'\) cannot be read as a table: Truncated"),
        ("no.csv.gz", b"a,b\n1,2\n", r"no.csv.gz'\) cannot be read as a table"),
        ("no.parquet", b"PAR1", r"no.parquet'\) cannot be read as a table"),
        ("no.arrow", b"ARROW", r"no.arrow'\) cannot be read as a table"),
        ("empty.jsonl", "", r"empty.jsonl'\) cannot be read as a table: Empty"),
        ("torn.jsonl", '{"a": 1}\n{"a":\n', r"torn.jsonl'\) cannot be read as a table: JSON parse error"),
        ("list.jsonl", "[1, 2]\n", r"list.jsonl'\) cannot be read as a table"),
        ("empty.txt", "\n\n", "empty.txt'.* has no rows"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and len(value) < 12 else "",
)
def test_a_bad_file_is_named_with_the_way_out(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, name, content))


def test_text_that_turns_to_another_encoding_beyond_the_first_block_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)
    path = written(tmp_path, "t.csv", b"a,b\n" + "é,x\n".encode() * 100 + "é,x\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"t\.csv'\) .*In column 'a': Row #102: .*encoding='latin-1'"):
        read(path)


def test_a_column_that_stands_twice_is_refused_in_every_kind(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["x"], pa.large_string())] * 2, names=["a", "a"])
    pa.parquet.write_table(twice, tmp_path / "t.parquet")
    for origin in (twice, tmp_path / "t.parquet"):
        with pytest.raises(DataError, match="column 'a' stands twice"):
            read(origin)


def test_quoted_newlines_a_row_of_delimiters_and_large_cells_are_data(tmp_path: Path) -> None:
    table = read(written(tmp_path, "t.csv", 'a,b\n1,"x\ny"\n,\n2,"c,""d"\n'))
    assert table.to_pydict() == {"a": [1, None, 2], "b": ["x\ny", None, 'c,"d']}
    large = "x " * 5_000_000
    table = read(written(tmp_path, "u.csv", f'a,b\n1,"{large}"\n2,y\n'))
    assert table["b"].to_pylist() == [large, "y"]
    assert read(written(tmp_path, "v.csv", '"a;x",b\n1,2\n')).column_names == ["a;x", "b"], "a delimiter within quotation marks is none"


def test_a_row_without_end_stops_the_growth_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 64)
    monkeypatch.setattr(files, "MOST_BLOCK_BYTES", 1024)
    path = written(tmp_path, "t.csv", 'a,b\n1,2\n1,"' + "x" * 99_999 + "\n")
    with pytest.raises(DataError, match=r"t\.csv'\) .*is each quotation mark closed"):
        read(path)


def test_two_thousand_columns_are_read(tmp_path: Path) -> None:
    lines = [",".join(str(row * column) for column in range(2000)) for row in range(20)]
    table = read(written(tmp_path, "t.csv", ",".join(f"c{i}" for i in range(2000)) + "\n" + "\n".join(lines)))
    schema = infer_schema(table, "c1")
    assert table.shape == (20, 2000) and len(schema.features) == 1999 and len(schema.classes or ()) == 0


VALUES = st.one_of(
    st.lists(st.none() | st.integers(-(2**62), 2**62), min_size=1, max_size=30),
    st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    st.lists(st.none() | st.text("ab,;\"'\n\té 1", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=30),
    st.lists(st.booleans(), min_size=1, max_size=30),
)


@given(VALUES, st.integers(20, 200), st.integers(1, 3))
@settings(max_examples=60)
def test_a_csv_file_reads_the_same_in_blocks_of_any_size_and_in_any_parts(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], block: int, parts: int
) -> None:
    """Types and values do not depend on how many bytes a block has, or on how many files the rows stand in."""
    folder = tmp_path_factory.mktemp("parts")
    table = pa.table({"v": pa.array(values), "k": range(len(values))})
    pa.csv.write_csv(table, folder / "whole.csv")
    whole = pa.Table.from_batches(Files([str(folder / "whole.csv")]).batches())
    size = -(-len(values) // parts)
    paths = []
    for start in range(0, len(values), size):
        paths.append(str(folder / f"part{start:03}.csv"))
        pa.csv.write_csv(table.slice(start, size), paths[-1])
    again = hold(Files(paths, block_bytes=block), "parts", limit=1 << 30)
    assert again.schema.types == whole.schema.types or again["v"].cast(pa.string()).to_pylist() == whole["v"].cast(pa.string()).to_pylist()
    assert again["k"].to_pylist() == list(range(len(values)))


def test_a_quotation_mark_that_never_closes_is_refused(tmp_path: Path) -> None:
    rows = [f"{n},a text of {n}" for n in range(100)]
    rows[10] = '0,"Hello said the man'
    (tmp_path / "t.csv").write_text("\n".join(["label,text", *rows]) + "\n")
    with pytest.raises(DataError, match=r"opens in row 11, column 'text', never closes"):
        Source(tmp_path / "t.csv").read()
    (tmp_path / "t.csv").write_text('label,text\n1,"two\nlines"\n2,"and\ntwo"\n')
    assert Source(tmp_path / "t.csv").read()["train"].num_rows == 2
