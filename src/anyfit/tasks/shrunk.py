"""Tasks around another task, whose network they shrink. All else is that of the task within, so that they train, federate and load like it.

They nest in the order of what was done (`Quantized(task=Pruned(task=Image()))`), which is their lineage; their fields are JSON, so a
shrunk network is built anywhere by `build_model` and then loaded with its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anyfit import data
from anyfit.errors import InputError, TaskError
from anyfit.metrics import Metric
from anyfit.program import QuantizedNetwork, lower, row_of, trace
from anyfit.schedule import Schedule, cosine
from anyfit.schema import Schema
from anyfit.task import Step, Task, adamw
from anyfit.tasks.edits import apply_edits
from anyfit.update import Update
from anyfit.values import Plan

if TYPE_CHECKING:
    import pyarrow as pa

    from anyfit.engine import Trainer

__all__ = ["Answered", "Morphed", "Pruned", "Quantized", "Shrunk", "check_amount", "prunable", "prune_to", "zeros_kept"]

RAMPS, SCOPES = ("cubic", "linear", "once"), ("global", "layer")
LEVELS = 100  # into which a ramp is divided: weights are sorted that often, not at every step


class Shrunk(Task):
    """A task around another one; what a subclass does not change is that of the one within."""

    task: Task

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task):
            raise TaskError(f"task (={self.task!r}) of {type(self).__name__} must be a task")

    def own_method(self, method: str) -> bool:
        return self.task.own_method(method)

    def classes(self) -> Sequence[type]:
        return (type(self.task), *self.task.classes())

    def plan(self) -> Plan:
        return self.task.plan()

    def statistics(self, table: pa.Table, schema: Schema) -> Update:
        return self.task.statistics(table, schema)

    def prepare(self, schema: Schema, statistics: Update) -> Schema:
        return self.task.prepare(schema, statistics)

    def build_model(self, schema: Schema) -> nn.Module:
        return self.task.build_model(schema)

    def build_dataset(self, table: pa.Table, split: str, schema: Schema) -> Any:
        return self.task.build_dataset(table, split, schema)

    def collate(self, samples: list[Any]) -> Any:
        return self.task.collate(samples)

    def augment(self, batch: Any, uniform: data.Uniform) -> Any:
        return self.task.augment(batch, uniform)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return self.task.forward(model, batch)

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int | Tensor]:
        return self.task.loss(outputs, batch)

    def step(self, model: nn.Module, batch: Any) -> Step:
        return self.task.step(model, batch)

    def evaluate_step(self, model: nn.Module, batch: Any) -> Step:
        return self.task.evaluate_step(model, batch)

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        return self.task.evaluate(model, batches)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return self.task.predict(model, batch)

    def build_optimizer(self, model: nn.Module) -> Optimizer | dict[str, Optimizer]:
        return self.task.build_optimizer(model)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule | dict[str, Schedule] | None:
        return self.task.build_schedule(optimizer, total_steps)

    def metrics(self, schema: Schema) -> Mapping[str, Metric | Callable[..., Any]] | None:
        return self.task.metrics(schema)

    def train_step(self, trainer: Trainer, window: Iterable[Any]) -> Step | None:
        return self.task.train_step(trainer, window)

    def constrain(self, model: nn.Module, progress: float | None) -> Callable[[], None] | None:
        return self.task.constrain(model, progress)

    def settles(self) -> float:
        return self.task.settles()

    def shared(self, name: str, tensor: Tensor) -> bool:
        return self.task.shared(name, tensor)

    def example_row(self, schema: Schema) -> Any:
        return self.task.example_row(schema)


class Pruned(Shrunk):
    """Fewer channels, fewer weights, or both.

    `kept`: which indices of each tensor's dimensions are left (structured; see `tasks.edits`). `amount`: the share of weights that become zero
    while training, between the shares `begin` and `end` of it, by magnitude over all layers or in each. A zero stays zero from then on,
    through checkpoints, other fits and at every site; which ones are zero, in a federation the server alone decides.
    """

    kept: dict[str, Any] = field(default_factory=dict)
    amount: float = 0.0
    ramp: Literal["cubic", "linear", "once"] = "cubic"
    begin: float = 0.15
    end: float = 0.75
    scope: Literal["global", "layer"] = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.amount < 1:
            raise InputError(f"amount (={self.amount}) must be from 0 to below 1: the share of weights that become zero")
        if not 0 <= self.begin <= self.end <= 1:
            raise InputError(f"begin (={self.begin}) and end (={self.end}) must be shares of the training, in this order")
        for name, words in (("ramp", RAMPS), ("scope", SCOPES)):
            if getattr(self, name) not in words:
                raise InputError(f"{name} (={getattr(self, name)!r}) must be one of {', '.join(words)}")

    def own_method(self, method: str) -> bool:
        return (method == "constrain" and self.amount > 0) or super().own_method(method)

    def build_model(self, schema: Schema) -> nn.Module:
        model = super().build_model(schema)
        if self.kept:
            model = apply_edits(model, [{"edit": "take", **self.kept}])
        if self.amount:
            check_amount(model, self.amount, self.scope)
        return model

    def settles(self) -> float:
        return max(self.end if self.amount else 0.0, super().settles())

    def sparsity(self, progress: float) -> float:
        """The share of weights that is zero by then. Cubic (Zhu and Gupta 2017): fast at first, where weights are many."""
        if self.ramp == "once" or self.begin == self.end:
            return self.amount if progress >= self.begin else 0.0
        done = min(1.0, max(0.0, (progress - self.begin) / (self.end - self.begin)))
        done = math.floor(done * LEVELS + 1e-9) / LEVELS
        return self.amount * (done if self.ramp == "linear" else 1 - (1 - done) ** 3)

    def constrain(self, model: nn.Module, progress: float | None) -> Callable[[], None] | None:
        within = super().constrain(model, progress)
        if not self.amount:
            return within
        tensors = list(prunable(model).values())
        keep = zeros_kept(tensors)

        def restore() -> None:
            if within is not None:
                within()
            keep()
            if progress is not None:
                prune_to(tensors, self.sparsity(progress), self.scope)

        return restore


class Morphed(Shrunk):
    """A network after changes of its structure (`edits`, see `tasks.edits`). `label`: whether they kept what it computes ("exact"), or what
    overlaps was inherited. `parent`: the SHA-256 of the weights that they were made from.
    """

    edits: list[dict[str, Any]] = field(default_factory=list)
    label: Literal["exact", "inherit"] = "inherit"
    parent: str = ""

    def build_model(self, schema: Schema) -> nn.Module:
        return apply_edits(super().build_model(schema), self.edits)


class Answered(Shrunk):
    """A task whose model takes batches as they are and gives predictions, by which alone it is judged: a network that runs elsewhere."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch)

    def step(self, model: nn.Module, batch: Any) -> Step:
        return Task.step(self, model, batch)

    def evaluate_step(self, model: nn.Module, batch: Any) -> Step:
        return Task.evaluate_step(self, model, batch)

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        return Task.evaluate(self, model, batches)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch)


