from __future__ import annotations

from pathlib import Path

import pytest

import anyfit
from anyfit.errors import TaskError
from anyfit.load import load, reference

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
    from anyfit.task import task_values

    (tmp_path / "t.py").write_text(SOURCE)
    (tmp_path / "w.txt").write_text("a")
    outer = type(load(f"{tmp_path}/t.py:Outer", {"inner": anyfit.Image(), "words": str(tmp_path / "w.txt")}))
    task = outer(inner=anyfit.Image(channels=7), words=anyfit.File.of(tmp_path / "w.txt"))
    assert load(f"{tmp_path}/t.py:Outer", task_values(task)) == task


def test_references() -> None:
    assert reference(anyfit.Image()) == "image"

    class Local(anyfit.Task):
        pass

    assert reference(Local()) is None


def test_fields_are_checked(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(SOURCE)
    with pytest.raises(TaskError, match=r"cannot be made: .*size"):
        load(f"{tmp_path}/t.py:Needs")
    with pytest.raises(ValueError, match=r"size \(='big'\) must be a whole number"):
        load(f"{tmp_path}/t.py:Needs", {"size": "big"})
    with pytest.raises(TaskError, match="colour is no field of Image; it has: channels, dropout, hidden, lr, weight_decay"):
        load("image", {"colour": 3})
