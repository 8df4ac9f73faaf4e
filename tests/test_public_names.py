"""What `import anyfit` offers, and what it does not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import anyfit

NAMES = [
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
    "PCA",
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


def test_the_public_names_are_these() -> None:
    assert sorted(anyfit.__all__) == NAMES == sorted(NAMES)
    assert dir(anyfit) == NAMES
    for name in NAMES:
        assert getattr(anyfit, name).__doc__, name


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_neither_torch_nor_numpy() -> None:
    assert run("import anyfit, sys; print({'torch', 'numpy', 'pyarrow'} & set(sys.modules))") == "set()"


def test_a_verb_stays_a_function_when_the_module_of_its_name_is_imported() -> None:
    script = "import anyfit.federate, anyfit.fit, anyfit.check, anyfit.load, anyfit.shrink; print(*(type(getattr(anyfit, n)).__name__ for n in ('fit', 'federate', 'check', 'load', 'shrink')))"
    assert run(script) == "function function function function function"


def test_type_checkers_see_the_names_that_resolve() -> None:
    blocks = [node for node in ast.parse(Path(anyfit.__file__).read_text()).body if isinstance(node, ast.If)]
    imported = {
        alias.name: node.module for block in blocks for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(imported) == NAMES
    for name, module in imported.items():
        assert getattr(import_module(module), name) is getattr(anyfit, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'anyfit' has no attribute 'fitt'"):
        _ = anyfit.fitt
