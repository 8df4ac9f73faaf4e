"""One fit over two unequal processes: the slow one gets less of each step, and what is learnt is what one process learns.

python examples/cluster.py
"""

from __future__ import annotations

import os
import time
from typing import Any

from torch import nn

import anyfit


class Slowed(anyfit.Image):
    """Rows take a while, as on real hardware; in the second process three times as long, as on a card of two generations ago."""

    dropout: float = 0.0
    seconds_per_row: float = 5e-4

    def step(self, model: nn.Module, batch: Any) -> anyfit.Step:
        if model.training:
            slowness = 3 if os.environ.get("LOCAL_RANK") == "1" else 1
            time.sleep(slowness * self.seconds_per_row * len(batch["target"]))
        return super().step(model, batch)


def tell(event: dict[str, Any]) -> None:
    if event["event"] == "ranks":
        parts = " + ".join(f"{rank['share']} rows" for rank in event["ranks"])
        print(f"step {event['step']:>3}: {parts}, {event['samples_per_s']:,.0f} rows/s", flush=True)


if __name__ == "__main__":  # the other process reads this file too
    task, plan = Slowed(), {"epochs": 2, "dtype": "float64", "seed": 1, "log_every": 10, "test": 0.2}
    together = anyfit.fit(task, "digits", nproc=2, on_event=tell, **plan)
    alone = anyfit.fit(task, "digits", **plan)

    weights = alone.model.state_dict()
    apart = max(float((weights[name] - value).abs().max()) for name, value in together.model.state_dict().items())
    for name, run in (("one process", alone), ("two unequal ones", together)):
        print(f"{name:<18} {run.result['seconds']:5.1f} s  accuracy {run.splits['test']['accuracy']:.4f}")
    print(f"their weights differ by at most {apart:.0e}")
