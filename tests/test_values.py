from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyfit.errors import InputError, StorageError
from anyfit.values import (
    File,
    Plan,
    canonical,
    coerce,
    digest,
    parse,
    without_secrets,
    write_atomic,
    write_json,
)

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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", "\ud800", {1: "a", "1": "b"}])
def test_what_is_not_strict_json_is_not_written(value: Any) -> None:
    with pytest.raises(InputError, match="not strict JSON"):
        canonical(value)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 2}}]', "NaN", "[-Infinity]", "[1e999]", "{'a': 1}", b"\xff", ""]
)
def test_what_is_not_strict_json_is_not_read(text: str | bytes) -> None:
    """A number too large for a float would come back as an infinity that nothing can write again."""
    with pytest.raises(InputError, match=r"run\.json is not strict JSON"):
        parse(text, "run.json")


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (OSError(28, "No space left on device"), StorageError, r"cannot write .*f\.json: No space left on device; .* untouched"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["disk full", "Ctrl-C"],
)
def test_a_failed_write_leaves_the_old_file_and_no_other(
    failure: BaseException, raised: type[BaseException], message: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "f.json"
    write_json(file, {"a": 1})

    def fail(stream: Any) -> None:
        stream.write(b"half")
        raise failure

    with pytest.raises(raised, match=message):
        write_atomic(file, fail)
    assert parse(file.read_bytes()) == {"a": 1}
    with pytest.raises(InputError):
        write_json(file, {"a": float("nan")})
    assert parse(file.read_bytes()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


def test_a_write_makes_folders_and_a_file_that_others_may_read(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomic(tmp_path / "new/folder/f", b"ab")
    assert (tmp_path / "new/folder/f").read_bytes() == b"ab"
    assert (tmp_path / "new/folder/f").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with pytest.raises(StorageError, match=r"cannot write .*plain/f"):
        write_atomic(tmp_path / "plain" / "f", b"ab")


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
        ("2.5", int | float, 2.5),
        ("1", Literal[1, 2], 1),
        ("none", Literal["a"] | None, None),
        ((1, "a"), tuple[int, str], (1, "a")),
        ("3,x", tuple[int, str], (3, "x")),
        ("a,b", list, ["a", "b"]),
        ("", tuple[int, ...], ()),
        (3, Any, 3),
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
        ("2.0", int, "a whole number"),
        pytest.param(10**400, float, "a finite number", id="larger than a float"),
        (None, float, "a finite number"),
        ("3", Literal[1, 2], "one of 1, 2"),
        (True, Literal[1, 2], "one of 1, 2"),
        (3, str, "text"),
        (3, File, "a path to a file"),
        ([1, 2.5], list[int], "list"),
        ("1,2,3", tuple[int, int], "tuple"),
        ((1, 2), tuple[int, str], "tuple"),
        ({"a": "x"}, dict[str, int], "dict"),
        (3, dict, "dict"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"depth (={value!r}) must be {words}")):
        coerce("depth", value, hint)


def test_a_file_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("a b")
    file = coerce("vocabulary", str(tmp_path / "v.txt"), File)
    assert file.read() == b"a b" and coerce("vocabulary", {"path": file.path, "sha256": file.sha256}, File) == file
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
        ({"clip": -1}, "clip (=-1.0) must be above 0"),
        ({"seed": -1}, "seed (=-1) must not be negative"),
        ({"seed": 2**64}, "seed (=18446744073709551616) must"),
        ({"min_delta": -0.5}, "min_delta (=-0.5) must not be negative"),
        ({"workers": -1}, "workers (=-1) must not be negative"),
        ({"patience": 0}, "patience (=0) must be at least 1"),
        ({"log_every": 0}, "log_every (=0) must be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every (=0) must be at least 1"),
        ({"accumulate": True}, "accumulate (=True) must be a whole number"),
        ({"checkpoint_every_s": float("nan")}, "checkpoint_every_s (=nan) must be a finite number"),
    ],
)
def test_a_plan_refuses_what_makes_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Plan(**fields)


@given(
    st.none() | st.integers(1, 9), st.integers(1, 500) | st.none(), st.floats(0.01, 9) | st.none(), st.booleans(), st.integers(0, 2**64 - 1)
)
def test_a_plan_comes_back_from_its_json_and_from_text(epochs: Any, batch_size: Any, clip: Any, best: bool, seed: int) -> None:
    plan = Plan(epochs=epochs, batch_size=batch_size, clip=clip, best=best, seed=seed)
    assert Plan(**parse(canonical(plan.to_json()))) == plan
    assert Plan(**{name: str(value) for name, value in plan.to_json().items() if value is not None} | {"batch_size": batch_size}) == plan


def test_a_best_checkpoint_is_kept_where_asked_or_where_patience_needs_it() -> None:
    assert [Plan(**fields).keeps_best for fields in ({}, {"best": True}, {"patience": 3})] == [False, True, True]


def test_epochs_and_steps_push_each_other_out() -> None:
    plan = Plan(epochs=3)
    assert (plan.updated(steps=5).epochs, plan.updated(steps=5).steps) == (None, 5)
    assert plan.updated(steps=5).updated(epochs=2) == Plan(epochs=2)
    assert plan.updated(steps=None) == plan
    with pytest.raises(InputError, match=re.escape("epochs (=1) and steps (=2) exclude each other; give one")):
        plan.updated(epochs=1, steps=2)
    with pytest.raises(InputError, match="epoch is no field of the plan; it has: epochs, steps"):
        plan.updated(epoch=1)


def test_urls_are_shown_without_secrets() -> None:
    shown = without_secrets("see postgresql://ann:hun@ter2@db/x and https://h/a.csv?X-Amz-Signature=SECRET&b=2 and s3://KEY:VALUE@bucket/x")
    assert shown == "see postgresql://ann:***@db/x and https://h/a.csv?X-Amz-Signature=***&b=*** and s3://KEY:***@bucket/x"
    assert without_secrets("https://token@h/a.csv postgresql://ann@db/x") == "https://***@h/a.csv postgresql://ann@db/x"
    assert without_secrets("plain words, a=1?b=2") == "plain words, a=1?b=2"
