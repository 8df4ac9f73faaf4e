"""Sources, splits, tables to tensors, batches."""

from __future__ import annotations

import gzip
import math
import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SubsetRandomSampler, TensorDataset

from anyfit import Plan, Schema, Source
from anyfit.data import (
    LoaderBatches,
    RowBatches,
    Share,
    TensorBatches,
    by_column,
    by_fraction,
    fingerprint,
    fitted,
    infer_schema,
    make_batches,
    num_rows,
    read_splits,
    row_hashes,
    statistics,
    taken_apart,
    tensor_schema,
    to_tensors,
    word_statistics,
)
from anyfit.data.hashes import pixels_of
from anyfit.data.sources import image_column
from anyfit.errors import DataError, InputError
from anyfit.prepare import infer
from anyfit.schema import Column
from anyfit.state import Position
from anyfit.update import Update
from anyfit.values import canonical, parse

CPU = torch.device("cpu")


# Sources


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, rows in (("train", 30), ("t10k", 10)):
        images, labels = random.integers(0, 256, (rows, 6, 5), dtype=np.uint8), (np.arange(rows) % 10).astype(np.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_idx_folders_give_train_and_test_packed_or_not(idx_folder: Path) -> None:
    parts = Source(idx_folder).read()
    assert {split: num_rows(rows) for split, rows in parts.items()} == {"train": 30, "test": 10}
    pixels = pixels_of(parts["train"]["image"])
    assert pixels.shape == (30, 1, 6, 5) and pixels.dtype == np.uint8
    raw = gzip.decompress((idx_folder / "train-images-idx3-ubyte.gz").read_bytes())
    assert pixels.tobytes() == raw[16:]
    for packed in list(idx_folder.glob("*.gz")):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert pixels_of(Source(idx_folder / "t10k-images-idx3-ubyte").read()["train"]["image"]).shape == (10, 1, 6, 5)


def test_a_broken_idx_file_is_named(idx_folder: Path) -> None:
    file = idx_folder / "train-images-idx3-ubyte.gz"
    for content in (file.read_bytes()[:40], gzip.compress(b"\0\0\x0d\x03" + bytes(20)), gzip.compress(b"xx")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=re.escape(str(file))):
            Source(idx_folder).read()
    (idx_folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="has no labels beside it"):
        Source(idx_folder).read()


def test_a_packed_idx_file_that_was_damaged_is_a_data_error_wherever_it_was(idx_folder: Path) -> None:
    file = idx_folder / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for place in range(10, len(whole)):  # the first ten bytes hold a name and a time, which nothing reads
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(str(file))):
            Source(idx_folder).read()


def test_two_sets_of_one_split_or_none_to_train_on_are_refused(idx_folder: Path) -> None:
    packed = idx_folder / "train-images-idx3-ubyte.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    (idx_folder / "train-labels-idx1-ubyte").write_bytes(gzip.decompress((idx_folder / "train-labels-idx1-ubyte.gz").read_bytes()))
    with pytest.raises(DataError, match="has two sets of train images; keep one"):
        Source(idx_folder).read()
    for file in idx_folder.glob("train-*"):
        file.unlink()
    with pytest.raises(DataError, match="to train on; give the folder of the four IDX files"):
        Source(idx_folder).read()


def test_the_digits_are_in_a_dependency() -> None:
    table = Source("digits").read()["train"]
    schema = infer_schema(table, "target")
    schema = fitted(schema, statistics(table, schema))
    pixels = pixels_of(table["image"])
    assert pixels.shape == (1797, 1, 8, 8) and pixels.max() == 16 and schema["image"].type == "image"
    assert schema["image"].mean == pytest.approx((pixels.mean(),)) and schema.classes == tuple("0123456789")


def test_mnist_is_read_from_its_four_files(data_folder: Path) -> None:
    parts = Source(data_folder / "mnist").read()
    assert {split: pixels_of(rows["image"]).shape for split, rows in parts.items()} == {
        "train": (60_000, 1, 28, 28),
        "test": (10_000, 1, 28, 28),
    }
    assert sorted(set(parts["test"]["target"].to_pylist())) == list(range(10))
    assert pixels_of(parts["train"]["image"]).mean() == pytest.approx(0.1307 * 255, abs=0.02), "the figure that everyone has"


def test_adult_has_missing_values_and_no_question_marks(data_folder: Path) -> None:
    parts = [Source(data_folder / f"adult/adult_{split}.csv.gz", target="income").read()["train"] for split in ("train", "test")]
    assert [table.num_rows for table in parts] == [32_561, 16_281]
    schema = infer_schema(parts[0], "income")
    schema = fitted(schema, statistics(parts[0], schema))
    assert parts[0]["workclass"].null_count == 1836 and parts[0]["age"].type == pa.int64()
    assert not any("?" in word for column in schema.of_type("categorical") for word in column.categories or ())
    assert schema.num_classes == 2
    tensors = to_tensors(parts[1], schema)
    assert tensors["continuous"].shape == (16_281, 6) and tensors["categorical"].shape == (16_281, 8)
    assert int((tensors["categorical"][:, 0] == 0).sum()) == parts[1]["workclass"].null_count


@pytest.mark.parametrize("kind", [tuple, lambda arrays: dict(zip("xy", arrays, strict=True))], ids=["tuple", "dict"])
def test_arrays_become_tensors_whoever_owns_their_memory(kind: Any) -> None:
    x, y = np.arange(6.0).reshape(3, 2), np.arange(3)
    x.flags.writeable = False  # as pandas and jax hand them out
    rows = Source(kind((x, y))).read()["train"]
    first, second = rows.values() if isinstance(rows, dict) else rows
    assert torch.equal(first, torch.tensor([[0.0, 1], [2, 3], [4, 5]], dtype=torch.float64)) and second.tolist() == [0, 1, 2]
    assert not np.shares_memory(first.numpy(), x), "a tensor can be written to"
    assert np.shares_memory(second.numpy(), y), "and nothing is copied without need"
    strided = Source((np.arange(12.0).reshape(3, 4)[:, ::-2],)).read()["train"][0]
    assert strided.tolist() == [[3, 1], [7, 5], [11, 9]]


