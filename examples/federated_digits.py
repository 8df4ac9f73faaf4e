"""The same task on this machine and over three sites of very different size; neither site shows its rows to anyone.

python examples/federated_digits.py
"""

from __future__ import annotations

import anyfit
from anyfit.data import read_splits

parts = read_splits(anyfit.Source("digits"), None, 0.2, wants_validation=False)
train, test = parts["train"], parts["test"]
sites = {"village": train.slice(0, 60), "town": train.slice(60, 300), "city": train.slice(360)}

task = anyfit.Image(channels=16)
alone = anyfit.fit(task, train, test=test, epochs=12, batch_size=32, seed=1)
together = anyfit.federate(task, sites, rounds=6, epochs=2, batch_size=32, seed=1, test=test)
single = anyfit.fit(task, sites["village"], test=test, epochs=12, batch_size=32, seed=1)

for name, run in (("all rows in one place", alone), ("federated", together), ("village alone", single)):
    print(f"{name:<22} {run.splits['test']['accuracy']:.3f}")
