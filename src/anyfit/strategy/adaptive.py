"""Adaptive optimizers where updates are added: the mean change of a round is their gradient (Reddi et al. 2021)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.strategy.averaging import FedAvg
from anyfit.strategy.base import WEIGHTS, Server, below_one, positive
from anyfit.update import Update

__all__ = ["FedAdagrad", "FedAdam", "FedYogi"]


@dataclass(frozen=True, kw_only=True)
class Adaptive(FedAvg):
    """What the three share: first moment, and a step scaled by the root of the second. `tau` bounds how far it adapts."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "tau")
        below_one(self, "beta1", "beta2")

    @abstractmethod
    def second(self, before: Tensor, squares: Tensor) -> Tensor:
        """The second moment."""

    def finish(self, server: Server, total: Update) -> Tensor:
        delta = total.mean(WEIGHTS)[WEIGHTS]
        first = self.beta1 * server.kept("first") + (1 - self.beta1) * delta
        second = self.second(server.kept("second", self.tau**2), delta * delta)
        server.memory |= {"first": first, "second": second}
        return server.weights + self.lr * first / (second.sqrt() + self.tau)


@dataclass(frozen=True, kw_only=True)
class FedAdam(Adaptive):
    """Adam on the mean changes (algorithm 2 of the paper, without bias correction)."""

    def second(self, before: Tensor, squares: Tensor) -> Tensor:
        return self.beta2 * before + (1 - self.beta2) * squares


@dataclass(frozen=True, kw_only=True)
class FedYogi(Adaptive):
    """Yogi on the mean changes: a second moment that falls slowly."""

    def second(self, before: Tensor, squares: Tensor) -> Tensor:
        return before - (1 - self.beta2) * squares * torch.sign(before - squares)


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Adaptive):
    """Adagrad on the mean changes; the paper's experiments have no first moment here."""

    beta1: float = 0.0

    def second(self, before: Tensor, squares: Tensor) -> Tensor:
        return before + squares
