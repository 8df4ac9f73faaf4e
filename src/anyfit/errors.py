"""The error tree. Every message names the argument, its value and the way out.

AnyfitError
├── InputError (also ValueError)            what a user gave; exit code 2
│   ├── TaskError                           a task that cannot be defined, found or built
│   ├── DataError                           a source, a column or a value that does not fit
│   ├── StateError                          a checkpoint that is torn, tampered with or of another task
│   ├── BusyError                           a run folder that another process holds
│   └── MissingExtra (also ImportError)     an optional dependency; names the install command
└── RunError (also RuntimeError)            what happened while running; exit code 1
    ├── NonFinite                           a loss or a weight that is NaN or infinite
    ├── Refused                             a site's guard lets something not out
    │   └── BudgetSpent                     what is asked would pass a budget of privacy
    ├── StorageError                        a disk that is full or cannot be written
    └── Lost                                a worker is gone; the same step can be retried
"""

from __future__ import annotations

__all__ = [
    "AnyfitError",
    "BudgetSpent",
    "BusyError",
    "DataError",
    "InputError",
    "Lost",
    "MissingExtra",
    "NonFinite",
    "Refused",
    "RunError",
    "StateError",
    "StorageError",
    "TaskError",
]


class AnyfitError(Exception):
    """The root: catch this to catch all that anyfit raises on purpose."""

    exit_code = 1


class InputError(AnyfitError, ValueError):
    """What a user gave cannot be used; nothing was changed."""

    exit_code = 2


class TaskError(InputError):
    """A task cannot be defined, found or built."""


class DataError(InputError):
    """A source, a column or a value does not fit."""


class StateError(InputError):
    """A checkpoint is torn, was tampered with or belongs to another task."""


class BusyError(InputError):
    """Another process holds this run folder."""


class MissingExtra(InputError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'anyfit[{extra}]'")


class RunError(AnyfitError, RuntimeError):
    """Something failed while running; what was saved before is whole."""


class NonFinite(RunError):
    """A loss or a weight became NaN or infinite."""


class Refused(RunError):
    """A site's guard does not let something out; what it was stays at the site."""


class BudgetSpent(Refused):
    """What is asked would pass a budget of privacy."""


class StorageError(RunError):
    """The disk is full or cannot be written; the files that were there are untouched."""


class Lost(RunError):
    """A worker is gone in the middle of a step; its weights are untouched and the step can be retried."""
