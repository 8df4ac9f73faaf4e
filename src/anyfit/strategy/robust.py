"""Strategies for sites that may send anything: they need each update, count every site the same, and bear a share of liars."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from anyfit.errors import InputError
from anyfit.guard import LOSS
from anyfit.strategy.averaging import FedAvg
from anyfit.strategy.base import WEIGHTS
from anyfit.update import Total, Update

__all__ = ["FedMedian", "Krum", "TrimmedMean"]


@dataclass(frozen=True, kw_only=True)
class Robust(FedAvg):
    """What the three share: the sites' mean changes as rows (n, P), of which one is made."""

    needs: ClassVar[Literal["sum", "each"]] = "each"

    @abstractmethod
    def one(self, changes: Tensor) -> Tensor:
        """(n, P) -> (P,)."""

    def combine(self, updates: Sequence[Update]) -> Update:
        losses = Total()
        for update in updates:
            losses.add(Update({LOSS: update.groups[LOSS]} if LOSS in update else {}))
        changes = torch.stack([update.mean(WEIGHTS)[WEIGHTS] for update in updates])
        return losses.update().joined(Update.of(WEIGHTS, {WEIGHTS: self.one(changes)}, 1.0))


@dataclass(frozen=True, kw_only=True)
class FedMedian(Robust):
    """The median of each coordinate; the mean of the middle two where their number is even (Yin et al. 2018)."""

    def one(self, changes: Tensor) -> Tensor:
        ordered, middle = changes.sort(0).values, len(changes) // 2
        return ordered[middle] if len(changes) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(Robust):
    """The mean of each coordinate without the share `trim` of the largest and of the smallest, rounded up (Yin et al. 2018)."""

    trim: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trim < 0.5:
            raise InputError(f"trim (={self.trim}) of TrimmedMean must be from 0 to below 0.5")

    def one(self, changes: Tensor) -> Tensor:
        cut = min(math.ceil(self.trim * len(changes) - 1e-9), (len(changes) - 1) // 2)  # 0.1 of 9 is one: no liar gets through unseen
        return changes.sort(0).values[cut : len(changes) - cut].mean(0)


@dataclass(frozen=True, kw_only=True)
class Krum(Robust):
    """The `keep` updates that lie nearest to their neighbours, averaged; bears `liars` of more than 2 x liars + 2 sites
    (Blanchard et al. 2017; keep 1 is Krum, more is multi-Krum).
    """

    liars: int = 1
    keep: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.liars < 0 or self.keep < 1:
            raise InputError(f"liars (={self.liars}) and keep (={self.keep}) of Krum must be at least 0 and 1")

    def one(self, changes: Tensor) -> Tensor:
        count = len(changes)
        near = count - self.liars - 2
        if count <= 2 * self.liars + 2 or self.keep > count - self.liars:
            raise InputError(
                f"Krum with liars={self.liars} and keep={self.keep} needs more than {max(2 * self.liars + 2, self.keep + self.liars - 1)} "
                f"updates, but {count} came; take more sites, or a smaller liars"
            )
        distances = torch.cdist(changes[None], changes[None], compute_mode="donot_use_mm_for_euclid_dist")[0].square()
        scores = distances.sort(1).values[:, 1 : near + 1].sum(1)  # the first is the distance to itself
        return changes[scores.argsort(stable=True)[: self.keep]].mean(0)