def test_csv_missing_values_types_and_compression(tmp_path: Path) -> None:
    text = "a,b,c\n1,x,2.5\n?,NA,\n3,y,nan\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "t.tsv").write_text(text.replace(",", "\t"))
    for name in ("t.csv.gz", "t.tsv"):
        table = Source(tmp_path / name).read()["train"]
        assert (
            table["a"].to_pylist() == [1, None, 3]
            and table["b"].to_pylist() == ["x", None, "y"]
            and table["c"].to_pylist() == [2.5, None, None]
        )
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    assert Source(tmp_path / "t.parquet").read()["train"].equals(table)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "does not exist"),
        ("empty.csv", "", "is empty"),
        ("header.csv", "a,b\n", "has no rows"),
        ("ragged.csv", "a,b\n1,2\n1,2,3\n", "cannot be read as a table"),
        ("twice.csv", "a,a\n1,2\n", "column 'a' stands twice"),
        ("notes.docx", "x", "is of no known kind"),
        ("latin.csv", b"a\n\xf0\n", "column 'a' of .* holds text that is not UTF-8"),
    ],
)
def test_bad_files_are_refused_by_name(name: str, content: Any, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"({message})"):
        Source(tmp_path / name).read()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data (a int) is no source; give a path, 'digits', a table or data frame"),
        ([], "data (a list) is no source"),
        (None, "data (a NoneType) is no source"),
        ((np.zeros(3), np.zeros(4)), "arrays have 3, 4 rows; they must agree"),
        ((np.zeros((0, 2)), np.zeros(0)), "arrays have no rows"),
        ((torch.tensor(1.0),), "data holds a single number"),
        ((np.array(["a"]),), "data holds an array of <U1; arrays must be of numbers"),
        (pa.table({"a": pa.array([], pa.int64())}), "data (='Table of 0 rows') has no rows"),
    ],
    ids=range(8),
)
def test_what_is_no_source_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        Source(data).read()


# Splits

FRAME = st.lists(st.tuples(st.integers(0, 50), st.sampled_from("abc"), st.none() | st.floats(-5, 5)), min_size=4, max_size=60, unique=True)


