"""Sources, splits, tables to tensors, batches."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, TensorDataset

from anyfit import Plan, Schema, Source
from anyfit.data import (
    LoaderBatches,
    RowBatches,
    TensorBatches,
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
)
from anyfit.data.sources import pixels_of
from anyfit.errors import DataError, InputError
from anyfit.schema import Column
from anyfit.state import Position

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


@pytest.mark.parametrize("data", [3, [], None, (np.zeros(3), np.zeros(4)), (np.zeros((0, 2)), np.zeros(0)), (np.array(["a"]),)])
def test_what_is_no_source_is_refused(data: Any) -> None:
    with pytest.raises(DataError):
        Source(data).read()


# Splits

FRAME = st.lists(st.tuples(st.integers(0, 50), st.sampled_from("abc"), st.none() | st.floats(-5, 5)), min_size=4, max_size=60, unique=True)


def frame(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = list(zip(*rows, strict=True))
    return pa.table({"n": pa.array(columns[0], pa.int64()), "word": columns[1], "x": pa.array(columns[2], pa.float64())})


@given(FRAME, st.randoms())
@settings(max_examples=40)
def test_a_split_by_fraction_depends_on_each_row_alone(rows: list[tuple[Any, ...]], random: Any) -> None:
    table = frame(rows)
    hashes = dict(zip(rows, row_hashes(table).tolist(), strict=True))
    assert len(set(hashes.values())) == len(rows)
    shuffled = random.sample(rows, len(rows))
    assert [hashes[row] for row in shuffled] == row_hashes(frame(shuffled)).tolist()
    rest, part = by_fraction(table, 0.3)
    assert rest.num_rows >= 1 and part.num_rows >= 1 and rest.num_rows + part.num_rows == len(rows)


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
    assert schema.cardinalities == (3, 3) and schema.input_size == 3
    assert Schema.from_json(schema.to_json()) == schema
    forced = infer_schema(TABLE, None, ["flag"], {"target": "continuous"})
    assert [column.name for column in forced.columns] == ["number", "grade", "target"]


def test_tensors_by_schema() -> None:
    schema = infer_schema(TABLE, "target")
    schema = fitted(schema, statistics(TABLE, schema))
    tensors = to_tensors(TABLE, schema)
    assert tensors["continuous"][:, 0].tolist() == pytest.approx([-1.2247, 0, 0, 1.2247], abs=1e-4)
    assert tensors["categorical"].tolist() == [[2, 2], [1, 1], [0, 2], [1, 0]]
    assert tensors["target"].tolist() == [0, 1, 0, -100]
    new = pa.table({"number": [3.0], "grade": ["8"], "flag": [True], "target": [2]})
    assert to_tensors(new, schema)["categorical"].tolist() == [[0, 2]], "an unseen category is 0, as missing is"
    assert "target" not in to_tensors(new.drop_columns(["target"]), schema, need_target=False)
    with pytest.raises(DataError, match="target 'target' holds '7', which training did not have; its classes are: 2, 10"):
        to_tensors(new.set_column(3, "target", [[7]]), schema)
    with pytest.raises(DataError, match="column 'grade' is missing"):
        to_tensors(new.drop_columns(["grade"]), schema)


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
    from anyfit.data.sources import image_column

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
    assert fingerprint(Lengths(5)) == fingerprint(Lengths(5)) != fingerprint(Lengths(6))


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


def test_chunks_and_shares_show_the_same_rows() -> None:
    x = torch.arange(5000)
    batches = make_batches({"x": x, "y": -x}, Plan(batch_size=7, accumulate=2, seed=4), list, device=CPU)
    for offset in (0, 63, 64, 200, 357):
        whole = batches.window(Position(0, 1, offset))
        size = sum(len(batch["x"]) for batch in whole)
        parts = [batches.window(Position(0, 1, offset), slice(*bounds)) for bounds in ((0, 3), (3, 3), (3, size))]
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


def test_a_data_set_may_have_an_order_and_a_batched_fetch() -> None:
    class Ordered(Lengths):
        def order(self, epoch: int) -> list[int]:
            return list(range(len(self)))[:: -1 if epoch else 1]

        def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
            self.fetched.append(indices)
            return [self[index] for index in indices]

    dataset = Ordered(6)
    batches = make_batches(dataset, Plan(batch_size=4), collate, device=CPU)
    epoch(batches, 0), epoch(batches, 1)
    assert dataset.fetched == [[0, 1, 2, 3], [4, 5], [5, 4, 3, 2], [1, 0]]


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
        batches.window(Position(0, 0, 0))
        with pytest.raises(InputError, match="cannot seek"):
            batches.window(Position(0, 0, 3))
        with pytest.raises(InputError, match="cannot be shared"):
            batches.window(Position(0, 0, 1), slice(0, 1))


def test_floats_take_the_plans_type_and_images_its_memory_format() -> None:
    data = (torch.zeros(8, 3, 4, 4, dtype=torch.float64), torch.zeros(8, dtype=torch.long))
    x, y = make_batches(data, Plan(batch_size=4, channels_last=True), list, device=CPU).window(Position())[0]
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.long


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(InputError, match=re.escape("batch_size (=9) is larger than the 8 rows to train on; pass a smaller one, or None")):
        make_batches((torch.zeros(8),), Plan(batch_size=9), list, device=CPU)


def test_bad_columns_are_refused_by_name(tmp_path: Path) -> None:
    for fields, message in (
        ({"target": "wage"}, "target (='wage') is not a column of table; the columns are: number, grade, flag, target"),
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
