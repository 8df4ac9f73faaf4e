"""anyfit: write a learning task once; fit it anywhere.

The public names resolve on first use, so that `import anyfit` loads neither torch nor numpy.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyfit.adapt.hetseq import from_hetseq
    from anyfit.adapt.huggingface import from_transformers
    from anyfit.adapt.lightning import from_lightning
    from anyfit.adapt.sparse import from_sparse
    from anyfit.check import check
    from anyfit.cluster import Cluster
    from anyfit.data import Partition, Source, Stream, partition
    from anyfit.engine import Trainer
    from anyfit.estimator import Estimator
    from anyfit.federate import Faults, federate
    from anyfit.fit import fit
    from anyfit.guard import Limits
    from anyfit.load import load
    from anyfit.metrics import Metric
    from anyfit.privacy import ExamplePrivacy, SitePrivacy
    from anyfit.report import write_report
    from anyfit.run import Run
    from anyfit.schedule import Schedule
    from anyfit.schema import Column, Schema
    from anyfit.shrink.export import export
    from anyfit.shrink.morph import morph
    from anyfit.shrink.pipeline import shrink
    from anyfit.shrink.prune import prune
    from anyfit.shrink.quantize import quantize
    from anyfit.shrink.resources import resources
    from anyfit.state import State
    from anyfit.strategy import (
        Calibrate,
        Cyclic,
        FedAdagrad,
        FedAdam,
        FedAvg,
        FedAvgM,
        FedBN,
        FedMedian,
        FedNova,
        FedPCA,
        FedProx,
        FedYogi,
        Krum,
        NewtonRaphson,
        Scaffold,
        SingleSite,
        Strategy,
        TrimmedMean,
    )
    from anyfit.task import Step, Task, adamw
    from anyfit.tasks import PCA, HuggingFace, Image, Morphed, Pruned, Quantized, Tabular, TextCNN, TextRNN, TextTransformer
    from anyfit.trained import evaluate, open_run, predict
    from anyfit.update import Update
    from anyfit.values import File, Plan

_PLACES = {
    "Calibrate": "strategy",
    "Cluster": "cluster",
    "Column": "schema",
    "Cyclic": "strategy",
    "Estimator": "estimator",
    "ExamplePrivacy": "privacy",
    "Faults": "federate",
    "FedAdagrad": "strategy",
    "FedAdam": "strategy",
    "FedAvg": "strategy",
    "FedAvgM": "strategy",
    "FedBN": "strategy",
    "FedMedian": "strategy",
    "FedNova": "strategy",
    "FedPCA": "strategy",
    "FedProx": "strategy",
    "FedYogi": "strategy",
    "File": "values",
    "HuggingFace": "tasks",
    "Image": "tasks",
    "Krum": "strategy",
    "Limits": "guard",
    "Metric": "metrics",
    "Morphed": "tasks",
    "NewtonRaphson": "strategy",
    "PCA": "tasks",
    "Partition": "data",
    "Plan": "values",
    "Pruned": "tasks",
    "Quantized": "tasks",
    "Run": "run",
    "Scaffold": "strategy",
    "Schedule": "schedule",
    "Schema": "schema",
    "SingleSite": "strategy",
    "SitePrivacy": "privacy",
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
    "TrimmedMean": "strategy",
    "Update": "update",
    "adamw": "task",
    "check": "check",
    "evaluate": "trained",
    "export": "shrink.export",
    "federate": "federate",
    "fit": "fit",
    "from_hetseq": "adapt.hetseq",
    "from_lightning": "adapt.lightning",
    "from_sparse": "adapt.sparse",
    "from_transformers": "adapt.huggingface",
    "load": "load",
    "morph": "shrink.morph",
    "open_run": "trained",
    "partition": "data",
    "predict": "trained",
    "prune": "shrink.prune",
    "quantize": "shrink.quantize",
    "resources": "shrink.resources",
    "shrink": "shrink.pipeline",
    "write_report": "report",
}

__all__ = [
    "PCA",
    "Calibrate",
    "Cluster",
    "Column",
    "Cyclic",
    "Estimator",
    "ExamplePrivacy",
    "Faults",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedMedian",
    "FedNova",
    "FedPCA",
    "FedProx",
    "FedYogi",
    "File",
    "HuggingFace",
    "Image",
    "Krum",
    "Limits",
    "Metric",
    "Morphed",
    "NewtonRaphson",
    "Partition",
    "Plan",
    "Pruned",
    "Quantized",
    "Run",
    "Scaffold",
    "Schedule",
    "Schema",
    "SingleSite",
    "SitePrivacy",
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
    "TrimmedMean",
    "Update",
    "adamw",
    "check",
    "evaluate",
    "export",
    "federate",
    "fit",
    "from_hetseq",
    "from_lightning",
    "from_sparse",
    "from_transformers",
    "load",
    "morph",
    "open_run",
    "partition",
    "predict",
    "prune",
    "quantize",
    "resources",
    "shrink",
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