class Quantized(Answered):
    """A network of int8 operations: in training with gradients, in evaluation with the integers that an exported one computes with.

    `inputs`: names, types and shapes of a row, which it is traced with. `power_of_two`: scales such that a device shifts and does not multiply.
    Training goes on at `lr` (None: a tenth of the rate of the task within).
    """

    inputs: list[dict[str, Any]]
    power_of_two: bool = False
    lr: float | None = None

    def own_method(self, method: str) -> bool:
        return method in ("shared", "constrain") or (method in ("augment", "collate", "build_dataset") and super().own_method(method))

    def build_model(self, schema: Schema) -> nn.Module:
        return QuantizedNetwork(self.lowered(super().build_model(schema)), power_of_two=self.power_of_two)

    def lowered(self, model: nn.Module) -> Any:
        """The network within as float operations."""
        return lower(trace(self.task.predict, model, row_of(self.inputs)))

    def train_step(self, trainer: Trainer, window: Iterable[Any]) -> Step | None:
        for method in ("train_step", "step"):
            if self.task.own_method(method):
                raise TaskError(
                    f"{type(self.task).__name__} has a {method} of its own, which a quantized network cannot be trained by; define loss(self, outputs, "
                    "batch), or quantize after training only"
                )
        return Task.train_step(self, trainer, window)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        lr = 0.1 * getattr(self.task, "lr", 1e-3) if self.lr is None else self.lr
        return adamw(model, lr=lr, weight_decay=0.0)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule:
        return cosine(optimizer, total_steps)

    def constrain(self, model: nn.Module, progress: float | None) -> Callable[[], None] | None:
        """Zeros stay, and so do ranges, which nothing trains: noise or rounding on the way is undone."""
        keep, ranges = zeros_kept(list(prunable(model).values())), model.ranges
        before = ranges.detach().clone()  # type: ignore[operator]

        def restore() -> None:
            keep()
            ranges.copy_(before)  # type: ignore[operator]

        return restore

    def settles(self) -> float:
        return 0.0

    def shared(self, name: str, tensor: Tensor) -> bool:
        return name == "ranges" or tensor.requires_grad


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that pruning counts: all of two dimensions or more but word tables, and what a weight is computed from."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and parameter.requires_grad and id(parameter) not in tables and "parametrizations." not in name
    }


