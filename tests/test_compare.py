"""What a federation is compared with: pooled rows and single sites, of one schema, one length and one set of test rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

import anyfit
from anyfit import Source, Task
from anyfit.data import read_splits
from anyfit.errors import DataError, InputError
from anyfit.schema import Schema

TASK = anyfit.Image(channels=4, hidden=32, dropout=0.0)
LOCAL: dict[str, Any] = {"rounds": 2, "batch_size": 32, "seed": 2}


@pytest.fixture(scope="module")
def digits() -> dict[str, pa.Table]:
    return read_splits(Source("digits"), None, 0.2, wants_validation=False)


@pytest.fixture(scope="module")
def sites(digits: dict[str, pa.Table]) -> dict[str, pa.Table]:
    return {"a": digits["train"].slice(0, 20), "b": digits["train"].slice(20, 300)}


def by_name(run: anyfit.Run) -> dict[str, dict[str, Any]]:
    return {line["what"]: line for line in run.result["comparison"]}


def test_lines_and_columns(sites: dict[str, pa.Table], tmp_path: Path) -> None:
    run = anyfit.federate(TASK, sites, test=0.2, compare=True, run=tmp_path / "r", **LOCAL)
    assert list(by_name(run)) == ["federated", "pooled rows", "alone: a", "alone: b", "alone, mean of sites"]
    assert all(list(line) == ["what", "all", "a", "b"] for line in run.result["comparison"])
    assert run.result["compared"] == {"figure": "accuracy", "split": "test"}
    federated = by_name(run)["federated"]
    assert federated["all"] == run.splits["test"]["accuracy"] and federated["b"] == run.result["sites"]["b"]["accuracy"]
    first, second, mean = (by_name(run)[name] for name in ("alone: a", "alone: b", "alone, mean of sites"))
    assert mean["all"] == pytest.approx((first["all"] + second["all"]) / 2)
    told = json.loads((tmp_path / "r/result.json").read_text())
    assert told["comparison"] == run.result["comparison"]
    anyfit.write_report(tmp_path / "r")
    assert (tmp_path / "r/comparison.png").stat().st_size > 1000
    assert "alone, mean of sites" in (tmp_path / "r/report.html").read_text()


class Linear(Task):
    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["image"].to(model[1].weight.dtype) / 16)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)


def test_the_pooled_model_is_that_of_fit_on_the_pooled_rows(digits: dict[str, pa.Table], sites: dict[str, pa.Table]) -> None:
    """As long as a site trained in all: rounds x local epochs. The same model as a plain fit of that length."""
    plan: dict[str, Any] = {"batch_size": None, "seed": 3, "dtype": "float64"}
    run = anyfit.federate(Linear(), sites, rounds=4, epochs=5, test=digits["test"], compare=True, **plan)
    pooled = anyfit.fit(Linear(), pa.concat_tables(sites.values()), epochs=20, test=digits["test"], **plan)
    alone = anyfit.fit(Linear(), sites["a"], epochs=20, test=digits["test"], **plan)
    assert by_name(run)["pooled rows"] == {"what": "pooled rows", "test": pooled.splits["test"]["accuracy"]}
    assert by_name(run)["alone: a"]["test"] == alone.splits["test"]["accuracy"] < pooled.splits["test"]["accuracy"]


def test_one_site_is_its_own_comparison(sites: dict[str, pa.Table]) -> None:
    """With one site and one full-batch step each round, federated, pooled and alone are one training."""
    run = anyfit.federate(Linear(), {"only": sites["b"]}, rounds=15, test=0.3, compare=True, batch_size=None, seed=1, dtype="float64")
    assert len({line["all"] for line in run.result["comparison"]}) == 1


def test_the_best_by_validation_is_kept_for_all(sites: dict[str, pa.Table]) -> None:
    run = anyfit.federate(TASK, sites, validation=0.2, compare=True, best=True, **LOCAL)
    assert run.result["compared"]["split"] == "validation"


def test_of_many_sites_twenty_train_alone() -> None:
    partition = anyfit.partition("digits", "iid", 25)
    options: dict[str, Any] = {"rounds": 1, "steps": 1, "batch_size": 32, "compare": True}
    run = anyfit.federate(Linear(), partition, seed=1, **options)
    alone = [name for name in by_name(run) if name.startswith("alone: ")]
    assert len(alone) == 20 and len(by_name(run)["pooled rows"]) == 22
    assert run.result["compared"]["split"] == "train"
    again = anyfit.federate(Linear(), partition, seed=2, **options)
    assert [name for name in by_name(again) if name.startswith("alone: ")] != alone


def test_tensors_and_data_sets_are_pooled_too() -> None:
    generator = torch.Generator().manual_seed(0)

    class Plane(Task):
        def build_model(self, schema: Schema) -> nn.Module:
            return nn.Linear(3, 2)

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, 3, generator=generator)
        return x, (x[:, 0] > 0).long()

    tensors = {"a": rows(30), "b": rows(50)}
    options: dict[str, Any] = {"rounds": 2, "batch_size": 10, "test": 0.2, "compare": True}
    first = by_name(anyfit.federate(Plane(), tensors, **options))
    sets = {name: torch.utils.data.TensorDataset(*tensors[name]) for name in tensors}
    second = by_name(anyfit.federate(Plane(), sets, **options))
    assert first["pooled rows"] == pytest.approx(second["pooled rows"])


def test_what_has_no_counterpart_is_refused_before_anything_trains(sites: dict[str, pa.Table]) -> None:
    seen: list[Any] = []
    for options, message in (
        ({"seconds": 0.1}, "compare needs a known amount of local work"),
        ({"strategy": anyfit.NewtonRaphson(l2=1.0)}, "compare trains by gradient steps, which NewtonRaphson does not take"),
        ({"privacy": anyfit.SitePrivacy(epsilon=8, delta=1e-3)}, "give test or validation"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            anyfit.federate(TASK, sites, compare=True, on_event=seen.append, **LOCAL, **options)
    assert seen == []


def test_rows_that_cannot_be_pooled_are_named_and_the_run_is_kept(tmp_path: Path) -> None:
    numbers = pa.table({"x": [0.5, 1.5, 2.5, 3.5], "y": ["a", "b", "a", "b"], "k": [1, 2, 1, 2]})
    words = pa.table({"x": [0.5, 1.5, 2.5, 3.5], "y": ["a", "b", "a", "b"], "k": ["1", "2", "u", "2"]})
    sites = {name: Source(table, target="y", types={"k": "categorical"}) for name, table in (("n", numbers), ("w", words))}
    with pytest.raises(DataError, match="cannot pool the rows of all sites"):
        anyfit.federate(anyfit.Tabular(hidden=(4,)), sites, rounds=1, compare=True, run=tmp_path / "r")
    assert "splits" in json.loads((tmp_path / "r/result.json").read_text())
