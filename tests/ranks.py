"""Ranks as threads of one process: real groups, sockets and coordinator, and deaths at chosen points of a step.

A test of a group then costs as long as its steps take, and no start of processes. What threads share are torch's, Python's and numpy's
own random numbers: models get their parameters from a generator of their own, and steps may draw nothing (dropout: exact_dropout).
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch.distributed
from torch import Tensor, nn

from anyfit import Plan, Schema, Task
from anyfit.cluster import Call, Cluster, Group, Member
from anyfit.cluster.meeting import INBOX, Coordinator, Place
from anyfit.data import Batches, make_batches
from anyfit.engine import Stepped, Trainer, make_trainer, train
from anyfit.machine import own_random
from anyfit.run import Run
from anyfit.values import canonical

Line = tuple[int, float, float, dict[str, float]]  # step, loss, count, logs
CPU = torch.device("cpu")
HOST = "127.0.0.1"
FIT: Any = importlib.import_module("anyfit.fit")  # the module: the verb has its name
RECORD: Any = importlib.import_module("anyfit.record")
OPTIONS: dict[str, Any] = {"target": None, "run": None, "resume": False, "weights_partial": False, "optimizer_overrides": {}}
ALIKE: dict[str, Any] = {"task": "the same everywhere"}  # a fingerprint
LONG_S = 120.0  # for what takes no time; it ends a test that hangs
_reading = threading.Lock()
_here = threading.local()


class Dead(BaseException):
    """A rank is gone, as by SIGKILL: nothing of it runs any more."""


def current() -> Rank | None:
    """The rank of this thread, if it is one."""
    rank: Rank | None = getattr(_here, "rank", None)
    return rank


def until(true: Callable[[], object], what: str = "it") -> None:
    """Wait for what is bound to come."""
    waits = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < waits, f"{what} did not come"
        time.sleep(0.002)


class Meeting:
    """A store in this process, and its coordinator in a thread."""

    def __init__(self, **options: Any) -> None:
        self.store: Any = torch.distributed.HashStore()  # as torch's TCPStore, without a connection for each
        self.store.set_timeout(timedelta(seconds=LONG_S))
        self.coordinator = Coordinator(self.store, **options)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def member(self, place: Place, timeout_s: float = 30.0) -> Member:
        """One that has said nothing yet."""
        return Member(self.store, self.store, place, HOST, timeout_s=timeout_s)

    def tell(self, **message: Any) -> None:
        """What a launcher tells."""
        self.store.queue_push(INBOX, canonical({"id": -1, **message}).decode())

    def _tick(self) -> None:
        while not self._over.wait(0.002):
            self.coordinator.tick()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


class Rank:
    """One thread's rank."""

    def __init__(self, ranks: Ranks, local: int) -> None:
        self.ranks, self.local = ranks, local
        self.member = ranks.meeting.member(Place(0, local), ranks.timeout_s)
        self.group = Group(self.member, CPU, ranks.cluster)
        self.trainer: Trainer
        self.events: list[dict[str, Any]] = []
        self.losses: list[Line] = []
        self.shares: list[list[int]] = []  # everyone's units of each step
        self.pending: list[int] = []  # rows of the step at hand, as the task notes them
        self.rows: dict[int, list[int]] = {}  # those of each step that was taken
        self.result: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.work: Callable[[Rank], Any] = lambda rank: None

    def meet(self, fingerprint: Mapping[str, Any] = ALIKE) -> None:
        """Find the others."""
        self.member.present()
        self.group.meet(fingerprint)
        if self.group.newcomer:
            self.group.take_over()

    def dies(self) -> None:
        """What the system does to a process that was killed: its signs of life end, its sockets close, its launcher hears of it."""
        self.member._ended.set()
        self.group._shut()
        self.ranks.meeting.tell(kind="exit", place=list(self.member.place), pid=os.getpid(), code=-9)

    def stops(self) -> None:
        """What SIGSTOP does until the others go on alone, and then SIGCONT: no sign of life, and all connections stay open."""
        member, coordinator = self.member, self.ranks.meeting.coordinator
        member._ended.set()
        for thread in member._threads:
            thread.join()
        until(lambda: member.number not in coordinator.members, "a generation without it")
        member._ended.clear()
        member._threads = [threading.Thread(target=member._beat, daemon=True)]
        member._threads[0].start()

    def _run(self) -> None:
        _here.rank = self
        try:
            self.result = self.work(self)
        except Dead:
            self.dies()
        except BaseException as error:  # noqa: BLE001 - raised by the one who waits
            self.error = error
            if self.member.number >= 0:
                self.member.failed(error)
            self.group._shut()


