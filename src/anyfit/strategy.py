"""How a site's update is made and how updates become the next state. A strategy knows nothing of what carries them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from anyfit.engine import Losses, Trainer, train
from anyfit.update import Order, Update

if TYPE_CHECKING:
    from anyfit.data import Batches
    from anyfit.state import State

__all__ = ["FedAvg", "Strategy"]

WEIGHTS = "weights"


class Strategy(ABC):
    """Both halves of a federated algorithm: `local` at the site, `begin` and `finish` where updates are added."""

    needs: ClassVar[Literal["sum", "each"]] = "sum"

    @property
    def name(self) -> str:
        """For records."""
        return type(self).__name__

    def begin(self, state: State, sites: int) -> Mapping[str, Tensor]:
        """Tensors that the order carries beside the weights."""
        return {}

    @abstractmethod
    def local(self, trainer: Trainer, order: Order, batches: Batches, memory: Any) -> tuple[Update, Any]:
        """The site's half: train from the order's weights; an update and a memory that stays at the site."""

    @abstractmethod
    def finish(self, state: State, total: Update, sites: int) -> State:
        """The other half: the next state from the total of a round."""


@dataclass(frozen=True, kw_only=True)
class FedAvg(Strategy):
    """Mean of the sites' weights, each counted by its rows (McMahan et al. 2017). Site and server agree on the delta, so `lr` 1 is the mean."""

    lr: float = 1.0

    def local(self, trainer: Trainer, order: Order, batches: Batches, memory: Any) -> tuple[Update, Any]:
        steps = local_steps(order, batches)
        losses = Losses()
        for event in train(trainer, batches, trainer.position.step + steps):
            losses.events.append(event)
        read = losses.read()
        rows = float(batches.rows or 0)
        after = exchanged(trainer)
        delta = {name: (after[name].detach() - order.tensors[name].to(after[name].device)).cpu() * rows for name in order.tensors}
        mean_loss = torch.tensor(0.0 if read is None else read[0], dtype=torch.float64)
        return Update.of(WEIGHTS, delta, rows).joined(Update.of("loss", {"loss": mean_loss * rows}, rows)), None

    def finish(self, state: State, total: Update, sites: int) -> State:
        mean = total.mean(WEIGHTS)
        model = dict(state.model)
        for name, delta in mean.items():
            weight = model[name]
            model[name] = (weight.to("cpu", torch.float64) + self.lr * delta).to(weight.device, weight.dtype)
        return replace(state, model=model)


def local_steps(order: Order, batches: Batches) -> int:
    """Optimizer steps of one round at a site: so many, or so many epochs over its rows."""
    steps = order.values.get("steps")
    if steps is not None:
        return int(steps)
    assert batches.steps_per_epoch is not None
    return int(order.values.get("epochs") or 1) * batches.steps_per_epoch


def exchanged(trainer: Trainer) -> dict[str, Tensor]:
    """The parameters and buffers that a site exchanges, as the task says."""
    model, task = trainer.model, trainer.task
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if task.shared(name, tensor)}
