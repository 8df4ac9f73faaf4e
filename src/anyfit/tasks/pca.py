"""Principal components as a task: the loss is what a projection leaves out. FedPCA finds them over sites; gradient steps get near.

B rows, d numbers of each, k components.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from anyfit.errors import DataError
from anyfit.schema import Schema
from anyfit.task import Step, Task
from anyfit.tree import first_tensor

__all__ = ["PCA", "Projection"]


class Projection(nn.Module):
    """Rows on `components` (k, d) after their `mean` (d,) is taken away."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width))
        self.components = nn.Parameter(torch.linalg.qr(torch.randn(width, count))[0].T.contiguous())

    def forward(self, x_Bd: Tensor) -> Tensor:
        return (x_Bd - self.mean) @ self.components.T


class PCA(Task):
    """Principal components of numbers, or of an image's pixels; columns of other types take no part. Predicts (B, k); the loss is the
    mean squared distance to the projection.
    """

    components: int = 2

    def build_model(self, schema: Schema) -> nn.Module:
        shapes = [column.shape for column in schema.features if column.shape]  # of images and arrays
        width = sum(map(math.prod, shapes)) if shapes else schema.num_continuous
        if not 1 <= self.components <= width:
            raise DataError(f"components (={self.components}) must be from 1 to the {width} numbers of a row")
        return Projection(width, self.components)

    def features(self, batch: Any) -> Tensor:
        """(B, d) what is projected."""
        named = batch if isinstance(batch, dict) else {}
        tensor = named.get("image", named.get("continuous"))
        found = first_tensor(batch) if tensor is None else tensor
        return found.reshape(len(found), -1)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(self.features(batch).to(next(model.parameters()).dtype))

    def step(self, model: nn.Module, batch: Any) -> Step:
        assert isinstance(model, Projection)
        x_Bd = self.features(batch).to(model.mean.dtype)
        left_Bd = x_Bd - model.mean - model(x_Bd) @ model.components
        return Step(left_Bd.square().sum(1).mean(), x_Bd.shape[0])
