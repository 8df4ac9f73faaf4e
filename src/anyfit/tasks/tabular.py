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

__all__ = ["Perceptron", "Tabular"]


class Perceptron(nn.Module):
    """Embeddings beside the standardised numbers, hidden layers with dropout, and logits or one number in the target's unit."""

    def __init__(self, schema: Schema, task: Tabular) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, min(task.embedding, (size + 1) // 2)) for size in schema.cardinalities)
        width = len(schema.of_type("continuous")) + sum(e.embedding_dim for e in self.embeddings)  # type: ignore[misc]
        layers: list[nn.Module] = []
        for hidden in task.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(task.dropout)]
            width = hidden
        classes = 1 if schema.classes is None else len(schema.classes)
        self.layers = nn.Sequential(*layers, nn.Linear(width, classes))
        target = None if schema.target is None or schema.classes is not None else schema[schema.target]
        self._scale = (1.0, 0.0) if target is None else (float(target.std or 1.0), float(target.mean or 0.0))  # type: ignore[arg-type]
        self._regression = target is not None

    def forward(self, continuous: Tensor | None = None, categorical: Tensor | None = None) -> Tensor:
        parts = [] if continuous is None else [continuous]
        if categorical is not None:
            parts += [embedding(codes_B) for embedding, codes_B in zip(self.embeddings, categorical.unbind(1), strict=True)]
        out: Tensor = self.layers(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
        return out.squeeze(1) * self._scale[0] + self._scale[1] if self._regression else out


class Tabular(Task):
    """Classify or regress rows. Batch: `continuous` (B, F), `categorical` (B, K), `target` (B,)."""

    hidden: tuple[int, ...] = (128, 64)
    embedding: int = 16
    dropout: float = 0.1
    lr: float = 2e-3
    weight_decay: float = 0.01

    def plan(self) -> Plan:
        return Plan(epochs=10, batch_size=256)

    def build_model(self, schema: Schema) -> nn.Module:
        if schema.target is None:
            raise DataError("task tabular needs a target column; name it with target=...")
        odd = [column for column in schema.features if column.type not in ("continuous", "categorical")]
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
