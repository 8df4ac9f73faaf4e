"""A torch Dataset, a DataLoader, a Hugging Face style model with labels, and metrics that are plain functions: nothing is converted.

python examples/own_data.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import anyfit


class Sentences(Dataset[dict[str, Tensor]]):
    """Token ids of different lengths; the label is whether the first token comes again."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(1, 12, (int(torch.randint(3, 9, (), generator=generator)),), generator=generator) for _ in range(count)]
        self.lengths = [len(ids) for ids in self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": (ids[1:] == ids[0]).any().long()}


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 32, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        x = self.embedding(input_ids)
        first, rest = x[:, 0], x[:, 1:] * x[:, :1]
        logits = self.body(torch.cat((first, rest.amax(1)), 1))
        return Output(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


class Repeats(anyfit.Task):
    lr: float = 5e-3

    def build_model(self, schema: anyfit.Schema) -> nn.Module:
        return Classifier()

    def metrics(self, schema: anyfit.Schema) -> dict[str, Any]:
        return {"share_right": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()}


data = Sentences(1200)
run = anyfit.fit(Repeats(), data, validation=0.2, epochs=8, batch_size=32, bucket=True, patience=3, seed=1)
print({name: round(value, 3) for name, value in run.splits["validation"].items()})

task = Repeats()
loader = DataLoader(data, batch_size=32, shuffle=True, collate_fn=task.collate)
run = anyfit.fit(task, loader, epochs=4, seed=1)
print("from a DataLoader:", {name: round(value, 3) for name, value in anyfit.evaluate(run, data).items()})
