"""anyfit: write a learning task once; fit it anywhere.

The public names resolve on first use, so that `import anyfit` loads neither torch nor numpy.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyfit.adapt.huggingface import from_transformers
    from anyfit.adapt.lightning import from_lightning
    from anyfit.check import check
    from anyfit.data import Source, Stream
    from anyfit.engine import Trainer
    from anyfit.estimator import Estimator
    from anyfit.federate import federate
    from anyfit.fit import evaluate, fit, open_run, predict
    from anyfit.load import load
    from anyfit.metrics import Metric
    from anyfit.report import write_report
    from anyfit.run import Run
    from anyfit.schedule import Schedule
    from anyfit.schema import Column, Schema
    from anyfit.state import State
    from anyfit.strategy import FedAvg, Strategy
    from anyfit.task import Step, Task, adamw
    from anyfit.tasks import HuggingFace, Image, Tabular, TextCNN, TextRNN, TextTransformer
    from anyfit.update import Update
    from anyfit.values import File, Plan

_PLACES = {
    "Column": "schema",
    "Estimator": "estimator",
    "FedAvg": "strategy",
    "File": "values",
    "HuggingFace": "tasks",
    "Image": "tasks",
    "Metric": "metrics",
    "Plan": "values",
    "Run": "run",
    "Schedule": "schedule",
    "Schema": "schema",
    "Source": "data",
    "State": "state",
    "Step": "task",
    "Strategy": "strategy",
    "Stream": "data",
    "Tabular": "tasks",
    "Task": "task",
    "TextCNN": "tasks",
    "TextRNN": "tasks",
    "TextTransformer": "tasks",
    "Trainer": "engine",
    "Update": "update",
    "adamw": "task",
    "check": "check",
    "evaluate": "fit",
    "federate": "federate",
    "fit": "fit",
    "from_lightning": "adapt.lightning",
    "from_transformers": "adapt.huggingface",
    "load": "load",
    "open_run": "fit",
    "predict": "fit",
    "write_report": "report",
}

__all__ = [
    "Column",
    "Estimator",
    "FedAvg",
    "File",
    "HuggingFace",
    "Image",
    "Metric",
    "Plan",
    "Run",
    "Schedule",
    "Schema",
    "Source",
    "State",
    "Step",
    "Strategy",
    "Stream",
    "Tabular",
    "Task",
    "TextCNN",
    "TextRNN",
    "TextTransformer",
    "Trainer",
    "Update",
    "adamw",
    "check",
    "evaluate",
    "federate",
    "fit",
    "from_lightning",
    "from_transformers",
    "load",
    "open_run",
    "predict",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'anyfit' has no attribute {name!r}")
    value = getattr(import_module(f"anyfit.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps a verb (`anyfit.fit`) from being replaced by the module of its name when that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
