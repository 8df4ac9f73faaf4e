"""Columns and their semantic types: what a schema says of them, and that it survives JSON."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anyfit.data import describe, infer_schema
from anyfit.errors import DataError
from anyfit.schema import Column, Schema, published
from anyfit.values import canonical, parse

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
COLUMNS = st.builds(
    Column,
    name=st.text(st.characters(codec="utf-8"), max_size=5),
    type=st.sampled_from(["continuous", "categorical", "text", "image", "datetime", "identifier"]),
    categories=st.none() | st.lists(st.text(st.characters(codec="utf-8"), max_size=3), max_size=3).map(tuple),
    mean=st.none() | NUMBERS | st.lists(NUMBERS, min_size=1, max_size=3).map(tuple),
    std=st.none() | NUMBERS | st.lists(NUMBERS, min_size=1, max_size=3).map(tuple),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    missing=st.booleans(),
    multiple=st.booleans(),
    weights=st.none() | st.lists(NUMBERS, min_size=1, max_size=3).map(tuple),
    tokenizer=st.none() | st.just("{}"),
)
SCHEMA = Schema(
    (
        Column("age", "continuous", mean=40.0, std=12.0),
        Column("scan", "image", shape=(3, 8, 8)),
        Column("colour", "categorical", categories=("blue", "red")),
        Column("label", "categorical", categories=("no", "yes")),
    ),
    "label",
)


@given(st.lists(COLUMNS, max_size=4, unique_by=lambda column: column.name), st.booleans())
@example([Column("all missing", "categorical", categories=())], True)
def test_to_json_and_from_json_are_the_identity(columns: list[Column], targeted: bool) -> None:
    schema = Schema(tuple(columns), columns[-1].name if columns and targeted else None)
    again = Schema.from_json(parse(canonical(schema.to_json())))
    assert again == schema and again.hash() == schema.hash() and not schema.differences(again)
    several = Schema(tuple(columns), tuple(column.name for column in columns), "w")
    assert Schema.from_json(parse(canonical(several.to_json()))) == several


def test_a_schema_tells_features_from_the_target() -> None:
    assert [column.name for column in SCHEMA.features] == ["age", "scan", "colour"]
    assert [column.name for column in SCHEMA.of_type("categorical")] == ["colour"]
    assert SCHEMA.classes == ("no", "yes") and SCHEMA.num_classes == 2
    assert SCHEMA.cardinalities == (4,), "two categories, 0 for missing and 1 for any other"
    assert SCHEMA.input_size == 1 + 3 * 8 * 8 + 1
    assert SCHEMA["age"].mean == 40.0
    untargeted = Schema(SCHEMA.columns)
    assert untargeted.features == SCHEMA.columns and untargeted.classes is None


def test_replacing_columns_keeps_their_order_and_the_target() -> None:
    fitted = Column("age", "continuous", mean=1.0, std=2.0)
    replaced = SCHEMA.replace([fitted])
    assert [column.name for column in replaced.columns] == [column.name for column in SCHEMA.columns]
    assert replaced["age"] == fitted and replaced["colour"] == SCHEMA["colour"] and replaced.target == "label"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Column("a", "number"),
            "type (='number') of column 'a' must be one of continuous, categorical, text, image, datetime, identifier",
        ),
        (lambda: Schema((Column("a", "text"), Column("a", "text"))), "column 'a' stands twice"),
        (lambda: Schema((Column("a", "text"),), "b"), "target (='b') is not a column; the columns are: a"),
        (lambda: SCHEMA["wage"], "column (='wage') is not in the schema; it has: age, scan, colour, label"),
        (lambda: Schema((Column("a", "continuous"),), "a").num_classes, "target (='a') is not categorical, so it has no classes"),
    ],
    ids=range(5),
)
def test_what_does_not_fit_is_named(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"columns": []},
        {"columns": 3, "target": None},
        {"columns": [3], "target": None},
        {"columns": [{"name": "a"}], "target": None},
        {"columns": [{"name": "a", "type": "text", "colour": 1}], "target": None},
        [],
    ],
    ids=range(7),
)
def test_malformed_json_is_a_data_error(value: Any) -> None:
    with pytest.raises(DataError, match="schema is malformed"):
        Schema.from_json(value)


# What may be told of a source


@st.composite
def described(draw: st.DrawFn) -> tuple[pa.Table, Any]:
    rows = draw(st.integers(1, 60))
    word = draw(st.lists(st.none() | st.sampled_from("abcdefgh"), min_size=rows, max_size=rows))
    number = draw(st.lists(st.none() | st.integers(-50, 50).map(float), min_size=rows, max_size=rows))
    moment = draw(st.lists(st.none() | st.integers(-(10**9), 10**9), min_size=rows, max_size=rows))
    labels = draw(st.lists(st.none() | st.lists(st.sampled_from("pqr"), max_size=3), min_size=rows, max_size=rows))
    table = pa.table(
        {
            "word": pa.array(word, pa.string()),
            "number": pa.array(number, pa.float64()),
            "moment": pa.array(moment, pa.timestamp("s")),
            "text": [f"some secret words of {row}" for row in range(rows)],
            "labels": pa.array(labels, pa.list_(pa.string())),
        }
    )
    return table, infer_schema(table, "labels", types={"text": "text"})


@given(described(), st.integers(1, 20))
@settings(max_examples=80)
def test_nothing_is_told_that_too_few_rows_stand_behind(given_: tuple[pa.Table, Any], minimum: int) -> None:
    table, schema = given_
    told = {column["name"]: column for column in published(describe(table, schema), minimum)}
    assert set(told) == set(table.column_names) and set(told["text"]) == {"name", "type"}
    words = table["word"].to_pylist()
    for word in told["word"].get("categories", ()):
        assert sum(other == word for other in words) >= minimum
    assert told["word"].get("others_rows", minimum) >= minimum
    for label in told["labels"].get("categories", ()):
        assert sum(row is not None and label in row for row in table["labels"].to_pylist()) >= minimum, "rows, not mentions"
    for name in ("number", "moment"):
        if "range" in told[name]:
            low, high = told[name]["range"]
            known = [value for value in table[name].to_pylist() if value is not None]
            known = [float(f"{value:.2g}") if name == "number" else value.isoformat()[:10] for value in known]
            for bound in (low, high):
                assert sum(value <= bound for value in known) >= minimum and sum(value >= bound for value in known) >= minimum
    assert set(told["number"]) <= {"name", "type", "range"}


def test_a_column_may_be_told_whole_where_that_is_allowed() -> None:
    table = pa.table({"word": ["a", "b"], "number": [1.0, 2.0]})
    description = describe(table, infer_schema(table, None))
    told = published(description, 10, allow=["word"])
    assert told[0] == description[0] and told[1] == {"name": "number", "type": "continuous"}
    with pytest.raises(DataError, match="allow names 'wage', which is not a column; the columns are: number, word"):
        published(description, allow=["wage"])
    with pytest.raises(DataError, match=re.escape("minimum (=0) must be at least 1")):
        published(description, 0)


def test_a_schema_of_thousands_of_columns_is_made_at_once() -> None:
    schema = Schema(tuple(Column(f"c{index}", "continuous") for index in range(20_000)), "c1")
    assert len(schema.features) == 19_999
