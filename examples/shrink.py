"""A trained network made to fit a microcontroller: half its channels, int8, C. Each verb takes a task and its state, and gives both back.

python examples/shrink.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import anyfit
from anyfit.data import read_splits

parts = read_splits(anyfit.Source("digits"), None, 0.2, wants_validation=False)
train, test = parts["train"], parts["test"]
run = anyfit.fit(anyfit.Image(channels=16, hidden=32), train, test=test, epochs=15, batch_size=32, seed=1)
cost = anyfit.resources(run.task, run)
print(f"trained  accuracy {run.splits['test']['accuracy']:.3f}  {cost.parameters:,} parameters, {cost.macs:,} MACs (estimated)")

# verb by verb
task, state = anyfit.prune(run.task, run, train, 0.5, structured=True, epochs=5, batch_size=32)
task, state = anyfit.quantize(task, state, train, epochs=3, batch_size=32)
with tempfile.TemporaryDirectory() as folder:
    artifact = anyfit.export(task, state, Path(folder) / "digits.c")  # with digits.h and main.c
    print(", ".join(f"{name} {artifact.figures[name]:,}" for name in ("flash_bytes", "ram_bytes")))

# or all at once, each stage measured on the same rows, and the compiled C compared with the integers bit for bit
done = anyfit.shrink(run.task, run, train, test=test, structured=0.5, quantize="int8", finetune=5, batch_size=32, export=["c"])
for stage in done.stages:
    accuracy = stage.value("accuracy")
    print(f"{stage.name:<16} {'' if accuracy is None else f'{accuracy:.3f}':<6} {stage.value('weights_bytes'):>8,} bytes of weights")
