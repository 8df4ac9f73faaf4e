"""Learning-rate schedules: pure functions of the step that scale each group's first rate, and a wrapper for torch's own.

`Schedule(scheduler, every)` tells when `scheduler.step` is called: after each step, epoch or evaluation (with its loss).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from anyfit.errors import InputError

__all__ = ["Factor", "Schedule", "constant", "cosine", "linear", "plateau", "polynomial", "step_decay"]


class Scheduler(Protocol):
    """What torch's schedulers have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """A scheduler and when it steps."""

    scheduler: Any
    every: Literal["step", "epoch", "evaluation"] = "step"

    def __post_init__(self) -> None:
        if self.every not in ("step", "epoch", "evaluation"):
            raise InputError(f"every (={self.every!r}) must be 'step', 'epoch' or 'evaluation'")

    def advance(self, loss: float | None = None) -> None:
        """Step the scheduler; one that watches a loss (torch's plateau) is given it."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if loss is not None:
                self.scheduler.step(loss)
        else:
            self.scheduler.step()

    def rebase(self) -> bool:
        """Go on from the optimizer's first rates, which have changed; whether this scheduler can."""
        if isinstance(self.scheduler, Factor):
            self.scheduler.rates = [float(group.get("initial_lr", group["lr"])) for group in self.scheduler.optimizer.param_groups]
            self.scheduler.load_state_dict(self.scheduler.state_dict())
        elif hasattr(self.scheduler, "base_lrs"):
            self.scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in self.scheduler.optimizer.param_groups]
        else:
            return False
        return True

    def skip(self, count: int) -> None:
        """Go `count` times further at once."""
        if isinstance(self.scheduler, Factor):
            self.scheduler.load_state_dict({"count": self.scheduler.count + count})
        else:
            with warnings.catch_warnings():  # torch warns of steps before the optimizer's first; those were taken elsewhere
                warnings.simplefilter("ignore", UserWarning)
                for _ in range(count):
                    self.advance()


class Factor:
    """Sets each group's rate to its first one times `factor(step)`: a pure function, so a resume needs one number."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.optimizer, self.factor, self.count = optimizer, factor, 0
        self.rates = [float(group.setdefault("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self._set()

    def _set(self) -> None:
        scale = self.factor(self.count)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale

    def step(self) -> None:
        """One step further."""
        self.count += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; the rates themselves come from the optimizer, so a resume may change them."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` stands."""
        self.count = int(state["count"])
        self._set()


def constant(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.0) -> Schedule:
    """The first rate throughout, after a linear warm-up over the share `warmup` of all steps."""
    return _warmed(optimizer, total_steps, warmup, lambda progress: 1.0)


def linear(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.0, end: float = 0.0) -> Schedule:
    """Straight down to `end` times the first rate."""
    return _warmed(optimizer, total_steps, warmup, lambda progress: 1.0 + (end - 1.0) * progress)


def polynomial(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.0, end: float = 0.0, power: float = 1.0) -> Schedule:
    """Polynomial decay to `end` times the first rate (as HetSeq and fairseq have it)."""
    return _warmed(optimizer, total_steps, warmup, lambda progress: end + (1.0 - end) * (1.0 - progress) ** power)


def cosine(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.0, end: float = 0.0) -> Schedule:
    """Half a cosine down to `end` times the first rate (Loshchilov and Hutter 2017, without restarts)."""
    return _warmed(optimizer, total_steps, warmup, lambda progress: end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def step_decay(optimizer: Optimizer, size: int, *, gamma: float = 0.1, every: Literal["step", "epoch", "evaluation"] = "epoch") -> Schedule:
    """Times `gamma` after each `size` epochs, steps or evaluations."""
    if size < 1:
        raise InputError(f"size (={size}) must be at least 1")
    return Schedule(Factor(optimizer, lambda count: gamma ** (count // size)), every)


def plateau(optimizer: Optimizer, *, factor: float = 0.1, patience: int = 10, min_lr: float = 0.0) -> Schedule:
    """Times `factor` when the validation loss has not fallen for `patience` evaluations (torch's ReduceLROnPlateau)."""
    return Schedule(ReduceLROnPlateau(optimizer, factor=factor, patience=patience, min_lr=min_lr), "evaluation")


def _warmed(optimizer: Optimizer, total_steps: int, warmup: float, shape: Callable[[float], float]) -> Schedule:
    if not 0.0 <= warmup < 1.0:
        raise InputError(f"warmup (={warmup}) must be a share of all steps, from 0 to below 1")
    rising = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return shape(min(1.0, (step - rising) / max(1, total_steps - rising)))

    return Schedule(Factor(optimizer, factor))