def frame(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = list(zip(*rows, strict=True))
    return pa.table({"n": pa.array(columns[0], pa.int64()), "word": columns[1], "x": pa.array(columns[2], pa.float64())})


@given(FRAME, st.randoms())
@settings(max_examples=40)
def test_a_split_by_fraction_depends_on_each_row_alone(rows: list[tuple[Any, ...]], random: Any) -> None:
    """Not on the order, on the other columns' order or on which other rows there are."""
    table = frame(rows)
    hashes = dict(zip(rows, row_hashes(table).tolist(), strict=True))
    assert len(set(hashes.values())) == len(rows)
    shuffled = random.sample(rows, len(rows))[: max(2, len(rows) // 2)]
    assert [hashes[row] for row in shuffled] == row_hashes(frame(shuffled).select(["x", "word", "n"])).tolist()
    rest, part = by_fraction(table, 0.3)
    assert rest.num_rows >= 1 and part.num_rows >= 1 and rest.num_rows + part.num_rows == len(rows)
    chosen = set(zip(*part.to_pydict().values(), strict=True))
    for row in zip(*by_fraction(frame(shuffled), 0.3)[1].to_pydict().values(), strict=True):
        assert row in chosen or len(shuffled) < 12, "a small part takes a row in any case"


@pytest.mark.parametrize(
    ("values", "distinct"),
    [
        (pa.array([2**60, 2**60 + 1, -1, None]), 4),
        (pa.array([2**63, 2**63 + 1], pa.uint64()), 2),
        (pa.array([0.0, -0.0, None, float("nan"), 0.5]), 3),
        (pa.array([True, False, None]), 3),
        (pa.array(["a", "b", None, ""]), 4),
        (pa.array(["a", "b", "a"]).dictionary_encode(), 2),
        (pa.array([[1, 2], [1], [], None]), 4),
        (pa.array([b"\xff\xd8", b"\xff", b""]), 3),
        (pa.array([{"bytes": b"\xff", "path": "a"}, {"bytes": b"\xff", "path": "b"}]), 2),
        (pa.array([1_600_000_000, 1_600_000_001, None], pa.timestamp("s")), 3),
        (image_column(np.linspace(0, 1, 4 * 36, dtype=np.float32).reshape(4, 1, 6, 6)), 4),
        (image_column(-np.linspace(0, 1, 4 * 36).reshape(4, 1, 6, 6)), 4),
    ],
    ids=["large", "unsigned", "float", "bool", "text", "dictionary", "list", "bytes", "struct", "time", "float image", "negative image"],
)
def test_rows_are_told_apart_whatever_their_type(values: Any, distinct: int) -> None:
    table = pa.table({"v": values})
    hashes = row_hashes(table)
    assert len(set(hashes.tolist())) == distinct and hashes.dtype == np.uint64
    assert fingerprint(table) != fingerprint(table.slice(1))


@pytest.mark.parametrize("values", [[[1, 2], [3]], [b"\xff\xd8", b""], [{"a": 1}, {"a": 2}]], ids=["list", "bytes", "struct"])
def test_a_column_that_has_no_semantic_type_is_named_and_may_be_left_out(values: list[Any]) -> None:
    table = pa.table({"v": values, "x": [1.0, 2.0]})
    with pytest.raises(DataError, match=r"column 'v' .*ignore"):
        statistics(table, infer_schema(table, None))
    assert [column.name for column in infer_schema(table, None, ["v"]).columns] == ["x"]


def test_a_column_tells_the_splits_and_is_dropped() -> None:
    table = pa.table({"x": range(6), "fold": ["train", "Train", "val", "dev", "test", "train"]})
    parts = by_column(table, "fold")
    assert {split: part["x"].to_pylist() for split, part in parts.items()} == {"train": [0, 5, 1], "validation": [2, 3], "test": [4]}
    assert all(part.column_names == ["x"] for part in parts.values())
    with pytest.raises(DataError, match="split column 'fold' has no row that says train"):
        by_column(table.slice(2, 3), "fold")
    with pytest.raises(DataError, match="split column 'fold' holds 'fold1'"):
        by_column(table.set_column(1, "fold", [["fold1"] * 6]), "fold")
    with pytest.raises(DataError, match=re.escape("split (='fold') needs a table")):
        read_splits(Source((np.zeros(4),), split="fold"), None, None, wants_validation=False)


def test_splits_come_from_fractions_sources_or_where_they_are_wanted() -> None:
    table, other = pa.table({"x": range(500)}), pa.table({"x": range(500, 510)})
    read = read_splits(Source(table), 0.2, other, wants_validation=True)
    assert read["test"].equals(other) and read["train"].num_rows + read["validation"].num_rows == 500
    assert set(read_splits(Source(table), None, None, wants_validation=False)) == {"train"}
    tenth = read_splits(Source(table), None, None, wants_validation=True)["validation"].num_rows
    assert 25 <= tenth <= 80
    for fraction, message in (
        (1.0, "fraction (=1.0) of a split must be between 0 and 1"),
        (0, "fraction (=0.0)"),
        (True, "validation (=True)"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            read_splits(Source(table), fraction, None, wants_validation=False)
    with pytest.raises(DataError, match=re.escape("group (='x') needs a table")):
        read_splits(Source((np.zeros(9),), group="x"), 0.2, None, wants_validation=False)


def test_fractions_are_met_and_groups_stay_together() -> None:
    table = pa.table({"x": np.arange(20_000.0), "patient": np.arange(20_000) // 20})
    rest, part = by_fraction(table, 0.25)
    assert abs(part.num_rows / 20_000 - 0.25) < 0.02
    other = by_fraction(table, 0.25, salt="test")[1]
    both = len(set(part["x"].to_pylist()) & set(other["x"].to_pylist())) / 20_000
    assert abs(both - 0.0625) < 0.01, "test and validation are drawn independently"
    rest, part = by_fraction(table, 0.25, group="patient")
    assert not set(rest["patient"].to_pylist()) & set(part["patient"].to_pylist())
    with pytest.raises(DataError, match="all equal, or of one group"):
        by_fraction(pa.table({"x": [1, 1, 1]}), 0.5)


def test_splits_of_tensors_and_data_sets_go_by_index() -> None:
    x = torch.arange(100)
    parts = read_splits(Source((x, x % 2)), 0.2, 0.1, wants_validation=False)
    assert sorted(torch.cat([part[0] for part in parts.values()]).tolist()) == list(range(100))
    rows = read_splits(Source(Lengths(100)), 0.2, None, wants_validation=False)
    assert len(rows["train"]) + len(rows["validation"]) == 100
    assert [len(rows["train"][index]) for index in range(5)] == rows["train"].lengths[:5]
    with pytest.raises(DataError, match="a stream or a DataLoader with its own sampler cannot be split by fraction"):
        read_splits(Source(DataLoader(Lengths(9))), 0.2, None, wants_validation=False)


def test_a_part_of_a_data_set_keeps_what_the_data_set_says() -> None:
    """Its lengths, its epochs, its own order among the rows it has, and its batched fetch."""
    dataset = Ordered(40)
    part = read_splits(Source(dataset), 0.25, None, wants_validation=False)["train"]
    batches = make_batches(part, Plan(batch_size=len(part)), list, device=CPU)
    for number in (0, 1):
        (rows,) = batches.window(Position(0, number, 0))[0:1]
        seen = [int(row[0]) for row in rows]
        assert seen == sorted(seen, reverse=number == 1) and sorted(seen) == sorted(part.indices)
    assert dataset.epochs == [0, 1] and len(dataset.fetched) == 2


def test_a_part_of_a_data_set_can_go_to_a_process_that_is_spawned() -> None:
    part = read_splits(Source(Ordered(40)), 0.25, None, wants_validation=False)["train"]
    copied = pickle.loads(pickle.dumps(part))
    assert [row.tolist() for row in copied.__getitems__([0, 2])] == [part[0].tolist(), part[2].tolist()]


# Tables

TABLE = pa.table(
    {
        "number": [1.0, 3.0, None, 5.0],
        "grade": ["10", "9", None, "9"],
        "flag": [True, False, True, None],
        "target": [2, 10, 2, None],
    }
)


def test_a_schema_is_inferred_fitted_and_round_trips_through_json() -> None:
    schema = infer_schema(TABLE, "target")
    assert [column.type for column in schema.columns] == ["continuous", "categorical", "categorical", "categorical"]
    schema = fitted(schema, statistics(TABLE, schema))
    assert schema["number"].mean == 3.0 and schema["number"].std == pytest.approx(np.std([1, 3, 5]))
    assert schema["grade"].categories == ("9", "10"), "numbers sort as numbers"
    assert schema.classes == ("2", "10") and schema.num_classes == 2
    assert schema.cardinalities == (4, 4) and schema.input_size == 3
    assert Schema.from_json(schema.to_json()) == schema
    forced = infer_schema(TABLE, None, ["flag"], {"target": "continuous"})
    assert [column.name for column in forced.columns] == ["number", "grade", "target"]


def test_tensors_by_schema() -> None:
    schema = infer_schema(TABLE, "target")
    schema = fitted(schema, statistics(TABLE, schema))
    tensors = to_tensors(TABLE, schema)
    assert tensors["continuous"][:, 0].tolist() == pytest.approx([-1.2247, 0, 0, 1.2247], abs=1e-4)
    assert tensors["categorical"].tolist() == [[3, 3], [2, 2], [0, 3], [2, 0]]
    assert tensors["target"].tolist() == [0, 1, 0, -100]
    new = pa.table({"number": [3.0], "grade": ["8"], "flag": [True], "target": [2]})
    assert to_tensors(new, schema)["categorical"].tolist() == [[1, 3]], "an unseen category is 1, a missing one 0"
    assert "target" not in to_tensors(new.drop_columns(["target"]), schema, need_target=False)
    with pytest.raises(DataError, match="target 'target' holds '7', which training did not have; its classes are: 2, 10"):
        to_tensors(new.set_column(3, "target", [[7]]), schema)
    with pytest.raises(DataError, match="column 'grade' is missing"):
        to_tensors(new.drop_columns(["grade"]), schema)


def test_a_category_is_the_same_word_in_every_table() -> None:
    """Whether its other numbers are whole, have fractions or are missing as pandas has it."""
    schema = Schema((Column("code", "categorical"),))
    whole, broken = pa.table({"code": [1.0, 2.0, None]}), pa.table({"code": [1.0, 2.5, float("nan")]})
    total = fitted(schema, statistics(whole, schema) + statistics(broken, schema))
    assert total["code"].categories == ("1", "2", "2.5")
    assert to_tensors(whole, total)["categorical"].tolist() == [[2], [3], [0]]
    assert to_tensors(broken, total)["categorical"].tolist() == [[2], [4], [0]], "NaN is missing"
    ints = pa.table({"code": [1, 2, 3]})
    assert to_tensors(ints, total)["categorical"].tolist() == [[2], [3], [1]], "an unseen one is another"


@pytest.mark.parametrize(
    ("values", "target", "kind"),
    [
        ([1, 2, 3], False, "continuous"),
        (list(range(100)) * 2, True, "categorical"),
        (list(range(101)) * 2, True, "continuous"),
        ([0.5, 1.0], True, "continuous"),
        ([True, False], False, "categorical"),
        (["a", "b"], False, "categorical"),
        (pa.array(["a", "b", "a"]).dictionary_encode(), False, "categorical"),
        (pa.array(["a", "b", "a"]).dictionary_encode(), True, "categorical"),
        ([f"sentence {n}" for n in range(2000)], False, "text"),
        ([f"id {n}" for n in range(2000)], True, "categorical"),
        (pa.nulls(3), False, "continuous"),
    ],
    ids=range(11),
)
def test_types_are_inferred_from_the_columns(values: Any, target: bool, kind: str) -> None:
    schema = infer_schema(pa.table({"v": values}), "v" if target else None)
    assert schema["v"].type == kind


def test_a_large_whole_number_is_a_number() -> None:
    """Above 2^53 float64 rounds, which no standardised feature can tell."""
    table = pa.table({"big": [2**60, 2**60 + 2**20, 2**60 + 2**21]})
    schema = fitted(infer_schema(table, None), statistics(table, infer_schema(table, None)))
    assert to_tensors(table, schema)["continuous"].isfinite().all() and schema["big"].mean == pytest.approx(2.0**60)


def test_a_target_that_is_missing_is_left_out_as_a_class_and_refused_as_a_number() -> None:
    schema = Schema((Column("y", "continuous"),), "y")
    with pytest.raises(DataError, match="target 'y' is missing in 2 rows; drop them or fill them"):
        to_tensors(pa.table({"y": [1.0, None, float("nan")]}), schema)
    with pytest.raises(DataError, match=re.escape("target (='y') is not a column; the table has: x")):
        to_tensors(pa.table({"x": [1.0]}), schema)
    with pytest.raises(DataError, match="column 'y' is continuous but holds 'a' in row 1, which is no number"):
        to_tensors(pa.table({"y": ["a"]}), schema)


@given(st.lists(st.integers(-(10**9), 10**9).map(lambda n: n / 1000), min_size=2, max_size=50))
def test_standardised_columns_have_mean_0_and_deviation_1(values: list[float]) -> None:
    table = pa.table({"x": values})
    schema = fitted(infer_schema(table, None), statistics(table, infer_schema(table, None)))
    x = to_tensors(table, schema)["continuous"]
    assert abs(float(x.mean())) < 1e-6
    spread = np.std(values)
    if spread > 1e-6 * max(map(abs, values)):  # below that, sums of squares in float64 cannot tell a spread from rounding
        assert float(x.std(correction=0)) == pytest.approx(1, rel=1e-6) and schema["x"].std == pytest.approx(spread, rel=1e-6)


@given(FRAME, st.integers(1, 5))
@settings(max_examples=40)
def test_statistics_of_any_parts_add_up_to_those_of_all(rows: list[tuple[Any, ...]], parts: int) -> None:
    table = frame(rows)
    schema = infer_schema(table, "word")
    total = statistics(table, schema)
    added = statistics(table.slice(0, 0), schema)
    for part in np.array_split(np.arange(len(rows)), parts):
        added = added + statistics(table.take(pa.array(part, pa.int64())), schema)
    for a, b in zip(fitted(schema, total).columns, fitted(schema, added).columns, strict=True):
        assert a.categories == b.categories
        assert a.mean == (None if b.mean is None else pytest.approx(b.mean, rel=1e-12, abs=1e-12))
        assert a.std == (None if b.std is None else pytest.approx(b.std, rel=1e-9))


@pytest.mark.parametrize("value", [1.7e-12, 1e-25, 1e-200, 3e5])
def test_a_constant_column_has_no_spread_however_it_is_added_up(value: float) -> None:
    schema = Schema((Column("x", "continuous"),))
    parts = [statistics(pa.table({"x": [value] * rows}), schema) for rows in (1, 3, 7)]
    for total in (parts[0], parts[0] + parts[1] + parts[2]):
        assert fitted(schema, total)["x"].std == 1.0


def test_odd_columns() -> None:
    table = pa.table({"same": [2.0] * 5, "none": pa.nulls(5), "big": [1e9 + 1000.0 * i for i in range(5)], "target": list("ababa")})
    schema = infer_schema(table, "target")
    schema = fitted(schema, statistics(table, schema))
    tensors = to_tensors(table, schema)["continuous"]
    assert tensors[:, 0].tolist() == [0] * 5 and tensors[:, 1].tolist() == [0] * 5
    assert float(tensors[:, 2].std(correction=0)) == pytest.approx(1, rel=1e-3)
    with pytest.raises(DataError, match="column 'x' holds an infinite number"):
        statistics(pa.table({"x": [float("inf")]}), Schema((Column("x", "continuous"),)))


def test_image_statistics_are_per_channel() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (5000, 3, 4, 4), dtype=np.uint8)
    table = pa.table({"image": image_column(images), "target": np.arange(5000) % 3})
    schema = infer_schema(table, "target")
    column = fitted(schema, statistics(table, schema))["image"]
    assert column.shape == (3, 4, 4)
    assert column.mean == pytest.approx(images.mean((0, 2, 3))) and column.std == pytest.approx(images.std((0, 2, 3)))
    assert torch.equal(to_tensors(table, fitted(schema, statistics(table, schema)))["image"], torch.from_numpy(images))


def test_schemas_of_tensors() -> None:
    schema = tensor_schema((torch.zeros(3, 8, 8), torch.tensor(1)), (torch.zeros(2, 3, 8, 8), torch.tensor([1, 4])))
    assert schema["input"].type == "image" and schema.num_classes == 5 and schema.input_size == 192
    assert tensor_schema({"input_ids": torch.arange(3), "labels": torch.tensor(0.5)}).target == "labels"
    with pytest.raises(DataError, match="labels must run from 0 up"):
        tensor_schema((torch.zeros(3), torch.tensor(1)), (torch.zeros(2, 3), torch.tensor([-1, 4])))
    with pytest.raises(DataError, match="it has no classes"):
        _ = tensor_schema((torch.zeros(3), torch.tensor(0.5))).num_classes


def test_fingerprints_tell_rows_apart() -> None:
    x = torch.arange(6.0)
    assert fingerprint((x, x)) == fingerprint((x.clone(), x.clone())) != fingerprint((x, x + 1))
    assert fingerprint(TABLE) != fingerprint(TABLE.slice(1))
    assert fingerprint(TABLE.slice(1)) != fingerprint(TABLE.slice(0, 3)) and fingerprint(TABLE) != fingerprint(
        TABLE.rename_columns(list("abcd"))
    )
    assert fingerprint(Lengths(5)) == fingerprint(Lengths(5)) != fingerprint(Lengths(6))


def test_fingerprints_see_the_words_of_a_dictionary() -> None:
    words = [pa.table({"w": pa.array(column).dictionary_encode()}) for column in (["a", "b"], ["c", "d"], ["a", "b"])]
    assert fingerprint(words[0]) == fingerprint(words[2]) != fingerprint(words[1])


def test_fingerprints_do_not_see_how_rows_lie_in_chunks() -> None:
    assert fingerprint(pa.concat_tables([TABLE.slice(0, 2), TABLE.slice(2)])) == fingerprint(TABLE)


def test_a_fingerprint_draws_no_number_and_leaves_a_data_set_that_moves_alone() -> None:
    class Moving(Lengths):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.rand(2)

    before = torch.get_rng_state()
    assert fingerprint(Moving(5)) == fingerprint(Moving(5))
    assert torch.equal(before, torch.get_rng_state())


# Frames of any types, from inference to tensors


def column_of(kind: str, rows: int) -> st.SearchStrategy[pa.Array]:
    moments = st.datetimes(datetime(1800, 1, 1), datetime(2200, 1, 1))  # noqa: DTZ001 - as stored
    values: dict[str, tuple[st.SearchStrategy[Any], pa.DataType]] = {
        "int": (st.integers(-(2**40), 2**40), pa.int64()),
        "float": (st.floats(-1e12, 1e12) | st.just(math.nan), pa.float64()),
        "single": (st.floats(-1e6, 1e6, width=32), pa.float32()),
        "decimal": (st.decimals(-999, 999, places=2), pa.decimal128(8, 2)),
        "bool": (st.booleans(), pa.bool_()),
        "word": (st.sampled_from(["a", "b", "", " ", "é", "1", "NA", "a b c"]), pa.string()),
        "coded": (st.sampled_from(["x", "y"]), pa.dictionary(pa.int8(), pa.string())),
        "date": (moments.map(lambda moment: moment.date()), pa.date32()),
        "moment": (moments, pa.timestamp("us")),
        "zoned": (moments.map(lambda moment: moment.replace(tzinfo=UTC)), pa.timestamp("ms", "UTC")),
        "null": (st.none(), pa.null()),
        "empty": (st.none(), pa.string()),
        "nan": (st.just(math.nan), pa.float64()),
    }
    values_, arrow = values[kind]
    if arrow == pa.timestamp("ms", "UTC"):
        values_ = values_.map(lambda moment: moment.replace(microsecond=0))
    return st.lists(st.none() | values_, min_size=rows, max_size=rows).map(lambda items: pa.array(items, arrow))


KINDS = ["int", "float", "single", "decimal", "bool", "word", "coded", "date", "moment", "zoned", "null", "empty", "nan"]
LABELS = {
    "labels": st.none() | st.lists(st.sampled_from("pqr"), max_size=4),
    "class": st.none() | st.sampled_from(["no", "yes"]),
    "grade": st.none() | st.integers(0, 4),
    "price": st.floats(-1e6, 1e6),
}


@st.composite
def frames(draw: st.DrawFn) -> tuple[pa.Table, str | None]:
    rows = draw(st.integers(1, 25))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
    columns = {f"{kind}{index}": draw(column_of(kind, rows)) for index, kind in enumerate(kinds)}
    target = draw(st.none() | st.sampled_from(sorted(LABELS)))
    if target is not None:
        arrow = {"labels": pa.list_(pa.string()), "class": pa.string(), "grade": pa.int64(), "price": pa.float64()}[target]
        columns[target] = pa.array(draw(st.lists(LABELS[target], min_size=rows, max_size=rows)), arrow)
    return pa.table(columns), target


@given(frames(), st.data())
@settings(max_examples=80)
def test_any_frame_goes_from_inference_to_finite_tensors_of_the_schemas_shapes(given_: tuple[pa.Table, str | None], data: Any) -> None:
    table, target = given_
    schema = infer_schema(table, target)
    schema = Schema.from_json(parse(canonical(fitted(schema, statistics(table, schema)).to_json())))
    tensors = to_tensors(table, schema)
    rows = table.num_rows
    assert ("continuous" in tensors) == bool(schema.num_continuous) and ("categorical" in tensors) == bool(schema.cardinalities)
    if schema.num_continuous:
        assert tensors["continuous"].shape == (rows, schema.num_continuous) and bool(tensors["continuous"].isfinite().all())
        numbers = tensors["continuous"][:, : len(schema.of_type("continuous"))]
        assert not numbers.numel() or float(numbers.abs().max()) < 100, "standardised"
    if schema.cardinalities:
        codes = tensors["categorical"]
        assert codes.shape == (rows, len(schema.cardinalities))
        assert bool((codes >= 0).all()) and all(int(codes[:, place].max()) < size for place, size in enumerate(schema.cardinalities))
        assert not bool((codes == 1).any()), "1 is what training did not have"
    if target is not None:
        labels = tensors["target"]
        assert labels.shape == ((rows, schema.num_classes) if target == "labels" else (rows,))
        if target == "labels":
            plain = [
                [-100] * schema.num_classes if row is None else [int(word in row) for word in schema.classes or ()]
                for row in table[target].to_pylist()
            ]
            assert labels.tolist() == plain
        elif target == "price":
            assert labels.tolist() == table[target].to_pylist()
        else:
            assert [None if label == -100 else (schema.classes or ())[label] for label in labels.tolist()] == [
                None if value is None else str(value) for value in table[target].to_pylist()
            ]
    start = data.draw(st.integers(0, rows - 1))
    part = to_tensors(table.slice(start), schema)
    assert all(torch.equal(part[name], tensors[name][start:]) for name in tensors), "a row's numbers are its own"


@given(frames(), st.lists(st.integers(0, 25), max_size=3))
@settings(max_examples=60)
def test_statistics_of_any_parts_add_up_to_those_of_all_rows(given_: tuple[pa.Table, str | None], cuts: list[int]) -> None:
    table, target = given_
    schema = infer_schema(table, target)
    bounds = [0, *sorted(min(cut, table.num_rows) for cut in cuts), table.num_rows]
    total = sum((statistics(table.slice(first, last - first), schema) for first, last in pairwise(bounds)), start=Update())
    one, other = fitted(schema, statistics(table, schema)), fitted(schema, total)
    for a, b in zip(one.columns, other.columns, strict=True):
        assert (a.name, a.type, a.categories, a.missing) == (b.name, b.type, b.categories, b.missing)
        assert b.mean == (None if a.mean is None else pytest.approx(a.mean, rel=1e-9, abs=1e-9))
        assert b.std == (None if a.std is None else pytest.approx(a.std, rel=1e-5, abs=1e-6))


@given(st.lists(st.text("ab é.", max_size=12), min_size=1, max_size=20), st.integers(0, 20), st.booleans())
def test_words_of_any_parts_add_up_to_those_of_all_texts(texts: list[str], cut: int, lowercase: bool) -> None:
    column = pa.chunked_array([pa.array(texts, pa.string())])
    whole = word_statistics(column, "text", lowercase=lowercase)
    parts = word_statistics(column.slice(0, cut), "text", lowercase=lowercase) + word_statistics(
        column.slice(cut), "text", lowercase=lowercase
    )
    assert parts.count("words:text") == whole.count("words:text") == len(texts)
    assert {w: int(c) for w, c in parts.sums("words:text").items()} == {w: int(c) for w, c in whole.sums("words:text").items()}


@given(st.data())
@settings(max_examples=30)
def test_preprocessing_never_sees_rows_to_validate_or_test_on(data: Any) -> None:
    """Whatever stands in them, what is fitted is the same."""
    rows = data.draw(st.integers(4, 30))
    fold = data.draw(
        st.lists(st.sampled_from(["train", "validation", "test"]), min_size=rows, max_size=rows).filter(lambda f: "train" in f)
    )
    table = pa.table({"x": range(rows), "word": list("abcd" * rows)[:rows], "seen": pa.array(range(rows), pa.timestamp("s")), "fold": fold})
    inside = pc.equal(table["fold"], "train")
    other = table
    for name, value in (("x", 10**9), ("word", "unseen"), ("seen", datetime(1900, 1, 1))):  # noqa: DTZ001
        other = other.set_column(other.column_names.index(name), name, pc.if_else(inside, table[name], pa.scalar(value, table[name].type)))
    source = [Source(one, target="word", split="fold") for one in (table, other)]
    parts = [read_splits(one, None, None, wants_validation=False)["train"] for one in source]
    schemas = [infer(one, part) for one, part in zip(source, parts, strict=True)]
    assert fitted(schemas[0], statistics(parts[0], schemas[0])) == fitted(schemas[1], statistics(parts[1], schemas[1]))


# What is wrong in a table


def test_a_column_that_training_lacked_altogether_says_nothing_later() -> None:
    table = pa.table({"x": pa.array([None, None], pa.float64()), "when": pa.array([None, None], pa.timestamp("s")), "y": [1.0, 2.0]})
    schema = infer_schema(table, "y")
    schema = Schema.from_json(parse(canonical(fitted(schema, statistics(table, schema)).to_json())))
    later = pa.table({"x": ["many", "words"], "when": pa.array([1, 2], pa.timestamp("s")), "y": [1.0, 2.0]})
    assert torch.equal(to_tensors(later, schema)["continuous"], to_tensors(table, schema)["continuous"])
    assert not to_tensors(later, schema)["continuous"].any() and schema.num_continuous == 8


@pytest.mark.parametrize(
    ("column", "types", "message"),
    [
        ([1.0, math.inf, 2.0], {}, "column 'v' holds an infinite number in row 2; mark it as missing or drop the row"),
        ([1e200, 2.0, -1e300], {}, "column 'v' holds 1e+300, which is too large to be standardised; leave the column out"),
        (["1", "x", "2"], {"v": "continuous"}, "column 'v' is continuous but holds 'x' in row 2, which is no number"),
        (["1", "x", "2"], {"v": "datetime"}, "column 'v' is a datetime but holds string that is none"),
        ([{"a": 1}] * 3, {}, "column 'v' holds struct<a: int64>, which has no semantic type"),
        ([["a"], ["b"], []], {}, "column 'v' holds list<"),
        ([["a"], ["b"], []], {"v": "categorical"}, "column 'v' holds lists of categories, which only a single target may"),
    ],
    ids=range(7),
)
def test_values_that_no_model_can_take_are_named(column: list[Any], types: dict[str, Any], message: str) -> None:
    table = pa.table({"v": column, "target": [0, 1, 0]})
    with pytest.raises(DataError, match=re.escape(message)):
        statistics(table, infer_schema(table, "target", types=types))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.5, 1.0], "weight 'w' is -0.5 in row 2; weights must be numbers from 0 up"),
        ([1.0, math.nan, 1.0], "weight 'w' is nan in row 2"),
        ([1.0, 1.0, None], "weight 'w' is nan in row 3"),
        ([0.0, 0.0, 0.0], "weight 'w' is 0 in all rows; at least one must count"),
        ([math.inf, 1.0, 1.0], "column 'w' holds an infinite number in row 1"),
        (["a", "b", "c"], "column 'w' is continuous but holds 'a' in row 1"),
    ],
    ids=range(6),
)
def test_weights_that_weigh_nothing_are_refused_before_training(weights: list[Any], message: str) -> None:
    table = pa.table({"x": [1.0, 2.0, 3.0], "w": pa.array(weights), "target": [0, 1, 0]})
    schema = infer_schema(table, "target", weight="w")
    with pytest.raises(DataError, match=re.escape(message)):
        fitted(schema, statistics(table, schema))
    with pytest.raises(DataError, match=re.escape("weight (='w') is not a column; the table has: x, target")):
        statistics(table.drop_columns(["w"]), schema)


def test_targets_must_be_of_one_type_and_a_number_or_a_class() -> None:
    table = pa.table({"a": [1.5, 2.5], "b": ["x", "y"], "t": pa.array([0, 1], pa.timestamp("s")), "l": [["x"], []]})
    with pytest.raises(DataError, match="targets a, b are categorical and continuous; several targets must be of one type"):
        infer_schema(table, ["a", "b"], ["l"])
    with pytest.raises(DataError, match="column 'b' holds lists of categories, which only a single target may"):
        infer_schema(table, ["b", "l"])
    schema = infer_schema(table, "t", ["l"])
    with pytest.raises(
        DataError, match=re.escape("target 't' is of type datetime, which is neither a number nor a class; force its type (types)")
    ):
        to_tensors(table, fitted(schema, statistics(table, schema)))


def test_an_unseen_category_is_other_and_an_unseen_class_is_refused() -> None:
    table = pa.table({"c": ["a", "b", None], "target": ["no", "yes", None]})
    schema = infer_schema(table, "target")
    schema = fitted(schema, statistics(table, schema))
    other = pa.table({"c": ["z", None, "a"], "target": ["no", "no", "no"]})
    assert to_tensors(other, schema)["categorical"].tolist() == [[1], [0], [2]]
    with pytest.raises(DataError, match="target 'target' holds 'maybe', which training did not have; its classes are: no, yes"):
        to_tensors(other.set_column(1, "target", [["maybe"] * 3]), schema)


def test_labels_may_be_whole_numbers_and_a_list_that_names_one_twice_counts_once() -> None:
    table = pa.table({"x": [1.0, 2.0, 3.0, 4.0], "target": [[9], [10, 9, 9], [], None]}).slice(1)
    schema = infer_schema(table, "target")
    total = statistics(table, schema)
    schema = fitted(schema, total)
    assert schema.classes == ("9", "10") and to_tensors(table, schema)["target"].tolist() == [[1, 1], [0, 0], [-100, -100]]
    assert {word: int(count) for word, count in total.sums("categories:target").items()} == {"9": 1, "10": 1}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("v", [f"{row / 7:.4f}" for row in range(2000)], "continuous"),
        ("zip", [f"{row:05}" for row in range(2000)], "identifier"),
        ("v", [f" {row} " for row in range(60)], "continuous"),
        ("v", ["1", "2", "3"] * 20, "categorical"),
        ("user_id", [f"u{row}" for row in range(20)], "identifier"),
        ("user_id", list(range(20)), "identifier"),
        ("userId", list(range(20)), "identifier"),
        ("paid", list(range(20)), "continuous"),
        ("user_id", ["u1"] * 20, "categorical"),
        ("v", [f"the cat sat {row} times" for row in range(20)], "text"),
        ("v", ["the cat sat"] * 20, "categorical"),
        ("v", [None] * 20, "continuous"),
        ("v", ["", None] * 10, "categorical"),
        ("v", [f"word{row}" for row in range(3000)], "identifier"),
        ("v", [f"word{row % 1500} x" for row in range(2900)], "text"),
    ],
    ids=range(15),
)
def test_words_are_numbers_texts_identifiers_or_categories(name: str, values: list[Any], expected: str) -> None:
    assert infer_schema(pa.table({name: pa.array(values)}), None)[name].type == expected


