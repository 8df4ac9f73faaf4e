"""Rows larger than memory: blocks on disk tell and give what the same rows in memory do, and streams resume where they were."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

import anyfit
from anyfit import Plan, Source
from anyfit.data import (
    Blocks,
    Ragged,
    Share,
    Stream,
    blocks,
    files,
    fingerprint,
    fitted,
    infer_schema,
    make_batches,
    num_rows,
    read_splits,
    text,
    to_tensors,
    without,
)
from anyfit.data.blocks import hold
from anyfit.data.files import Files, Wider
from anyfit.data.large import BlockBatches
from anyfit.errors import DataError, InputError, StorageError
from anyfit.prepare import infer, statistics
from anyfit.state import Position

CPU = torch.device("cpu")
ROWS = 1000
TABLE = pa.table(
    {
        "row": pa.array(range(ROWS)),
        "x": pa.array([None if row % 7 == 0 else row / 3 for row in range(ROWS)]),
        "grade": pa.array([("low", "mid", "high", None)[row % 4] for row in range(ROWS)]),
        "flag": pa.array([row % 3 == 0 for row in range(ROWS)]),
        "seen": pa.array([-1_000_000_000_000 + row * 100_000_000 for row in range(ROWS)], pa.timestamp("ms")),
        "who": pa.array([row // 10 for row in range(ROWS)]),
        "fold": pa.array([("train", "train", "val", "test")[row % 4] for row in range(ROWS)]),
        "target": pa.array([("no", "yes")[(row * row) % 3 % 2] for row in range(ROWS)]),
    }
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANYFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is larger than memory."""
    monkeypatch.setattr(blocks, "HOLD_BYTES", 1000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(files, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(files, "BATCH_ROWS", 70)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pa.parquet.write_table(TABLE, tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def in_blocks(path: Path, **fields: Any) -> Blocks:
    rows = Source(path, **fields).read()["train"]
    assert isinstance(rows, Blocks) and len(rows.sizes) > 2
    return rows


def table_of(rows: Any) -> pa.Table:
    return pa.concat_tables(list(rows)).combine_chunks() if isinstance(rows, Blocks) else rows


# What blocks hold


def test_blocks_are_the_rows_in_their_order_and_of_even_size(small: None, path: Path) -> None:
    rows = in_blocks(path)
    assert table_of(rows).equals(TABLE) and rows.num_rows == ROWS == num_rows(rows) and rows.column_names == TABLE.column_names
    bytes_ = [rows.block(index).nbytes for index in range(len(rows.sizes))]
    assert max(bytes_) <= 8000 and min(bytes_[:-1]) >= 2000
    assert rows.head(37).equals(TABLE.slice(0, 37))


def test_blocks_stay_small_though_rows_grow(small: None, tmp_path: Path) -> None:
    """The first rows say nothing of how long the later ones are."""
    table = pa.table({"text": ["x" * (1 + row) for row in range(600)]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    rows = in_blocks(tmp_path / "t.parquet")
    assert table_of(rows).equals(table) and max(rows.block(index).nbytes for index in range(len(rows.sizes))) < 10_000


def test_cells_that_are_large_come_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BATCH_BYTES", 1 << 20)
    random = np.random.default_rng(0)
    pa.parquet.write_table(pa.table({"a": [random.bytes(100_000) for _ in range(60)]}), tmp_path / "t.parquet")
    assert max(batch.nbytes for batch in Files([str(tmp_path / "t.parquet")]).batches()) < 2 << 20


def test_images_and_lists_pass_through_blocks(small: None, tmp_path: Path) -> None:
    from PIL import Image

    for row in range(60):
        file = tmp_path / "images" / "ab"[row % 2] / f"{row:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), row, dtype=np.uint8)).save(file)
    rows = Source(tmp_path / "images").read()["train"]
    assert isinstance(rows, Blocks) and len(rows.sizes) > 1 and isinstance(rows.schema.field("image").type, pa.FixedShapeTensorType)
    tensors = to_tensors(table_of(rows), schema_of(Source(tmp_path / "images"), rows))
    assert tensors["image"][:, 0, 0, 0].tolist() == [*range(0, 60, 2), *range(1, 60, 2)]
    lists = pa.table({"x": range(500), "target": [["a"], ["b", "a"], [], None] * 125})
    pa.parquet.write_table(lists, tmp_path / "lists.parquet")
    assert table_of(in_blocks(tmp_path / "lists.parquet")).equals(lists)


# Blocks beside a table


def schema_of(source: Source, rows: Any) -> anyfit.Schema:
    schema = infer(source, rows)
    total = statistics(anyfit.Tabular(), rows, schema)
    assert total is not None
    return fitted(schema, total)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_schema_and_statistics_are_those_of_the_table(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / f"t.{kind}"
    (pa.parquet.write_table if kind == "parquet" else pa.csv.write_csv)(TABLE, file)
    source = Source(file, group="who", ignore=["fold"])
    table = source.read()["train"]
    assert isinstance(table, pa.Table)
    monkeypatch.setattr(blocks, "HOLD_BYTES", 1000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4000)
    rows = in_blocks(file, group="who", ignore=["fold"])
    ours, theirs = schema_of(source, rows), schema_of(source, table)
    assert [(c.name, c.type, c.categories, c.missing) for c in ours.columns] == [
        (c.name, c.type, c.categories, c.missing) for c in theirs.columns
    ]
    for column in theirs.columns:
        assert ours[column.name].mean == (None if column.mean is None else pytest.approx(column.mean, rel=1e-12))
        assert ours[column.name].std == (None if column.std is None else pytest.approx(column.std, rel=1e-9))
    assert table_of(rows).equals(table)


@pytest.mark.parametrize(
    ("fields", "given_"),
    [
        ({}, {"validation": 0.2, "test": 0.1}),
        ({"group": "who"}, {"validation": 0.2, "test": 0.3}),
        ({"group": "target"}, {"validation": 0.001, "test": None}),
        ({"group": "target"}, {"validation": 0.999, "test": None}),
        ({"split": "fold"}, {"validation": None, "test": None}),
        ({"split": "fold"}, {"validation": None, "test": 0.2}),
    ],
    ids=range(6),
)
def test_a_split_puts_the_same_rows_on_the_same_side(
    fields: dict[str, Any], given_: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = read_splits(Source(path, **fields), **given_, wants_validation=True)
    monkeypatch.setattr(blocks, "HOLD_BYTES", 1000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4000)
    disk = read_splits(Source(path, **fields), **given_, wants_validation=True)
    assert set(memory) == set(disk) and all(isinstance(part, Blocks) for part in disk.values())
    for split, table in memory.items():
        assert sorted(table_of(disk[split])["row"].to_pylist()) == sorted(table["row"].to_pylist())
        assert table_of(disk[split]).column_names == table.column_names == disk[split].column_names
    assert len({fingerprint(part) for part in disk.values()}) == len(disk)


def test_splits_that_cannot_be_are_refused_as_in_memory(small: None, tmp_path: Path) -> None:
    table = TABLE.set_column(6, "fold", pa.array(["val", "test"] * 500)).append_column("one", pa.array([1] * ROWS))
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    for fields, given_, message in (
        ({"split": "fold"}, None, "split column 'fold' has no row that says train"),
        ({"group": "one"}, 0.5, "all equal, or of one group"),
        ({"split": "grade"}, None, "split column 'grade' holds"),
        ({}, 1.5, "must be between 0 and 1"),
    ):
        with pytest.raises(DataError, match=message):
            read_splits(Source(tmp_path / "t.parquet", **fields), given_, None, wants_validation=False)


def test_columns_can_be_left_out_of_blocks_and_of_parts_of_them(small: None, path: Path) -> None:
    rows = in_blocks(path)
    part = rows.where(lambda table: pc.equal(table["grade"], "low").fill_null(False).to_numpy(), "low")
    fewer = without(without(part, ["grade", "none"]), ["x"])
    assert fewer.column_names == ["row", "flag", "seen", "who", "fold", "target"] == table_of(fewer).column_names
    assert table_of(fewer)["row"].to_pylist() == list(range(0, ROWS, 4)) and fewer.head(3).num_rows == 3
    again = fewer.where(lambda table: table["row"].to_numpy() % 8 == 0, "eighth")
    assert table_of(again)["row"].to_pylist() == list(range(0, ROWS, 8)) and len({fingerprint(r) for r in (rows, part, fewer, again)}) == 4
    assert without(rows, ["none"]) is rows


def test_a_word_among_numbers_is_found_though_it_stands_beyond_what_types_are_inferred_from(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by whoever reads the cache, and in a file whose column is text."""
    monkeypatch.setattr(blocks, "SAMPLE_ROWS", 300)
    values = [str(row) for row in range(ROWS)]
    values[900] = "n.v.t."
    table = pa.table({"a": values, "code": [f"{row:04}" for row in range(ROWS)], "b": range(ROWS)})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    pa.csv.write_csv(table, tmp_path / "t.csv")
    for name in ("t.parquet", "t.csv", "t.csv"):
        source = Source(tmp_path / name, target="b")
        with pytest.raises(DataError, match=r"column 'a' holds numbers, but 'n\.v\.t\.' in row 901; name what stands for a missing value"):
            infer(source, in_blocks(tmp_path / name))
        forced = Source(tmp_path / name, target="b", types={"a": "continuous"})
        with pytest.raises(DataError, match=r"column 'a' is continuous but holds 'n\.v\.t\.'"):
            schema_of(forced, in_blocks(tmp_path / name))
        named = Source(tmp_path / name, target="b", missing=["n.v.t."])
        schema = schema_of(named, in_blocks(tmp_path / name, missing=["n.v.t."]))
        assert schema["a"].type == "continuous" and schema["a"].missing


def test_words_for_missing_hold_in_a_database_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    pytest.importorskip("sqlalchemy")
    with contextlib.closing(sqlite3.connect(tmp_path / "t.db")) as connection, connection:
        connection.execute("CREATE TABLE t (a TEXT, b INTEGER)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [("n.v.t." if row % 2 else "x", row) for row in range(500)])
    for limit in (1 << 30, 100):
        monkeypatch.setattr(blocks, "HOLD_BYTES", limit)
        rows = Source(f"sqlite:///{tmp_path / 't.db'}", missing=["n.v.t."]).read()["train"]
        assert isinstance(rows, Blocks) == (limit == 100) and table_of(rows)["a"].null_count == 250


# Epochs


class Samples(Dataset[Any]):
    """What a task may make of a table: samples of different lengths."""

    def __init__(self, table: pa.Table) -> None:
        self.rows = table["row"].to_pylist()
        self.lengths = [row % 5 + 1 for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((self.lengths[index],), self.rows[index])

    @staticmethod
    def collate(samples: list[torch.Tensor]) -> Any:
        return (torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=-1),)


def as_tensors(table: pa.Table) -> Any:
    row = torch.tensor(table["row"].to_pylist())
    return {"row": row, "twice": row * 2}


def as_ragged(table: pa.Table) -> Any:
    rows = table["row"].to_pylist()
    return {"ids": Ragged.of([[row] * (row % 5 + 1) for row in rows], padding=-1), "row": torch.tensor(rows)}


BUILDS: dict[str, Callable[[pa.Table], Any]] = {"tensors": as_tensors, "ragged": as_ragged, "samples": Samples}


def rows_of(batch: Any) -> list[int]:
    """The rows of a batch, which must agree in all its parts."""
    if isinstance(batch, tuple):
        numbers = batch[0]
    elif "ids" in batch:
        numbers = batch["ids"]
        assert batch["row"].tolist() == numbers[:, 0].tolist() and batch["lengths"].tolist() == [
            row % 5 + 1 for row in batch["row"].tolist()
        ]
    else:
        assert torch.equal(batch["twice"], batch["row"] * 2)
        return batch["row"].tolist()
    rows = numbers[:, 0].tolist()
    width = max(row % 5 + 1 for row in rows)
    assert numbers.tolist() == [[row] * (row % 5 + 1) + [-1] * (width - row % 5 - 1) for row in rows]
    return rows


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    folder = tmp_path_factory.mktemp("held")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYFIT_CACHE", str(folder))
        patch.setattr(blocks, "BLOCK_BYTES", 300)
        pa.parquet.write_table(TABLE.select(["row", "grade"]).slice(0, 331), folder / "t.parquet")
        patch.setattr(files, "BATCH_ROWS", 17)
        rows = hold(Files([str(folder / "t.parquet")]), "t", 100)
    assert isinstance(rows, Blocks) and len(rows.sizes) > 4
    return rows


def of_blocks(held: Blocks, build: str, plan: Plan, **options: Any) -> Any:
    return make_batches(held, plan, Samples.collate, device=CPU, build=BUILDS[build], **options)


@given(
    st.sampled_from(sorted(BUILDS)),
    st.integers(1, 120),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 300), max_size=2),
    st.integers(0, 3),
)
@settings(max_examples=40)
def test_an_epoch_of_blocks_sees_each_row_once_and_any_step_can_be_sought(
    held: Blocks, build: str, batch_size: int, accumulate: int, drop: bool, bucket: bool, cuts: list[int], epoch: int
) -> None:
    plan = Plan(batch_size=batch_size, accumulate=accumulate, drop_last=drop, bucket=bucket and build != "tensors", seed=3)
    batches = of_blocks(held, build, plan)
    windows = [[rows_of(b) for b in batches.window(Position(0, epoch, offset))] for offset in range(batches.steps_per_epoch)]
    seen = [row for window in windows for batch in window for row in batch]
    assert len(seen) == len(set(seen)) and (drop or sorted(seen) == list(range(331)))
    assert all(len(batch) == batch_size for window in windows[:-1] for batch in window)
    assert len(windows) == batches.steps_per_epoch == (331 // batches.step_size if drop else -(-331 // batches.step_size))
    anew = of_blocks(held, build, plan)
    for offset in {0, len(windows) // 2, len(windows) - 1}:
        assert [rows_of(batch) for batch in anew.window(Position(0, epoch, offset))] == windows[offset], "a jump finds the same step"
        bounds = [0, *sorted(cuts), batches.units(Position(0, epoch, offset))]
        shares = [
            row
            for first, last in pairwise(bounds)
            for batch in anew.window(Position(0, epoch, offset), Share(first, max(first, last)))
            for row in rows_of(batch)
        ]
        assert shares == [row for batch in windows[offset] for row in batch], "shares of a step are its rows in order"
    assert len(anew._loaded) <= 2, "no more than two groups are in memory"


def test_epochs_differ_seeds_differ_and_rows_mix_beyond_their_block(held: Blocks) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = of_blocks(held, "tensors", Plan(batch_size=10, seed=seed))
        return [
            row
            for offset in range(batches.steps_per_epoch)
            for batch in batches.window(Position(0, epoch, offset))
            for row in rows_of(batch)
        ]

    assert order(1, 0) == order(1, 0) and len({tuple(order(*at)) for at in ((1, 0), (1, 1), (2, 0))}) == 3
    first = of_blocks(held, "tensors", Plan(batch_size=40, seed=1)).window(Position())[0]["row"].tolist()
    size = held.sizes[0]
    assert len({row // size for row in first}) > 1


def test_what_augments_a_sample_does_not_depend_on_the_worker(held: Blocks) -> None:
    batches = of_blocks(held, "tensors", Plan(batch_size=50, accumulate=2), augment=lambda batch, uniform: {**batch, "u": uniform()})
    whole = torch.cat([batch["u"] for batch in batches.window(Position(0, 0, 1))])
    parts = [batch["u"] for share in (Share(0, 30), Share(30, 100)) for batch in batches.window(Position(0, 0, 1), share)]
    assert torch.equal(whole, torch.cat(parts)) and len(set(whole.tolist())) == 100


@pytest.mark.parametrize("build", sorted(BUILDS))
@pytest.mark.parametrize("batch_size", [7, 64, 1000, None])
def test_evaluation_of_blocks_sees_each_row_once_as_they_stand(held: Blocks, build: str, batch_size: int | None) -> None:
    batches = of_blocks(held, build, Plan(batch_size=batch_size), shuffle=False)
    assert [row for batch in batches for row in rows_of(batch)] == list(range(331))


def test_blocks_refuse_a_batch_larger_than_all_rows(held: Blocks) -> None:
    with pytest.raises(InputError, match=r"batch_size \(=1000\) is larger than the 331 rows"):
        of_blocks(held, "tensors", Plan(batch_size=1000))


def test_memory_does_not_grow_with_the_epochs(held: Blocks) -> None:
    built: list[int] = []
    batches = make_batches(
        held, Plan(batch_size=20), list, device=CPU, build=lambda table: (built.append(table.num_rows), as_tensors(table))[1]
    )
    assert isinstance(batches, BlockBatches)
    for epoch in range(3):
        for offset in range(batches.steps_per_epoch or 0):
            batches.window(Position(0, epoch, offset))
            assert len(batches._loaded) <= 2
    assert sum(built) == 3 * 331, "and each group is made once in an epoch"


# A whole fit


def test_a_fit_evaluation_and_prediction_of_blocks_work_as_of_the_table(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of rows differs, so the weights do; evaluated with one set of weights all figures agree."""
    run = anyfit.fit(anyfit.Tabular(hidden=(8,)), Source(path, ignore=["fold", "row"]), epochs=1, validation=0.2, batch_size=64)
    memory = (anyfit.evaluate(run, path), anyfit.predict(run, path))
    monkeypatch.setattr(blocks, "HOLD_BYTES", 1000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4000)
    disk = (anyfit.evaluate(run, path), anyfit.predict(run, path))
    assert disk[0].keys() == memory[0].keys()
    assert all(np.allclose(disk[0][name], value, rtol=1e-5) for name, value in memory[0].items())
    assert torch.allclose(torch.as_tensor(disk[1]), torch.as_tensor(memory[1]), atol=1e-6)
    anew = anyfit.fit(
        anyfit.Tabular(hidden=(8,)), Source(path, ignore=["fold", "row"], weight="who"), epochs=1, validation=0.2, test=0.1, batch_size=64
    )
    assert torch.as_tensor(anyfit.predict(anew, path)).shape == torch.as_tensor(disk[1]).shape


def test_a_block_or_a_window_in_which_no_row_weighs_anything_is_no_error(small: None, tmp_path: Path) -> None:
    table = pa.table({"x": np.arange(600.0), "w": [0.0] * 590 + [1.0] * 10, "target": [0, 1] * 300})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    source = Source(tmp_path / "t.parquet", weight="w")
    schema = schema_of(source, in_blocks(tmp_path / "t.parquet"))
    assert float(to_tensors(table.slice(0, 50), schema)["weight"].sum()) == 0
    for weights, message in (([0.0] * 600, "weight 'w' is 0 in all rows"), ([-1.0] + [1.0] * 599, "weight 'w' is -1.0 in row 1")):
        pa.parquet.write_table(table.set_column(1, "w", pa.array(weights)), tmp_path / "u.parquet")
        with pytest.raises(DataError, match=message):
            schema_of(source, in_blocks(tmp_path / "u.parquet"))


# The cache


def files_in(cache: Path) -> list[str]:
    return sorted(file.name for file in cache.rglob("*") if file.is_file())


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read from here on."""
    seen: list[str] = []
    batches = Files.batches

    def counted(self: Files) -> Iterator[pa.RecordBatch]:
        seen.append(Path(self.paths[0]).name)
        return batches(self)

    monkeypatch.setattr(Files, "batches", counted)
    return seen


def test_what_was_read_once_is_found_again_and_a_changed_file_is_read_anew(
    small: None, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = reads(monkeypatch)
    first, second = in_blocks(path), in_blocks(path)
    assert seen == ["rows.parquet"] and first.path == second.path and first.path.is_relative_to(cache)
    assert fingerprint(first) == fingerprint(second) and table_of(second).equals(TABLE) and len(files_in(cache)) == 2
    in_blocks(path, missing=["low"])
    assert len(seen) == 2, "other options are other rows"
    before = path.stat()
    changed = TABLE.set_column(0, "row", pa.array(range(ROWS, 0, -1)))
    pa.parquet.write_table(changed, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    third = in_blocks(path)
    assert len(seen) == 3 and table_of(third).equals(changed) and fingerprint(third) != fingerprint(first)


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrow, about: arrow.write_bytes(arrow.read_bytes()[:-10]),
        lambda arrow, about: arrow.write_bytes(arrow.read_bytes()[:3000] + b"\x55" + arrow.read_bytes()[3001:]),
        lambda arrow, about: arrow.write_bytes(b""),
        lambda arrow, about: arrow.unlink(),
        lambda arrow, about: about.unlink(),
        lambda arrow, about: about.write_text("{"),
        lambda arrow, about: about.write_text("[]"),
        lambda arrow, about: about.write_text(json.dumps({**json.loads(about.read_text()), "sizes": [1]})),
        lambda arrow, about: about.write_text(json.dumps({**json.loads(about.read_text()), "odd": 3})),
    ],
    ids=range(9),
)
def test_a_damaged_cache_is_not_trusted_but_made_anew(
    damage: Callable[[Path, Path], object], small: None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = in_blocks(path)
    damage(whole.path, whole.path.with_suffix(".json"))
    seen = reads(monkeypatch)
    again = in_blocks(path)
    assert len(seen) == 1 and table_of(again).equals(TABLE) and fingerprint(again) == fingerprint(whole)


def test_a_cache_that_is_deleted_under_a_run_is_told(small: None, path: Path) -> None:
    rows = in_blocks(path)
    rows.path.unlink()
    with pytest.raises(StorageError, match="was deleted or damaged meanwhile; start again"):
        rows.block(0)


def test_rows_that_nobody_can_find_again_go_with_their_last_part(small: None, cache: Path) -> None:
    """They stand in ANYFIT_CACHE too: a system's /tmp may be memory."""

    class Unknown:
        def __init__(self) -> None:
            self.types: dict[str, pa.DataType] = {}

        def identity(self) -> None:
            return None

        def batches(self) -> Iterator[pa.RecordBatch]:
            yield from TABLE.to_batches(50)

    rows = hold(Unknown(), "rows")
    assert isinstance(rows, Blocks) and rows.path.is_relative_to(cache)
    part = rows.where(lambda table: table["row"].to_numpy() < 30, "few")
    del rows
    gc.collect()
    assert table_of(part).num_rows == 30
    del part
    gc.collect()
    assert not files_in(cache) and not any(cache.iterdir())


def test_a_wider_type_starts_again_and_leaves_nothing_behind(small: None, cache: Path) -> None:
    class Late:
        """Whole numbers, then a half, then a word."""

        def __init__(self, identity: list[Any] | None) -> None:
            self.types: dict[str, pa.DataType] = {}
            self.started, self._identity = 0, identity

        def identity(self) -> list[Any] | None:
            return self._identity

        def batches(self) -> Iterator[pa.RecordBatch]:
            self.started += 1
            kind = self.types.get("a", pa.int64())
            for start in range(0, 900, 100):
                yield pa.record_batch({"a": pa.array(range(start, start + 100)).cast(kind)})
            if kind == pa.int64():
                raise Wider("a", pa.float64())
            if kind == pa.float64():
                raise Wider("a", pa.string())
            yield pa.record_batch({"a": pa.array(["x"])})

    for identity in (None, ["late"]):
        reader = Late(identity)
        rows = hold(reader, "late")
        assert reader.started == 3 and isinstance(rows, Blocks) and rows.num_rows == 901 and rows.odd == {"a": ("x", 901)}
        assert len([name for name in files_in(cache) if name.endswith(".arrow")]) == 1 and not list(cache.rglob(".*.tmp"))
        del rows, reader
        gc.collect()

    class Endless(Late):
        def batches(self) -> Iterator[pa.RecordBatch]:
            self.started += 1
            raise Wider("a", pa.float64())
            yield

    reader = Endless(None)
    with pytest.raises(DataError, match="column 'a' of endless cannot be read as double"):
        hold(reader, "endless")
    assert reader.started == 2


def test_a_bad_row_far_down_leaves_nothing_half_written(small: None, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n" + "1,2\n" * 2000 + "1,2,3\n")
    with pytest.raises(DataError, match=r"Row #2002: Expected 2 columns, got 3"):
        Source(tmp_path / "t.csv").read()
    assert not files_in(cache)


def test_a_full_disk_leaves_nothing_and_names_the_folder(small: None, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def write(self: Any, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    with monkeypatch.context() as patch:
        patch.setattr(blocks._Hashed, "write", write)
        with pytest.raises(StorageError, match=r"No space left on device.*ANYFIT_CACHE"):
            Source(path).read()
    assert not files_in(cache)
    assert table_of(in_blocks(path)).equals(TABLE)
    monkeypatch.setenv("ANYFIT_CACHE", str(path / "inside a file"))
    with pytest.raises(StorageError, match="ANYFIT_CACHE"):
        Source(path, missing=["x"]).read()


def test_what_killed_processes_left_is_swept_once_it_is_old(small: None, path: Path, cache: Path) -> None:
    cache.mkdir()
    old, fresh = cache / ".a.arrow.x.tmp", cache / ".b.arrow.y.tmp"
    for file in (old, fresh):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * blocks.STALE_S,) * 2)
    in_blocks(path)
    assert not old.exists() and fresh.exists(), "another process may be writing it"


READ = """
import sys
from anyfit.data import blocks, files
from anyfit.data.files import Files
blocks.BLOCK_BYTES, files.BATCH_ROWS = 4000, 10
reader, slow = Files([sys.argv[1]]), Files.batches
def batches(self):
    import time
    for batch in slow(self):
        time.sleep(float(sys.argv[2]))
        yield batch
Files.batches = batches
print("reading", flush=True)
rows = blocks.hold(reader, "t", 1000)
print(rows.num_rows, rows.sha256, flush=True)
"""


def test_processes_that_read_at_once_and_one_that_is_killed_leave_one_whole_cache(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", READ, str(path)]
    killed = subprocess.Popen([*command, "0.05"], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    killed.stdout.readline()
    deadline = time.monotonic() + 30
    while not list(cache.glob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert not list(cache.glob("*.arrow")) and list(cache.glob(".*.tmp")), "only what bears no name yet"
    both = [subprocess.Popen([*command, "0.002"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0].splitlines()[1] for process in both]
    assert len(set(answers)) == 1 and answers[0].startswith(f"{ROWS} ")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(blocks, "HOLD_BYTES", 1000)
    seen = reads(monkeypatch)
    rows = in_blocks(path)
    assert not seen and table_of(rows).equals(TABLE) and answers[0].endswith(rows.sha256)


# Texts that are kept as numbers


def tokenizer() -> str:
    return text.trained_tokenizer({"a": 9, "b": 5, "c": 2}, "word", size=100, least=1, lowercase=True)


def test_tokens_are_kept_by_block_so_that_epochs_add_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CACHED_BYTES", 400)
    chunks = [pa.array([f"a b {'c ' * (row % 9)} {row}" for row in range(start, start + 30)]) for start in range(0, 120, 30)]
    expected = text._encoded(pa.chunked_array(chunks), tokenizer(), 5)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 0, 3, 1)):
        found = text.encoded(pa.chunked_array([chunks[index] for index in order]), tokenizer(), 5)
        rows = torch.tensor([row for index in order for row in range(30 * index, 30 * index + 30)])
        assert torch.equal(found.padded(torch.arange(120)), expected.padded(rows))
        assert len(files_in(cache)) == 4, "whatever the order of the blocks"


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-7], lambda data: data[:-3] + b"\x55" + data[-2:], lambda data: b"", lambda data: b"\0" * 100],
    ids=range(4),
)
def test_tokens_that_were_damaged_are_made_anew(damage: Callable[[bytes], bytes], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CACHED_BYTES", 400)
    texts = pa.chunked_array([[f"a {'b ' * (row % 7)}" for row in range(100)]])
    first = text.encoded(texts, tokenizer(), 9)
    [name] = files_in(cache)
    whole = (cache / name).read_bytes()
    (cache / name).write_bytes(damage(whole))
    again = text.encoded(texts, tokenizer(), 9)
    assert torch.equal(first.values, again.values) and torch.equal(first.offsets, again.offsets)
    assert (cache / name).read_bytes() == whole
    monkeypatch.setenv("ANYFIT_CACHE", str(cache / name / "no folder"))
    assert torch.equal(text.encoded(texts, tokenizer(), 9).values, first.values), "a cache that cannot be written costs time only"


# Streams


def numbered(rows: int) -> Callable[[], Iterator[dict[str, Any]]]:
    return lambda: ({"row": row, "target": row % 2} for row in range(rows))


@given(st.integers(1, 200), st.integers(1, 80), st.integers(0, 5))
@settings(max_examples=40)
def test_a_shuffle_buffer_gives_each_row_once_in_an_order_of_its_seed(rows: int, buffer: int, seed: int) -> None:
    stream = Stream(numbered(rows), buffer=buffer)
    order = [row["row"] for row in stream.shuffled(seed)]
    assert sorted(order) == list(range(rows)) and order == [row["row"] for row in stream.shuffled(seed)]
    assert all(place >= row - buffer for place, row in enumerate(order)), "none comes before it was in the buffer"
    if rows > 20 and buffer > 5:
        assert order != list(range(rows)) and order != [row["row"] for row in stream.shuffled(seed + 1)]


@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 3), st.booleans(), st.integers(0, 2))
@settings(max_examples=40)
def test_a_stream_resumes_at_any_step(rows: int, batch_size: int, accumulate: int, drop: bool, epoch: int) -> None:
    plan = Plan(batch_size=batch_size, accumulate=accumulate, drop_last=drop)

    def batches() -> Any:
        stream = Stream(numbered(rows), buffer=30)
        return make_batches(
            stream, plan, list, device=CPU, build=lambda t: (torch.tensor(t["row"].to_pylist()),), columns=stream.first().schema
        )

    whole, windows = batches(), []
    while window := whole.window(Position(0, epoch, len(windows))):
        windows.append([batch[0].tolist() for batch in window])
    seen = [row for window in windows for batch in window for row in batch]
    step = batch_size * accumulate
    assert len(seen) == len(set(seen)) == (rows // step * step if drop and rows >= step else rows)
    assert all(sum(map(len, window)) == step and len(window) == accumulate for window in windows[:-1])
    for offset in range(0, len(windows), 3):
        assert [batch[0].tolist() for batch in batches().window(Position(0, epoch, offset))] == windows[offset]
    assert batches().window(Position(0, epoch, len(windows) + 3)) == []
    evaluated = [batch[0].tolist() for batch in batches()]
    assert [row for batch in evaluated for row in batch] == list(range(rows))


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["stream", "blocks"])
def test_a_fit_that_is_cut_and_resumed_ends_with_the_same_weights(kind: str, small: None, path: Path, tmp_path: Path) -> None:
    columns = ["x", "grade", "target"]
    task = anyfit.Tabular(hidden=(4,))
    options: dict[str, Any] = {"batch_size": 50, "steps": 40, "checkpoint_every_s": 0.0, "log_every": 7}

    def data() -> Any:
        if kind == "blocks":
            return Source(path, ignore=[name for name in TABLE.column_names if name not in columns])
        return Stream(lambda: iter(TABLE.select(columns).to_batches(64)), buffer=100)

    whole = anyfit.fit(task, data(), run=tmp_path / "whole", **options)
    for stop in (1, 13, 20, 31):
        seen = 0

        def interrupt(event: dict[str, Any], stop: int = stop) -> None:
            nonlocal seen
            seen += event["event"] == "checkpoint"
            if seen == stop:
                raise Stop

        with pytest.raises(Stop):
            anyfit.fit(task, data(), run=tmp_path / str(stop), on_event=interrupt, **options)
        again = anyfit.fit(task, data(), run=tmp_path / str(stop), resume=True, **options)
        assert all(torch.equal(again.state.model[name], tensor) for name, tensor in whole.state.model.items())
        assert again.history == whole.history
    assert whole.result["steps"] == 40 and len(anyfit.predict(whole, data())) == ROWS


def test_what_can_be_read_once_only_is_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match=r"rows \(a generator\) can be read once only.*Stream\(make_rows\)"):
        Stream(numbered(3)())
    once = numbered(3)()
    stream = Stream(lambda: once)
    assert stream.first().num_rows == 3
    with pytest.raises(DataError, match="rows gave the same generator twice, which can be read once only; let the function make a new one"):
        list(stream)  # what was held of the first reading does not count as another
    for fields, message in (({"buffer": 0}, r"buffer \(=0\) must be at least 1"), ({"head": 0}, r"head \(=0\)")):
        with pytest.raises(DataError, match=message):
            Stream(numbered(3), **fields)


def test_a_stream_takes_rows_tables_and_anything_iterable_again() -> None:
    rows = [{"a": 1, "b": "x"}, {"b": "y", "c": 2.5, "a": 2}]
    for origin in (
        rows,
        lambda: iter(rows),
        [pa.Table.from_pylist(rows[:1]), rows[1]],
        lambda: [rows[0], pa.RecordBatch.from_pylist(rows[1:])],
    ):
        assert Stream(origin).first().to_pylist() == [{"a": 1, "b": "x", "c": None}, {"a": 2, "b": "y", "c": 2.5}], "no column is lost"
    assert Source(Stream(rows)).name == "Stream" and num_rows(Stream(rows)) is None
    assert fingerprint(Stream(rows)) == fingerprint(Stream(rows)) != fingerprint(Stream(rows[1:]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the stream gave no row"),
        ([3], "a stream gave a int; it must give rows as dicts"),
        ([{"a": 1}, {"a": "x"}], "column 'a' of a stream holds what does not fit it"),
    ],
    ids=range(3),
)
def test_a_stream_that_gives_no_rows_or_odd_ones_says_so(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Stream(rows).first()


def test_a_row_that_does_not_fit_the_types_of_the_first_is_named_with_the_way_out() -> None:
    stream = Stream([{"a": 1}] * 5 + [{"a": 2.5}], head=5)
    batches = make_batches(
        stream, Plan(batch_size=6), list, device=CPU, build=lambda t: (torch.tensor(t["a"].to_pylist()),), columns=stream.first().schema
    )
    with pytest.raises(DataError, match=r"column 'a' of a stream holds what does not fit it \(int64 by the first 5 rows; raise head"):
        batches.window(Position())
    with pytest.raises(InputError, match=r"batch_size \(=None\)"):
        make_batches(stream, Plan(batch_size=None), list, device=CPU, build=as_tensors, columns=stream.first().schema)
    with pytest.raises(InputError, match="a stream cannot be shared"):
        batches.window(Position(), Share(0, 1))
    with pytest.raises(DataError, match="cannot be split by fraction"):
        read_splits(Source(stream), 0.2, None, wants_validation=False)


def test_schema_of_blocks_ignores_rows_to_validate_on(small: None, path: Path, tmp_path: Path) -> None:
    source = Source(path, split="fold")
    before = schema_of(source, read_splits(source, None, None, wants_validation=False)["train"])
    changed = TABLE.set_column(1, "x", pc.if_else(pc.equal(TABLE["fold"], "train"), TABLE["x"], 1e6))
    pa.parquet.write_table(changed, tmp_path / "u.parquet")
    other = Source(tmp_path / "u.parquet", split="fold")
    assert schema_of(other, read_splits(other, None, None, wants_validation=False)["train"]) == before
    assert infer_schema(changed, "target") is not None


def test_the_head_of_a_stream_is_read_once_for_types_statistics_and_columns() -> None:
    begun: list[int] = []

    def rows() -> Any:
        begun.append(1)
        return iter([{"x": float(n), "target": n % 2} for n in range(50)])

    stream = Stream(rows)
    assert stream.first() is stream.first() and stream.first().num_rows == 50
    assert len(begun) == 1
