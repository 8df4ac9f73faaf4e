"""Starts the ranks of one machine as `python -m anyfit rank CALL`, watches them, and leaves survivors alone.

The first launcher of a job (of --nnodes) keeps the store and the coordinator; the others bring their ranks to it. What rank 0 tells
of the run comes to its launcher line by line and is handed on; what the run gave is left in the folder of the call.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from anyfit.cluster.meeting import INBOX, Coordinator, connect, raised
from anyfit.errors import InputError, RunError
from anyfit.run import cores
from anyfit.values import canonical, digest, parse, write_json

__all__ = ["ENVIRONMENT", "OUTCOME", "Cluster", "launch"]

ENVIRONMENT = "ANYFIT_RANK"  # tells a child where it belongs
OUTCOME = "outcome.json"
TICK_S = 0.01
PATIENCE_S = 5.0  # with a store that is asked why a job ended


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How many ranks, where, and how long to wait. `rdzv`: host:port of the first node (tcp:// in front is fine), or file:///shared/path."""

    nproc: int = 1
    nnodes: int = 1
    rdzv: str | None = None
    wait_s: float = 300.0  # for all nodes to come
    timeout_s: float = 30.0  # without a sign of life, after which a rank counts as dead
    restarts: int = 0  # of ranks of this node that died; a new one joins at the end of a step
    shares: str = "measured"  # of each step: by measured speed, equal, or fixed by rank (5:1)
    backend: Literal["auto", "gloo", "nccl"] = "auto"  # what adds gradients: gloo in the host's memory; nccl, experimental, on GPUs

    def __post_init__(self) -> None:
        for name in ("nproc", "nnodes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} (={getattr(self, name)}) must be at least 1")
        if self.nnodes > 1 and self.rdzv is None:
            raise InputError(
                f"nnodes (={self.nnodes}) needs rdzv (--rdzv HOST:PORT), where all nodes meet: a host and a free port of the first one"
            )
        for name in ("wait_s", "timeout_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} (={getattr(self, name)}) must be above 0 seconds")
        if self.shares not in ("measured", "equal") and not re.fullmatch(r"\d+(\.\d+)?(:\d+(\.\d+)?)+", self.shares):
            raise InputError(f"shares (={self.shares!r}) must be 'measured', 'equal' or relative speeds of all ranks, such as 5:1")
        speeds = self.shares.count(":") + 1
        if ":" in self.shares and self.nnodes == 1 < self.nproc != speeds:
            raise InputError(f"shares (={self.shares!r}) names {speeds} speeds for nproc (={self.nproc}) ranks; give one for each")
        if self.backend not in ("auto", "gloo", "nccl"):
            raise InputError(f"backend (={self.backend!r}) must be auto (nccl on GPUs, else gloo), gloo or nccl")
        if self.restarts < 0:
            raise InputError(f"restarts (={self.restarts}) must not be negative")

    @property
    def plain(self) -> bool:
        """Whether this is one process, without any group."""
        return self.nproc == 1 and self.nnodes == 1 and self.rdzv is None


@dataclass
class _Child:
    local: int
    process: subprocess.Popen[bytes]
    channel: socket.socket
    lines: bytes = b""
    told: bool = False  # that it has ended


