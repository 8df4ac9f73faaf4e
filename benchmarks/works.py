"""What the engine benchmark trains: one torch module and one set of rows for each work, the same for every engine.

Imported in two environments (the repository's and the peers'), so it needs torch alone.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

DATA = Path(os.environ.get("ANYFIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


class Convolutions(nn.Module):
    """The MNIST network of HetSeq's example, its dropout mended."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv2(torch.relu(self.conv1(x)))), 2)
        return self.fc2(self.dropout2(torch.relu(self.fc1(self.dropout1(x).flatten(1)))))


@dataclass(frozen=True)
class Work:
    """A network, its rows, and how many steps are measured after the warm-up. Both are multiples of 50, where engines log."""

    model: Callable[[], nn.Module]
    batch_size: int
    warmup: int
    steps: int
    rounds: int
    weight_decay: float = 0.01  # torch's default for AdamW, and ours; transformers' own is 0

    def loader(self, x: Any, y: Any) -> DataLoader[Any]:
        """As a tutorial has it."""
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size, shuffle=True)

    def rows(self, name: str) -> tuple[Any, Any]:
        """Enough rows that no engine starts an epoch anew within the measured steps; fewer for the large network."""
        generator = torch.Generator().manual_seed(0)
        if name == "mnist-cnn":
            return mnist()
        count, width = self.batch_size * (self.warmup + self.steps), 14 if name == "mlp" else 10
        x = torch.randn(count, width, generator=generator)
        return x, (x[:, 0] + 0.5 * torch.randn(count, generator=generator) > 0).long()


WORKS = {
    "mnist-cnn": Work(Convolutions, 64, 50, 50, 9),
    "mlp": Work(lambda: nn.Sequential(nn.Linear(14, 64), nn.ReLU(), nn.Linear(64, 2)), 64, 100, 1000, 9),
    "linear": Work(lambda: nn.Linear(10, 2), 8, 100, 1500, 9),
}


def mnist() -> tuple[Tensor, Tensor]:
    """The real rows where they are at hand, else noise of the same shape: the arithmetic is the same."""
    images, labels = DATA / "mnist/train-images-idx3-ubyte.gz", DATA / "mnist/train-labels-idx1-ubyte.gz"
    count = 64 * 100
    if images.exists():
        x = torch.frombuffer(bytearray(gzip.decompress(images.read_bytes())[16:]), dtype=torch.uint8)[: count * 784]
        y = torch.frombuffer(bytearray(gzip.decompress(labels.read_bytes())[8:]), dtype=torch.uint8)[:count]
        return (x.reshape(count, 1, 28, 28).float() / 255 - 0.1307) / 0.3081, y.long()
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 28, 28, generator=generator), torch.randint(0, 10, (count,), generator=generator)
