"""The events of `anyfit.fit` as transformers' callbacks know them: their order, the state and control, the lines of the log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyfit.adapt.huggingface.arguments import Timetable, theirs
from anyfit.adapt.huggingface.task import RESERVED, Figures
from anyfit.errors import InputError
from anyfit.schedule import Factor
from anyfit.values import parse

if TYPE_CHECKING:
    from anyfit.adapt.huggingface.trainer import Trainer

__all__ = ["Events", "named"]

UNUSED = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")  # the engine has no such moments

log = logging.getLogger(__name__)


def _overrides(callback: Any, name: str) -> bool:
    """Whether a callback does something at an event; the class that all inherit does nothing."""
    base = next((base for base in type(callback).__mro__ if name in vars(base)), None)
    return base is not None and base.__name__ != "TrainerCallback"


def named(figures: Figures, started: float, prefix: str, batch_size: int) -> Figures:
    """Figures under transformers' names."""
    shown = {name: value for name, value in figures.items() if name != "rows" and not (name == "loss" and value is None)}
    result = {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in shown.items()}
    rows = figures["rows"]
    return {**result, **theirs(".trainer_utils", "speed_metrics")(prefix, started, rows, -(-rows // batch_size))}


class Events:
    """What is told of one training after the other, by transformers' own CallbackHandler."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.times = trainer, Timetable()
        self.state = theirs(".trainer_callback", "TrainerState")()
        self.control = theirs(".trainer_callback", "TrainerControl")()
        self._flow = theirs(".trainer_callback", "DefaultFlowCallback")
        self.handler = theirs(".trainer_callback", "CallbackHandler")([self._flow], trainer.model, trainer.processing_class, None, None)
        self.handler.callbacks.clear()  # it warns without that one; the plan itself does what it is for
        self._forget()

    def _forget(self) -> None:
        self.first_step = self.told = 0  # steps whose loss an event has told
        self._losses: list[tuple[float, int]] = []  # mean losses since the last line of the log, and of how many steps
        self.total_loss = 0.0
        self._in_epoch = self._stopped = False
        self.measured: tuple[Figures, float] | None = None  # an evaluation and its start, whose event is to come
        self._figures: tuple[int, Figures] | None = None  # those of the weights with which the training will end, and their step

    def add(self, callback: Any) -> None:
        """A callback, or a class of one."""
        callback = callback() if isinstance(callback, type) else callback
        for name in UNUSED:
            if _overrides(callback, name):
                raise InputError(
                    f"callback {type(callback).__name__}.{name} has no place here; write an anyfit.Task with a train_step of its own"
                )
        if not isinstance(callback, self._flow):
            self.handler.add_callback(callback)

    def waiting(self, event: str) -> list[str]:
        """The callbacks that do something at an event."""
        return [type(callback).__name__ for callback in self.handler.callbacks if _overrides(callback, event)]

    def call(self, event: str, **more: Any) -> None:
        """One event for all callbacks."""
        handler, trainer = self.handler, self.trainer
        handler.optimizer, handler.lr_scheduler, handler.eval_dataloader = trainer.optimizer, trainer.lr_scheduler, trainer.loader
        self.control = handler.call_event(event, trainer.args, self.state, self.control, **more)
        self.control.should_save = False  # checkpoints are written without being asked for
        for name in ("should_evaluate", "should_log", "should_epoch_stop"):
            if getattr(self.control, name):
                raise InputError(
                    f"callback {', '.join(self.waiting(event))} set control.{name} in {event}, which cannot be honoured; say it with eval_steps, "
                    "logging_steps or control.should_training_stop"
                )

    def log(self, logs: Figures) -> None:
        """A line of the log, under transformers' names."""
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.call("on_log", logs=logs)

    def evaluated(self, metrics: Figures) -> None:
        """Figures of an evaluation, into the log and to the callbacks."""
        self.log(metrics)
        self.call("on_evaluate", metrics=metrics)

    def begin(self, times: Timetable) -> None:
        """A new training."""
        self._forget()
        args, self.times = self.trainer.args, times
        self.state = theirs(".trainer_callback", "TrainerState")(
            max_steps=times.total,
            num_train_epochs=math.ceil(times.total / times.per_epoch) if times.per_epoch else 1,
            train_batch_size=args.train_batch_size,
            logging_steps=times.log_every or args.logging_steps,
            eval_steps=times.evaluate_every or args.eval_steps,
        )
        self.control.should_training_stop = False

    def hear(self, event: Mapping[str, Any]) -> str | None:
        """An event of `fit`; the answer "stop" ends the training after it."""
        kind = event["event"]
        if kind == "notice":
            log.warning("%s", event["text"])
        elif kind == "start":
            if event["step"]:
                self._replay(Path(self.trainer.args.output_dir) / "metrics.jsonl")
            self.first_step = self.told = self.state.global_step = int(event["step"])
            self.total_loss = 0.0
            self.call("on_train_begin")
        elif kind == "step":
            self._stepped(event)
        elif kind == "evaluate" and event["split"] == "validation":
            self._validated(event)
        elif kind == "checkpoint":
            self.call("on_save")
        elif kind == "stop":
            self._stopped = event["reason"] != "signal"
        return "stop" if self.control.should_training_stop else None

    def _replay(self, path: Path) -> None:
        """Log and best of a run that goes on, from its record. Of the callbacks only an early stop has to know."""
        callbacks = self.handler.callbacks
        self.handler.callbacks = [one for one in callbacks if type(one).__name__ == "EarlyStoppingCallback"]
        for line in path.read_bytes().splitlines():
            event = parse(line, str(path))
            if event["event"] in ("step", "evaluate"):
                self.hear(event)
        self.handler.callbacks = callbacks
        self.control.should_training_stop = self._in_epoch = False

    def before_step(self, step: int, offset: int) -> None:
        """The task is about to take a step."""
        self.state.global_step = step
        if offset == 0 or not self._in_epoch:
            self._in_epoch, self.state.epoch = True, self.times.epoch(step)
            self.call("on_epoch_begin")
        self.call("on_step_begin")

    def _stepped(self, event: Mapping[str, Any]) -> None:
        step, loss, times = int(event["step"]), float(event["loss"]), self.times
        self._losses.append((loss, step - self.told))
        self.total_loss += loss * (step - self.told)
        self.told = self.state.global_step = step
        self.state.epoch = times.epoch(step)
        self.call("on_step_end")
        if times.log_epochs and times.ends_epoch(step):
            self.end_epoch()
        if times.logs(step):
            steps = sum(count for _, count in self._losses)
            mean = sum(value * count for value, count in self._losses) / max(steps, 1)
            self._losses = []
            self.log({"loss": mean, "learning_rate": self._rate(step, float(event["lr"]))})
        if times.ends_epoch(step) and not times.evaluates_by_step(step):
            self.end_epoch()

    def end_epoch(self) -> None:
        """The end of an epoch, unless it was told already."""
        if self._in_epoch:
            self._in_epoch = False
            self.call("on_epoch_end")

    def _rate(self, step: int, now: float) -> float:
        """The rate that a step was taken with; an event tells that of the next one."""
        scheduler = self.trainer.lr_scheduler
        return scheduler.rates[0] * scheduler.factor(step - 1) if isinstance(scheduler, Factor) else now

    def _validated(self, event: Mapping[str, Any]) -> None:
        args, state, step = self.trainer.args, self.state, int(event["step"])
        state.global_step, state.epoch = step, self.times.epoch(step)
        if self.measured is None:  # of an earlier process
            figures = {name: value for name, value in event.items() if name not in RESERVED - {"loss", "rows"}}
            started = time.time()
        else:
            (figures, started), self.measured = self.measured, None
            if event["best"] or not args.load_best_model_at_end:
                self._figures = (step, figures)
        self.evaluated(named(figures, started, "eval", args.eval_batch_size))
        if args.metric_for_best_model is not None and (state.best_metric is None or figures["loss"] < state.best_metric):
            state.best_metric, state.best_global_step = figures["loss"], step
            if args.load_best_model_at_end:
                state.best_model_checkpoint = str(Path(args.output_dir) / "checkpoints" / "best.safetensors")
        if self.times.ends_epoch(step):
            self.end_epoch()

    def known(self) -> Figures | None:
        """Figures of the weights that a training has ended with, where this process measured them."""
        if not self._stopped or self._figures is None:
            return None
        step, figures = self._figures
        return figures if self.trainer.args.load_best_model_at_end or step == self.state.global_step else None