def test_two_thousand_columns_are_no_trouble() -> None:
    random = np.random.default_rng(0)
    table = pa.table({f"c{index}": random.normal(size=20) for index in range(2000)} | {"target": [0, 1] * 10})
    schema = infer_schema(table, "target")
    assert to_tensors(table, fitted(schema, statistics(table, schema)))["continuous"].shape == (20, 2000)


@pytest.mark.parametrize(
    "origin", [{"a": np.zeros(3)}, (torch.zeros(3),), iter([1]), 3, None, [], {}, DataLoader(TensorDataset(torch.zeros(3)))]
)
def test_every_source_has_a_name_or_is_refused(origin: Any) -> None:
    with suppress(DataError):
        Source(origin).read()
        assert Source(origin).name and "None" not in Source(origin).name


# Batches


class Lengths(Dataset[torch.Tensor]):
    """Row i has (i * 7) % 5 + 1 numbers, all of them i."""

    def __init__(self, rows: int) -> None:
        self.lengths = [(index * 7) % 5 + 1 for index in range(rows)]
        self.fetched: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((self.lengths[index],), index)


class Ordered(Lengths):
    """Forwards and backwards in turn, fetched a batch at a time."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def order(self, epoch: int) -> list[int]:
        assert self.epochs[-1] == epoch, "it is told of an epoch before it is asked for its order"
        return list(range(len(self)))[:: -1 if epoch else 1]

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        self.fetched.append(indices)
        return [self[index] for index in indices]


def epoch(batches: Any, number: int) -> list[torch.Tensor]:
    return [batch for offset in range(batches.steps_per_epoch) for batch in batches.window(Position(0, number, offset))]


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 4), st.booleans())
@settings(max_examples=60)
def test_an_epoch_sees_each_row_once_in_windows_of_the_right_size(rows: int, batch_size: int, accumulate: int, drop: bool) -> None:
    plan = Plan(batch_size=min(rows, batch_size), accumulate=accumulate, drop_last=drop)
    batches = make_batches((torch.arange(rows),), plan, list, device=CPU)
    assert isinstance(batches, TensorBatches)
    seen = torch.cat([batch[0] for batch in epoch(batches, 0)]).tolist()
    assert len(seen) == len(set(seen)) and (drop or sorted(seen) == list(range(rows)))
    for offset in range(batches.steps_per_epoch or 0):
        window = batches.window(Position(0, 0, offset))
        assert len(window) <= accumulate and sum(len(batch[0]) for batch in window) <= batches.step_size
        if drop:
            assert sum(len(batch[0]) for batch in window) == batches.step_size
    assert torch.cat([batch[0] for batch in batches]).tolist() == list(range(rows))


def jittered(batch: Any, uniform: Any) -> Any:
    """The samples, and a number each that says which place in the epoch they had."""
    return batch[0], uniform()


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 3), st.lists(st.integers(0, 30), max_size=3), st.booleans())
@settings(max_examples=60)
def test_shares_of_a_step_are_its_rows_in_order(rows: int, batch_size: int, accumulate: int, cuts: list[int], tensors: bool) -> None:
    """However it is cut, also into nothing; and what augments them does not depend on the cut."""
    data = (torch.arange(rows),)
    plan = Plan(batch_size=min(batch_size, rows), accumulate=accumulate)
    batches = make_batches(data if tensors else Whole(rows), plan, Whole.collate, device=CPU, augment=jittered)
    bounds = [0, *sorted(cuts), batches.step_size]
    for offset in range(batches.steps_per_epoch):
        whole = batches.window(Position(0, 1, offset))
        parts = [
            batch for first, last in pairwise(bounds) for batch in batches.window(Position(0, 1, offset), Share(first, max(first, last)))
        ]
        for index in range(2):
            assert torch.cat([batch[index] for batch in whole]).tolist() == torch.cat([batch[index] for batch in parts]).tolist()


class Whole(Dataset[torch.Tensor]):
    """The numbers from 0 up."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)

    @staticmethod
    def collate(samples: list[torch.Tensor]) -> Any:
        return (torch.stack(samples),)


