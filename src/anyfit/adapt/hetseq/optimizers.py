"""HetSeq's optimizers and schedulers: classes of a user's own, or what HetSeq makes of its options where none are given."""

from __future__ import annotations

import argparse
import ast
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anyfit.errors import TaskError
from anyfit.schedule import Factor, Schedule

__all__ = ["build_optimizer", "build_schedules", "defined", "polynomial_decay"]

# What HetSeq's controller calls on an optimizer, and anyfit's engine does itself.
ENGINE = ("backward", "multiply_grads", "clip_grad_norm", "step", "zero_grad")


def polynomial_decay(
    optimizer: Optimizer,
    *,
    total_num_update: int = 1_000_000,
    warmup_updates: int = 0,
    end_learning_rate: float = 0.0,
    power: float = 1.0,
) -> Schedule:
    """HetSeq's PolynomialDecayScheduler: linear up over `warmup_updates` steps, the first at rate 0, then down to `end_learning_rate`.

    Where a share of all steps is what is known, `anyfit.schedule.polynomial` has it.
    """

    def factor(step: int) -> float:
        first = float(optimizer.param_groups[0]["initial_lr"])
        end = end_learning_rate / first if first else 0.0  # what is scaled is the first rate
        if warmup_updates > 0 and step <= warmup_updates:
            return step / warmup_updates
        if step >= total_num_update:
            return end
        return float((1.0 - end) * (1 - (step - warmup_updates) / (total_num_update - warmup_updates)) ** power + end)

    return Schedule(Factor(optimizer, factor))


def build_optimizer(cls: Any, args: argparse.Namespace, model: nn.Module) -> Optimizer | None:
    """The torch optimizer of a HetSeq optimizer class; without one, of the options; None where those give no rate."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TaskError("the model has no parameter that trains; leave requires_grad on for at least one")
    if cls is None:
        return _by_options(args, parameters)
    if found := [] if issubclass(cls, Optimizer) else defined(cls, ENGINE, alone=False):
        raise TaskError(
            f"{cls.__name__} overrides {', '.join(found)}, which the engine does itself: it adds up gradients, divides, clips and steps. Put "
            "what it does into the step of a torch.optim.Optimizer, or write an anyfit.Task with a train_step of its own"
        )
    given = cls(args, parameters)
    if isinstance(given, Optimizer):
        return given
    optimizer = vars(given).get("_optimizer")
    if optimizer is None and not isinstance(getattr(cls, "optimizer", None), property):  # HetSeq's own property wants _optimizer
        optimizer = getattr(given, "optimizer", None)
    if not isinstance(optimizer, Optimizer):
        raise TaskError(f"{cls.__name__}(args, params) holds no torch optimizer; keep one as self._optimizer")
    optimizer._anyfit_hetseq = given  # type: ignore[attr-defined]  # build_schedule is given nothing but the optimizer
    return optimizer


def _by_options(args: argparse.Namespace, parameters: list[nn.Parameter]) -> Optimizer | None:
    """What HetSeq's `--optimizer` names: `adam` decays weights as AdamW does."""
    if getattr(args, "lr", None) is None:
        return None
    name = getattr(args, "optimizer", "adam")
    if name == "adam":
        return torch.optim.AdamW(
            parameters,
            lr=_first_rate(args),
            betas=_pair(getattr(args, "adam_betas", (0.9, 0.999))),
            eps=float(getattr(args, "adam_eps", 1e-8)),
            weight_decay=float(getattr(args, "weight_decay", 0.0)),
            fused=all(parameter.is_floating_point() for parameter in parameters),
        )
    if name == "adadelta":
        return torch.optim.Adadelta(
            parameters,
            lr=_first_rate(args),
            rho=float(getattr(args, "adadelta_rho", 0.9)),
            eps=float(getattr(args, "adadelta_eps", 1e-6)),
            weight_decay=float(getattr(args, "dadelta_weight_decay", 0.0)),
        )
    raise TaskError(f"args.optimizer (={name!r}) must be 'adam' or 'adadelta'; pass another as optimizer=, a class of (args, params)")


def _first_rate(args: argparse.Namespace) -> float:
    rates = args.lr if isinstance(args.lr, list | tuple) else [args.lr]
    try:
        return float(rates[0])
    except (IndexError, TypeError, ValueError) as error:
        raise TaskError(f"args.lr (={args.lr!r}) must be a number, or a list of them") from error


def _pair(value: Any) -> tuple[float, float]:
    """HetSeq spells Adam's betas as text."""
    try:
        one, two = ast.literal_eval(value) if isinstance(value, str) else value
        return float(one), float(two)
    except (SyntaxError, TypeError, ValueError) as error:
        raise TaskError(f"args.adam_betas (={value!r}) must be two numbers, e.g. (0.9, 0.999)") from error


