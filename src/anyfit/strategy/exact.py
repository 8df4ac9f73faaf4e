"""Strategies that need no learning rate: sums of second order, from which the pooled solution follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from anyfit.errors import InputError, TaskError
from anyfit.strategy.base import LOSS, WEIGHTS, Server, Strategy, positive
from anyfit.update import WIDE, Layout, Update

if TYPE_CHECKING:
    from anyfit.guard import Shapes
    from anyfit.worker import Turn

__all__ = ["FedPCA", "NewtonRaphson"]

MOST_PARAMETERS = 4096  # whose Hessian is sent: 128 MB


@dataclass(frozen=True, kw_only=True)
class NewtonRaphson(Strategy):
    """Newton's method on the pooled loss: sites send gradients and Hessians, as sums over rows. For convex losses of few parameters.

    `l2` adds l2 / 2 x squared weights to the mean loss; `damping` stands on the Hessian's diagonal.
    """

    trains: ClassVar[bool] = False
    lr: float = 1.0
    l2: float = 0.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "lr")
        positive(self, "l2", "damping", zero=True)

    def sends(self, layout: Layout) -> Shapes:
        size = layout.size
        if size > MOST_PARAMETERS:
            raise InputError(
                f"NewtonRaphson sends a Hessian, which {size:,} parameters are too many for ({MOST_PARAMETERS:,} at most); use FedAvg"
            )
        return {**super().sends(layout), "hessian": {"hessian": (size, size)}}

    def local(self, turn: Turn) -> Update:
        size = turn.weights.numel()
        gradient = torch.zeros(size, dtype=torch.float64)
        hessian = torch.zeros(size, size, dtype=torch.float64)
        loss, count = 0.0, 0.0
        model = turn.model.eval()
        for batch in turn.batches:
            step = turn.task.step(model, batch)
            weight = float(step.count)
            if weight <= 0:
                continue
            first = torch.autograd.grad(step.loss, turn.shared, create_graph=True, materialize_grads=True)
            flat = torch.cat([part.reshape(-1) for part in first])
            basis = torch.eye(size, dtype=flat.dtype, device=flat.device)
            rows = torch.autograd.grad(flat, turn.shared, basis, is_grads_batched=True, allow_unused=True)
            parts = zip(rows, turn.shared, strict=True)
            second = torch.cat([basis.new_zeros(size, p.numel()) if row is None else row.reshape(size, -1) for row, p in parts], 1)
            gradient += weight * flat.detach().cpu().double()
            hessian += weight * second.detach().cpu().double()
            loss, count = loss + weight * float(step.loss.detach()), count + weight
        sums = Update.of(WEIGHTS, {WEIGHTS: gradient}, count, WIDE).joined(Update.of("hessian", {"hessian": hessian}, count, WIDE))
        return sums.joined(Update.of(LOSS, {LOSS: torch.tensor(loss, dtype=torch.float64)}, count, WIDE))

    def finish(self, server: Server, total: Update) -> Tensor:
        gradient = total.mean(WEIGHTS)[WEIGHTS] + self.l2 * server.weights
        hessian = total.mean("hessian")["hessian"]
        hessian = (hessian + hessian.T) / 2 + (self.l2 + self.damping) * torch.eye(len(gradient), dtype=torch.float64)
        factor, info = torch.linalg.cholesky_ex(hessian)
        # what is left of each diagonal entry once the parameters before it are known; rounding makes 0 a little more
        nothing = len(gradient) * torch.finfo(server.layout.dtype).eps * hessian.diagonal()
        if bool(info) or bool((factor.diagonal().square() <= nothing).any()):
            raise InputError(
                f"the Hessian of all rows cannot be inverted in round {server.round} (not positive definite: parameters that do the same, "
                "or a loss that is not convex); give NewtonRaphson l2 or damping above 0"
            )
        step: Tensor = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        return server.weights - self.lr * step


@dataclass(frozen=True, kw_only=True)
class FedPCA(Strategy):
    """Principal components of all rows in one round: sites send the sums of x and of x x' (as the exact variant in Hartebrodt and
    Roettger 2022). For a task with `features(batch)` -> (B, d) whose model exchanges `mean` (d,) and `components` (k, d).
    """

    trains: ClassVar[bool] = False

    def sends(self, layout: Layout) -> Shapes:
        if set(layout.shapes) != {"mean", "components"}:
            raise InputError(
                f"FedPCA needs a model that exchanges `mean` and `components`, not {', '.join(layout.shapes)}; use the task pca"
            )
        (width,) = layout.shapes["mean"]
        if width > MOST_PARAMETERS:
            raise InputError(
                f"FedPCA sends products of all pairs of columns, which {width:,} are too many for ({MOST_PARAMETERS:,} at most)"
            )
        return {WEIGHTS: {"sum": (width,), "products": (width, width)}}

    def local(self, turn: Turn) -> Update:
        features = getattr(turn.task, "features", None)
        if features is None:
            raise TaskError(f"{type(turn.task).__name__} has no features(batch), which FedPCA works on; use the task pca")
        (width,) = turn.layout.shapes["mean"]
        sums = torch.zeros(width, dtype=torch.float64)
        products = torch.zeros(width, width, dtype=torch.float64)
        for batch in turn.batches:
            x_Bd = features(batch).detach().cpu().double()
            sums += x_Bd.sum(0)
            products += x_Bd.T @ x_Bd
        return Update.of(WEIGHTS, {"sum": sums, "products": products}, turn.rows, WIDE)

    def finish(self, server: Server, total: Update) -> Tensor:
        means = total.mean(WEIGHTS)
        covariance = means["products"] - torch.outer(means["sum"], means["sum"])
        count, _ = server.layout.shapes["components"]
        vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :count].T
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        named = {"mean": means["sum"], "components": vectors * largest.sign()}  # eigenvectors have no sign of their own
        return torch.cat([named[name].reshape(-1) for name in server.layout.shapes])