def test_tensors_and_a_data_set_of_the_same_rows_give_the_same_batches() -> None:
    plan = Plan(batch_size=7, accumulate=2, seed=3)
    for data in (Whole(50), TensorDataset(torch.arange(50)), DataLoader(Whole(50)).dataset):
        batches = make_batches(data, plan, Whole.collate, device=CPU)
        for number in (0, 1):
            expected = epoch(make_batches((torch.arange(50),), plan, list, device=CPU), number)
            assert [batch[0].tolist() for batch in epoch(batches, number)] == [batch[0].tolist() for batch in expected]


def test_chunks_and_shares_show_the_same_rows() -> None:
    x = torch.arange(5000)
    batches = make_batches({"x": x, "y": -x}, Plan(batch_size=7, accumulate=2, seed=4), list, device=CPU)
    for offset in (0, 63, 64, 200, 357):
        whole = batches.window(Position(0, 1, offset))
        size = sum(len(batch["x"]) for batch in whole)
        parts = [batches.window(Position(0, 1, offset), Share(*bounds)) for bounds in ((0, 3), (3, 3), (3, size))]
        assert torch.cat([batch["x"] for batch in whole]).tolist() == torch.cat([b["x"] for part in parts for b in part]).tolist()
        assert all(torch.equal(batch["x"], -batch["y"]) for batch in whole)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, number: int) -> list[int]:
        batches = make_batches((torch.arange(50),), Plan(batch_size=10, seed=seed), list, device=CPU)
        return torch.cat([batch[0] for batch in epoch(batches, number)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(*at)) for at in ((1, 0), (1, 1), (2, 0), (0, 1), (2, 1))}) == 5
    torch.manual_seed(5)
    before = torch.get_rng_state()
    order(1, 0)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not drawn from"


