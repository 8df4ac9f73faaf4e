"""Tables of numbers and categories: a perceptron with an embedding for each categorical column.

B rows, F continuous columns, K categorical ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anyfit.errors import DataError
from anyfit.schedule import Schedule, cosine
from anyfit.schema import Schema
from anyfit.task import Task, adamw
from anyfit.values import Plan

__all__ = ["Perceptron", "Tabular", "Unit", "unit_of"]


class Perceptron(nn.Module):
    """Embeddings beside the standardised numbers, hidden layers with dropout, and logits or one number in the target's unit."""

    def __init__(self, schema: Schema, task: Tabular) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, min(task.embedding, (size + 1) // 2)) for size in schema.cardinalities)
        width = schema.num_continuous + sum(e.embedding_dim for e in self.embeddings)  # type: ignore[misc]
        layers: list[nn.Module] = []
        for hidden in task.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(task.dropout)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, schema.num_outputs), *unit_of(schema))

    def forward(self, continuous: Tensor | None = None, categorical: Tensor | None = None) -> Tensor:
        parts = [] if continuous is None else [continuous]
        if categorical is not None:
            parts += [embedding(codes_B) for embedding, codes_B in zip(self.embeddings, categorical.unbind(1), strict=True)]
        out: Tensor = self.layers(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
        return out


class Unit(nn.Module):
    """Standardised numbers (B, T) back in the targets' units; (B,) for one target. Its numbers come from the schema."""

    def __init__(self, means: list[float], stds: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(means), persistent=False)
        self.register_buffer("std", torch.tensor(stds), persistent=False)

    def forward(self, numbers_BT: Tensor) -> Tensor:
        out: Tensor = numbers_BT * self.std + self.mean  # type: ignore[operator]
        return out.squeeze(1) if out.shape[1] == 1 else out


def unit_of(schema: Schema) -> list[nn.Module]:
    """The last layer of a regression; none where the target is of classes."""
    if schema.classes is not None:
        return []
    columns = [schema[name] for name in schema.targets]
    return [Unit([float(c.mean or 0.0) for c in columns], [float(c.std or 1.0) for c in columns])]  # type: ignore[arg-type]


class Tabular(Task):
    """Classify or regress rows. Batch: `continuous` (B, F), `categorical` (B, K), `target` (B,) or (B, T).

    `rare`: categories of fewer training rows count as other. `balance`: each class weighs the same in total.
    """

    hidden: tuple[int, ...] = (128, 64)
    embedding: int = 16
    dropout: float = 0.1
    rare: int = 5
    balance: bool = False
    lr: float = 2e-3
    weight_decay: float = 0.01

    def plan(self) -> Plan:
        return Plan(epochs=10, batch_size=256)

    def build_model(self, schema: Schema) -> nn.Module:
        if schema.target is None:
            raise DataError("task tabular needs a target column; name it with target=...")
        odd = [column for column in schema.features if column.type not in ("continuous", "categorical", "datetime")]
        if odd:
            raise DataError(
                f"column {odd[0].name!r} is of type {odd[0].type}, which task tabular does not take; "
                "leave it out (ignore) or say what it is (types)"
            )
        if not schema.features:
            raise DataError(f"the data has no column beside the target {schema.target!r}; there is nothing to learn from")
        return Perceptron(schema, self)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return adamw(model, lr=self.lr, weight_decay=self.weight_decay)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule:
        return cosine(optimizer, total_steps, warmup=0.05)
