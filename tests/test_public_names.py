"""What `import anyfit` offers, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import anyfit

NAMES = [
    "Column",
    "FedAvg",
    "File",
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
    "Tabular",
    "Task",
    "Trainer",
    "Update",
    "adamw",
    "check",
    "evaluate",
    "federate",
    "fit",
    "load",
    "open_run",
    "predict",
    "write_report",
]


def test_the_public_names_are_these() -> None:
    assert anyfit.__all__ == NAMES == sorted(NAMES)
    assert dir(anyfit) == NAMES
    for name in NAMES:
        assert getattr(anyfit, name).__doc__, name


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_neither_torch_nor_numpy() -> None:
    assert run("import anyfit, sys; print({'torch', 'numpy', 'pyarrow'} & set(sys.modules))") == "set()"


def test_a_verb_stays_a_function_when_the_module_of_its_name_is_imported() -> None:
    script = "import anyfit.federate, anyfit.fit, anyfit.check, anyfit.load; print(*(type(getattr(anyfit, n)).__name__ for n in ('fit', 'federate', 'check', 'load')))"
    assert run(script) == "function function function function"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(anyfit, "fitt")
