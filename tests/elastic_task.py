"""A task for ranks that are processes, and a launcher that a test may kill: `python elastic_task.py CALL.json`, run by test_elastic.py.

CALL.json: {"pace_ms": ..., "cluster": fields of Cluster, "options": arguments of fit, "signal_at": step}. A line for each event.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anyfit.cluster import Cluster
from anyfit.fit import fit
from anyfit.schedule import Schedule, cosine
from anyfit.schema import Schema
from anyfit.task import Step, Task, adamw


class Digits(Task):
    """Layers without random numbers; a row takes a while, so that there is time to die in."""

    pace_ms: float = 0.0

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return adamw(model, lr=3e-3)

    def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule:
        return cosine(optimizer, total_steps, warmup=0.1)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        image = batch["image"]
        if model.training:
            time.sleep(len(image) * self.pace_ms / 1000)
        return model(image.flatten(1).to(next(model.parameters()).dtype) / 16)

    def augment(self, batch: Any, uniform: Any) -> Any:
        shift = (uniform(1) < 0.5).reshape(-1, 1, 1, 1)
        return {**batch, "image": torch.where(shift, batch["image"].roll(1, 3), batch["image"])}

    def step(self, model: nn.Module, batch: Any) -> Step:
        step = super().step(model, batch)
        return Step(step.loss, step.count, step.outputs, step.targets, {"twice": 2 * step.loss.detach()})


OPTIONS: dict[str, Any] = {
    "data": "digits",
    "validation": 0.1,
    "test": 0.1,
    "batch_size": 48,
    "dtype": "float64",
    "seed": 5,
    "log_every": 4,
    "evaluate_every": 10,
    "best": True,
    "clip": 5.0,
    "device": "cpu",
}


def main(call: dict[str, Any]) -> None:
    def told(event: dict[str, Any]) -> None:
        print(json.dumps({**event, "pid": os.getpid()}), flush=True)

    done = fit(Digits(pace_ms=call["pace_ms"]), cluster=Cluster(**call["cluster"]), on_event=told, **{**OPTIONS, **call["options"]})
    print(json.dumps({"event": "done", "stopped": done.stopped, "ranks": done.result.get("ranks")}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
