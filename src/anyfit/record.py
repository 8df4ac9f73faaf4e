"""What joins a run's record with its state: what is written of a fit, what a resume may change, and where weights come from."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anyfit import engine
from anyfit.errors import StateError
from anyfit.load import reference
from anyfit.run import Folder, Run, committed, environment
from anyfit.schema import Schema
from anyfit.state import State, load_weights
from anyfit.task import Task, task_code, task_values
from anyfit.values import Plan, canonical, without_secrets

__all__ = ["compare", "fingerprint_of", "forget_seed", "keep_seed", "last_state", "record_of", "secret_seed", "start_from", "weights_file"]

# A change of these on resume would train on other samples than the checkpoint's position means.
ORDER = ("seed", "batch_size", "accumulate", "drop_last", "bucket", "max_tokens", "dtype")


def record_of(kind: str, task: Task, model: nn.Module, plan: Plan, schema: Schema, device: torch.device) -> dict[str, Any]:
    """run.json: what was run, where and with what."""
    cls, parameters = type(task), list(model.parameters())
    return {
        "format": 1,
        "kind": kind,
        "anyfit": metadata.version("anyfit"),
        "task": {
            "reference": reference(task),
            "class": f"{cls.__module__}:{cls.__qualname__}",
            "code": task_code(task),
            "values": task_values(task, reference),
        },
        "plan": plan.to_json(),
        "schema": schema.to_json(),
        "data": {},
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "command": ["anyfit", *map(without_secrets, sys.argv[1:])] if Path(sys.argv[0]).name in ("anyfit", "__main__.py") else None,
        "forks": [],
        **environment(str(device)),
    }


def fingerprint_of(task: Task, plan: Plan, schema: Schema, data: Mapping[str, Any]) -> dict[str, Any]:
    """What ranks of one fit must have in common."""
    cls = type(task)
    return {
        "anyfit version": metadata.version("anyfit"),
        "torch version": torch.__version__.partition("+")[0],
        "task": cls.__qualname__,
        "code of the task": task_code(task),
        "values of the task": task_values(task),
        "plan": {name: value for name, value in plan.to_json().items() if name not in ("device", "workers")},
        "columns": [[column.name, column.type] for column in schema.columns],
        **{f"rows of {split}": about.get("rows") for split, about in data.items()},
        **{f"data of {split}": about.get("sha256") for split, about in data.items()},
    }


def last_state(folder: Folder) -> State | None:
    """The newest checkpoint; None where nothing is saved yet. A bad one is refused and the last good one named."""
    found = folder.checkpoints()
    if not found:
        return None
    try:
        return State.load(found[-1])
    except StateError as error:
        good = next((path for path in reversed(found[:-1]) if _loads(path)), None)
        way = f"the last good one is {good}; delete {found[-1].name} to go on from there" if good else "there is no other; start a new run"
        raise StateError(f"{error}; {way}") from error


def compare(folder: Folder, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a resume changes: fields of the task and the plan may; code, data and the order of samples may not."""
    where = f"run (={str(folder.path)!r})"
    if before["kind"] != now["kind"] or before["task"]["class"].rpartition(":")[2] != now["task"]["class"].rpartition(":")[2]:
        raise StateError(
            f"{where} is a {before['kind']} of task {before['task']['class']}, not a {now['kind']} of {now['task']['class']}; "
            "start a new run, or pass weights="
        )
    if before["task"]["code"] != now["task"]["code"]:
        raise StateError(
            f"{where} was made by other code of task {now['task']['class']}; start a new run with weights={str(folder.path)!r}"
        )
    for split in sorted((set(before["data"]) | set(now["data"])) - {"test"}):
        old, new = before["data"].get(split), now["data"].get(split)
        if (old or {}).get("sha256") != (new or {}).get("sha256"):
            raise StateError(f"{where} has other {split} rows ({old} then, {new} now); resume with the same data, or start a new run")
    if before.get("privacy") != now.get("privacy"):
        raise StateError(
            f"{where} was made with privacy={before.get('privacy')}, not {now.get('privacy')}; resume with the same privacy and batch_size, or "
            "start a new run"
        )
    changed = {
        name: [old.get(name), new.get(name)]
        for old, new in ((before["task"]["values"], now["task"]["values"]), ({**Plan().to_json(), **before["plan"]}, now["plan"]))
        for name in sorted(set(old) | set(new))
        if old.get(name) != new.get(name)
    }
    fixed = [name for name in ORDER if name in changed]
    if fixed:
        was, new_value = changed[fixed[0]]
        raise StateError(
            f"{fixed[0]} (={new_value!r}) was {was!r} in {where}; a change means other batches, so start a new run with weights="
        )
    if canonical(before["schema"]) != canonical(now["schema"]):
        raise StateError(
            f"{where} was fitted with another schema (types, preprocessing or vocabulary) than these rows and fields give now; resume with "
            "the same, or start a new run"
        )
    return changed


SEED = "noise.seed"


def secret_seed(folder: Folder | None) -> int:
    """What the noise of private steps is made from: that of the run where it keeps one, else a fresh one."""
    path = None if folder is None else folder.path / SEED
    if path is None or not path.exists():
        return secrets.randbits(128)
    text = path.read_text(encoding="ascii", errors="replace")
    if len(text) != 32 or set(text) - set("0123456789abcdef"):
        raise StateError(f"{path} was altered; delete it to go on with fresh noise (as private, but not the same numbers)")
    return int(text, 16)


def keep_seed(folder: Folder, seed: int) -> None:
    """Beside the run until it ends, for its owner alone: whoever has it can take the noise off."""
    path, temporary = folder.path / SEED, folder.path / f"{SEED}.tmp"
    if path.exists():
        return
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{seed:032x}")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def forget_seed(folder: Folder) -> None:
    """The run has ended, so nobody needs to make its noise again."""
    (folder.path / SEED).unlink(missing_ok=True)


def _loads(path: Path) -> bool:
    try:
        State.load(path)
    except StateError:
        return False
    return True


def start_from(model: nn.Module, weights: Any, partial: bool) -> dict[str, Any]:
    """Copy weights from a run, a file or a mapping; partial copies what overlaps and lists the rest."""
    if isinstance(weights, Run):
        found, name = weights.model.state_dict(), str(weights.path or "run")
    elif isinstance(weights, Mapping):
        found, name = dict(weights), "mapping"
    else:
        found, name = load_weights(weights_file(Path(weights))), str(weights)
    if not partial:
        engine.load_model(model, found)
        return {"from": name, "left": []}
    return {"from": name, "left": engine.load_partial(model, found)}


def weights_file(path: Path) -> Path:
    """A file as it is; of a run, the best checkpoint or else the last."""
    if not path.is_dir():
        return path
    best = path / "checkpoints" / "best.safetensors"
    found = [best] if best.exists() else committed(path)
    if not found:
        raise StateError(f"run (={str(path)!r}) has no checkpoint yet")
    return found[-1]
