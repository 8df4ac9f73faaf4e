"""FedAvg and those that change one thing of it: momentum, a pull to the start, control variates, unequal steps, what stays at home."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anyfit.errors import InputError
from anyfit.strategy.base import WEIGHTS, Server, Strategy, below_one, positive
from anyfit.update import GRADIENTS, WIDE, Layout, Update

if TYPE_CHECKING:
    from anyfit.guard import Shapes
    from anyfit.worker import Turn

__all__ = ["FedAvg", "FedAvgM", "FedBN", "FedNova", "FedProx", "Scaffold"]


@dataclass(frozen=True, kw_only=True)
class FedAvg(Strategy):
    """Mean of the sites' weights, each counted by its rows (McMahan et al. 2017). What travels is the change, so `lr` 1 is the mean."""

    lr: float = 1.0
    personal: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        positive(self, "lr")

    def local(self, turn: Turn) -> Update:
        return turn.update(turn.train())

    def finish(self, server: Server, total: Update) -> Tensor:
        return server.weights + self.lr * total.mean(WEIGHTS)[WEIGHTS]


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedAvg):
    """FedAvg with momentum where updates are added (Hsu, Qi and Brown 2019)."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one(self, "momentum")

    def finish(self, server: Server, total: Update) -> Tensor:
        velocity = self.momentum * server.kept("velocity") + total.mean(WEIGHTS)[WEIGHTS]
        server.memory["velocity"] = velocity
        return server.weights + self.lr * velocity


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose sites are pulled to the weights that they were sent, by mu / 2 x squared distance (Li et al. 2020)."""

    mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "mu", zero=True)

    def local(self, turn: Turn) -> Update:
        start = turn.start

        def pull(gradients: list[Tensor], places: list[int]) -> None:
            moved = [turn.shared[place].detach() - start[place] for place in places]
            torch._foreach_add_(gradients, moved, alpha=self.mu)

        return turn.update(turn.train(pull if self.mu else None))


@dataclass(frozen=True, kw_only=True)
class FedNova(FedAvg):
    """FedAvg over unequal numbers of local steps: each site's change counts per step (Wang et al. 2020), with SGD's momentum heeded."""

    def sends(self, layout: Layout) -> Shapes:
        return {**super().sends(layout), "steps": {"steps": ()}}

    def local(self, turn: Turn) -> Update:
        delta = turn.train()
        groups = [group for optimizer in turn.trainer.optimizers.values() for group in optimizer.param_groups]
        if any(group.get("nesterov") for group in groups) or (turn.momentum and turn.order.values.get("keep_optimizer")):
            raise InputError("FedNova counts plain momentum that starts anew each round; leave nesterov and keep_optimizer off")
        weight = _effective_steps(turn.steps, turn.momentum)
        steps = torch.tensor(weight * turn.rows, dtype=torch.float64)
        return turn.update(delta / weight).joined(Update.of("steps", {"steps": steps}, turn.rows, WIDE))

    def finish(self, server: Server, total: Update) -> Tensor:
        steps = float(total.mean("steps")["steps"])
        return server.weights + self.lr * steps * total.mean(WEIGHTS)[WEIGHTS]


def _effective_steps(steps: int, momentum: float) -> float:
    """The sum of the weights that local gradients have in a site's change: the paper's norm of a."""
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


@dataclass(frozen=True, kw_only=True)
class Scaffold(FedAvg):
    """Control variates against the drift of unlike sites (SCAFFOLD, Karimireddy et al. 2020, option II), weighted by rows.

    A site's control is the mean of the gradients of its last turn; it stays there, and its change travels.
    """

    def begin(self, server: Server) -> Mapping[str, Tensor]:
        return {"control": (server.kept("controls") / server.rows).to(server.layout.dtype)}

    def sends(self, layout: Layout) -> Shapes:
        return {**super().sends(layout), "control": {"control": (layout.size,)}}

    def local(self, turn: Turn) -> Update:
        everywhere = turn.tensors["control"].to(turn.weights)
        mine = turn.memory["control"].to(turn.weights) if "control" in turn.memory else torch.zeros_like(turn.weights)
        apart = turn.layout.views(everywhere - mine)
        seen = torch.zeros_like(turn.weights)
        sums = turn.layout.views(seen)

        def correct(gradients: list[Tensor], places: list[int]) -> None:
            torch._foreach_add_([sums[place] for place in places], gradients)
            torch._foreach_add_(gradients, [apart[place] for place in places])

        delta = turn.train(correct)
        control = seen / max(turn.steps, 1)  # of plain SGD this is the paper's (x - y) / (K lr), and of others what it stands for
        turn.memory["control"] = control.cpu()
        change = Update.of("control", {"control": (control - mine) * turn.rows}, turn.rows, GRADIENTS)
        return turn.update(delta).joined(change)

    def finish(self, server: Server, total: Update) -> Tensor:
        # a sum over the rows of all sites: those that were not here keep their controls, and others may join
        server.memory["controls"] = server.kept("controls") + total.sums("control")["control"]
        return super().finish(server, total)


@dataclass(frozen=True, kw_only=True)
class FedBN(FedAvg):
    """FedAvg whose normalisation layers, their weights and batch statistics, stay at each site (Li et al. 2021)."""

    normalisation: tuple[str, ...] = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")

    def stays(self, model: nn.Module) -> set[str]:
        found = {
            f"{place}.{name}" if place else name
            for place, module in model.named_modules()
            if type(module).__name__ in self.normalisation
            for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }
        if not found:
            raise InputError(
                f"the model has no layer that FedBN keeps at home ({', '.join(self.normalisation)}); name others, or use FedAvg"
            )
        return found | super().stays(model)
