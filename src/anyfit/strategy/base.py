"""The interface of a strategy: two halves, and what each may use."""

from __future__ import annotations

import fnmatch
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anyfit.errors import InputError, TaskError
from anyfit.guard import LOSS, WEIGHTS, Shapes
from anyfit.update import Layout, Update

if TYPE_CHECKING:
    from anyfit.worker import Turn

__all__ = ["LOSS", "WEIGHTS", "Server", "Strategy", "below_one", "positive"]


@dataclass
class Server:
    """The side where updates are added. `weights` (P,) float64; `memory` is the strategy's own and is saved with the state."""

    weights: Tensor
    layout: Layout
    round: int
    sites: int  # all that there are, whether they take part in this round or not
    rows: float  # at all of them
    memory: dict[str, Tensor] = field(default_factory=dict)

    def kept(self, name: str, start: float = 0.0) -> Tensor:
        """A vector of the strategy's memory; `start` throughout before it was first set."""
        return self.memory[name] if name in self.memory else torch.full_like(self.weights, start)


class Strategy(ABC):
    """Both halves of a federated algorithm: `local` at the site, `begin` and `finish` where updates are added.

    `needs`: "sum" folds updates as they arrive; "each" holds all of a round, for `combine`. `personal`: patterns of names
    (`head.*`) that stay at each site.
    """

    needs: ClassVar[Literal["sum", "each"]] = "sum"
    trains: ClassVar[bool] = True  # by gradient steps; False where `local` only looks at the rows
    personal: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For records."""
        return type(self).__name__

    def to_json(self) -> dict[str, Any]:
        """Name and fields."""
        return {"name": self.name, "values": asdict(self) if is_dataclass(self) else {}}

    def choose(self, round: int, sites: Sequence[str], count: int, seed: int) -> list[str]:
        """The sites of a round: `count` of them by `seed`."""
        return list(sites) if count >= len(sites) else sorted(random.Random(seed).sample(list(sites), count))

    def begin(self, server: Server) -> Mapping[str, Tensor]:
        """Tensors that the order carries beside the weights."""
        return {}

    def sends(self, layout: Layout) -> Shapes:
        """What a site's update holds: group -> name -> shape. The guard lets nothing else out."""
        return {WEIGHTS: {WEIGHTS: (layout.size,)}, LOSS: {LOSS: ()}}

    def stays(self, model: nn.Module) -> set[str]:
        """The names of parameters and buffers that each site keeps to itself."""
        if isinstance(self.personal, str):
            raise InputError(f"personal (={self.personal!r}) of {self.name} must be a tuple of patterns: ({self.personal!r},)")
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        unknown = [pattern for pattern in self.personal if not fnmatch.filter(names, pattern)]
        if unknown:
            raise InputError(f"personal (={unknown[0]!r}) of {self.name} matches no name of the model; there are: {', '.join(names[:20])}")
        return {name for pattern in self.personal for name in fnmatch.filter(names, pattern)}

    @abstractmethod
    def local(self, turn: Turn) -> Update:
        """The site's half: what it computes on its rows from the order's weights. What it keeps goes into `turn.memory`."""

    def combine(self, updates: Sequence[Update]) -> Update:
        """One update from those of a round, where `needs` is "each"; in the order of the sites' names."""
        raise TaskError(f"{self.name} needs each update (needs='each'), so it has to make one of them; define combine(self, updates)")

    @abstractmethod
    def finish(self, server: Server, total: Update) -> Tensor:
        """The other half: the next weights (P,) from the total of a round."""


def positive(strategy: Strategy, *names: str, zero: bool = False) -> None:
    """Refuse fields that are not above 0 (or, with `zero`, negative) or not finite."""
    for name in names:
        value = getattr(strategy, name)
        if not (0 < value < math.inf or (zero and value == 0)):
            raise InputError(f"{name} (={value}) of {strategy.name} must be {'0 or more' if zero else 'above 0'}")


def below_one(strategy: Strategy, *names: str) -> None:
    """Refuse fields that are not from 0 to below 1: shares of what was before."""
    for name in names:
        value = getattr(strategy, name)
        if not 0 <= value < 1:
            raise InputError(f"{name} (={value}) of {strategy.name} must be from 0 to below 1")