def build_schedules(
    cls: Any, args: argparse.Namespace, optimizer: Optimizer, updated: Callable[[int], object] | None
) -> dict[str, Schedule]:
    """The schedules of a HetSeq scheduler class; without one, of the options. `updated` hears of the number of steps after each."""
    if cls is None:
        decay = _decay_by_options(args, optimizer)
        found = {} if decay is None else {"main": decay}
        return found if updated is None else {**found, "updates": Schedule(_Updates(_Nothing(), updated))}
    absent = [name for name in ("step", "step_update") if not callable(getattr(cls, name, None))]
    if absent:
        raise TaskError(f"{cls.__name__} defines no {absent[0]}; a HetSeq scheduler has step(epoch, val_loss) and step_update(num_updates)")
    holder = getattr(optimizer, "_anyfit_hetseq", None)
    try:
        scheduler = cls(args, holder or _Holder(args, optimizer))
    except ValueError as error:
        if holder is not None:
            raise
        raise TaskError(
            f"{cls.__name__}(args, optimizer) wants an optimizer class of its own ({error}); pass that as optimizer= too"
        ) from error
    updates = _Updates(scheduler, updated)
    return {"main": Schedule(updates), "epochs": Schedule(_Epochs(updates), "epoch")}


def _decay_by_options(args: argparse.Namespace, optimizer: Optimizer) -> Schedule | None:
    name = getattr(args, "lr_scheduler", None)
    if name not in (None, "PolynomialDecayScheduler"):
        raise TaskError(
            f"args.lr_scheduler (={name!r}) must be 'PolynomialDecayScheduler'; pass another as scheduler=, a class of (args, optimizer)"
        )
    if getattr(args, "lr", None) is None or (name is None and getattr(args, "total_num_update", None) is None):
        return None
    if isinstance(args.lr, list | tuple) and len(args.lr) > 1:
        raise TaskError(f"args.lr (={args.lr!r}) changes with the epoch; give one rate, or the scheduler class as scheduler=")
    if getattr(args, "force_anneal", None) is not None:
        raise TaskError(f"args.force_anneal (={args.force_anneal!r}) needs the scheduler class; pass it as scheduler=, or leave it out")
    names = ("total_num_update", "warmup_updates", "end_learning_rate", "power")
    return polynomial_decay(optimizer, **{name: value for name in names if (value := getattr(args, name, None)) is not None})


class _Holder:
    """What HetSeq's schedulers ask an optimizer, where no optimizer class was given."""

    def __init__(self, args: argparse.Namespace, optimizer: Optimizer) -> None:
        self.args, self.optimizer = args, optimizer

    @property
    def params(self) -> Iterator[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def get_lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr


class _Nothing:
    """No scheduler."""

    def step(self, epoch: int, val_loss: float | None = None) -> None: ...

    def step_update(self, num_updates: int) -> None: ...


class _Updates:
    """A HetSeq scheduler, told of the number of steps after each one. Its plain attributes that have changed are in a checkpoint, beside
    its own state_dict, so that a resume goes on where it was while a changed option counts.
    """

    def __init__(self, scheduler: Any, updated: Callable[[int], object] | None) -> None:
        self.scheduler, self.updated, self.updates, self.epochs = scheduler, updated, 0, 0
        self.fresh = copy.deepcopy(_plain(scheduler))
        scheduler.step(0, None)  # HetSeq begins so
        scheduler.step_update(0)

    def step(self) -> None:
        self.updates += 1
        self.scheduler.step_update(self.updates)
        if self.updated is not None:
            self.updated(self.updates)

    def end_epoch(self) -> None:
        """HetSeq gives no validation loss either, and prefers the rate of the step."""
        self.epochs += 1
        self.scheduler.step(self.epochs, None)
        self.scheduler.step_update(self.updates)

    def state_dict(self) -> dict[str, Any]:
        own = self.scheduler.state_dict() if hasattr(self.scheduler, "state_dict") else {}
        changed = {name: value for name, value in _plain(self.scheduler).items() if name not in self.fresh or self.fresh[name] != value}
        return {"updates": self.updates, "epochs": self.epochs, "own": own, "changed": changed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates, self.epochs = int(state["updates"]), int(state["epochs"])
        if hasattr(self.scheduler, "load_state_dict"):
            self.scheduler.load_state_dict(state["own"])
        for name, value in state["changed"].items():
            setattr(self.scheduler, name, value)
        self.scheduler.step_update(self.updates)


class _Epochs:
    """The ends of epochs, for the same scheduler."""

    def __init__(self, updates: _Updates) -> None:
        self.updates = updates

    def step(self) -> None:
        self.updates.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The other schedule holds all there is."""


def _plain(scheduler: Any) -> dict[str, Any]:
    """Attributes that are JSON values."""
    return {name: value for name, value in getattr(scheduler, "__dict__", {}).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def defined(cls: type, names: tuple[str, ...], *, alone: bool) -> list[str]:
    """Which of these a class defines itself, rather than the base that all of its kind share (HetSeq's Task, say).

    `alone`: whether those of a class without any base count.
    """
    lineage = [base for base in cls.__mro__ if base.__module__ not in ("abc", "builtins", "typing")]
    own = lineage[:-1] or (lineage if alone else [])
    return [name for name in names if any(name in vars(base) for base in own)]
