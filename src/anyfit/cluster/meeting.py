"""Where ranks meet: a store beside them all, members that give signs of life, and a coordinator that says who belongs together.

The store is torch's TCPStore; what is in it is JSON. The coordinator lives where the store does (the launcher, or rank 0 under
torchrun) and alone decides: a generation is a list of members, and a new one begins when one of the old dies, leaves or joins.

Steps, and exchanges between steps, are numbered. Each ends with an exchange of what is small, and who completed that knows that all
had entered it; so of those who meet again after a failure some may be one number ahead, never more. Those behind are handed what was
heard in that exchange and go on; those of the highest number try theirs again.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed

from anyfit import errors
from anyfit.errors import AnyfitError, InputError, RunError

__all__ = ["Coordinator", "Generation", "Member", "Place", "address_towards", "connect", "raised", "reachable"]

Store = Any  # torch's, of which its annotations say nothing
dist: Any = torch.distributed

BEAT_S = 0.25  # between signs of life
POLL_S = 0.005  # between looks while something is waited for
INBOX = "inbox"


class Place(NamedTuple):
    """Where a member runs: the number of its node and its own there."""

    node: int
    local: int


@dataclass(frozen=True, slots=True)
class Generation:
    """Who computes together. `ahead` exchanges are complete, the last of them with `result`; `joined` know nothing yet."""

    number: int
    members: tuple[int, ...]
    places: tuple[Place, ...]
    hosts: tuple[str, ...]
    addresses: tuple[str, ...]
    joined: tuple[int, ...] = ()
    ahead: int = 0
    result: tuple[str, ...] | None = None
    patience_s: float = 300.0

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Generation:
        """Of what the coordinator announced."""
        lists = {name: tuple(item) for name, item in value.items() if isinstance(item, list)}
        return cls(**{**value, **lists, "places": tuple(Place(*place) for place in value["places"])})


def connect(host: str, port: int, *, serve: bool, wait_s: float, job: str = "", inner: bool = False) -> tuple[Store, int]:
    """The store at an address, served from here or elsewhere, and its port. `inner`: it is for processes of this machine alone."""
    options: dict[str, Any] = {}
    if inner:  # torch would listen on all networks
        door = socket.create_server((host, port))
        port = door.getsockname()[1]
        options["master_listen_fd"] = door.detach()
    made: list[Any] = []

    def make() -> None:
        try:
            made.append(dist.TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=timedelta(seconds=wait_s), **options))
        except (RuntimeError, ValueError) as error:  # torch's DistNetworkError and DistStoreError are RuntimeErrors
            made.append(error)

    # apart: where something else listens, torch waits for its answer without end
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(2 * wait_s + 5.0)
    found = made[0] if made else None
    if found is None or isinstance(found, Exception):
        if serve:
            raise InputError(f"rdzv (={host}:{port}) cannot be opened here: {_short(found)}; another job may hold the port; take another")
        what = (
            f"nobody answered there for {wait_s:.0f} s"
            if found
            else f"what listens there gave no answer for {wait_s:.0f} s, so it is no job"
        )
        raise RunError(f"rdzv (={host}:{port}): {what}; start the job on that host, and check its name, its port and the firewall between")
    return dist.PrefixStore(f"anyfit/{job}", found), found.port


def address_towards(host: str) -> str:
    """The address of this machine on the way to another."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent: the kernel only picks the way
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def raised(verdict: Mapping[str, Any]) -> AnyfitError:
    """The error that ended a job, as its own kind."""
    kind = getattr(errors, str(verdict.get("type")), RunError)
    kind = kind if isinstance(kind, type) and issubclass(kind, AnyfitError) and kind is not errors.MissingExtra else RunError
    error: AnyfitError = kind(str(verdict["message"]))
    return error


def _short(error: BaseException | None) -> str:
    return str(error).split("\n", 1)[0][:300]


def _told(value: Mapping[str, Any]) -> str:
    return json.dumps(value, allow_nan=False)