class Ranks:
    """Some ranks in threads, and who joins them."""

    def __init__(self, count: int, *, timeout_s: float = 10.0, **options: Any) -> None:
        self.cluster, self.timeout_s = Cluster(nproc=count, timeout_s=timeout_s, **{"shares": "equal", **options}), timeout_s
        self.meeting = Meeting(ranks=count, timeout_s=timeout_s, wait_s=LONG_S)
        self.all = [Rank(self, local) for local in range(count)]

    def join(self, work: Callable[[Rank], Any] | None = None) -> Rank:
        """One more, from now on."""
        rank = Rank(self, len(self.all))
        rank.work = work or self.all[0].work
        self.all.append(rank)
        rank.thread.start()
        return rank

    def run(self, work: Callable[[Rank], Any], *, raises: bool = True) -> list[Any]:
        """What each rank gives; None of those that died. Errors are raised, or (not `raises`) given in place of results."""
        with own_random(), fit_in_threads(), self.meeting:
            for rank in self.all:
                rank.work = work
                rank.thread.start()
            for rank in self.all:  # grows by those who join
                rank.thread.join(LONG_S)
                assert not rank.thread.is_alive(), f"rank {rank.local} hangs"
        for rank in self.all:
            if raises and rank.error is not None:
                raise rank.error
        return [rank.error or rank.result for rank in self.all]


# ---------------------------------------------------------------------- steps


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """The model with parameters from a generator of its own: other threads draw from torch's, and seed it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
    return model


def built(task: Task, plan: Plan) -> nn.Module:
    """A model from the plan's seed."""
    return seeded(task.build_model(Schema(())), plan.seed)


def made(task: Task, data: Any, plan: Plan, **options: Any) -> tuple[Trainer, Batches]:
    """A trainer with its batches."""
    trainer = make_trainer(task, built(task, plan), plan, 100, CPU, **options)
    augment = task.augment if type(task).augment is not Task.augment else None
    return trainer, make_batches(data, plan, task.collate, device=CPU, augment=augment)


