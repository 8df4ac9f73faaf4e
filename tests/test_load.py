from __future__ import annotations

import re
from pathlib import Path

import pytest

import anyfit
from anyfit.errors import TaskError
from anyfit.load import load, reference
from anyfit.task import task_values

SOURCE = """
import anyfit
class Outer(anyfit.Task):
    inner: anyfit.Task
    words: anyfit.File
    width: int = 3
class Needs(anyfit.Task):
    size: int
"""


def test_a_task_is_found_by_name_file_or_module(tmp_path: Path) -> None:
    assert load("tabular", {"hidden": "8,4", "dropout": 0}) == anyfit.Tabular(hidden=(8, 4), dropout=0.0)
    assert load("anyfit.tasks.image:Image") == anyfit.Image()
    (tmp_path / "t.py").write_text(SOURCE)
    needs = load(f"{tmp_path}/t.py:Needs", {"size": "5"})
    assert needs.size == 5
    assert reference(needs) == f"{(tmp_path / 't.py').resolve()}:Needs"
    assert type(load(f"{tmp_path}/t.py:Needs", {"size": 1})) is type(needs)


def test_nested_tasks_and_files_come_back_from_their_values(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(SOURCE)
    (tmp_path / "w.txt").write_text("a")
    outer = type(load(f"{tmp_path}/t.py:Outer", {"inner": anyfit.Image(), "words": str(tmp_path / "w.txt")}))
    task = outer(inner=anyfit.Image(channels=7), words=anyfit.File.of(tmp_path / "w.txt"))
    assert load(f"{tmp_path}/t.py:Outer", task_values(task)) == task


class OfThisModule(anyfit.Task):
    pass


def test_a_reference_finds_the_same_class_again_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(SOURCE)
    for task in (anyfit.Image(), anyfit.Tabular(), OfThisModule(), load(f"{tmp_path}/t.py:Needs", {"size": 5})):
        name = reference(task)
        assert name is not None and type(load(name, {"size": 5} if hasattr(task, "size") else None)) is type(task)
    assert reference(anyfit.Image()) == "image"

    class Local(anyfit.Task):
        pass

    assert reference(Local()) is None


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    found = []
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.py").write_text(f"import anyfit\nclass T(anyfit.Task):\n    folder: str = '{folder}'\n")
        found.append(load(f"{tmp_path}/{folder}/t.py:T"))
    assert [task.folder for task in found] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tabluar",
            "task (='tabluar') is not known; ready tasks are image, tabular, text-cnn, text-rnn, text-transformer, hf, pca; your own is file.py:Class or module:Class",
        ),
        ("{folder}/t.py", "names a file but no class; write {folder}/t.py:ClassName"),
        ("{folder}/none.py:T", "task file (='{folder}/none.py') does not exist"),
        ("{folder}/t.py:Neds", "has no task 'Neds'; it has: Outer, Needs"),
        ("{folder}/t.py:anyfit", "has no task 'anyfit'"),
        ("{folder}/breaks.py:T", "fails when it is imported: ZeroDivisionError: division by zero"),
        ("no.such.module:T", "task module (='no.such.module') cannot be imported"),
        ("os:system", "has no task 'system'; it has: none"),
    ],
)
def test_what_cannot_be_found_says_where_it_looked(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(SOURCE)
    (tmp_path / "breaks.py").write_text("1 / 0")
    for _ in range(2):  # a file that failed is not half there the second time
        with pytest.raises(TaskError, match=re.escape(message.format(folder=tmp_path))):
            load(name.format(folder=tmp_path))


def test_fields_are_checked(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(SOURCE)
    with pytest.raises(TaskError, match=r"cannot be made: .*size"):
        load(f"{tmp_path}/t.py:Needs")
    with pytest.raises(ValueError, match=r"size \(='big'\) must be a whole number"):
        load(f"{tmp_path}/t.py:Needs", {"size": "big"})
    with pytest.raises(
        TaskError, match="colour is no field of Image; it has: balance, channels, dropout, flip, hidden, lr, shift, weight_decay"
    ):
        load("image", {"colour": 3})
    with pytest.raises(TaskError, match="colour"):  # and not that the size is missing, which is there
        load(f"{tmp_path}/t.py:Needs", {"size": 1, "colour": 3})