def collate(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_buckets_hold_like_lengths_and_see_each_row_once(workers: int) -> None:
    plan = Plan(batch_size=8, bucket=True, workers=workers)
    batches = make_batches(Lengths(203), plan, collate, device=CPU)
    assert isinstance(batches, RowBatches)
    first, second = epoch(batches, 0), epoch(batches, 1)
    for seen in (first, second):
        assert sorted(int(row[0]) for batch in seen for row in batch) == list(range(203))
    plain = epoch(make_batches(Lengths(203), plan.updated(bucket=False), collate, device=CPU), 0)
    padding = [sum(int((batch == -1).sum()) for batch in seen) for seen in (first, plain)]
    assert padding[0] < padding[1] / 4
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in second]
    jump = make_batches(Lengths(203), plan, collate, device=CPU)
    assert torch.equal(jump.window(Position(0, 1, 9))[0], second[9]), "a seek finds the same window"
    with pytest.raises(InputError, match="needs the samples' lengths"):
        make_batches(TensorDataset(torch.zeros(8)), Plan(batch_size=2, bucket=True), collate, device=CPU)


def test_a_data_set_may_have_an_order_epochs_and_a_batched_fetch() -> None:
    dataset = Ordered(6)
    batches = make_batches(dataset, Plan(batch_size=4), collate, device=CPU)
    epoch(batches, 0), epoch(batches, 1)
    assert dataset.fetched == [[0, 1, 2, 3], [4, 5], [5, 4, 3, 2], [1, 0]]
    assert dataset.epochs == [0, 1], "once for each epoch"


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 3, 4, 5, 5], [0, 1, 2, 3, 4, 9]], ids=["short", "long", "beyond"])
def test_an_order_that_is_not_of_the_data_sets_rows_is_refused(order: list[int]) -> None:
    class Wrong(Lengths):
        def order(self, epoch: int) -> list[int]:
            return order

    with pytest.raises(InputError, match="order"):
        epoch(make_batches(Wrong(6), Plan(batch_size=2), collate, device=CPU), 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_row_once_as_they_stand(workers: int) -> None:
    batches = make_batches(Ordered(21), Plan(batch_size=4, workers=workers), collate, device=CPU, shuffle=False)
    assert [int(row[0]) for batch in batches for row in batch] == list(range(21))
    larger = make_batches((torch.arange(3),), Plan(batch_size=64), list, device=CPU, shuffle=False)
    assert [batch[0].tolist() for batch in larger] == [[0, 1, 2]], "a batch may be larger than what is evaluated"


def test_a_batch_size_of_none_is_the_whole_data() -> None:
    batches = make_batches((torch.arange(9),), Plan(batch_size=None), list, device=CPU)
    assert batches.steps_per_epoch == 1 and sorted(batches.window(Position())[0][0].tolist()) == list(range(9))


def test_loaders_are_taken_apart_or_run_as_they_are() -> None:
    dataset = TensorDataset(torch.arange(20))
    apart = taken_apart(DataLoader(dataset, batch_size=6, shuffle=True, drop_last=True))
    assert apart is not None and apart[1] == {"batch_size": 6, "drop_last": True, "workers": 0} and apart[3]
    assert taken_apart(DataLoader(dataset, batch_size=6))[3] is False  # type: ignore[index]
    for sampler in (SubsetRandomSampler(range(5)), RandomSampler(dataset, replacement=True, num_samples=7)):
        loader = DataLoader(dataset, batch_size=2, sampler=sampler)
        assert taken_apart(loader) is None
        batches = make_batches(loader, Plan(), list, device=CPU)
        assert isinstance(batches, LoaderBatches)
        first = batches.window(Position(0, 0, 0)) + batches.window(Position(0, 0, 1))
        assert [len(batch[0]) for batch in first] == [2, 2]
        with pytest.raises(InputError, match="cannot seek to step 3 of an epoch; give its data set instead"):
            batches.window(Position(0, 0, 3))
        assert len(batches.window(Position(2, 1, 0))) == 1, "an epoch may begin anew"
        with pytest.raises(InputError, match="cannot be shared"):
            batches.window(Position(0, 0, 1), Share(0, 1))


@pytest.mark.parametrize(
    "loader",
    [
        lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 2, drop_last=False)),
        lambda data: DataLoader(data, batch_size=None),
        lambda data: DataLoader(data, batch_size=2, sampler=Backwards(data)),
    ],
    ids=["batch sampler", "no batches", "own sampler"],
)
def test_only_a_loader_whose_order_is_torchs_own_is_taken_apart(loader: Any) -> None:
    made = loader(Whole(6))
    apart = taken_apart(made)
    if apart is None:
        rows = torch.cat([part.reshape(-1) for part in make_batches(made, Plan(), list, device=CPU)]).tolist()
        assert sorted(rows) == list(range(6)), "and else it runs as it is"
    else:
        assert apart[0] is made.dataset and apart[1]["batch_size"] == 2 and apart[3], "a plain batch sampler over random rows says the same"


