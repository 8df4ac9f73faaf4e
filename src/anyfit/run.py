"""Run: the record of one fit, in memory and as a folder that anyone can read.

run.json         task, plan, schema, data, versions, hardware, command, forks
metrics.jsonl    what happened, in order, without times; cut back to the checkpoint on resume
timings.jsonl    how long it took
checkpoints/     step-<n>.safetensors (the last two) and best.safetensors; of a cluster step-<n>.json, which lists shards:
                 step-<n>.<rank>-of-<ranks>.safetensors
result.json      final metrics by split, once finished
report.html      and PNG plots
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import platform
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Protocol

from anyfit.errors import BusyError, InputError, StorageError
from anyfit.values import canonical, parse, write_atomic, write_json

__all__ = ["Folder", "Run", "Seen", "Writer", "committed", "cores", "environment", "read_record", "shard_path", "under_torchrun"]

FORMAT = 1
GRACE_S = 60.0  # for a disk that hangs: a process does not end before its background job has
CHECKPOINT = re.compile(r"step-(\d+)\.(?:json|safetensors)")
SHARD = re.compile(r"step-(\d+)\.\d+-of-\d+\..*safetensors")  # of no use without its JSON
UNFINISHED = re.compile(r"\.(?:step-(\d+)\.\d+-of-\d+\.)?.*\.(?:tmp|part)")  # a number where another rank writes it


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

    def __init__(self, path: Path, *, resume: bool, ours: bool = False) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise InputError(f"run (={str(path)!r}) is a file; give a folder")
        self._made = not path.exists()
        exists = (path / "run.json").exists()
        if exists and not resume:
            raise InputError(f"run (={str(path)!r}) holds a run already; pass resume to go on with it, or give another folder")
        if path.is_dir() and not exists and not ours and any(entry.name not in (".lock", "checkpoints") for entry in path.iterdir()):
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

    def sign(self) -> str:
        """Leave a sign by which others know that they see this folder and no other of its name."""
        sign = secrets.token_hex(8)
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(sign)
        self._lock.flush()
        return sign

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
            self._metrics.write(_line(event))
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

    def checkpoint_path(self, step: int, sharded: bool = False) -> Path:
        """Where the checkpoint after `step` steps goes; of a sharded one the JSON."""
        return self.path / "checkpoints" / f"step-{step:09d}.{'json' if sharded else 'safetensors'}"

    def checkpoints(self) -> list[Path]:
        """Checkpoints of both kinds, oldest first."""
        return committed(self.path)

    def keep(self, number: int = 2) -> None:
        """Drop all but the newest checkpoints, and what a kill left of unfinished ones; shards newer than all may be in the making."""
        found = self.checkpoints()
        for path in found[:-number]:
            path.unlink(missing_ok=True)  # first, for it is what makes a checkpoint of its shards
        self._drop(found[-number:], _step(found[-1]) if found else -1)

    def sweep(self) -> None:
        """Drop all that is part of no checkpoint; for a start, while no rank writes."""
        self._drop(self.checkpoints(), None)

    def _drop(self, kept: list[Path], newest: int | None) -> None:
        """Shards, and temporary files, that none of `kept` lists; up to a step."""
        names: set[str] = set()
        for path in kept:
            listed = _listed(path) if path.suffix == ".json" else []
            # one that cannot be read keeps its shards: what it is may be found out by hand
            names |= {shard.name for shard in path.parent.glob(f"{path.stem}.*")} if listed is None else set(listed)
        for path in (self.path / "checkpoints").iterdir():
            found = SHARD.fullmatch(path.name) or UNFINISHED.fullmatch(path.name)
            if not found or path.name in names or (newest is not None and found[1] is not None and int(found[1]) > newest):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)  # one that was left behind may end its write just now; the next call gets the rest
            else:
                path.unlink(missing_ok=True)

    @property
    def best(self) -> Path:
        """The best checkpoint."""
        return self.path / "checkpoints" / "best.safetensors"

    def mark_best(self, checkpoint: Path, state: _Saves | None = None) -> None:
        """Make `checkpoint` the best one: another name of the same file, in one rename. Of a sharded one `state`, its content, is
        written whole: the best is one file.
        """
        if checkpoint.suffix == ".json":
            if state is None:
                raise InputError(f"state (=None) must be given to make {checkpoint.name} the best; pass State.load(checkpoint)")
            state.save(self.best)
            return
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


class Seen(Folder):
    """A run folder that another process writes, as those read it who compute with that process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, size: int) -> list[dict[str, Any]]:
        """The lines that the writer keeps."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes()[:size].splitlines() if path.exists() else []
        return [parse(line, str(path)) for line in lines]

    def signed(self, sign: str) -> bool:
        """Whether this is the folder that its writer signed."""
        lock = self.path / ".lock"
        return lock.is_file() and lock.read_text(encoding="ascii", errors="replace") == sign

    def taken_over(self, lines: Sequence[Mapping[str, Any]], wait_s: float) -> Folder:
        """Write in place of the process that is gone, from its last line on."""
        waits = time.monotonic() + wait_s
        while True:
            try:
                folder = Folder(self.path, resume=True, ours=True)
                break
            except BusyError:  # its last breath
                if time.monotonic() > waits:
                    raise
                time.sleep(0.05)
        write_atomic(self.path / "metrics.jsonl", b"".join(_line(line) for line in lines))
        return folder

    def close(self) -> None:
        """Nothing is held."""


class _Saves(Protocol):
    def save(self, path: Path) -> None: ...


class Writer:
    """One job at a time in the background, such as the writing of a checkpoint; its error is raised by the next `start` or `finish`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, function: Callable[[], object]) -> None:
        """Wait for the job before, then begin this one; not where that one has failed."""
        self.finish()
        # an interpreter that ends under a thread in compiled code aborts, and nobody would hear of an error that is not asked for
        atexit.register(self.finish, GRACE_S)
        self._thread = threading.Thread(target=self._work, args=(function,), name="anyfit-writer", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait until the job is done."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise StorageError(f"a checkpoint is still being written after timeout_s (={timeout_s}); the disk is slow or hangs")
            self._thread = None
            atexit.unregister(self.finish)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self, function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised where the job is waited for
            self._error = error


def committed(run: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first: files, and the JSONs of sharded ones."""
    found = [path for path in (run / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.name))


def shard_path(commit: Path, index: int, count: int) -> Path:
    """Where a shard of the checkpoint `commit` goes; never over one that it lists now, should a step be saved again."""
    name = f"{commit.stem}.{index}-of-{count}"
    again = f"{name}.safetensors" in (_listed(commit) or [])
    return commit.with_name(f"{name}.again.safetensors" if again else f"{name}.safetensors")


def _step(path: Path) -> int:
    found = CHECKPOINT.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _listed(commit: Path) -> list[str] | None:
    """The shards that a sharded checkpoint is made of; None where it is not there or cannot be read."""
    try:
        return [str(shard["file"]) for shard in parse(commit.read_bytes())["shards"]]
    except (OSError, InputError, KeyError, TypeError):
        return None


def _line(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event, allow_nan=False, ensure_ascii=False).encode() + b"\n"


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


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun, or what sets its variables, has started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware, for the record."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "pyarrow", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {"versions": versions, "hardware": {"cpu": _processor(), "cores": cores(), "memory_bytes": memory, "device": device}}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
