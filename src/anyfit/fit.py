"""fit, evaluate, predict: a task and data on this machine. Joins the engine's loop, the run's records and the state."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from anyfit import data, engine, machine
from anyfit.data import Blocks, Rows, Source, Stream, without
from anyfit.engine import Losses, Stepped
from anyfit.errors import DataError, InputError, NonFinite, StateError
from anyfit.load import load
from anyfit.metrics import Metric
from anyfit.prepare import Prepared, built, prepare
from anyfit.privacy import ExamplePrivacy, noise_for
from anyfit.private import PrivateSteps, Spending, sampling_rate, units_of
from anyfit.record import compare, forget_seed, keep_seed, last_state, record_of, secret_seed, start_from, weights_file
from anyfit.run import Folder, Run, read_record
from anyfit.schema import Schema
from anyfit.state import Position, State, load_weights
from anyfit.task import Task
from anyfit.tree import clone, leaves
from anyfit.values import Plan

__all__ = ["Event", "evaluate", "fit", "open_run", "predict"]

Event = dict[str, Any]
OnEvent = Callable[[Event], object]
Origin = str | Path | Run


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C are noted and read between steps; a second one acts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def fit(
    task: Task,
    data: Any,
    *,
    target: str | None = None,
    validation: Any = None,
    test: Any = None,
    run: str | Path | None = None,
    resume: bool = False,
    weights: Any = None,
    weights_partial: bool = False,
    privacy: ExamplePrivacy | None = None,
    on_event: OnEvent | None = None,
    **plan: Any,
) -> Run:
    """Train `task` on `data`; nothing is written unless `run` names a folder.

    `validation`, `test`: a fraction of the rows, or a source. `weights`: a run or a .safetensors file to start from.
    `privacy`: differentially private steps, `batch_size` being the expected number of its units. `plan`: any field of `Plan`.
    `on_event` gets each event as JSON values, in this order: step, evaluate, stop, checkpoint; if it returns "stop", training ends
    after that step.
    """
    folder = None if run is None else Folder(Path(run), resume=resume)
    try:
        with machine.own_random(), machine.steady_memory():
            unit = None if privacy is None else privacy.unit
            prepared = prepare(task, data, target=target, validation=validation, test=test, plan=plan, unit=unit)
            if privacy is not None:
                prepared = _drawn(prepared, plan)
            machine.seed_all(prepared.plan.seed)
            fitting = _Fit(prepared, folder, on_event or (lambda event: None), resume=resume, privacy=privacy)
            fitting.begin(weights, weights_partial)
            with signals() as caught:
                fitting.loop(caught)
            return fitting.end(caught)
    finally:
        if folder is not None:
            folder.close()


def _drawn(prepared: Prepared, given: Mapping[str, Any]) -> Prepared:
    """Without what a task's plan has by default and private steps cannot do; what the caller asked for is refused later."""
    changes = {"bucket": False, "clip": None}
    changes = {name: value for name, value in changes.items() if name not in given and getattr(prepared.plan, name) != value}
    if not changes:
        return prepared
    notice = f"privacy draws rows by chance and clips each one's gradient, so the task's {' and '.join(changes)} is left out"
    return replace(prepared, plan=prepared.plan.updated(**changes), notices=(*prepared.notices, notice))


