"""The MNIST network of HetSeq's tutorial: the model returns its loss and takes its target, as HetSeq's models do.

    python examples/hetseq_mnist.py [FOLDER OF THE IDX FILES]

Optimizer, decay and clipping are those of HetSeq's own script. Dropout2d on a flat tensor, a mistake of the original, is a plain Dropout
here. Without a folder it trains on the bundled digits.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anyfit
from anyfit.adapt.hetseq import polynomial_decay


class MNISTNet(nn.Module):
    def __init__(self, size: int, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout2d(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(64 * ((size - 4) // 2) ** 2, 128)
        self.fc2 = nn.Linear(128, 10)

    def logits(self, image: Tensor) -> Tensor:
        x = F.relu(self.conv1((image - self.mean) / self.std))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(self.dropout1(x), 1)
        return self.fc2(self.dropout2(F.relu(self.fc1(x))))

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(image), target)


class MNIST(anyfit.Task):
    lr: float = 1.01

    def plan(self) -> anyfit.Plan:
        return anyfit.Plan(epochs=20, batch_size=64, clip=100.0)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adadelta(model.parameters(), lr=self.lr)

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> anyfit.Schedule:
        return polynomial_decay(optimizer, total_num_update=50_000)

    def build_model(self, schema: anyfit.Schema) -> nn.Module:
        image = schema["image"]
        return MNISTNet(image.shape[-1], image.mean[0], image.std[0])

    def evaluate_step(self, model: nn.Module, batch: Any) -> anyfit.Step:
        logits = self.predict(model, batch)
        return anyfit.Step(F.cross_entropy(logits, batch["target"]), len(logits), logits, batch["target"])

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model.logits(batch["image"])


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    data = {"data": folder} if folder else {"data": "digits", "test": 0.2}
    run = anyfit.fit(MNIST(), **data, epochs=3, on_event=print)
    print(f"accuracy {run.splits['test']['accuracy']:.3f}")