@dataclass
class _Known:
    """What the coordinator knows of a member."""

    place: Place
    host: str
    address: str
    pid: int
    beat: bytes = b""
    seen: float = 0.0
    fingerprint: dict[str, Any] | None = None
    gone: bool = False
    done: bool = False
    post: dict[str, Any] | None = None  # its wish for a new generation


class Coordinator:
    """Decides who belongs together. `tick` reads what came and acts on it; nothing here waits."""

    def __init__(self, store: Store, *, nodes: int = 1, ranks: int | None = None, wait_s: float = 300.0, timeout_s: float = 30.0) -> None:
        self.store, self.expected, self.ranks, self.wait_s, self.timeout_s = store, nodes, ranks, wait_s, timeout_s
        self.nodes: dict[int, tuple[str, int]] = {}  # host and number of ranks
        self.known: dict[int, _Known] = {}
        self.number = 0
        self.members: list[int] = []
        self.waiting: list[int] = []  # want to join
        self.result: list[str] | None = None
        self.ahead = 0
        self.patience_s = 10 * timeout_s  # for a rank that is alive and slow
        self.verdict: dict[str, Any] | None = None
        self.started = time.monotonic()
        self._beaten = 0.0
        self._gone: list[int] = []

    def tick(self) -> None:
        """Read and act; the error of a store that is gone is the caller's."""
        while self.store.queue_len(INBOX):
            self._take(json.loads(self.store.queue_pop(INBOX)))
        now = time.monotonic()
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            self._feel(now)
        gone = [number for number, known in self.known.items() if known.gone]
        if gone != self._gone:
            self._gone = gone
            self.store.set("dead", json.dumps(gone))
        if self.number and not self.alive():
            for number in self.waiting:
                self.store.set(f"refused/{number}", _told({"type": "RunError", "message": "the job has ended"}))
            self.waiting = []
        if self.verdict is not None:
            return
        if not self.number:
            self._begin(now)
        else:
            self._regroup()

    def alive(self) -> list[int]:
        """Those of the generation that are neither gone nor done."""
        return [number for number in self.members if not self.known[number].gone and not self.known[number].done]

    @property
    def over(self) -> bool:
        """Whether nobody is left, or the job has failed."""
        return self.verdict is not None or (self.number > 0 and not self.alive())

    def end(self, error: BaseException) -> None:
        """The job is over: everyone raises this."""
        if self.verdict is None:
            message = str(error) if isinstance(error, AnyfitError) else f"{type(error).__name__}: {error}"
            self.verdict = {"type": type(error).__name__ if isinstance(error, AnyfitError) else "RunError", "message": message}
            self.store.set("verdict", _told(self.verdict))

    def _take(self, message: dict[str, Any]) -> None:
        kind, number = message["kind"], message["id"]
        if kind == "node":
            self.nodes[message["node"]] = (message["host"], message["ranks"])
            return
        if kind == "present":
            place = Place(*message["place"])
            self.known[number] = _Known(place, message["host"], message["address"], message["pid"], seen=time.monotonic())
            return
        if kind == "exit":  # of a node's launcher: a child has ended
            mine = [known for known in self.known.values() if list(known.place) == message["place"] and known.pid == message["pid"]]
            for known in mine:
                known.gone = True
            if not mine and not self.number:
                node, local = message["place"]
                self.end(
                    RunError(f"rank {local} of node {node} ended before training began (exit code {message['code']}); see its own message")
                )
            return
        if number not in self.known:
            return
        known = self.known[number]
        if kind == "ready":
            known.fingerprint = message["fingerprint"]
            if self.number:
                self._welcome(number)
        elif kind == "regroup" and message["generation"] == self.number:
            known.post = message
            if not message["boundary"]:
                self.store.set("broken", str(self.number))
        elif kind == "done":
            known.done = True
            self._heard(message)
        elif kind == "left" or (kind == "failed" and self.number and number not in self.members):
            known.gone = True
        elif kind == "failed" and not known.gone:  # who was refused or taken for dead is no matter of the others
            known.gone = True
            if self.verdict is None:
                self.verdict = {"type": message["type"], "message": message["message"]}
                self.store.set("verdict", _told(self.verdict))

    def _heard(self, message: Mapping[str, Any]) -> None:
        """How far a member is, and the result of its last exchange."""
        if message["serial"] >= self.ahead:
            self.ahead, self.result = message["serial"], message["result"]

    def _feel(self, now: float) -> None:
        """Signs of life; one that gave none for too long is dead, whatever it may do later."""
        numbers = [number for number, known in self.known.items() if not known.gone and not known.done]
        values = self.store.multi_get([f"beat/{number}" for number in numbers]) if numbers else []
        for number, value in zip(numbers, values, strict=True):
            known = self.known[number]
            if value != known.beat:
                known.beat, known.seen = value, now
            elif now - known.seen > self.timeout_s:
                known.gone = True
                self.store.set(f"dead/{number}", "1")
                self.store.set(f"buried/{known.place.node}/{known.pid}", "1")

    def _begin(self, now: float) -> None:
        """The first generation: everyone who is expected has come and is ready."""
        first = self.known if self.ranks is not None else {n: k for n, k in self.known.items() if k.place.node < self.expected}
        lost = [known for known in first.values() if known.gone]
        here = {node: about for node, about in self.nodes.items() if node < self.expected}
        expected = self.ranks if self.ranks is not None else sum(ranks for _, ranks in here.values())
        complete = len(first) == expected and (self.ranks is not None or len(here) == self.expected)
        if lost:
            silent = time.monotonic() - lost[0].seen > self.timeout_s
            what = f"gave no sign of life for {self.timeout_s:.0f} s (--rank-timeout)" if silent else "ended"
            self.end(RunError(f"{_name(lost[0])} {what} before training began; see its own message"))
        elif not complete:
            if now - self.started > self.wait_s:
                self.end(RunError(self._missing(here, first)))
        elif all(known.fingerprint is not None for known in first.values()):
            there = sorted(first, key=lambda number: first[number].place)
            if (problem := self._differs(there)) is not None:
                self.end(InputError(problem))
                return
            self._announce(there, ())
            for number in [number for number, known in self.known.items() if known.fingerprint is not None and number not in first]:
                self._welcome(number)

    def _missing(self, nodes: Mapping[int, tuple[str, int]], first: Mapping[int, _Known]) -> str:
        """Who has not come."""
        if self.ranks is not None:
            there = (
                ", ".join(sorted({f"{known.place.local} of node {known.place.node} ({known.host})" for known in first.values()})) or "none"
            )
            return f"{len(first)} of {self.ranks} ranks came within {self.wait_s:.0f} s: {there}; look at the messages of those that are missing"
        came = ", ".join(f"node {node} ({host}, {ranks} ranks)" for node, (host, ranks) in sorted(nodes.items()))
        silent = [
            f"rank {local} of node {node} ({host})"
            for node, (host, ranks) in sorted(nodes.items())
            for local in range(ranks)
            if not any(known.place == (node, local) for known in first.values())
        ]
        if len(nodes) == self.expected:
            return f"{', '.join(silent)} did not come within {self.wait_s:.0f} s; look at its messages"
        return (
            f"{len(nodes)} of {self.expected} nodes came to the rendezvous within {self.wait_s:.0f} s: {came}; start the same command on the others, "
            "or ask for fewer (nnodes)"
        )

    def _differs(self, numbers: Sequence[int]) -> str | None:
        """What ranks must have in common, and one has not."""
        first = self.known[numbers[0]]
        for number in numbers[1:]:
            other = self.known[number]
            assert first.fingerprint is not None and other.fingerprint is not None
            for what in sorted(set(first.fingerprint) | set(other.fingerprint)):
                ours, theirs = first.fingerprint.get(what), other.fingerprint.get(what)
                if ours != theirs:
                    return f"{what} differs between ranks: {_spell(ours)} at {_name(first)}, {_spell(theirs)} at {_name(other)}; give all the same"
        return None

    def _welcome(self, number: int) -> None:
        """One more, who waits for the end of a step; refused where it runs something else."""
        there = self.alive()
        problem = self._differs([there[0], number]) if there else "the job has ended"
        if problem is not None:
            self.store.set(f"refused/{number}", _told({"type": "InputError", "message": problem}))
            self.known[number].gone = True
            return
        self.waiting.append(number)
        self.store.set("wanted", str(self.number))

    def _regroup(self) -> None:
        """A new generation, as soon as everyone who lives has asked for it."""
        there = self.alive()
        posts = {number: self.known[number].post for number in there}
        asked = [post for post in posts.values() if post is not None]
        if not asked or len(asked) < len(there):
            return
        for post in asked:
            self._heard(post)
        behind = min(post["serial"] for post in asked)
        if behind < self.ahead - 1 or (behind < self.ahead and self.result is None):
            self.end(RunError("ranks are further apart than one exchange; the state of the last checkpoint is kept, and resume goes on"))
            return
        joiners = [number for number in self.waiting if not self.known[number].gone]
        enters = all(post["boundary"] for post in asked) and len({post["serial"] for post in asked}) == 1
        if (
            there == self.members and not (enters and joiners) and not any(post["calm"] for post in asked)
        ):  # nobody was lost: somebody was only slow
            self.patience_s *= 2
        if enters:
            self.waiting = []
        self._announce([*there, *(joiners if enters else ())], joiners if enters else ())

    def _announce(self, members: Sequence[int], joined: Sequence[int]) -> None:
        self.number, self.members = self.number + 1, list(members)
        for number in members:
            self.known[number].post = None
        known = [self.known[number] for number in members]
        announced = {
            "number": self.number,
            "members": self.members,
            "places": [list(item.place) for item in known],
            "hosts": [item.host for item in known],
            "addresses": [item.address for item in known],
            "joined": list(joined),
            "ahead": self.ahead,
            "result": self.result,
            "patience_s": self.patience_s,
        }
        if self.waiting:
            self.store.set("wanted", str(self.number))
        self.store.set(f"generation/{self.number}", _told(announced))
        self.store.set("latest", str(self.number))