def check_amount(model: nn.Module, amount: float, scope: str) -> None:
    """Refuse an amount that would leave nothing of a tensor."""
    tensors = prunable(model)
    _refuse_none(list(tensors.values()))
    for name, tensor in tensors.items() if scope == "layer" else ():
        if round(amount * tensor.numel()) >= tensor.numel():
            raise InputError(
                f"amount (={amount}) would leave nothing of {name}, which has {tensor.numel()} weights; give less, or scope='global'"
            )
    total = sum(tensor.numel() for tensor in tensors.values())
    if round(amount * total) > total - len(tensors):
        raise InputError(f"amount (={amount}) leaves fewer than one of {total} weights for each of {len(tensors)} tensors; give less")


def _refuse_none(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        raise InputError("the model has no weights that pruning could take (of two dimensions or more, which are no word tables)")


def zeros_kept(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Called before a step, gives what makes zero again what was zero before it. A tensor of zeros alone was not pruned but begins so."""
    zeros = [tensor == 0 for tensor in tensors]
    begun = [bool(zero.all()) for zero in zeros]

    def keep() -> None:
        with torch.no_grad():
            for tensor, zero, fresh in zip(tensors, zeros, begun, strict=True):
                if not fresh:
                    tensor.masked_fill_(zero, 0.0)

    return keep


def prune_to(tensors: Sequence[Tensor], amount: float, scope: str = "global") -> None:
    """Set the smallest weights to zero, exactly round(amount x all) of them, those that are zero already among them. The largest of
    each tensor stays: a layer of zeros alone would pass nothing on.
    """
    _refuse_none(tensors)
    with torch.no_grad():
        for group in [tensors] if scope == "global" else [[tensor] for tensor in tensors]:
            sizes = [tensor.numel() for tensor in group]
            count = round(amount * sum(sizes))
            if sum(int((tensor == 0).sum()) for tensor in group) >= count:
                continue
            parts = [tensor.detach().abs().reshape(-1) for tensor in group]
            for part in parts:
                part[part.argmax()] = torch.inf
            magnitudes = torch.cat(parts)
            smallest = torch.zeros_like(magnitudes, dtype=torch.bool)
            smallest[magnitudes.topk(count, largest=False).indices] = True
            for tensor, part in zip(group, torch.split(smallest, sizes), strict=True):
                tensor.masked_fill_(part.view(tensor.shape), 0.0)