def before(target: Any, name: str, act: Callable[..., object]) -> None:
    """Do something before each call of a method of one object."""
    plain = getattr(target, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        act(*given, **named)
        return plain(*given, **named)

    setattr(target, name, wrapped)


@dataclass(frozen=True)
class Death:
    """A rank's end in a step: forward, backward, sums (before they begin), tail (before it), sent (it has sent its part of the tail),
    commit (before the optimizer step), next (after it).
    """

    rank: int
    step: int
    where: str
    what: str = "dies"  # or stops

    def arm(self, rank: Rank, trainer: Trainer) -> None:
        """Lay the trap."""
        if rank.local != self.rank:
            return
        group, done = rank.group, False

        def due() -> bool:
            return not done and trainer.position.step == self.step

        def end(*_: object) -> None:
            nonlocal done
            if due():
                done = True
                if self.what == "dies":
                    raise Dead
                rank.stops()

        def sent(payload: bytes) -> None:
            if due():
                mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
                group._group.allgather([[torch.empty_like(mine) for _ in range(group.size)]], [mine])
                time.sleep(0.02)
                end()

        if self.where == "forward":
            trainer.model.register_forward_pre_hook(end)
        elif self.where == "backward":
            watched = next(parameter for parameter in trainer.trained if parameter.requires_grad)
            watched.register_hook(end)  # the last gradients are those of the first layer: some sums are under way
        elif self.where == "sums":
            before(group, "reduce", end)
        elif self.where == "tail":
            before(group, "_tail", end)
        elif self.where == "sent":
            before(group, "exchange", sent)
        elif self.where == "commit":
            for optimizer in trainer.optimizers.values():
                optimizer.register_step_pre_hook(end)
        else:
            assert self.where == "next"
            before(group, "share", end)


def learn(
    task: Task,
    data: Any,
    plan: Plan,
    steps: int,
    *,
    deaths: Sequence[Death] = (),
    between: Callable[[Rank, int], object] | None = None,
) -> Callable[[Rank], Trainer]:
    """Work for ranks: so many steps; `between` is called after each one."""

    def work(rank: Rank) -> Trainer:
        rank.meet()
        group = rank.group
        trainer, batches = made(task, data, plan, workers=group)
        group.by_rows = getattr(batches, "lengths", None) is None
        rank.trainer = trainer
        if group.newcomer:
            trainer.restore(group.handed[0])
        before(group, "share", lambda *_: rank.pending.clear())  # a step begins, or begins anew
        for death in deaths:
            death.arm(rank, trainer)
        for event in train(trainer, batches, steps):
            rank.losses.append(line(event))
            rank.rows[event.position.step - 1] = list(rank.pending)
            rank.shares.append([share.last - share.first for share in group.shares])
            if between is not None:
                between(rank, event.position.step)
            if group.wished("join") and group.regroup() and group.rank == 0:
                group.hand_over(trainer.snapshot(), {})
        group.same(trainer.trained)
        group.done()
        return trainer

    return work


def alone(task: Task, data: Any, plan: Plan, steps: int) -> tuple[Trainer, list[Line]]:
    """The same in one process."""
    trainer, batches = made(task, data, plan)
    return trainer, [line(event) for event in train(trainer, batches, steps)]


def line(event: Stepped) -> Line:
    """What a step tells."""
    return event.position.step, float(event.loss), float(event.count), {name: float(value) for name, value in (event.logs or {}).items()}


def note(rows: Tensor) -> None:
    """For tasks: these rows were computed here."""
    if (rank := current()) is not None and not rank.group.phantom:
        rank.pending += rows.tolist()


def weights(trainer: Trainer) -> Tensor:
    """All parameters, flat."""
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def apart(one: Trainer, other: Trainer) -> float:
    """How far two models are from each other, buffers included."""
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in theirs)


# ---------------------------------------------------------------------- whole fits


def fits(task: Task, data: Any, *, on_event: Callable[[Rank, dict[str, Any]], object] | None = None, **given: Any) -> Callable[[Rank], Run]:
    """Work for ranks: `fit` as a launcher's child runs it. The task builds its model with `seeded`."""
    parts = {name: given.pop(name, None) for name in ("validation", "test", "weights")}
    options = {name: given.pop(name, default) for name, default in OPTIONS.items()}

    def work(rank: Rank) -> Run:
        call = Call(task, data, {**options, "run": options["run"] and str(options["run"]), "plan": given}, **parts)

        def told(event: dict[str, Any]) -> object:
            rank.events.append(event)
            return None if on_event is None else on_event(rank, event)

        return FIT._fit(call, None, told, rank.member, rank.ranks.cluster)

    return work


@contextmanager
def fit_in_threads() -> Iterator[None]:
    """What `fit` takes for its group is the rank's, so that its end can be that of the rank; and Python 3.11 reads source in one thread only."""
    group, code = FIT.Group, RECORD.task_code

    def read(cls: type[Task]) -> str:
        with _reading:
            return str(code(cls))

    FIT.Group, RECORD.task_code = lambda *_: _here.rank.group, read
    try:
        yield
    finally:
        FIT.Group, RECORD.task_code = group, code