def _name(known: _Known) -> str:
    return f"rank {known.place.local} of node {known.place.node} ({known.host})"


def _spell(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass
class Member:
    """One rank's side: its signs of life, what it tells the coordinator, what it waits for."""

    store: Store
    beats: Store  # a connection of its own: a wait of the main thread must not stop the signs of life
    place: Place
    address: str
    timeout_s: float = 30.0
    coordinator: Coordinator | None = None  # where it lives in this process
    parent: int | None = None  # the process without which this one must not go on
    folder: Path | None = None  # what that process would have removed
    number: int = -1
    generation: int = 0
    stop: int = 0  # the signal by which the whole job is to end
    wanted: int = 0  # the generation in which somebody wants to join
    broken: int = 0  # the generation that some have left after a failure
    newcomer: bool = False  # what goes wrong here is no matter of the others
    dead: frozenset[int] = frozenset()  # members that gave no sign of life for too long
    _ended: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _heard: float = field(default_factory=time.monotonic)

    def present(self) -> None:
        """Say that this rank is there; from now on it gives signs of life."""
        self.number = int(self.store.add("members", 1)) - 1
        self.beats.set(f"beat/{self.number}", "0")
        self._tell(kind="present", place=list(self.place), host=socket.gethostname(), address=self.address, pid=os.getpid())
        for work in (self._beat, self._watch):
            self._threads.append(threading.Thread(target=work, name=f"anyfit {work.__name__}", daemon=True))
            self._threads[-1].start()

    def ready(self, fingerprint: Mapping[str, Any]) -> Generation:
        """Wait for those with whom this rank computes."""
        latest = int(self.store.get("latest")) if self.store.check(["latest"]) else 0
        self._tell(kind="ready", fingerprint=dict(fingerprint))
        return self._await(latest + 1)

    def regroup(self, serial: int, result: Sequence[str], *, boundary: bool = False, calm: bool = False) -> Generation:
        """Meet again after a failure, between two steps, or (calm) for a reason of this rank's own."""
        self._tell(kind="regroup", generation=self.generation, serial=serial, result=result, boundary=boundary, calm=calm)
        return self._await(self.generation + 1)

    def done(self, serial: int, result: Sequence[str]) -> None:
        """Say that this rank has done all there is to do, or leaves."""
        self._tell(kind="done", serial=serial, result=result)
        self.end()

    def failed(self, error: BaseException) -> None:
        """Something went wrong here that goes wrong everywhere: the job is over."""
        known = isinstance(error, AnyfitError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        if self.place != (0, 0):
            message = f"rank {self.place.local} of node {self.place.node} ({socket.gethostname()}): {message}"
        with suppress(RunError):
            self._tell(kind="left" if self.newcomer else "failed", type=type(error).__name__ if known else "RunError", message=message)
        self.end()

    def stopped_by(self) -> int | None:
        """The signal by which the whole job ends."""
        if not self.stop and self.store.check(["stop"]):  # another rank was the first to see it
            self.stop = int(self.store.get("stop"))
        return self.stop or None

    def end(self) -> None:
        """No more signs of life; a coordinator in this process serves the others until they are done."""
        if self.coordinator is not None and self.number >= 0:
            waits = time.monotonic() + 2 * self.timeout_s
            while not self.coordinator.over and time.monotonic() < waits:
                time.sleep(POLL_S)
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _tell(self, **message: Any) -> None:
        with reachable():
            self.store.queue_push(INBOX, _told({"id": self.number, **message}))

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_S if self.coordinator is None else POLL_S):
            try:
                if self.coordinator is not None:
                    self.coordinator.tick()
                    if time.monotonic() - self._heard < BEAT_S:
                        continue
                count += 1
                self.beats.set(f"beat/{self.number}", str(count))
                if self.beats.check(["stop"]):
                    self.stop = int(self.beats.get("stop"))
                if self.beats.check(["broken"]):
                    self.broken = int(self.beats.get("broken"))
                if self.beats.check(["dead"]):
                    self.dead = frozenset(json.loads(self.beats.get("dead")))
                if self.beats.check(["wanted"]):
                    self.wanted = int(self.beats.get("wanted"))
                self._heard = time.monotonic()
            except RuntimeError:
                return  # the store is gone, and with it the job: the main thread finds out, or the watch ends it

    def _watch(self) -> None:
        """End a rank that can neither go on nor find out: its launcher or its store is gone while it sits in a collective."""
        while not self._ended.wait(BEAT_S):
            if self.parent is not None and os.getppid() != self.parent:
                if self.folder is not None:  # of the call, which may hold a copy of rows
                    shutil.rmtree(self.folder, ignore_errors=True)
                os._exit(1)
            if time.monotonic() - self._heard > 3 * self.timeout_s:
                sys.stderr.write("error: the store of this job cannot be reached any more; its host is gone or cut off\n")
                os._exit(1)

    def _await(self, number: int) -> Generation:
        """The next generation that this rank belongs to."""
        generation = None
        with reachable():
            while generation is None or self.number not in generation.members:
                if self.store.check([f"generation/{number}"]):
                    generation = Generation.from_json(json.loads(self.store.get(f"generation/{number}")))
                    number += 1
                    continue
                if self.store.check(["verdict"]):
                    raise raised(json.loads(self.store.get("verdict")))
                if self.store.check([f"refused/{self.number}"]):
                    raise raised(json.loads(self.store.get(f"refused/{self.number}")))
                if self.store.check([f"dead/{self.number}"]):
                    raise RunError(f"this rank gave no sign of life for {self.timeout_s:.0f} s, and the others went on without it")
                time.sleep(POLL_S)
        self.generation = generation.number
        return generation


@contextmanager
def reachable() -> Iterator[None]:
    """Say what it means when the store does not answer."""
    try:
        yield
    except AnyfitError:
        raise
    except RuntimeError as error:
        raise RunError(
            f"the store of this job cannot be reached any more ({_short(error)}); its host is gone or cut off. What was saved last is kept, and "
            "resume goes on"
        ) from error
