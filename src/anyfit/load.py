"""From a reference to a Task: a ready task's name, `file.py:Class` or `module:Class`; and to data. The only import by name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from anyfit.errors import DataError, TaskError
from anyfit.task import Task
from anyfit.tasks import READY

__all__ = ["load", "load_data", "module_of", "reference"]


def load(name: str, values: Mapping[str, Any] | None = None) -> Task:
    """The task that `name` refers to, with `values` for its fields. A task file is code: it runs with your rights."""
    task_class = _find(name)
    try:
        task = task_class()
    except TypeError as error:  # a field without default
        try:
            fields = task_class.__dataclass_fields__  # type: ignore[attr-defined]
            task = task_class(**{field: value for field, value in _nested(values or {}).items() if field in fields})
        except TypeError:
            raise TaskError(f"task {name!r} cannot be made: {error}; give its fields with --set field=value") from error
    return task.replaced(**_nested(values or {}))


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in which another task stands as {"task", "values"}."""
    return {
        key: load(value["task"], value["values"]) if isinstance(value, Mapping) and set(value) == {"task", "values"} else value
        for key, value in values.items()
    }


def _find(name: str) -> type[Task]:
    if name in READY:
        return READY[name]
    place, colon, member = name.rpartition(":")
    if not colon:
        if name.endswith(".py"):
            raise TaskError(f"task (={name!r}) names a file but no class; write {name}:ClassName")
        raise TaskError(f"task (={name!r}) is not known; ready tasks are {', '.join(READY)}; your own is file.py:Class or module:Class")
    module = module_of(place)
    found: Any = module
    for part in member.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Task) and value is not Task]
        raise TaskError(f"task (={name!r}): {place} has no task {member!r}; it has: {', '.join(classes) or 'none'}")
    return found


def load_data(name: str) -> Any:
    """What the function `file.py:function` gives, without arguments: a torch Dataset, a table, anything that is a source."""
    place, _, member = name.rpartition(":")
    made = getattr(module_of(place), member, None)
    if not callable(made):
        raise DataError(f"data (={name!r}): {place} has no function {member!r}; define it to return a data set, a table or another source")
    return made()


def module_of(place: str) -> ModuleType:
    """The module that a reference names by file or by name."""
    return _from_file(Path(place)) if place.endswith(".py") else _from_module(place)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TaskError(f"task file (={str(path)!r}) does not exist")
    resolved = path.resolve()
    # the name tells files of one name apart, and finds the same module again
    name = f"anyfit_task_{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise TaskError(f"task file (={str(path)!r}) fails when it is imported: {type(error).__name__}: {error}") from error
        raise
    return module


def _from_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f"task module (={name!r}) cannot be imported: {error}; is it on the path? A file is file.py:Class") from error


def reference(task: Task) -> str | None:
    """How `load` finds this task again; None for one that lives in a notebook or in __main__."""
    cls = type(task)
    for name, ready in READY.items():
        if cls is ready:
            return name
    module = sys.modules.get(cls.__module__)
    if "<locals>" in cls.__qualname__ or module is None:
        return None
    file = getattr(module, "__file__", None)
    if cls.__module__ == "__main__" or cls.__module__.startswith("anyfit_task_"):
        return f"{Path(file).resolve()}:{cls.__qualname__}" if file and file.endswith(".py") and Path(file).exists() else None
    return f"{cls.__module__}:{cls.__qualname__}"
