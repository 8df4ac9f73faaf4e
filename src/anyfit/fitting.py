"""One fit, from its beginning or its checkpoint to its result: steps, and between them what is due."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from anyfit import data, engine, machine
from anyfit.cluster import (
    Group,
    Shards,
    figures_of,
)
from anyfit.data import Indexed, Stream
from anyfit.dropout import ExactDropout
from anyfit.engine import Losses, Stepped
from anyfit.errors import DataError, InputError, NonFinite, StateError
from anyfit.metrics import Metric
from anyfit.prepare import Prepared, built
from anyfit.privacy import ExamplePrivacy, noise_for
from anyfit.private import PrivateSteps, Spending, sampling_rate, units_of
from anyfit.record import compare, forget_seed, keep_seed, last_state, record_of, secret_seed, start_from
from anyfit.run import Folder, Run, Seen
from anyfit.state import Position, State, load_weights
from anyfit.tree import clone, leaves
from anyfit.values import Plan

__all__ = ["Event", "Fitting", "OnEvent", "scalars", "signals"]

Event = dict[str, Any]
OnEvent = Callable[[Event], object]


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


class Fitting:
    """One fit, from its beginning or its checkpoint to its result."""

    def __init__(
        self,
        prepared: Prepared,
        folder: Folder | None,
        on_event: OnEvent,
        *,
        resume: bool,
        privacy: ExamplePrivacy | None = None,
        group: Group | None = None,
    ) -> None:
        self.prepared, self.folder, self.resume, self.group = prepared, folder, resume, group
        self._on_event, self.asked = on_event, False
        task, plan = prepared.task, prepared.plan
        self.batches = prepared.batches("train")
        self.validation = prepared.batches("validation") if "validation" in prepared.rows else None
        self.steps_per_epoch = self.batches.steps_per_epoch
        if group is not None:
            group.by_rows = getattr(self.batches, "lengths", None) is None
            group.least = int(task.own_method("train_step"))  # an own loop takes part with a sample at least
            if isinstance(self.batches, Indexed):
                self.batches.ahead = group.next_share
        self.spending = None if privacy is None else self._private(privacy)
        self.total = self._total_steps(plan)
        model = built(task, prepared.schema)
        private = None if self.spending is None else self.spending.steps
        self.trainer = engine.make_trainer(task, model, plan, self.total, prepared.device, private=private, workers=group)
        self.fresh_groups = {
            name: [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for name, optimizer in self.trainer.optimizers.items()
        }
        self.overrides: Mapping[str, Any] = {}  # of the optimizers' options
        self.history: list[Event] = []
        self.losses = Losses()
        self.best: dict[str, Any] | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.bad = 0  # evaluations since the best
        self.stopped: str | None = None
        self.started = self.saved = self.logged = time.monotonic()
        self.logged_step = 0
        self.shards = None if group is None else Shards(group)
        self.apart = False  # whether buffers of ranks differ
        self.members = 1 if group is None else group.size

    @property
    def writes(self) -> Folder | None:
        """The folder at whoever writes it: rank 0, which is another's number when the first one is lost."""
        if self.folder is None or (self.group is not None and self.group.rank != 0):
            return None
        if isinstance(self.folder, Seen):
            assert self.group is not None
            self.folder = self.folder.taken_over(self.history, 4 * self.group.member.timeout_s)
        return self.folder

    def emit(self, event: Event) -> None:
        """Tell an event; who listens may answer "stop"."""
        if (self.group is None or self.group.rank == 0) and self._on_event(event) == "stop":
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
        if self.prepared.plan.max_tokens is not None:
            raise InputError("privacy draws rows, so max_tokens has no meaning beside it; leave it out")
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
        self._check_overrides()
        record = record_of("fit", self.prepared.task, self.trainer.model, self.prepared.plan, self.prepared.schema, self.prepared.device)
        record["data"] = self.prepared.sources
        if self.spending is not None:
            record["privacy"] = self.spending.to_json()
        if self.group is not None and self.group.newcomer:
            self._join()
            record["weights"] = None
        else:
            self._start(record, weights, partial)
        self._override()
        if self.overrides:
            record["optimizer_overrides"] = dict(self.overrides)
        self.record = record
        if self.group is None or not self.group.newcomer:
            self._settled(self._write_record)
        if self.group is not None and self.group.rank != 0:
            return
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

    def _start(self, record: dict[str, Any], weights: Any, partial: bool) -> None:
        """From the last checkpoint where there is one to go on from, else fresh or from other weights."""
        before = None if self.folder is None or not self.resume else self.folder.record()  # before anyone writes a new one
        state = last_state(self.folder) if self.resume and self.folder is not None else None
        if self.group is not None and len(set(self.group.every(lambda: -1 if state is None else state.position.step))) > 1:
            raise StateError(
                f"ranks see other checkpoints in run (={self.folder and str(self.folder.path)!r}); give a path that all nodes share"
            )
        if state is None:
            if weights is not None:
                record["weights"] = start_from(self.trainer.model, weights, partial)
            if self.folder is not None:
                if before is not None:
                    compare(self.folder, before, record)
                self.folder.cut(0)
        else:
            assert self.folder is not None
            if before is None:
                raise StateError(
                    f"run (={str(self.folder.path)!r}) has checkpoints but no run.json; restore it, or start a new run with weights="
                )
            changed = compare(self.folder, before, record)
            self._restore(state, forked=bool(changed))
            changed |= {f"optimizer.{name}": [None, value] for name, value in self.overrides.items()}
            record["forks"] = [*before.get("forks", []), *([{"step": state.position.step, "changed": changed}] if changed else [])]
            record["weights"] = before.get("weights")

    def _write_record(self) -> None:
        if (folder := self.writes) is not None:
            folder.write_record(self.record)
            if self.spending is not None:
                keep_seed(folder, self.spending.steps.seed)

    def _check_overrides(self) -> None:
        for optimizer in self.trainer.optimizers.values():
            unknown = sorted((set(self.overrides) - set(optimizer.param_groups[0])) | ({"params"} & set(self.overrides)))
            if unknown:
                known = ", ".join(name for name in optimizer.param_groups[0] if name != "params")
                raise InputError(f"optimizer_overrides (={unknown[0]!r}) is no option of {type(optimizer).__name__}; it has: {known}")

    def _override(self) -> None:
        """The caller's options of the optimizers; a schedule goes on from the new rate."""
        for optimizer in self.trainer.optimizers.values():
            for group in optimizer.param_groups:
                done = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0
                group.update({name: tuple(value) if isinstance(value, list) else value for name, value in self.overrides.items()})
                if "lr" in self.overrides and "initial_lr" in group:
                    group["initial_lr"], group["lr"] = group["lr"], group["lr"] * done
        if "lr" in self.overrides:
            for name, schedule in self.trainer.schedules.items():
                if not schedule.rebase():
                    raise InputError(
                        f"optimizer_overrides (lr={self.overrides['lr']}) cannot reach the schedule {name!r} (a {type(schedule.scheduler).__name__}), "
                        "which sets rates of its own; give the task another rate"
                    )

    def _join(self) -> None:
        """Into a run that is under way: the state of the others in place of a checkpoint."""
        assert self.group is not None
        state, more = self.group.handed
        progress = dict(state.progress)
        self.best_weights = progress.pop("best_weights")
        self.trainer.restore(state)
        self._progressed(progress)
        self.history = more["history"]

    def _progressed(self, progress: Mapping[str, Any]) -> None:
        """Where a checkpoint or another rank stood."""
        self.best, self.bad, self.stopped = progress["best"], int(progress["bad"]), progress["stopped"]
        self.logged_step = int(progress["logged_step"])
        self.losses.events = [_stepped(item) for item in progress["pending"]]
        if self.trainer.position.step < self.total and self.stopped != "patience":
            self.stopped = None

    def _notices(self) -> Iterator[str]:
        """What a user should know before it starts, some of it from one look at a batch of the evaluation."""
        if self.spending is not None:
            yield (
                f"privacy covers what the weights tell of {self.spending.asked.unit or 'row'}s that are trained on, and nothing else: statistics "
                "that preprocessing is fitted with (means, categories, vocabularies), the loss in the log, all rows and figures of validation "
                "and test, and what is chosen by them are not covered"
            )
        yield from self._dropout_notices()
        task, schema = self.prepared.task, self.prepared.schema
        split = next((name for name in ("validation", "test") if name in self.prepared.rows), None)
        if split is None or isinstance(self.prepared.rows[split], DataLoader | IterableDataset | Stream):
            return
        plain = [name for name, metric in (task.metrics(schema) or {}).items() if not isinstance(metric, Metric)]
        if plain:
            yield f"metric {', '.join(plain)} is a plain function: all outputs and targets are held in memory for it"
        if task.own_method("evaluate"):
            return
        with machine.own_random():
            outputs = engine.glance(task, self.trainer.model, self.prepared.batches(split), self.trainer.autocast())
        if outputs is None:
            yield "the model returns its loss only, so there are no metrics beside it; define predict(self, model, batch) and evaluate_step"

    def _dropout_notices(self) -> Iterator[str]:
        """Which layers draw what a step of one process would not draw."""
        exact = self.prepared.plan.exact_dropout
        if not exact and self.group is None:
            return
        probe = ExactDropout(self.trainer.model, 0)
        names = probe.others if exact else [*probe.names, *probe.others]
        probe.leave()
        few = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        if names and exact:
            yield f"dropout of {few} is of a kind that exact_dropout does not cover: ranks draw their own numbers"
        elif names:
            yield f"dropout of {few}: ranks draw numbers of their own, so the result is as good as that of one process but not equal; exact_dropout=True makes it equal"

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
                if schedule.rebase():
                    continue
                if name in state.schedules:
                    schedule.scheduler.load_state_dict(clone(state.schedules[name]))
        progress = state.progress
        self.history = self.folder.cut(int(progress["metrics_bytes"]))
        self._progressed(progress)
        if self.best is not None and self.prepared.plan.keeps_best:
            if self.best["step"] == state.position.step:
                if self.writes is not None:  # killed between the checkpoint and its second name
                    self.writes.mark_best(self.writes.checkpoints()[-1], state)
                self.best_weights = clone(dict(state.model))
            elif self.folder.best.exists():  # not where a fork asks for the best only now
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
            logs = step % plan.log_every == 0 or last or evaluates
            if logs:
                self._log(event)
            better = self._evaluate(event) if evaluates else False
            asked = self.asked
            if self.group is not None:
                if self.asked:  # all are told with the next step, unless there is a line of the log to agree at
                    self.group.wish("asked")
                asked = bool(self.group.wished("asked")) or (logs and self.group.agree(self.asked))
                if logs:
                    self._compare(self.group)
            if plan.patience is not None and self.bad >= plan.patience:
                self.stopped = "patience"
            elif self._signalled(caught):
                self.stopped = "signal"
            elif spent:
                self._spent(step)
            elif last:
                self.stopped = "finished"
            elif asked:
                self.stopped = "asked"
            if self.stopped is not None:
                self._line({"event": "stop", "step": step, "reason": self.stopped}, kept=self.stopped != "signal")
            if self.stopped or better or event.ends_epoch or self._saving_is_due():
                begun = time.monotonic()
                self._checkpoint(better)
                self.logged += time.monotonic() - begun  # speed is that of steps
            if self.stopped is not None:
                return
            if self.group is not None and not self._settle(self.group):
                self.stopped = "signal"
                return

    def _signalled(self, caught: list[int]) -> bool:
        """Whether a signal ends the run here. Of several ranks, one that was told to go leaves at the end of a step; all go together."""
        group = self.group
        if group is None:
            return bool(caught)
        if caught:
            group.wish("leave")
        return bool(group.wished("stop")) or len(group.wished("leave")) == len(group.told)

    def _saving_is_due(self) -> bool:
        due = time.monotonic() - self.saved > self.prepared.plan.checkpoint_every_s
        if self.group is None:
            return due
        if due and self.group.rank == 0:
            self.group.wish("save")
        return bool(self.group.wished("save"))

    def _compare(self, group: Group) -> None:
        """All ranks must have the same weights. Unlike devices round differently, and some buffers follow each rank's own samples: then
        those of rank 0 are taken.
        """
        model = self.trainer.model
        weights, buffers = group.same(self.trainer.trained, list(model.buffers()))
        if not weights:
            states = [optimizer.state_dict()["state"] for optimizer in self.trainer.optimizers.values()]
            group.align(self.trainer.trained, weights=True)
            group.align([*model.buffers(), *leaves(states)])
        if not buffers:
            group.align(list(model.buffers()))
            if not self.apart:
                text = "buffers of the model follow the samples that each rank has seen; at each line of the log all take those of rank 0"
                self.emit({"event": "notice", "text": text})
            self.apart = True

    def _settle(self, group: Group) -> bool:
        """Between two steps: ranks leave and join. Whether this one goes on."""
        if group.member.number in group.wished("leave"):
            return False
        if (group.wished("leave") or group.wished("join")) and self._regrouped(group) and group.rank == 0:
            progress = {**self._progress(), "best_weights": self.best_weights}
            group.hand_over(self.trainer.snapshot(self.prepared.schema.to_json(), progress), {"history": self.history})
        if group.size != self.members:
            what = f"{self.members - group.size} lost" if group.size < self.members else f"{group.size - self.members} joined"
            self.emit({"event": "notice", "text": f"ranks: {what}; {group.size} go on from step {self.trainer.position.step}"})
            self.members = group.size
        return True

    def _regrouped(self, group: Group) -> bool:
        """Meet anew between two steps; whether somebody joined. A checkpoint that is being written is finished by those who began it."""
        if self.shards is not None:
            self.shards.finish()
        return group.regroup()

    def _told(self) -> None:
        """Notices of the steps, and of checkpoints that ranks have finished."""
        while self.trainer.notices:
            self.emit({"event": "notice", "text": self.trainer.notices.pop(0)})
        while self.shards is not None and self.shards.written:
            step = self.shards.written.pop(0)
            assert self.folder is not None
            self.emit({"event": "checkpoint", "step": step, "path": str(self.folder.checkpoint_path(step, sharded=True))})
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
            folder = self.writes  # first: who becomes the writer writes the history as it is
            self.history.append(event)
            if folder is not None:
                folder.line(event)
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
        rows = getattr(self.batches, "step_size", 0)
        if self.spending is not None:
            rows = self.spending.steps.sampling_rate * (self.batches.rows or 0)
        timing = {
            "step": event.position.step,
            "seconds": now - self.logged,
            "samples_per_s": steps * rows / max(now - self.logged, 1e-9),
        }
        if self.group is not None:
            timing |= self.group.report()
        if (folder := self.writes) is not None:
            folder.timing(timing)
        self.logged, self.logged_step = now, event.position.step
        if self.group is not None:
            self.emit({"event": "ranks", **timing})
        self._line({**line, "logs": logs} if logs else line)

    def _evaluate(self, event: Stepped) -> bool:
        """Evaluate on the validation rows; whether it is the best so far."""
        assert self.validation is not None
        plan = self.prepared.plan
        begun = time.monotonic()
        figures = self._figures(self.validation)
        loss = figures["loss"]
        if loss is None or not abs(loss) < float("inf"):
            raise NonFinite(
                f"validation loss (={loss}) is not finite after step {event.position.step}; lower the learning rate. The last checkpoint is untouched."
            )
        for schedule in self.trainer.schedules.values():
            if schedule.every == "evaluation":
                schedule.advance(loss)
        settled = event.position.step >= self.prepared.task.settles() * self.total
        better = settled and (self.best is None or loss < self.best["loss"] - plan.min_delta)
        self.bad = 0 if better or not settled else self.bad + 1
        if better:
            self.best = {"step": event.position.step, **scalars(figures)}
            if plan.keeps_best:
                self.best_weights = clone(dict(self.trainer.model.state_dict()))
        if self.folder is not None:
            seconds = time.monotonic() - begun
            if (folder := self.writes) is not None:
                folder.timing({"event": "evaluate", "split": "validation", "step": event.position.step, "seconds": seconds})
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

    def _figures(self, batches: data.Batches) -> dict[str, Any]:
        task, model, autocast = self.prepared.task, self.trainer.model, self.trainer.autocast
        if self.group is None:
            return engine.evaluate(task, model, batches, autocast())
        return figures_of(self.group, task, model, batches, autocast)

    def _snapshot(self) -> State:
        return self.trainer.snapshot(self.prepared.schema.to_json(), self._progress())

    def _folder(self) -> tuple[Folder, bool]:
        """The folder, and whether this rank is the one that writes it."""
        writes = self.writes is not None
        assert self.folder is not None
        return self.folder, writes

    def _progress(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "bad": self.bad,
            "stopped": self.stopped,
            "logged_step": self.logged_step,
            "metrics_bytes": 0 if self.writes is None else self.writes.metrics_bytes(),
            "pending": [_pending(event) for event in self.losses.events],
        }

    def _checkpoint(self, better: bool) -> None:
        events, self.losses.events = self.losses.events, list(self.losses.events)
        self.losses.read()  # a loss that is not finite must never reach a checkpoint
        self.losses.events = events
        self.saved = time.monotonic()
        if self.folder is None:
            return
        if self.shards is not None:
            if self.stopped is None:
                self.shards.save(self.folder, self._snapshot(), better, writes=self.writes is not None)
            else:
                self.shards.save_last(self._folder, self._snapshot, better)
            return
        path = self.folder.checkpoint_path(self.trainer.position.step)
        self._snapshot().save(path)
        if better:
            self.folder.mark_best(path)
        self.folder.keep()
        self.emit({"event": "checkpoint", "step": self.trainer.position.step, "path": str(path)})

    def end(self, caught: list[int]) -> Run:
        """Final figures, with the best weights where a best is kept."""
        prepared, trainer = self.prepared, self.trainer
        if self.shards is not None:
            self.shards.finish()
        self._told()
        state = self._snapshot()
        if self.best_weights is not None:
            engine.load_model(trainer.model, self.best_weights)
        splits: dict[str, Any] = {}
        if self.stopped != "signal":
            for split in ("validation", "test"):
                if split in prepared.rows:
                    splits[split] = self._figures(prepared.batches(split))
                    if split == "test":
                        self.emit({"event": "evaluate", "step": trainer.position.step, "split": "test", **scalars(splits[split])})
        seconds = time.monotonic() - self.started
        result = {
            "stopped": self.stopped or "finished",
            "signal": self._signal(caught) if self.stopped == "signal" else None,
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
        if self.group is not None:
            result["ranks"] = self.group.size
        if self.stopped != "signal":
            self._settled(lambda: self._finish(result))
        return Run(
            prepared.task, trainer.model, state, self.record, self.history, result, None if self.folder is None else self.folder.path
        )

    def _settled(self, write: Callable[[], object]) -> None:
        """Write what only some ranks write."""
        if self.group is None:
            write()
        else:
            self.group.settle(write)

    def _finish(self, result: Mapping[str, Any]) -> None:
        if (folder := self.writes) is None:
            return
        folder.finish(result)
        if self.spending is not None and self.stopped != "asked":
            forget_seed(folder)

    def _signal(self, caught: list[int]) -> int | None:
        if caught or self.group is None:
            return caught[0] if caught else None
        return self.group.member.stopped_by()


def scalars(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures that are single numbers."""
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
