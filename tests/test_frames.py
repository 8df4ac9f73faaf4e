"""Data frames and data sets of other libraries are the tables they hold."""

from __future__ import annotations

import datetime as dt
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import anyfit
from anyfit import Source
from anyfit.data import fingerprint, fitted, infer_schema, pixels_of, row_hashes, statistics, to_tensors
from anyfit.errors import DataError

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")

MOMENTS = [dt.datetime(2020, 1, 2, 3, 4, 5), dt.datetime(1931, 5, 6), None]  # noqa: DTZ001 - without a zone, as most are
COLUMNS: dict[str, list[Any]] = {
    "whole": [1, None, 3],
    "real": [1.5, float("nan"), -2.0],
    "word": ["a", None, "b"],
    "kind": ["x", "y", "x"],
    "yes": [True, None, False],
    "moment": MOMENTS,
    "day": [dt.date(2020, 1, 2), None, dt.date(1931, 5, 6)],
    "none": [None, None, None],
    "target": ["no", "yes", "no"],
}
TYPES = ["continuous", "continuous", "categorical", "categorical", "categorical", "datetime", "datetime", "continuous", "categorical"]


def of_pandas() -> Any:
    frame = pandas.DataFrame({**COLUMNS, "whole": pandas.array(COLUMNS["whole"], "Int64"), "kind": pandas.Categorical(COLUMNS["kind"])})
    return frame.set_index(pandas.Index([7, 8, 9]))


def of_polars() -> Any:
    return polars.DataFrame({**COLUMNS, "kind": polars.Series(COLUMNS["kind"], dtype=polars.Categorical)}, strict=False)


def of_datasets() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict(COLUMNS)


def of_arrow() -> Any:
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in COLUMNS.items()})
    for index, name in ((2, "word"), (3, "kind")):
        table = table.set_column(index, name, table[name].cast(pa.large_string()).dictionary_encode())
    return table


@pytest.mark.parametrize("make", [of_pandas, of_polars, of_datasets, of_arrow, lambda: of_arrow().to_batches()[0]], ids=range(5))
def test_a_frame_of_any_library_is_one_and_the_same_table(make: Any) -> None:
    """Values, types, hashes and so splits; categories, views and large strings are only ways to hold them."""
    table = Source(make()).read()["train"]
    plain = Source(of_arrow()).read()["train"]
    assert (
        row_hashes(table.select(["whole", "real", "word", "kind", "yes"])).tolist()
        == row_hashes(plain.select(["whole", "real", "word", "kind", "yes"])).tolist()
    )
    schema = infer_schema(table, "target")
    assert [column.type for column in schema.columns] == TYPES
    tensors, others = (to_tensors(rows, fitted(schema, statistics(rows, schema))) for rows in (table, plain))
    assert all(np.allclose(tensors[name], others[name], atol=1e-9) for name in ("continuous", "categorical", "target"))
    assert table["word"].type == pa.string() == table["kind"].type
    assert "of 3 rows" in Source(make()).name