@dataclass
class _Launcher:
    """One machine's part of a job."""

    cluster: Cluster
    call: Path
    on_event: Callable[[dict[str, Any]], object]
    job: str
    store: Any = None
    coordinator: Coordinator | None = None
    node: int = 0
    address: tuple[str, int] = ("", 0)
    children: list[_Child] = field(default_factory=list)
    restarts: int = 0
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    meeting: Path | None = None  # the shared file that this launcher wrote
    errands: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)  # what the coordinator is to know
    rounds: int = 0  # of errands done
    lost: bool = False  # the store answers no more
    heard: dict[str, Any] | None = None  # the verdict, where there is one
    closed: threading.Event = field(default_factory=threading.Event)

    def meet(self) -> None:
        """Open the store here, or reach the one of the first node."""
        cluster = self.cluster
        host, port = _address(cluster.rdzv, cluster.wait_s) if cluster.rdzv is not None else ("127.0.0.1", 0)
        inner = cluster.rdzv is None
        if cluster.rdzv is not None and cluster.rdzv.startswith("file://") and port == 0:
            self.meeting = Path(cluster.rdzv.removeprefix("file://"))
        serves = port == 0 or _is_here(host)
        if serves:
            try:
                self.store, port = connect(host, port, serve=True, wait_s=cluster.wait_s, inner=inner)
            except InputError:
                if cluster.nnodes == 1:
                    raise
                serves = False  # another launcher of this machine was first
        if not serves:
            self.store, port = connect(host, port, serve=False, wait_s=cluster.wait_s)
        self.address = (host, port)
        if serves:
            self.node = int(self.store.add("nodes", 1)) - 1  # before the others, who wait for the job
            self.store.set("job", canonical({"job": self.job, "nnodes": cluster.nnodes}).decode())
            self.coordinator = Coordinator(self.store, nodes=cluster.nnodes, wait_s=cluster.wait_s, timeout_s=cluster.timeout_s)
            if self.meeting is not None:
                write_json(self.meeting, {"host": host, "port": port})
        else:
            theirs = parse(self.store.get("job"), "the job at the rendezvous")
            if theirs["job"] != self.job:
                raise InputError(
                    f"rdzv (={cluster.rdzv}): another job (of another task, run or plan) meets there; give each job a port of its own"
                )
            if theirs["nnodes"] != cluster.nnodes:
                raise InputError(f"nnodes (={cluster.nnodes}) is {theirs['nnodes']} at the first node; give all the same")
            self.node = int(self.store.add("nodes", 1)) - 1
        self._tell(kind="node", node=self.node, host=socket.gethostname(), ranks=cluster.nproc)
        threading.Thread(target=self._run_errands, name="anyfit errands", daemon=True).start()

    def _tell(self, **message: Any) -> None:
        self.errands.put(json.dumps({"id": -1, **message}))

    def _run_errands(self) -> None:
        """What goes to the store and comes from it, in a thread: where the network is cut, an answer is waited for without end."""
        try:
            while not self.closed.wait(TICK_S):
                while not self.errands.empty():
                    self.store.queue_push(INBOX, self.errands.get())
                self.rounds += 1
                if self.rounds % 25 and not all(child.told for child in self.children):
                    continue
                for child in self.children:  # taken for dead: they hold connections and files
                    if not child.told and self.store.check([f"buried/{self.node}/{child.process.pid}"]):
                        child.process.kill()
                if self.heard is None and self.store.check(["verdict"]):
                    self.heard = parse(self.store.get("verdict"), "the verdict")
        except RuntimeError:
            self.lost = True

    def start(self, local: int) -> None:
        """One rank."""
        ours, theirs = socket.socketpair()
        where = {
            "host": self.address[0],
            "port": self.address[1],
            "place": [self.node, local],
            "ranks": self.cluster.nproc,
            "parent": os.getpid(),
            "timeout_s": self.cluster.timeout_s,
            "wait_s": self.cluster.wait_s,
            "shares": self.cluster.shares,
            "backend": self.cluster.backend,
            "channel": theirs.fileno(),
        }
        environment = {**os.environ, ENVIRONMENT: json.dumps(where), "LOCAL_RANK": str(local)}
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what is wrong is said by anyfit
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // self.cluster.nproc)))
        process = subprocess.Popen(
            [sys.executable, "-m", "anyfit", "rank", str(self.call)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno()
            if _has_number(sys.stderr)
            else subprocess.DEVNULL,  # stdout is the launcher's: its last line is a result
            stderr=None if _has_number(sys.stderr) else subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C goes to the launcher, which ends all at one step
        )
        theirs.close()
        ours.setblocking(False)
        child = _Child(local, process, ours)
        self.children.append(child)
        self.selector.register(ours, selectors.EVENT_READ, child)

    def run(self) -> None:
        """Until all ranks of this machine have ended, and, where the store is, those of the others."""
        for local in range(self.cluster.nproc):
            self.start(local)
        with _signals(self._signalled) as signals:
            while True:
                self.listen()
                if self.coordinator is not None:
                    self.coordinator.tick()
                self._watch()
                if all(child.told for child in self.children):
                    break
            while self.coordinator is not None and not self.coordinator.over and not signals[1:]:
                self.coordinator.tick()  # ranks of other machines go on
                time.sleep(TICK_S)

    def listen(self) -> None:
        """What the ranks tell; each line is answered."""
        for key, _ in self.selector.select(TICK_S):
            child: _Child = key.data
            try:
                data = child.channel.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                self.selector.unregister(child.channel)
                child.channel.close()
                continue
            child.lines += data
            *whole, child.lines = child.lines.split(b"\n")
            for line in whole:
                answer = self.on_event(json.loads(line))
                with contextlib.suppress(OSError):
                    child.channel.sendall(b"stop\n" if answer == "stop" else b"go\n")

    def _watch(self) -> None:
        for child in list(self.children):
            code = child.process.poll()
            if code is None or child.told:
                continue
            child.told = True
            self._tell(kind="exit", place=[self.node, child.local], pid=child.process.pid, code=code)
            died = code < 0 and not (self.coordinator is not None and self.coordinator.over)
            if died and self.restarts < self.cluster.restarts and any(not other.told for other in self.children):
                self.restarts += 1
                self.start(child.local)

    def _signalled(self, number: int, again: bool) -> None:
        """The first signal ends the job between two steps; of one of several machines, only its ranks. The second one acts at once."""
        if again:
            self.kill()
        elif self.coordinator is not None:
            self.store.set("stop", str(number))
        else:
            for child in self.children:
                if child.process.poll() is None:
                    child.process.terminate()

    def kill(self) -> None:
        """End all ranks of this machine now."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()

    def close(self) -> None:
        """Leave nothing behind."""
        self.closed.set()
        self.kill()
        for child in self.children:
            child.channel.close()
        self.selector.close()
        if self.meeting is not None:
            self.meeting.unlink(missing_ok=True)

    def verdict(self) -> Exception:
        """Why there is no outcome."""
        done, waits = self.rounds, time.monotonic() + PATIENCE_S
        while self.heard is None and not self.lost and self.rounds < done + 2 and time.monotonic() < waits:
            time.sleep(TICK_S)
        if self.heard is not None:
            return raised(self.heard)
        if self.lost or self.rounds < done + 2:
            host, port = self.address
            return RunError(
                f"the store of this job ({host}:{port}) cannot be reached any more; its host is gone or cut off. What was saved last is kept, and "
                "resume goes on"
            )
        codes = ", ".join(f"rank {child.local}: {_spell(child.process.returncode)}" for child in self.children)
        return RunError(f"all ranks of this machine are gone ({codes}); what was saved last is kept, and resume goes on from there")


def launch(call: Path, cluster: Cluster, job: Any, on_event: Callable[[dict[str, Any]], object]) -> Path:
    """Run a call over ranks; the folder with its outcome. `job`: JSON that all nodes of one job have in common."""
    launcher = _Launcher(cluster, call, on_event, digest(job))
    try:
        launcher.meet()
        launcher.run()
        if not (call.parent / OUTCOME).exists():
            raise launcher.verdict()
    finally:
        launcher.close()
    return call.parent


def _address(rdzv: str, wait_s: float) -> tuple[str, int]:
    """Host and port; port 0 where this launcher is the first to come to a shared file."""
    if rdzv.startswith("file://"):
        path = Path(rdzv.removeprefix("file://"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
        except FileExistsError:
            return _read_meeting(path, rdzv, wait_s)
        except OSError as error:
            raise InputError(f"rdzv (={rdzv!r}) cannot be written: {error.strerror or error}; give a path that all nodes share") from error
        return socket.gethostname(), 0
    text = rdzv.removeprefix("tcp://")
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"rdzv (={rdzv!r}) must be HOST:PORT (also tcp://HOST:PORT), or file:///PATH of a file that all nodes share")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise InputError(f"rdzv (={rdzv!r}): host {host!r} cannot be found ({error.strerror or error}); check its name") from error
    return host.strip("[]"), int(port)


def _read_meeting(path: Path, rdzv: str, wait_s: float) -> tuple[str, int]:
    waits = time.monotonic() + wait_s
    while time.monotonic() < waits:
        if path.exists() and path.stat().st_size:
            told = parse(path.read_bytes(), str(path))
            return str(told["host"]), int(told["port"])
        time.sleep(TICK_S)
    raise RunError(
        f"rdzv (={rdzv!r}): the node that made this file has not opened the job within {wait_s:.0f} s; if it was left by another job, delete it"
    )


def _is_here(host: str) -> bool:
    """Whether a host's address is one of this machine."""
    for family, _, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
            return True
    return False


def _has_number(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):  # a notebook's
        return False
    return True


def _spell(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


@contextlib.contextmanager
def _signals(act: Callable[[int, bool], None]) -> Iterator[list[int]]:
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        act(number, len(caught) > 1)
        if len(caught) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
