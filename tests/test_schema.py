"""Columns and their semantic types: what a schema says of them, and that it survives JSON."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anyfit.errors import DataError
from anyfit.schema import Column, Schema
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
