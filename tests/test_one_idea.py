"""The test that states the project: here, on unequal workers, and over sites, the same task learns the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from anyfit.cluster import Cluster
from anyfit.data import Source
from anyfit.federate import federate
from anyfit.fit import fit
from anyfit.schema import Schema
from anyfit.strategy import FedAvg
from anyfit.tasks.tabular import Perceptron, Tabular
from anyfit.update import Update

ROUNDS = 5


class Plain(Tabular):
    """Plain SGD, no dropout, no batch statistics."""

    hidden: tuple[int, ...] = (8,)
    dropout: float = 0.0

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    def build_schedule(self, optimizer: Any, total_steps: int) -> None:
        return None


def table(rows: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    numbers = random.normal(size=(rows, 3)) * [1.0, 100.0, 1e-3] + [0.0, 1e4, 1.0]
    kind = random.choice(["a", "b", "c"], size=rows)
    target = np.where(numbers[:, 0] + 0.01 * (numbers[:, 1] - 1e4) + (kind == "b") > 0, "yes", "no")
    columns = {f"x{index}": numbers[:, index] for index in range(3)}
    return pa.table({**columns, "kind": kind, "target": target})


@pytest.fixture(scope="module")
def sites() -> dict[str, pa.Table]:
    return {"north": table(5, 1), "south": table(40, 2), "west": table(52, 3)}


OPTIONS: dict[str, Any] = {"batch_size": None, "dtype": "float64", "seed": 3}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_fit_here_on_unequal_workers_and_federate_learn_the_same_weights(sites: dict[str, pa.Table]) -> None:
    """One process; two processes of which one takes five sixths of each step; three sites of 5, 40 and 52 rows."""
    pooled = pa.concat_tables(list(sites.values()))
    alone = fit(Plain(), pooled, target="target", steps=ROUNDS, **OPTIONS)
    events: list[dict[str, Any]] = []
    unequal = Cluster(nproc=2, shares="5:1")
    shared = fit(Plain(), pooled, target="target", steps=ROUNDS, cluster=unequal, on_event=events.append, device="cpu", **OPTIONS)
    together = federate(Plain(), sites, rounds=ROUNDS, steps=1, target="target", **OPTIONS)
    assert difference(alone.state.model, together.state.model) < 1e-10
    assert difference(alone.state.model, shared.state.model) < 1e-10
    (ranks,) = (event["ranks"] for event in events if event["event"] == "ranks")
    assert [rank["share"] for rank in ranks] == [81, 16], "of 97 rows"
    assert isinstance(alone.model, Perceptron)
    start = fit(Plain(), pooled, target="target", steps=1, **OPTIONS)
    assert difference(alone.state.model, start.state.model) > 1e-2, "nothing was learnt, so equality would say nothing"


class MeanOfMeans(FedAvg):
    """The mistake: each site counts the same, however many rows it has."""

    def local(self, turn: Any) -> Update:
        update = super().local(turn)
        return Update.of("weights", update.mean("weights"), 1.0).joined(Update({"loss": update.groups["loss"]}))


def test_mean_of_means_fails(sites: dict[str, pa.Table]) -> None:
    alone = fit(Plain(), pa.concat_tables(list(sites.values())), target="target", steps=ROUNDS, **OPTIONS)
    wrong = federate(Plain(), sites, rounds=ROUNDS, steps=1, target="target", strategy=MeanOfMeans(), **OPTIONS)
    assert difference(alone.state.model, wrong.state.model) > 1e-4


def test_schemas_from_statistics_are_those_of_all_rows(sites: dict[str, pa.Table]) -> None:
    alone = fit(Plain(), pa.concat_tables(list(sites.values())), target="target", steps=1, **OPTIONS)
    together = federate(Plain(), sites, rounds=1, steps=1, target="target", **OPTIONS)
    ours, theirs = Schema.from_json(alone.state.schema), Schema.from_json(together.state.schema)
    for a, b in zip(ours.columns, theirs.columns, strict=True):
        assert (a.name, a.type, a.categories) == (b.name, b.type, b.categories)
        assert (a.mean is None) == (b.mean is None)
        if a.mean is None or b.mean is None:
            continue
        assert a.mean == pytest.approx(b.mean, rel=1e-12)
        assert a.std == pytest.approx(b.std, rel=1e-9)


def test_the_order_of_sites_changes_no_bit(sites: dict[str, pa.Table]) -> None:
    first = federate(Plain(), sites, rounds=2, steps=1, target="target", **OPTIONS)
    renamed = {"z": sites["north"], "a": sites["west"], "m": sites["south"]}
    second = federate(Plain(), renamed, rounds=2, steps=1, target="target", **OPTIONS)
    for name, tensor in first.state.model.items():
        assert torch.equal(tensor, second.state.model[name])
    assert Source.of(sites["north"]).name.startswith("Table")
