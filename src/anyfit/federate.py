"""federate: the same task over sites that keep their rows. In process, through the orders and updates that a network would carry."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from anyfit import data, engine, machine
from anyfit.data import Batches, Source
from anyfit.errors import DataError, InputError, NonFinite, RunError, StateError, TaskError
from anyfit.fit import OnEvent, scalars, signals
from anyfit.metrics import figures
from anyfit.prepare import Prepared, built
from anyfit.record import compare, last_state, record_of
from anyfit.run import Folder, Run
from anyfit.schema import Column, Schema
from anyfit.state import Position, State
from anyfit.strategy import WEIGHTS, FedAvg, Strategy
from anyfit.task import Task
from anyfit.tree import clone
from anyfit.update import Order, Reply, Update
from anyfit.values import Plan
from anyfit.worker import Worker

__all__ = ["federate"]


def federate(
    task: Task,
    sites: Mapping[str, Any] | Sequence[Any],
    *,
    strategy: Strategy | None = None,
    rounds: int,
    target: str | None = None,
    test: Any = None,
    run: str | Path | None = None,
    resume: bool = False,
    on_event: OnEvent | None = None,
    **plan: Any,
) -> Run:
    """Train `task` over sites. A round sends the weights, each site trains on its rows, and their updates become the next weights.

    `sites`: sources by name, or files that give their names. `epochs` or `steps` in `plan` are local work per round (default: one
    epoch). `test` is a source that is evaluated here after each round.
    """
    if rounds < 1:
        raise InputError(f"rounds (={rounds}) must be at least 1")
    defaults = task.plan()
    local = {"epochs": 1} if plan.get("epochs") is None and plan.get("steps") is None else {}
    final = defaults.updated(**{**local, **plan})
    unused = [name for name in ("patience", "evaluate_every", "best", "bucket") if name in plan]
    if unused:
        raise InputError(f"{unused[0]} (={plan[unused[0]]!r}) has no meaning in a federation yet; leave it out")
    folder = None if run is None else Folder(Path(run), resume=resume)
    try:
        with machine.own_random(), machine.steady_memory():
            workers = _workers(task, sites, target, final, strategy or FedAvg())
            federation = _Federation(task, workers, strategy or FedAvg(), rounds, final, folder, on_event or (lambda event: None))
            federation.begin(None if test is None else Source.of(test, target), resume=resume)
            with signals() as caught:
                federation.loop(caught)
            return federation.end()
    finally:
        if folder is not None:
            folder.close()


def _workers(task: Task, sites: Mapping[str, Any] | Sequence[Any], target: str | None, plan: Plan, strategy: Strategy) -> list[Worker]:
    """A worker for each site, in the order of their names."""
    if isinstance(sites, Mapping):
        named = {str(name): origin for name, origin in sites.items()}
    else:
        named = {}
        for index, origin in enumerate(sites):
            name = Path(origin).name.split(".")[0] if isinstance(origin, str | Path) else f"site{index}"
            if name in named:
                raise InputError(f"two sites are named {name!r}; give them names: sites={{'a': ..., 'b': ...}} or --site a=FILE")
            named[name] = origin
    if not named:
        raise InputError("sites is empty; give at least one")
    return [Worker(name, task, Source.of(origin, target), plan, strategy) for name, origin in sorted(named.items())]


def _agreed_schema(workers: Sequence[Worker]) -> Schema:
    """Names and types of the first site, to which all must agree; for tensors, the widest range of labels."""
    base = workers[0].base_schema()
    for worker in workers[1:]:
        other = worker.base_schema()
        ours = {column.name: (column.type, column.shape) for column in base.columns}
        theirs = {column.name: (column.type, column.shape) for column in other.columns}
        # a column all missing at a site has no type of its own there
        odd = sorted(name for name in set(ours) | set(theirs) if ours.get(name) != theirs.get(name))
        if odd or base.target != other.target:
            raise DataError(
                f"site {worker.site!r} has another schema than {workers[0].site!r}: column {odd[0] if odd else 'target'!r} is "
                f"{theirs.get(odd[0]) if odd else other.target} there and {ours.get(odd[0]) if odd else base.target} here; make them agree (types=...)"
            )
        base = base.replace(_wider(a, b) for a, b in zip(base.columns, other.columns, strict=True))
    return base


def _wider(a: Column, b: Column) -> Column:
    return b if len(b.categories or ()) > len(a.categories or ()) else a


class _Federation:
    """One federation, from its beginning or its last round to its result."""

    def __init__(
        self, task: Task, workers: list[Worker], strategy: Strategy, rounds: int, plan: Plan, folder: Folder | None, emit: OnEvent
    ) -> None:
        self.task, self.workers, self.strategy, self.rounds, self.plan = task, workers, strategy, rounds, plan
        self.folder, self.emit = folder, emit
        self.device = machine.pick_device(plan.device)
        self.history: list[dict[str, Any]] = []
        self.bytes = {"up": 0, "down": 0}
        self.stopped: str | None = None
        self.signal: int | None = None
        self.test: Batches | None = None
        self.started = time.monotonic()

    def _send(self, order: Order) -> Iterator[Reply]:
        """Give an order to every site; replies come as they are done."""
        for worker in self.workers:
            self.bytes["down"] += order.size_bytes()
            reply = worker.answer(order)
            if reply.update is not None:
                self.bytes["up"] += reply.update.size_bytes()
            yield reply

    def _total(self, order: Order, each: dict[str, Update] | None = None) -> Update:
        """The sum of all sites' updates; the order in which they arrive changes no bit of it."""
        total = Update()
        for reply in self._send(order):
            if reply.update is None:
                raise RunError(f"site {reply.site!r} failed in round {order.round}: {reply.error}")
            if each is not None:
                each[reply.site] = reply.update
            total = total + reply.update
        return total

    def begin(self, test: Source | None, *, resume: bool) -> None:
        """Agree on a schema, fit it by the round of statistics, and build or load the first state."""
        self.base = _agreed_schema(self.workers)
        statistics = self._total(Order("prepare", 0, 1, self.plan.seed, values={"schema": self.base.to_json()}))
        self.schema = self.base if not isinstance(self.workers[0].rows, pa.Table) else self.task.prepare(self.base, statistics)
        if self.schema.classes is not None and len(self.schema.classes) < 2:
            raise DataError(f"target {self.schema.target!r} has one class only at all sites together; there is nothing to tell apart")
        machine.seed_all(self.plan.seed)
        self.model = built(self.task, self.schema).to(device=self.device, dtype=getattr(torch, self.plan.dtype))
        _refuse_batch_statistics(self.task, self.model)
        self.names = [name for name, tensor in _named(self.model) if self.task.shared(name, tensor)]
        if not self.names:
            raise TaskError(f"shared() of {type(self.task).__name__} leaves nothing to exchange; let at least one parameter through")
        self.state = State(model=clone(dict(self.model.state_dict())), schema=self.schema.to_json(), progress=self._progress())
        self._prepare_test(test)
        self._begin_record(test, resume=resume)

    def _prepare_test(self, test: Source | None) -> None:
        if test is None:
            return
        read = test.read()
        rows = read.get("test", read["train"])
        prepared = Prepared(self.task, self.plan, self.device, self.schema, {"test": rows}, {}, self.task.collate)
        self.test = prepared.batches("test")

    def _begin_record(self, test: Source | None, *, resume: bool) -> None:
        record = record_of("federate", self.task, self.model, self.plan, self.schema, self.device)
        record["strategy"] = {"name": self.strategy.name, "values": asdict(self.strategy) if is_dataclass(self.strategy) else {}}
        record["rounds"] = self.rounds
        record["data"] = {
            worker.site: {"source": worker.source_name, "rows": worker.num_rows, "sha256": data.fingerprint(worker.rows)}
            for worker in self.workers
        }
        record["sites"] = {worker.site: {"source": worker.source_name, "rows": worker.num_rows} for worker in self.workers}
        if self.test is not None and test is not None:
            record["data"]["test"] = {"source": test.name, "rows": self.test.rows}
        if self.folder is not None:
            before, state = (self.folder.record(), last_state(self.folder)) if resume else (None, None)
            if before is not None:
                changed = compare(self.folder, before, record)
                if before["strategy"] != record["strategy"]:
                    raise StateError(
                        f"run (={str(self.folder.path)!r}) has the strategy {before['strategy']}, not {record['strategy']}; start a new run"
                    )
                if changed:
                    record["forks"] = [*before["forks"], {"step": 0 if state is None else state.position.step, "changed": changed}]
            if state is not None:
                self.state = state
                self.bytes = dict(state.progress["bytes"])
                self.history = self.folder.cut(int(state.progress["metrics_bytes"]))
            else:
                self.folder.cut(0)
            self.folder.write_record(record)
        self.record = record
        rows = {worker.site: worker.num_rows for worker in self.workers}
        self.emit(
            {"event": "start", "round": self.state.position.step, "rounds": self.rounds, "sites": rows, "parameters": record["parameters"]}
        )

    def _progress(self) -> dict[str, Any]:
        return {"metrics_bytes": 0 if self.folder is None else self.folder.metrics_bytes(), "bytes": dict(self.bytes)}

    def loop(self, caught: list[int]) -> None:
        """Rounds, each one a transaction: its state is saved before the next begins."""
        while self.state.position.step < self.rounds and not caught:
            begun, round = time.monotonic(), self.state.position.step + 1
            self._round(round)
            if self.folder is not None:
                self.folder.timing({"round": round, "seconds": time.monotonic() - begun})
                path = self.folder.checkpoint_path(round)
                self.state = replace(self.state, progress=self._progress())
                self.state.save(path)
                self.folder.keep()
                self.emit({"event": "checkpoint", "round": round, "path": str(path)})
        if caught and self.state.position.step < self.rounds:
            self.stopped, self.signal = "signal", caught[0]
        else:
            self.stopped = "finished"
        self.emit({"event": "stop", "round": self.state.position.step, "reason": self.stopped})

    def _round(self, round: int) -> None:
        weights = {name: self.state.model[name] for name in self.names}
        tensors = {**weights, **self.strategy.begin(self.state, len(self.workers))}
        before = dict(self.bytes)
        each: dict[str, Update] = {}
        total = self._total(Order("train", round, 1, self.plan.seed, tensors, self._values()), each)
        if not total.count(WEIGHTS) > 0:
            raise RunError(f"round {round} has no row at any site; nothing was learnt")
        state = self.strategy.finish(self.state, total, len(self.workers))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in state.model.values() if tensor.is_floating_point()):
            raise NonFinite(f"a weight is not finite after round {round}; lower the learning rate. The last round's state is untouched.")
        self.state = replace(state, position=Position(round, round, 0))
        sites = {site: {"rows": int(update.count("loss")), "loss": float(update.mean("loss")["loss"])} for site, update in each.items()}
        loss = float(total.mean("loss")["loss"])
        moved = {f"bytes_{way}": self.bytes[way] - before[way] for way in self.bytes}
        self._line({"event": "round", "round": round, "loss": loss, "sites": sites, **moved})
        if self.test is not None:
            self._line({"event": "evaluate", "round": round, "split": "test", **scalars(self._tested())})

    def _tested(self) -> dict[str, Any]:
        assert self.test is not None
        engine.load_model(self.model, self.state.model)
        return engine.evaluate(self.task, self.model, self.test)

    def _pooled(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Figures over the rows of all sites, from sums that each site sends, and those of each site."""
        weights = {name: self.state.model[name] for name in self.names}
        each: dict[str, Update] = {}
        total = self._total(Order("evaluate", self.state.position.step, 1, self.plan.seed, weights, self._values()), each)
        metrics = self.task.metrics(self.schema)

        def read(update: Update) -> dict[str, Any]:
            sums = {name.removeprefix("metric:"): update.sums(name) for name in update.groups}
            return figures(sums, metrics)

        return read(total), {site: scalars(read(update)) for site, update in each.items()}

    def _values(self) -> dict[str, Any]:
        return {"schema": self.schema.to_json(), "rounds": self.rounds, "epochs": self.plan.epochs, "steps": self.plan.steps}

    def _line(self, event: dict[str, Any]) -> None:
        self.history.append(event)
        if self.folder is not None:
            self.folder.line(event)
        self.emit(event)

    def end(self) -> Run:
        """Final figures of the last round's weights."""
        engine.load_model(self.model, self.state.model)
        splits: dict[str, Any] = {}
        sites: dict[str, Any] = {}
        if self.stopped == "finished":
            splits["train"], sites = self._pooled()
            if self.test is not None:
                splits["test"] = self._tested()
        result = {
            "stopped": self.stopped,
            "signal": self.signal,
            "steps": self.state.position.step,
            "rounds": self.state.position.step,
            "seconds": time.monotonic() - self.started,
            "best": None,
            "bytes": dict(self.bytes),
            "sites": sites,
            "splits": splits,
        }
        if self.folder is not None and self.stopped == "finished":
            self.folder.finish(result)
        return Run(self.task, self.model, self.state, self.record, self.history, result, None if self.folder is None else self.folder.path)


def _named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _refuse_batch_statistics(task: Task, model: nn.Module) -> None:
    """Running means that stay at the sites would leave the joint model with those of its first moment."""
    kept = [
        name for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var")) and not task.shared(name, buffer)
    ]
    if kept:
        raise TaskError(
            f"the model keeps batch statistics ({kept[0]}), which sites do not exchange; let shared() of {type(task).__name__} return True for "
            "them, or use a layer without (GroupNorm, LayerNorm)"
        )