class _Fit:
    """One fit, from its beginning or its checkpoint to its result."""

    def __init__(
        self, prepared: Prepared, folder: Folder | None, on_event: OnEvent, *, resume: bool, privacy: ExamplePrivacy | None = None
    ) -> None:
        self.prepared, self.folder, self.resume = prepared, folder, resume
        self._on_event, self.asked = on_event, False
        task, plan = prepared.task, prepared.plan
        self.batches = prepared.batches("train")
        self.validation = prepared.batches("validation") if "validation" in prepared.rows else None
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.spending = None if privacy is None else self._private(privacy)
        self.total = self._total_steps(plan)
        model = built(task, prepared.schema)
        private = None if self.spending is None else self.spending.steps
        self.trainer = engine.make_trainer(task, model, plan, self.total, prepared.device, private=private)
        self.fresh_groups = {
            name: [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for name, optimizer in self.trainer.optimizers.items()
        }
        self.history: list[Event] = []
        self.losses = Losses()
        self.best: dict[str, Any] | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.bad = 0  # evaluations since the best
        self.stopped: str | None = None
        self.started = self.saved = self.logged = time.monotonic()
        self.logged_step = 0

    def emit(self, event: Event) -> None:
        """Tell an event; who listens may answer "stop"."""
        if self._on_event(event) == "stop":
            self.asked = True

    def _total_steps(self, plan: Plan) -> int:
        if plan.steps is not None:
            return plan.steps
        if self.steps_per_epoch is None:
            raise InputError("epochs cannot be counted on a stream without length; pass steps=...")
        assert plan.epochs is not None
        return plan.epochs * self.steps_per_epoch

    def _private(self, privacy: ExamplePrivacy) -> Spending:
        """Who is protected, how often each one is drawn, and how much noise the budget takes; a resume keeps the noise that it began with."""
        rows = self.prepared.rows["train"]
        units = None if privacy.unit is None else units_of(rows, privacy.unit)
        count = data.num_rows(rows) if units is None else int(units.max()) + 1
        if count is None:
            raise DataError("privacy needs rows that can be counted and drawn; a stream has neither")
        rate = sampling_rate(self.prepared.plan.batch_size, count)
        self.steps_per_epoch = max(1, round(1 / rate))
        before = (self.folder.record() if self.folder is not None else None) or {}
        noise = privacy.noise_multiplier
        if noise is None:
            assert privacy.epsilon is not None
            noise = (before.get("privacy") or {}).get("noise_multiplier")
            noise = noise_for(privacy.epsilon, privacy.delta, self._total_steps(self.prepared.plan), rate) if noise is None else noise
        steps = PrivateSteps(clip=privacy.clip, noise_multiplier=noise, sampling_rate=rate, seed=secret_seed(self.folder), units=units)
        return Spending(privacy, steps, count)

    def begin(self, weights: Any, partial: bool) -> None:
        """Fresh, from other weights, or from the last checkpoint."""
        record = record_of("fit", self.prepared.task, self.trainer.model, self.prepared.plan, self.prepared.schema, self.prepared.device)
        record["data"] = self.prepared.sources
        if self.spending is not None:
            record["privacy"] = self.spending.to_json()
        state = last_state(self.folder) if self.resume and self.folder is not None else None
        if state is None:
            if weights is not None:
                record["weights"] = start_from(self.trainer.model, weights, partial)
            if self.folder is not None:
                if (before := self.folder.record()) is not None:
                    compare(self.folder, before, record)
                self.folder.cut(0)
        else:
            assert self.folder is not None
            before = self.folder.record()
            if before is None:
                raise StateError(
                    f"run (={str(self.folder.path)!r}) has checkpoints but no run.json; restore it, or start a new run with weights="
                )
            changed = compare(self.folder, before, record)
            self._restore(state, forked=bool(changed))
            record["forks"] = [*before.get("forks", []), *([{"step": state.position.step, "changed": changed}] if changed else [])]
            record["weights"] = before.get("weights")
        self.record = record
        if self.folder is not None:
            self.folder.write_record(record)
            if self.spending is not None:
                keep_seed(self.folder, self.spending.steps.seed)
        for notice in (*self.prepared.notices, *self._notices()):
            self.emit({"event": "notice", "text": notice})
        self.emit(
            {
                "event": "start",
                "step": self.trainer.position.step,
                "steps": self.total,
                "steps_per_epoch": self.steps_per_epoch,
                "parameters": record["parameters"],
                "device": str(self.prepared.device),
                "rows": {split: source["rows"] for split, source in self.prepared.sources.items()},
            }
        )

    def _notices(self) -> Iterator[str]:
        """What a user should know before it starts, some of it from one look at a batch of the evaluation."""
        if self.spending is not None:
            yield (
                f"privacy covers what the weights tell of {self.spending.asked.unit or 'row'}s that are trained on, and nothing else: statistics "
                "that preprocessing is fitted with (means, categories, vocabularies), the loss in the log, all rows and figures of validation "
                "and test, and what is chosen by them are not covered"
            )
        task, schema = self.prepared.task, self.prepared.schema
        split = next((name for name in ("validation", "test") if name in self.prepared.rows), None)
        if split is None or isinstance(self.prepared.rows[split], DataLoader | IterableDataset | Stream):
            return
        plain = [name for name, metric in (task.metrics(schema) or {}).items() if not isinstance(metric, Metric)]
        if plain:
            yield f"metric {', '.join(plain)} is a plain function: all outputs and targets are held in memory for it"
        if type(task).evaluate is not Task.evaluate:
            return
        with machine.own_random():
            outputs = engine.glance(task, self.trainer.model, self.prepared.batches(split), self.trainer.autocast())
        if outputs is None:
            yield "the model returns its loss only, so there are no metrics beside it; define predict(self, model, batch) and evaluate_step"

    def _restore(self, state: State, *, forked: bool) -> None:
        assert self.folder is not None
        try:
            self.trainer.restore(state)
        except (InputError, KeyError, ValueError) as error:
            raise StateError(f"the checkpoint in {self.folder.path} does not fit this task: {error}") from error
        if forked:  # what the changed task builds counts, not what the checkpoint remembers
            for name, optimizer in self.trainer.optimizers.items():
                for group, fresh in zip(optimizer.param_groups, self.fresh_groups[name], strict=True):
                    done = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0  # a schedule may go on from where it is
                    group.update(fresh)
                    if "initial_lr" in fresh:
                        group["lr"] = fresh["initial_lr"] * done
            for name, schedule in self.trainer.schedules.items():
                if hasattr(schedule.scheduler, "base_lrs"):
                    schedule.scheduler.base_lrs = [group["initial_lr"] for group in schedule.scheduler.optimizer.param_groups]
                elif name in state.schedules:
                    schedule.scheduler.load_state_dict(clone(state.schedules[name]))
        progress = state.progress
        self.history = self.folder.cut(int(progress["metrics_bytes"]))
        self.best, self.bad, self.stopped = progress["best"], int(progress["bad"]), progress["stopped"]
        self.logged_step = int(progress["logged_step"])
        self.losses.events = [_stepped(item) for item in progress["pending"]]
        if self.trainer.position.step < self.total and self.stopped != "patience":
            self.stopped = None
        if self.best is not None and self.prepared.plan.keeps_best:
            if self.best["step"] == state.position.step:  # killed between the checkpoint and its second name
                self.folder.mark_best(self.folder.checkpoint_path(state.position.step))
            if self.folder.best.exists():  # not where a fork asks for the best only now
                self.best_weights = load_weights(self.folder.best)

    def loop(self, caught: list[int]) -> None:
        """Steps, and between them what is due: log, evaluate, stop, checkpoint."""
        plan = self.prepared.plan
        if self.stopped is not None:
            return
        self.trainer.use_rows(self.batches)
        for used, rows in self.trainer.rows_in_use:
            self.emit({"event": "notice", "text": f"{used} of {rows} word vectors are in use; only those are updated, to the same effect"})
        allowed = None if self.spending is None else self.spending.allowed
        if allowed is not None and allowed <= self.trainer.position.step < self.total:
            self._spent(allowed)
            return
        for event in engine.train(self.trainer, self.batches, self.total):
            self._told()
            self.losses.events.append(event)
            step = event.position.step
            spent = allowed is not None and allowed <= step < self.total
            last = spent or step >= self.total
            evaluates = self.validation is not None and (
                last or (event.ends_epoch if plan.evaluate_every is None else step % plan.evaluate_every == 0)
            )
            if step % plan.log_every == 0 or last or evaluates:
                self._log(event)
            better = self._evaluate(event) if evaluates else False
            if plan.patience is not None and self.bad >= plan.patience:
                self.stopped = "patience"
            elif caught:
                self.stopped = "signal"
            elif spent:
                self._spent(step)
            elif last:
                self.stopped = "finished"
            elif self.asked:
                self.stopped = "asked"
            if self.stopped is not None:
                self._line({"event": "stop", "step": step, "reason": self.stopped}, kept=self.stopped != "signal")
            if self.stopped or better or event.ends_epoch or time.monotonic() - self.saved > plan.checkpoint_every_s:
                self._checkpoint(better)
                self.logged += time.monotonic() - self.saved  # speed is that of steps
            if self.stopped is not None:
                return

    def _told(self) -> None:
        """Notices of the private steps."""
        if self.trainer.private is not None:
            while self.trainer.private.notices:
                self.emit({"event": "notice", "text": self.trainer.private.notices.pop(0)})

    def _spent(self, steps: int) -> None:
        assert self.spending is not None
        self.stopped = "budget"
        budget = f"epsilon={self.spending.asked.epsilon} at delta={self.spending.asked.delta}"
        self.emit(
            {"event": "notice", "text": f"the privacy budget ({budget}) pays for {steps} of {self.total} steps; training stops there"}
        )

    def _line(self, event: Event, *, kept: bool = True) -> None:
        """Record and tell an event; one that a resume takes back is only told."""
        if kept:
            self.history.append(event)
            if self.folder is not None:
                self.folder.line(event)
        self.emit(event)

    def _log(self, event: Stepped) -> None:
        read = self.losses.read()
        if read is None:
            return
        loss, logs = read
        line = {"event": "step", "step": event.position.step, "epoch": event.epoch, "loss": loss, "lr": self.trainer.learning_rate()}
        if self.spending is not None:
            line["epsilon"] = self.spending.epsilon(event.position.step)
        now, steps = time.monotonic(), event.position.step - self.logged_step
        if self.folder is not None:
            rows = getattr(self.batches, "step_size", 0)
            if self.spending is not None:
                rows = self.spending.steps.sampling_rate * (self.batches.rows or 0)
            rate = steps * rows / max(now - self.logged, 1e-9)
            self.folder.timing({"step": event.position.step, "seconds": now - self.logged, "samples_per_s": rate})
        self.logged, self.logged_step = now, event.position.step
        self._line({**line, "logs": logs} if logs else line)

    def _evaluate(self, event: Stepped) -> bool:
        """Evaluate on the validation rows; whether it is the best so far."""
        assert self.validation is not None
        plan = self.prepared.plan
        begun = time.monotonic()
        figures = engine.evaluate(self.prepared.task, self.trainer.model, self.validation, self.trainer.autocast())
        loss = figures["loss"]
        if loss is None or not abs(loss) < float("inf"):
            raise NonFinite(
                f"validation loss (={loss}) is not finite after step {event.position.step}; lower the learning rate. The last checkpoint is untouched."
            )
        for schedule in self.trainer.schedules.values():
            if schedule.every == "evaluation":
                schedule.advance(loss)
        better = self.best is None or loss < self.best["loss"] - plan.min_delta
        self.bad = 0 if better else self.bad + 1
        if better:
            self.best = {"step": event.position.step, **scalars(figures)}
            if plan.keeps_best:
                self.best_weights = clone(dict(self.trainer.model.state_dict()))
        if self.folder is not None:
            seconds = time.monotonic() - begun
            self.folder.timing({"event": "evaluate", "split": "validation", "step": event.position.step, "seconds": seconds})
            self.logged += seconds
        self._line(
            {
                "event": "evaluate",
                "step": event.position.step,
                "epoch": event.epoch,
                "split": "validation",
                **scalars(figures),
                "best": better,
            }
        )
        return better and plan.keeps_best

    def _progress(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "bad": self.bad,
            "stopped": self.stopped,
            "logged_step": self.logged_step,
            "metrics_bytes": 0 if self.folder is None else self.folder.metrics_bytes(),
            "pending": [_pending(event) for event in self.losses.events],
        }

    def _checkpoint(self, better: bool) -> None:
        events, self.losses.events = self.losses.events, list(self.losses.events)
        self.losses.read()  # a loss that is not finite must never reach a checkpoint
        self.losses.events = events
        self.saved = time.monotonic()
        if self.folder is None:
            return
        path = self.folder.checkpoint_path(self.trainer.position.step)
        self.trainer.snapshot(self.prepared.schema.to_json(), self._progress()).save(path)
        if better:
            self.folder.mark_best(path)
        self.folder.keep()
        self.emit({"event": "checkpoint", "step": self.trainer.position.step, "path": str(path)})

    def end(self, caught: list[int]) -> Run:
        """Final figures, with the best weights where a best is kept."""
        prepared, trainer = self.prepared, self.trainer
        state = trainer.snapshot(prepared.schema.to_json(), self._progress())
        if self.best_weights is not None:
            engine.load_model(trainer.model, self.best_weights)
        splits: dict[str, Any] = {}
        if self.stopped != "signal":
            for split in ("validation", "test"):
                if split in prepared.rows:
                    splits[split] = engine.evaluate(prepared.task, trainer.model, prepared.batches(split), trainer.autocast())
                    if split == "test":
                        self.emit({"event": "evaluate", "step": trainer.position.step, "split": "test", **scalars(splits[split])})
        seconds = time.monotonic() - self.started
        result = {
            "stopped": self.stopped or "finished",
            "signal": caught[0] if caught and self.stopped == "signal" else None,
            "steps": trainer.position.step,
            "epochs": trainer.position.epoch,
            "seconds": seconds,
            "best": self.best,
            "train": next(({"loss": line["loss"]} for line in reversed(self.history) if line["event"] == "step"), None),
            "splits": splits,
        }
        if self.spending is not None:
            steps = trainer.position.step
            result["privacy"] = {"epsilon": self.spending.epsilon(steps), "delta": self.spending.asked.delta, "steps": steps}
        if self.folder is not None and self.stopped != "signal":
            self.folder.finish(result)
            if self.spending is not None and self.stopped != "asked":
                forget_seed(self.folder)
        return Run(
            prepared.task, trainer.model, state, self.record, self.history, result, None if self.folder is None else self.folder.path
        )


def scalars(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if not isinstance(value, list)}


def _pending(event: Stepped) -> dict[str, Any]:
    """A step that no log line has told of yet, for the checkpoint."""
    position = [event.position.step, event.position.epoch, event.position.offset]
    logs = {name: float(value) for name, value in (event.logs or {}).items()}
    return {"at": [*position, event.epoch, event.offset], "loss": float(event.loss), "count": float(event.count), "logs": logs}


def _stepped(item: Mapping[str, Any]) -> Stepped:
    step, epoch, offset, of_epoch, of_offset = item["at"]
    logs = {name: torch.tensor(value, dtype=torch.float64) for name, value in item["logs"].items()}
    loss, count = (torch.tensor(item[name], dtype=torch.float64) for name in ("loss", "count"))
    return Stepped(Position(step, epoch, offset), loss, count, of_epoch, of_offset, logs or None)


def open_run(run: str | Path, task: Task | None = None) -> tuple[Task, State]:
    """The task of a run folder and its state: the best if one is kept, else the last. A task that cannot be found by name is given."""
    path = Path(run)
    record = read_record(path)
    if task is None:
        if record["task"]["reference"] is None:
            raise StateError(f"the task of run (={str(path)!r}) lives in no file ({record['task']['class']}); pass it as task=")
        task = load(record["task"]["reference"], record["task"]["values"])
    return task, State.load(weights_file(path))


def _opened(run: Origin, task: Task | None, plan: Mapping[str, Any]) -> tuple[Task, nn.Module, Prepared]:
    """A trained model with what is needed to give it rows."""
    if isinstance(run, Run):
        task, schema_json, model, record = run.task, run.state.schema, run.model, run.record
    else:
        task, state = open_run(run, task)
        schema_json, record = state.schema, read_record(Path(run))
        model = built(task, Schema.from_json(schema_json or {}))
        engine.load_model(model, state.model)
    final = Plan(**record["plan"]).updated(**{"device": "auto", **plan})
    device = machine.pick_device(final.device)
    model.to(device=device, dtype=getattr(torch, final.dtype))
    schema = Schema.from_json(schema_json or {})
    return task, model, Prepared(task, final, device, schema, {}, record["data"], task.collate)


def _given_rows(origin: Any, prepared: Prepared, split: str) -> Rows:
    schema = prepared.schema
    source = Source.of(origin)
    if isinstance(source.origin, DataLoader) and (apart := data.taken_apart(source.origin)) is not None:
        return apart[0]
    told = prepared.sources.get("train", {})  # what training said of its source holds for these rows too
    source = replace(
        source, missing=source.missing or told.get("missing", ()), size=source.size or (tuple(told["size"]) if "size" in told else None)
    )
    images = {column.name: column.type for column in schema.of_type("image") if column.name not in source.types}
    read = replace(source, types={**source.types, **images}).read()  # names of images are read as such again
    rows = read.get("test", read["train"])
    names = rows.column_names if isinstance(rows, pa.Table | Blocks) else None
    absent = [name for name in schema.targets if names is not None and name not in names]
    if split == "test" and absent:
        raise DataError(f"target (={absent[0]!r}) is not a column of {source.name}; the columns are: {', '.join(names or ())}")
    return rows


def evaluate(run: Origin, data: Any, *, task: Task | None = None, **plan: Any) -> dict[str, Any]:
    """Figures of a trained run on data with targets."""
    task, model, prepared = _opened(run, task, plan)
    batches = prepared.batches_of(_given_rows(data, prepared, "test"), "test")
    return engine.evaluate(task, model, batches, machine.autocast(prepared.plan, prepared.device))


def predict(run: Origin, data: Any, *, task: Task | None = None, **plan: Any) -> Any:
    """Predictions of a trained run for data whose targets may be absent: tensors (rows first) as `Task.predict` gives them."""
    task, model, prepared = _opened(run, task, plan)
    rows = _given_rows(data, prepared, "predict")
    rows = without(rows, prepared.schema.targets)
    batches = prepared.batches_of(rows, "predict")
    return _joined(list(engine.predict(task, model, batches, machine.autocast(prepared.plan, prepared.device))))


def _joined(parts: list[Any]) -> Any:
    """Batches of one structure, one after the other."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], Mapping):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], tuple | list):
        return tuple(_joined(list(column)) for column in zip(*parts, strict=True))
    if not list(leaves(parts)):
        return [item for part in parts for item in (part if isinstance(part, list) else [part])]
    raise DataError(f"predict gave a {type(parts[0]).__name__}; it must give a tensor, or a dict or tuple of tensors")
