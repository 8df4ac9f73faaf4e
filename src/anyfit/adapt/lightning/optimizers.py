"""What configure_optimizers may return, as one optimizer and its schedules."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from anyfit.errors import TaskError
from anyfit.schedule import Schedule

if TYPE_CHECKING:
    from anyfit.adapt.lightning.task import Notes

__all__ = ["configured", "spelled"]


class _Watching:
    """A scheduler that steps with a figure of the last evaluation."""

    def __init__(self, scheduler: Any, monitor: str, strict: bool, notes: Notes) -> None:
        self.scheduler, self.monitor, self.strict, self.notes = scheduler, monitor, strict, notes
        self.state_dict, self.load_state_dict = scheduler.state_dict, scheduler.load_state_dict

    def step(self) -> None:
        known = {name: figure for name, figure in self.notes.figures.items() if isinstance(figure, int | float)}
        if self.monitor in known:
            self.scheduler.step(known[self.monitor])
        elif self.strict:
            raise TaskError(f"monitor (={self.monitor!r}) of the scheduler is no figure of the evaluation; there are: {', '.join(known)}")


class _Beside:
    """A second scheduler of one optimizer; the first alone has the first rates that a changed resume sets anew."""

    def __init__(self, scheduler: Any) -> None:
        self.step, self.state_dict, self.load_state_dict = scheduler.step, scheduler.state_dict, scheduler.load_state_dict


def configured(given: Any, name: str, notes: Notes) -> tuple[Optimizer, dict[str, Schedule]]:
    """The one optimizer and the schedules of any form that configure_optimizers may return."""
    where = f"configure_optimizers of {name}"
    optimizers: Any = given
    schedulers: Any = []
    monitor = None
    if isinstance(given, list | tuple) and len(given) == 1 and isinstance(given[0], Mapping):
        given = given[0]
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - {"optimizer", "lr_scheduler", "monitor"})
        if unknown or "optimizer" not in given:
            what = f"the key {unknown[0]!r}" if unknown else "no key 'optimizer'"
            raise TaskError(f"{where} gives a dict with {what}; its keys are optimizer, lr_scheduler and monitor")
        optimizers, schedulers, monitor = (
            given["optimizer"],
            [given["lr_scheduler"]] if "lr_scheduler" in given else [],
            given.get("monitor"),
        )
    elif isinstance(given, list | tuple) and len(given) == 2 and isinstance(given[0], list):
        optimizers, schedulers = given[0], given[1] if isinstance(given[1], list | tuple) else [given[1]]
    optimizers = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
    if len(optimizers) != 1:
        raise TaskError(
            f"{where} gives {len(optimizers)} optimizers; automatic optimization takes one, in Lightning 2 too. Use one with parameter "
            "groups, or write an anyfit.Task with several"
        )
    (optimizer,) = optimizers
    if not isinstance(optimizer, Optimizer):
        raise TaskError(f"{where} gives {spelled(optimizer)}; return a torch optimizer, alone, in a list or in a dict with 'optimizer'")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TaskError(f"{where} gives {type(optimizer).__name__}, whose step needs a closure; use an optimizer that takes one gradient")
    names = ["main", *(f"main{number}" for number in range(2, len(schedulers) + 1))]
    made = [_schedule(each, monitor, where, optimizer, notes) for each in schedulers]
    beside = [each if index == 0 else Schedule(_Beside(each.scheduler), each.every) for index, each in enumerate(made)]
    return optimizer, dict(zip(names, beside, strict=False))


def _schedule(given: Any, monitor: str | None, where: str, optimizer: Optimizer, notes: Notes) -> Schedule:
    options = dict(given) if isinstance(given, Mapping) else {"scheduler": given, "monitor": monitor}
    unknown = sorted(set(options) - {"scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau"})
    if unknown:
        raise TaskError(f"{where} gives a scheduler with the key {unknown[0]!r}, which is not known; leave it out")
    scheduler, interval = options.get("scheduler"), options.get("interval", "epoch")
    if not all(hasattr(scheduler, name) for name in ("step", "state_dict", "load_state_dict")):
        raise TaskError(f"{where} gives {spelled(scheduler)} as scheduler; it needs step, state_dict and load_state_dict")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise TaskError(f"{where} gives a {type(scheduler).__name__} of another optimizer; make it with the one that is returned")
    if interval not in ("step", "epoch"):
        raise TaskError(f"interval (={interval!r}) of the scheduler in {where} must be 'step' or 'epoch'")
    if options.get("frequency", 1) != 1:
        raise TaskError(
            f"frequency (={options['frequency']!r}) of the scheduler in {where} must be 1; anyfit steps it after every {interval}, so put "
            "the frequency into the scheduler"
        )
    if not options.get("reduce_on_plateau", isinstance(scheduler, ReduceLROnPlateau)):
        return Schedule(scheduler, interval)
    if interval == "step":
        raise TaskError(f"interval (='step') of the {type(scheduler).__name__} in {where} cannot be; it steps after each evaluation")
    if options.get("monitor") is None:
        raise TaskError(f"{where} gives a {type(scheduler).__name__} without monitor; name the figure that it watches, as 'val_loss'")
    return Schedule(_Watching(scheduler, options["monitor"], options.get("strict", True), notes), "evaluation")


def spelled(value: Any) -> str:
    """What a value is, for an error."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
