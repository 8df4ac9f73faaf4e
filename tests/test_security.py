"""Attacks on what SECURITY.md claims. Anyone can run them: pytest tests/test_security.py."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import anyfit
import anyfit.state as state_module
from anyfit.errors import InputError, StateError
from anyfit.state import State, load_weights
from anyfit.values import parse

ROOT = Path(__file__).resolve().parent.parent
AUDITED = """
import sys
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event == "pickle.find_class" or event == "exec" and armed else None)
armed = False
import torch, anyfit
from anyfit.data import read_splits
from anyfit import fit, federate, evaluate, predict, write_report, Image, Source
task = Image(channels=2)
seen.clear()
fit(task, "digits", epochs=1, best=True, run="r")
fit(task, "digits", epochs=2, best=True, run="r", resume=True)
evaluate("r", "digits"), predict("r", "digits"), write_report(__import__("pathlib").Path("r"))
federate(task, {"a": "digits", "b": "digits"}, rounds=1, run="f")
fit(task, "digits", epochs=1, weights="f")
print([event for event in seen if event == "pickle.find_class"])
"""


class Payload:
    """What a pickle can do: this one writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_is_opened_by_anything_a_run_does(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", AUDITED], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_source_holds_no_pickle_and_no_eval() -> None:
    unsafe = re.compile(
        r"\b(import (pickle|cloudpickle|dill|joblib|marshal)\b|torch\.load\(|torch\.save\(|allow_pickle=True|(?<![\w.])eval\(|(?<![\w.])exec\()"
    )
    found = [
        f"{path.name}:{number}"
        for path in (ROOT / "src").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if unsafe.search(line) and 'f"' not in line and "return None" not in line
    ]
    assert found == []


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "checkpoints/step-000000001.safetensors"])
def test_a_pickle_in_place_of_weights_runs_nothing(name: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(StateError):
        load_weights(file)
    with pytest.raises(StateError):
        State.load(file)
    torch.save({"weight": Payload(trap)}, tmp_path / name)
    with pytest.raises(StateError):
        load_weights(file)
    assert not trap.exists()


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        "[]",
        '{"format":1}',
        '{"format":1,"parts":{},"position":[0,0,0],"strides":{},"tied":{},"sha256":"0"}',
        '{"format":1,"format":2}',
        '{"format":NaN}',
        "[" * 100_000,
    ],
    ids=range(7),
)
def test_a_forged_header_is_refused(header: str, tmp_path: Path) -> None:
    file = tmp_path / "forged.safetensors"
    save_file({"w": torch.zeros(2)}, file, metadata={"anyfit": header})
    with pytest.raises(InputError):
        State.load(file)


@pytest.mark.parametrize("text", ['{"a":1,"a":2}', "NaN", "[1, Infinity]", "{", "[" * 100_000, "\ud800"], ids=range(6))
def test_json_that_is_not_strict_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse(text)


@pytest.mark.parametrize(
    "change",
    [
        {"parts": 3},
        {"parts": {"model": {"tensor": "nowhere"}}},
        {"parts": {"model": {"map": [["a"]]}}},
        {"parts": {"model": {"a": 1, "b": 2}}},
        {"parts": {"unknown": None}},
        {"position": "abc"},
        {"strides": {"w": [9, 9, 9]}},
        {"tied": {"x": "nowhere"}},
    ],
    ids=range(8),
)
def test_a_forged_header_with_the_right_checksum_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "forged.safetensors"
    tensors = {"w": torch.zeros(2)}
    header = {"format": 1, "parts": {}, "position": [0, 0, 0], "strides": {}, "tied": {}, **change}
    header["sha256"] = state_module._checksum(tensors, header)
    save_file(tensors, file, metadata={"anyfit": json.dumps(header)})
    with pytest.raises(StateError):
        State.load(file)


def test_a_run_record_cannot_name_code_outside_the_task_it_was_made_with(tmp_path: Path) -> None:
    """run.json names the task to import: opening someone else's run runs that code, so only a Task class is ever made of it."""
    anyfit.fit(anyfit.Image(channels=2), "digits", epochs=1, run=tmp_path / "r")
    record = json.loads((tmp_path / "r/run.json").read_text())
    for reference in ("os:system", "subprocess:Popen", "builtins:eval", "anyfit.values:File"):
        record["task"]["reference"] = reference
        (tmp_path / "r/run.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match="has no task"):
            anyfit.open_run(tmp_path / "r")