def test_zones_nanoseconds_and_times_before_1970_are_moments() -> None:
    frame = pandas.DataFrame(
        {
            "fine": pandas.Series(np.array([1, -1_500_000_001, 7], "datetime64[ns]")),
            "zone": pandas.to_datetime(["1950-01-01", "2020-06-01", None]).tz_localize("Europe/Brussels"),
            "old": pandas.Series(np.array(["0001-01-01", "1600-02-29", "9999-12-31"], "datetime64[us]")),
        }
    )
    table = Source(frame).read()["train"]
    schema = infer_schema(table, None)
    schema = fitted(schema, statistics(table, schema))
    tensors = to_tensors(table, schema)
    assert {column.type for column in schema.columns} == {"datetime"} and tensors["continuous"].shape == (3, 22)
    assert bool(tensors["continuous"].isfinite().all()) and schema["zone"].missing
    utc = table.set_column(1, "zone", table["zone"].cast(pa.timestamp("us", "UTC")))
    assert bool((to_tensors(utc, schema)["continuous"] == tensors["continuous"]).all()), "a zone is how a moment is written"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pandas.DataFrame([[1, 2]], columns=["a", "a"]), "a"),
        (lambda: pandas.DataFrame({"a": [1, "x", 2.5]}), "column a"),
        (lambda: pandas.DataFrame({"a": []}), "has no rows"),
        (pandas.DataFrame, "has no rows"),
        (lambda: polars.DataFrame({"a": []}), "has no rows"),
        (lambda: polars.DataFrame({"a": [1]}).lazy(), "a LazyFrame) is no source"),
    ],
    ids=range(6),
)
def test_a_frame_that_cannot_become_a_table_says_why(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        Source(make()).read()


@pytest.mark.parametrize(
    "make",
    [
        lambda: pandas.DataFrame({"a": pandas.to_timedelta([1, 2]), "x": [1, 2]}),
        lambda: pandas.DataFrame({"a": [{"b": 1}, {"b": 2}], "x": [1, 2]}),
        lambda: polars.DataFrame({"a": [[1, 2], [3]], "x": [1, 2]}),
        lambda: polars.DataFrame({"a": [dt.time(1), dt.time(2)], "x": [1, 2]}),
    ],
    ids=range(4),
)
def test_a_column_without_a_semantic_type_is_named_and_may_be_left_out(make: Any) -> None:
    table = Source(make()).read()["train"]
    with pytest.raises(DataError, match=r"column 'a' .*ignore"):
        infer_schema(table, None)
    assert [column.name for column in infer_schema(table, None, ["a"]).columns] == ["x"]
    assert len(set(row_hashes(table).tolist())) == 2


def test_lists_of_polars_are_labels_and_words_for_missing_hold_in_frames() -> None:
    frame = polars.DataFrame({"x": ["1.5", "n.v.t.", "2"] * 30, "target": [["a"], ["a", "b"], []] * 30})
    coded = frame.with_columns(polars.col("target").cast(polars.List(polars.Categorical)))
    assert Source(coded).read()["train"]["target"].to_pylist() == frame["target"].to_list()
    assert Source(coded[1:]).read()["train"]["target"].to_pylist() == frame["target"].to_list()[1:]
    table = Source(frame, missing=["n.v.t."]).read()["train"]
    assert table["x"].null_count == 30
    schema = infer_schema(table, "target", types={"x": "continuous"})
    schema = fitted(schema, statistics(table, schema))
    assert schema.classes == ("a", "b") and schema["x"].missing
    assert to_tensors(table, schema)["target"][:3].tolist() == [[1, 0], [1, 1], [0, 0]]


def test_odd_column_names_are_text(tmp_path: Path) -> None:
    table = Source(pandas.DataFrame([[1, 2, "a"], [3, 4, "b"]], columns=[0, "", ("x", 1)])).read()["train"]
    assert [column.name for column in infer_schema(table, None).columns] == table.column_names
    assert all(isinstance(name, str) for name in table.column_names)


def test_a_fingerprint_does_not_see_which_library_held_the_rows() -> None:
    columns = {"a": [1, 2, 3], "b": [0.5, None, 2.0], "c": ["x", None, "z"]}
    frames = [pandas.DataFrame(columns), polars.DataFrame(columns), pa.table(columns)]
    prints = {fingerprint(Source(frame).read()["train"]) for frame in frames}
    assert len(prints) == 1 and fingerprint(Source(pa.table({**columns, "a": [1, 2, 4]})).read()["train"]) not in prints
    nans = pa.table({"b": pa.array(np.array([0xFFF8 << 48, 0x7FF8 << 48, 0x7FF0000000000001], np.uint64).view(np.float64))})
    assert len(set(row_hashes(nans).tolist())) == 1, "whatever wrote it, NaN is NaN"


# Hugging Face datasets


@pytest.fixture
def labelled() -> Any:
    datasets = pytest.importorskip("datasets")

    def picture(value: int) -> dict[str, Any]:
        file = io.BytesIO()
        Image.new("L", (3, 2), value).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["old", "new"])),
        }
    )
    rows = {"image": [picture(value) for value in range(4)], "label": [0, 1, -1, None], "tags": [[0], [1, 0], [], [1]]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_labels_have_their_names_and_images_their_pixels(labelled: Any) -> None:
    table = Source(labelled).read()["train"]
    assert table["label"].to_pylist() == ["cat", "dog", None, None] and table["tags"].to_pylist() == [["old"], ["new", "old"], [], ["new"]]
    assert pixels_of(table["image"])[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    shuffled = Source(labelled.select([3, 1])).read()["train"]
    assert shuffled["label"].to_pylist() == [None, "dog"] and shuffled["tags"].to_pylist() == [["new"], ["new", "old"]]
    assert infer_schema(table, "tags", ["label"])["tags"].multiple


def test_a_dict_of_data_sets_is_its_splits_in_memory_and_saved(labelled: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = datasets.DatasetDict({"train": labelled, "valid": labelled.select([0]), "test": labelled.select([1]), "unsupervised": labelled})
    parts.save_to_disk(tmp_path / "all")
    labelled.save_to_disk(tmp_path / "one")
    for origin in (parts, tmp_path / "all"):
        read = Source(origin).read()
        assert {split: rows.num_rows for split, rows in read.items()} == {"train": 4, "validation": 1, "test": 1}
        assert read["test"]["label"].to_pylist() == ["dog"]
    assert Source(tmp_path / "one").read()["train"].num_rows == 4 and Source(parts).name
    with pytest.raises(DataError, match="the DatasetDict has no split named train; it has: test"):
        Source(datasets.DatasetDict({"test": labelled})).read()
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(b"ARROW1")
    with pytest.raises(DataError, match=r"one'\) cannot be read as a saved data set"):
        Source(tmp_path / "one").read()


def test_an_image_that_is_missing_is_named_with_its_row(labelled: Any) -> None:
    datasets = pytest.importorskip("datasets")
    for value, message in (
        (None, "image 'image' is missing in row 1"),
        ({"bytes": None, "path": "/no/1.png"}, "image 'image' of row 1 (/no/1.png)"),
    ):
        one = datasets.Dataset.from_dict({"image": [value]}, features=datasets.Features({"image": datasets.Image()}))
        with pytest.raises(DataError, match=re.escape(message)):
            Source(one).read()


def test_a_fit_takes_a_frame() -> None:
    frame = polars.DataFrame({"x": [float(row) for row in range(60)], "target": ["a" if row % 2 else "b" for row in range(60)]})
    run = anyfit.fit(anyfit.Tabular(hidden=(4,)), frame, epochs=1, batch_size=20, validation=0.3)
    assert len(anyfit.predict(run, frame.to_pandas())) == 60
