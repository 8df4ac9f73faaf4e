"""Run: the record of one fit, in memory and as a folder that anyone can read.

run.json         task, plan, schema, data, versions, hardware, command, forks
metrics.jsonl    what happened, in order, without times; cut back to the checkpoint on resume
timings.jsonl    how long it took
checkpoints/     step-<n>.safetensors (the last two) and best.safetensors
result.json      final metrics by split, once finished
report.html      and PNG plots
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from anyfit.errors import BusyError, InputError, StorageError
from anyfit.values import canonical, parse, write_json

__all__ = ["Folder", "Run", "environment", "read_record"]

FORMAT = 1


@dataclass
class Run:
    """What a fit gives back. `splits` holds the final figures by split; `model` has the best weights where a best is kept."""

    task: Any
    model: Any
    state: Any
    record: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """Final figures by split."""
        splits: dict[str, dict[str, Any]] = self.result.get("splits", {})
        return splits

    @property
    def stopped(self) -> str:
        """Why it ended: finished, patience, budget (of privacy), asked or signal."""
        return str(self.result.get("stopped", "unfinished"))


class Folder:
    """The folder of one run, held by one process at a time."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise InputError(f"run (={str(path)!r}) is a file; give a folder")
        self._made = not path.exists()
        exists = (path / "run.json").exists()
        if exists and not resume:
            raise InputError(f"run (={str(path)!r}) holds a run already; pass resume to go on with it, or give another folder")
        if path.is_dir() and not exists and any(entry.name not in (".lock", "checkpoints") for entry in path.iterdir()):
            raise InputError(f"run (={str(path)!r}) is a folder with other files; give an empty or a new one")
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / ".lock").open("w")
        except OSError as error:
            raise StorageError(f"run (={str(path)!r}) cannot be written: {error.strerror or error}; give another folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BusyError(f"run (={str(path)!r}) is in use by another process; wait for it or give another folder") from error
        self._metrics: IO[bytes] | None = None
        self._timings: IO[str] | None = None

    def record(self) -> dict[str, Any] | None:
        """What run.json says, if it is there."""
        return read_record(self.path) if (self.path / "run.json").exists() else None

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write run.json."""
        write_json(self.path / "run.json", record)

    def line(self, event: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("ab")
        try:
            self._metrics.write(json.dumps(event, allow_nan=False, ensure_ascii=False).encode() + b"\n")
            self._metrics.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}; free some space and resume") from error

    def metrics_bytes(self) -> int:
        """How long metrics.jsonl is now: a checkpoint remembers it."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def cut(self, size: int) -> list[dict[str, Any]]:
        """Cut metrics.jsonl back to what it was at the checkpoint; returns its lines."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            path.touch()
        if path.stat().st_size < size:
            raise InputError(f"{path} is shorter than the checkpoint says ({path.stat().st_size} < {size} bytes); it was altered")
        os.truncate(path, size)
        return [parse(line, str(path)) for line in path.read_bytes().splitlines()]

    def timing(self, event: Mapping[str, Any]) -> None:
        """Append a line to timings.jsonl."""
        with contextlib.suppress(OSError):  # not worth a run
            if self._timings is None:
                self._timings = (self.path / "timings.jsonl").open("a")
            self._timings.write(json.dumps(event) + "\n")
            self._timings.flush()

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps goes."""
        return self.path / "checkpoints" / f"step-{step:09d}.safetensors"

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.safetensors"))

    def keep(self, number: int = 2) -> None:
        """Drop all but the newest checkpoints, and what a kill left of unfinished ones."""
        for path in self.checkpoints()[:-number]:
            path.unlink(missing_ok=True)
        for path in (self.path / "checkpoints").glob(".*.tmp"):
            path.unlink(missing_ok=True)

    @property
    def best(self) -> Path:
        """The best checkpoint."""
        return self.path / "checkpoints" / "best.safetensors"

    def mark_best(self, checkpoint: Path) -> None:
        """Make `checkpoint` the best one: another name of the same file, in one rename."""
        temporary = self.best.with_name(".best.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(checkpoint, temporary)
        except OSError:  # a file system without hard links
            temporary.write_bytes(checkpoint.read_bytes())
        temporary.replace(self.best)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json."""
        write_json(self.path / "result.json", result)

    def close(self) -> None:
        """Let the folder go; what was refused before anything was written leaves none."""
        if self._made and not (self.path / "run.json").exists():
            with contextlib.suppress(OSError):
                (self.path / ".lock").unlink()
                (self.path / "checkpoints").rmdir()
                self.path.rmdir()
        for file in (self._metrics, self._timings, self._lock):
            if file is not None:
                file.close()
        self._metrics = self._timings = None


def read_record(path: Path) -> dict[str, Any]:
    """run.json of a run folder."""
    file = path / "run.json"
    if not file.is_file():
        raise InputError(f"run (={str(path)!r}) holds no run.json; give the folder of a run")
    record = parse(file.read_bytes(), str(file))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{file} is of another format; this version reads {FORMAT}")
    canonical(record)
    return record


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware, for the record."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "pyarrow", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"versions": versions, "hardware": {"cpu": _processor(), "cores": cores, "memory_bytes": memory, "device": device}}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
