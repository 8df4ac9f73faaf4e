"""A fit that kills itself: `python kill_worker.py RUN OPTIMIZER CHANNELS_LAST WHEN`, run by test_kill.py.

WHEN: none | time:SECONDS (after training began) | write:N (in the middle of the Nth checkpoint) | rename:N (right after the Nth
checkpoint got its name) | line:N (in the middle of the Nth line of the log).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

import anyfit.state
from anyfit.fit import fit
from anyfit.run import Folder
from anyfit.schedule import Schedule, cosine
from anyfit.schema import Schema
from anyfit.task import Task, adamw


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Dropout2d(0.2)
        )
        self.out = nn.Linear(8 * 6 * 6, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.dropout(self.conv(image.float() / 16).flatten(1), 0.3, self.training))


class Digits(Task):
    optimizer: str = "adamw"

    def build_model(self, schema: Schema) -> nn.Module:
        return Net()

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return adamw(model, lr=3e-3)
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule:
        return cosine(optimizer, total_steps, warmup=0.1)

    def augment(self, batch: Any, uniform: Any) -> Any:
        shift = (uniform(1) < 0.5).reshape(-1, 1, 1, 1)
        return {**batch, "image": torch.where(shift, batch["image"].roll(1, 3), batch["image"])}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(when: str) -> Any:
    """Prepare the kill; returns what to call on each event."""
    kind, _, amount = when.partition(":")
    seen = 0

    def reached() -> bool:
        nonlocal seen
        seen += 1
        return seen == int(amount)

    if kind == "write":
        save_file = anyfit.state.save_file

        def torn(tensors: Any, path: Path, metadata: Any) -> None:
            save_file(tensors, path, metadata=metadata)
            if reached():
                os.truncate(path, path.stat().st_size // 2)
                die()

        anyfit.state.save_file = torn  # type: ignore[assignment]
    elif kind == "rename":
        mark_best = Folder.mark_best
        Folder.mark_best = lambda self, path, state=None: die() if reached() else mark_best(self, path, state)  # type: ignore[method-assign]
    elif kind == "line":
        line = Folder.line

        def half(self: Folder, event: Any) -> None:
            line(self, event)
            if reached():
                os.truncate(self.path / "metrics.jsonl", (self.path / "metrics.jsonl").stat().st_size - 9)
                die()

        Folder.line = half  # type: ignore[method-assign]

    def on_event(event: dict[str, Any]) -> None:
        if kind == "time" and event["event"] == "start":
            timer = threading.Timer(float(amount), die)
            timer.daemon = True
            timer.start()

    return on_event


def main(run: str, optimizer: str, channels_last: str, when: str) -> None:
    torch.set_num_threads(1)
    fit(
        Digits(optimizer=optimizer),
        "digits",
        validation=0.2,
        run=run,
        resume=True,
        on_event=arm(when),
        epochs=16,
        batch_size=48,
        accumulate=2,
        best=True,
        clip=5.0,
        log_every=4,
        evaluate_every=7,
        checkpoint_every_s=0.05,
        channels_last=channels_last == "yes",
        seed=5,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
