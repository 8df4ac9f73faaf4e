"""Rounds to 0.97 on MNIST over 100 sites of two digits each: the FedAvg paper's pathological split (McMahan et al. 2017).

    python benchmarks/mnist_rounds.py                  # both models, FedAvg and others
    python benchmarks/mnist_rounds.py --full           # the CNN to 0.99, the paper's own target
    python benchmarks/mnist_rounds.py --model 2nn --strategy fedavg --lr 0.1

100 sites of two shards of 300 images, 10 a round, one local epoch, batch 10, SGD. Needs the MNIST files (--data FOLDER).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import anyfit
from anyfit.schema import Schema

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
# rounds in the paper, tables 1 and 2: C=0.1, E=1, B=10, not IID
PAPER = {("2nn", 0.97): 664, ("cnn", 0.99): 350}
# (model, strategy, local rate): the rates were chosen from 0.03, 0.05, 0.1 by rounds to the target
RUNS = [
    ("2nn", "fedavg", 0.1),
    ("2nn", "fedavgm:momentum=0.9", 0.03),
    ("2nn", "scaffold", 0.1),
    ("cnn", "fedavg", 0.1),
    ("cnn", "fedavgm:momentum=0.9", 0.03),
]


class Digits(anyfit.Task):
    """The paper's two networks: 199,210 and 1,663,370 parameters."""

    model: str = "2nn"
    lr: float = 0.1

    def build_model(self, schema: Schema) -> nn.Module:
        if self.model == "2nn":
            return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
        first = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        second = [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["image"].float() / 255)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.lr)


def rounds_to(target: float, model: str, strategy: str, lr: float, most: int, every: int, data: Path, seed: int) -> dict[str, Any]:
    sites = anyfit.partition(data, "shards:2", 100, seed=seed)
    begun, best = time.process_time(), 0.0
    reached: int | None = None

    def look(event: dict[str, Any]) -> str | None:
        nonlocal best, reached
        if event["event"] != "evaluate":
            return None
        best = max(best, event["accuracy"])
        print(f"\r{model} {strategy} round {event['round']:4d}  accuracy {event['accuracy']:.4f}  best {best:.4f}", end="", flush=True)
        if event["accuracy"] >= target and reached is None:
            reached = event["round"]
        return "stop" if reached else None

    test = anyfit.partition(data, "iid", 1, split="test")["site-0"]
    options: dict[str, Any] = {"epochs": 1, "batch_size": 10, "evaluate_every": every, "seed": seed, "device": "cpu"}
    anyfit.federate(Digits(model=model, lr=lr), sites, strategy=strategy, rounds=most, sample=10, test=test, on_event=look, **options)
    print()
    return {
        "model": model,
        "strategy": strategy,
        "lr": lr,
        "target": target,
        "rounds": reached,
        "paper": PAPER.get((model, target)),
        "best": best,
        "cpu_s": round(time.process_time() - begun),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("2nn", "cnn"))
    parser.add_argument("--strategy")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--target", type=float, default=0.97)
    parser.add_argument("--rounds", type=int, default=1000, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--full", action="store_true", help="the CNN to 0.99")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [(model, strategy, lr, arguments.target) for model, strategy, lr in RUNS]
    if arguments.full:
        runs = [(model, strategy, lr, 0.99) for model, strategy, lr in RUNS if model == "cnn"]
    if arguments.strategy or arguments.model:
        models = [arguments.model] if arguments.model else ["2nn", "cnn"]
        runs = [(model, arguments.strategy or "fedavg", arguments.lr, arguments.target) for model in models]
    rows = []
    for model, strategy, lr, target in runs:
        every = 1 if model == "2nn" else 2
        rows.append(rounds_to(target, model, strategy, lr, arguments.rounds, every, arguments.data, arguments.seed))
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'model':6}{'strategy':24}{'rate':>6}{'target':>8}{'rounds':>8}{'paper':>7}{'CPU s':>8}")
    for row in rows:
        shown = row["rounds"] if row["rounds"] is not None else f"> {arguments.rounds}"
        print(f"{row['model']:6}{row['strategy']:24}{row['lr']:>6}{row['target']:>8}{shown:>8}{row['paper'] or '-':>7}{row['cpu_s']:>8}")


if __name__ == "__main__":
    main()
