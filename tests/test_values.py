from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyfit.errors import InputError, StorageError
from anyfit.values import File, Plan, canonical, coerce, digest, parse, write_atomic, write_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_canonical_json_is_read_back_and_has_one_spelling(value: Any) -> None:
    assert parse(canonical(value)) == value
    shuffled = json.loads(json.dumps(value))
    if isinstance(shuffled, dict):
        shuffled = dict(reversed(shuffled.items()))
    assert canonical(shuffled) == canonical(value)
    assert digest(shuffled) == digest(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", "\ud800"])
def test_what_is_not_strict_json_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="not strict JSON"):
        canonical(value)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    write_json(file, {"a": 1})

    def fail(stream: Any) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot write .*f\.json: No space left on device; .* untouched"):
        write_atomic(file, fail)
    assert parse(file.read_bytes()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        (3, float, 3.0),
        ("yes", bool, True),
        ("false", bool, False),
        ("none", int | None, None),
        ("4", int | None, 4),
        ("bf16", Literal["fp32", "bf16"], "bf16"),
        ("128,64", tuple[int, ...], (128, 64)),
        ("[128, 64]", tuple[int, ...], (128, 64)),
        ([1, 2], list[int], [1, 2]),
        ('{"a": 1}', dict[str, int], {"a": 1}),
        ("5", Annotated[int, "range"], 5),
        ("5", str, "5"),
        ("5", int | str, 5),
        ("five", int | str, "five"),
    ],
)
def test_text_becomes_what_the_annotation_says(value: Any, hint: Any, expected: Any) -> None:
    result = coerce("field", value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("x", int, "a whole number"),
        (True, int, "a whole number"),
        (1.5, int, "a whole number"),
        ("nan", float, "a finite number"),
        (1, bool, "true or false"),
        ("fp8", Literal["fp32", "bf16"], "one of 'fp32', 'bf16'"),
        ("1,x", tuple[int, ...], "tuple"),
        ("x", int | None, "a whole number or none"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"depth (={value!r}) must be {words}")):
        coerce("depth", value, hint)


def test_a_file_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("a b")
    file = coerce("vocabulary", str(tmp_path / "v.txt"), File)
    assert file.read() == b"a b"
    (tmp_path / "v.txt").write_text("a c")
    with pytest.raises(InputError, match="has changed"):
        file.read()
    with pytest.raises(InputError, match="cannot be read"):
        File.of(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs (=0) must be at least 1"),
        ({"batch_size": -1}, "batch_size (=-1) must be at least 1"),
        ({"epochs": 1, "steps": 1}, "epochs (=1) and steps (=1) exclude each other"),
        ({"clip": 0.0}, "clip (=0.0) must be above 0"),
        ({"precision": "fp8"}, "precision (='fp8') must be one of"),
        ({"seed": -1}, "seed (=-1) must not be negative"),
    ],
)
def test_a_plan_refuses_what_makes_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Plan(**fields)


def test_epochs_and_steps_push_each_other_out() -> None:
    plan = Plan(epochs=3)
    assert (plan.updated(steps=5).epochs, plan.updated(steps=5).steps) == (None, 5)
    assert plan.updated(steps=5).updated(epochs=2) == Plan(epochs=2)
    with pytest.raises(InputError, match="epoch is no field of the plan; it has: epochs, steps"):
        plan.updated(epoch=1)