class Backwards(Sampler[int]):
    def __init__(self, data: Whole) -> None:
        self.data = data

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.data))[::-1])


def test_a_loaders_collate_is_kept() -> None:
    apart = taken_apart(DataLoader(Lengths(9), batch_size=3, collate_fn=collate))
    assert apart is not None and apart[2] is collate


def test_floats_take_the_plans_type_and_images_its_memory_format() -> None:
    data = (torch.zeros(8, 3, 4, 4, dtype=torch.float64), torch.zeros(8, dtype=torch.long))
    x, y = make_batches(data, Plan(batch_size=4, channels_last=True), list, device=CPU).window(Position())[0]
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.long


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(InputError, match=re.escape("batch_size (=9) is larger than the 8 rows to train on; pass a smaller one, or None")):
        make_batches((torch.zeros(8),), Plan(batch_size=9), list, device=CPU)


def test_bad_columns_are_refused_by_name(tmp_path: Path) -> None:
    for fields, message in (
        ({"target": "wage"}, "target (='wage') is not a column of Table of 4 rows; the columns are: number, grade, flag, target"),
        ({"group": "who"}, "group (='who') is not a column"),
        ({"ignore": ["who"]}, "ignore (='who') is not a column"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            Source(TABLE, **fields).read()
    with pytest.raises(DataError, match="types names 'who'"):
        infer_schema(TABLE, None, (), {"who": "text"})
    with pytest.raises(DataError, match="split column 'grade' holds"):
        read_splits(Source(TABLE, split="grade"), None, None, wants_validation=False)
    with pytest.raises(DataError, match=re.escape("schema is malformed")):
        Schema.from_json({"columns": [{"colour": 1}], "target": None})
