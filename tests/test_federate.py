"""Federation in process: what is exchanged, what is refused, resume, and figures pooled from sums."""

from __future__ import annotations

import json
import re
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

import anyfit
from anyfit import FedAvg, Source, Task
from anyfit.data import read_splits
from anyfit.errors import DataError, InputError, RunError, StateError, TaskError
from anyfit.schema import Schema


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    return read_splits(Source("digits"), None, 0.2, wants_validation=False)


@pytest.fixture(scope="module")
def sites(digits: dict[str, Any]) -> dict[str, pa.Table]:
    train = digits["train"]
    return {"small": train.slice(0, 40), "middle": train.slice(40, 300), "large": train.slice(340)}


TASK = anyfit.Image(channels=4, hidden=32, dropout=0.1)
LOCAL: dict[str, Any] = {"rounds": 3, "batch_size": 32, "seed": 2}


def test_figures_pooled_from_sums_are_those_of_all_rows(digits: dict[str, Any], sites: dict[str, pa.Table]) -> None:
    run = anyfit.federate(TASK, sites, test=digits["test"], **LOCAL)
    expected = anyfit.evaluate(run, digits["train"])
    for name in ("accuracy", "f1", "confusion", "rows"):
        assert run.splits["train"][name] == expected[name]
    assert run.splits["train"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert {site: figures["rows"] for site, figures in run.result["sites"].items()} == {
        name: table.num_rows for name, table in sites.items()
    }


def test_a_larger_site_counts_more_and_the_loss_falls(sites: dict[str, pa.Table]) -> None:
    run = anyfit.federate(TASK, sites, **LOCAL)
    rounds = [line for line in run.history if line["event"] == "round"]
    assert rounds[0]["loss"] > rounds[-1]["loss"]
    weighted = sum(site["rows"] * site["loss"] for site in rounds[0]["sites"].values()) / sum(table.num_rows for table in sites.values())
    assert rounds[0]["loss"] == pytest.approx(weighted, rel=1e-6)


def test_bytes_moved_are_those_of_the_weights(sites: dict[str, pa.Table]) -> None:
    run = anyfit.federate(TASK, sites, **LOCAL)
    weights = 4 * run.record["parameters"]
    for line in run.history:
        assert line["bytes_down"] == 3 * weights
        assert line["bytes_up"] == 3 * (weights + 8)  # and the loss


class Frozen(anyfit.Image):
    def build_model(self, schema: Schema) -> nn.Module:
        model = super().build_model(schema)
        model.conv1.requires_grad_(False)
        return model


def test_frozen_weights_are_neither_sent_nor_changed(sites: dict[str, pa.Table]) -> None:
    run = anyfit.federate(Frozen(channels=4), sites, **LOCAL)
    assert run.history[0]["bytes_down"] == 3 * 4 * run.record["trainable"] < 3 * 4 * run.record["parameters"]
    other = anyfit.federate(Frozen(channels=4), sites, **{**LOCAL, "rounds": 1})
    assert torch.equal(run.state.model["conv1.weight"], other.state.model["conv1.weight"])
    assert not torch.equal(run.state.model["conv2.weight"], other.state.model["conv2.weight"])


class Normed(Task):
    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["image"].float() / 16)


def test_batch_statistics_travel_or_are_refused(digits: dict[str, Any], sites: dict[str, pa.Table]) -> None:
    with pytest.raises(TaskError, match=re.escape("keeps batch statistics (2.running_mean)")):
        anyfit.federate(Normed(), sites, **LOCAL)
    run = anyfit.federate(Normed(), sites, batch_statistics="aggregate", test=digits["test"], **{**LOCAL, "rounds": 6})
    assert run.splits["test"]["accuracy"] > 0.7
    assert float(run.state.model["2.running_mean"].abs().max()) > 0


def test_resume_between_rounds_is_exact(digits: dict[str, Any], sites: dict[str, pa.Table], tmp_path: Path) -> None:
    options = {**LOCAL, "rounds": 4, "test": digits["test"]}
    whole = anyfit.federate(TASK, sites, run=tmp_path / "whole", **options)

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["round"] == 2:
            raise Stop

    with pytest.raises(Stop):
        anyfit.federate(TASK, sites, run=tmp_path / "cut", on_event=stop, **options)
    again = anyfit.federate(TASK, sites, run=tmp_path / "cut", resume=True, **options)
    assert again.history == whole.history
    for name, tensor in whole.state.model.items():
        assert torch.equal(tensor, again.state.model[name])
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert again.result["bytes"] == whole.result["bytes"]
    record = json.loads((tmp_path / "cut/run.json").read_text())
    assert record["kind"] == "federate" and set(record["sites"]) == set(sites)
    assert anyfit.evaluate(tmp_path / "cut", digits["test"])["accuracy"] == whole.splits["test"]["accuracy"]
    with pytest.raises(StateError, match="has the strategy"):
        anyfit.federate(TASK, sites, strategy=FedAvg(lr=0.5), run=tmp_path / "cut", resume=True, **options)
    with pytest.raises(StateError, match="has other small rows"):
        anyfit.federate(TASK, {**sites, "small": sites["small"].slice(1)}, run=tmp_path / "cut", resume=True, **options)


def test_learning_rate_schedules_run_over_the_whole_federation(sites: dict[str, pa.Table]) -> None:
    seen: list[float] = []

    class Watched(FedAvg):
        def local(self, turn: Any) -> Any:
            change = turn.train()
            seen.append(turn.trainer.learning_rate())
            return turn.update(change)

    anyfit.federate(TASK, {"one": sites["middle"]}, strategy=Watched(), **{**LOCAL, "rounds": 5})
    assert seen[0] > seen[1] > seen[2] > seen[3] > seen[4]


def test_arrays_federate_too() -> None:
    generator = torch.Generator().manual_seed(0)

    class Linear(Task):
        def build_model(self, schema: Schema) -> nn.Module:
            return nn.Linear(3, schema.num_classes)

    def part(rows: int, labels: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rows, 3, generator=generator), torch.arange(rows) % labels

    run = anyfit.federate(Linear(), {"a": part(20, 2), "b": part(30, 4)}, rounds=2, batch_size=10)
    assert run.model.out_features == 4


TABLE = pa.table({"x": np.arange(40.0), "kind": ["a", "b"] * 20, "target": np.arange(40) % 2})


class Explodes(anyfit.Tabular):
    def loss(self, outputs: Any, batch: Any) -> Any:
        return outputs.sum() * float("nan"), len(outputs)


@pytest.mark.parametrize(
    ("sites", "options", "error", "message"),
    [
        ({}, {}, InputError, "sites is empty"),
        ({"a": TABLE, "b": TABLE.slice(0, 0)}, {}, DataError, "has no rows"),
        (
            {"a": TABLE, "b": TABLE.rename_columns(["y", "kind", "target"])},
            {},
            DataError,
            "site 'b' has another schema than 'a': column 'x'",
        ),
        ({"a": TABLE}, {"rounds": 0}, InputError, "rounds (=0) must be at least 1"),
        (["x/a.csv", "y/a.csv"], {}, InputError, "two sites are named 'a'"),
        ({"a": TABLE.slice(0, 40).set_column(2, "target", pa.array([1] * 40))}, {}, DataError, "one class only at all sites together"),
    ],
)
def test_bad_input_is_refused(sites: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        anyfit.federate(anyfit.Tabular(), sites, **{"rounds": 1, **options})


def test_a_site_that_fails_stops_the_round_with_its_reason_and_the_state_stays(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=re.escape("site 'a' failed in round 1: loss (=nan) is not finite")):
        anyfit.federate(Explodes(), {"a": TABLE}, rounds=1, run=tmp_path / "r")
    assert not list((tmp_path / "r/checkpoints").glob("*.safetensors"))


def test_a_site_with_fewer_rows_than_a_batch_or_one_class_takes_part() -> None:
    tiny = TABLE.take([0, 2, 4])
    run = anyfit.federate(anyfit.Tabular(), {"a": TABLE, "tiny": tiny}, rounds=2, batch_size=16)
    assert run.result["sites"]["tiny"]["rows"] == 3


def test_sums_of_large_sites_have_more_room_and_the_same_weights(sites: dict[str, pa.Table], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**LOCAL, "rounds": 2, "dtype": "float64"}
    before = anyfit.federate(TASK, sites, **options)
    monkeypatch.setattr(import_module("anyfit.federate.rounds"), "MOST_FINE", 100)
    after = anyfit.federate(TASK, sites, **options)
    for name, tensor in before.state.model.items():
        assert float((tensor - after.state.model[name]).abs().max()) < 1e-12

    class Leaps(FedAvg):  # 940 rows in all that move by 10,000: more than one limb holds
        def local(self, turn: Any) -> Any:
            return turn.update(turn.train() * 0 + 10_000)

    leapt = anyfit.federate(TASK, sites, strategy=Leaps(), **{**options, "rounds": 1})
    start = anyfit.federate(TASK, sites, strategy=FedAvg(lr=1e-30), **{**options, "rounds": 1})
    assert float((leapt.state.model["output.bias"] - start.state.model["output.bias"] - 10_000).abs().max()) < 1e-9
    monkeypatch.undo()
    again = anyfit.federate(TASK, sites, strategy=Leaps(), **{**options, "rounds": 1})  # tried in one limb first
    assert torch.equal(again.state.model["output.bias"], leapt.state.model["output.bias"])
    assert [line["loss"] for line in again.history if line["event"] == "round"] == [
        line["loss"] for line in leapt.history if line["event"] == "round"
    ]


def test_rounds_between_two_checkpoints_are_run_again_and_what_sites_remember_with_them(sites: dict[str, pa.Table], tmp_path: Path) -> None:
    options = {**LOCAL, "rounds": 5, "strategy": "scaffold", "checkpoint_every_s": 1e6}
    whole = anyfit.federate(TASK, sites, run=tmp_path / "whole", **options)
    assert [path.name for path in (tmp_path / "whole/checkpoints").iterdir()] == ["step-000000005.safetensors"]

    class Killed(Exception):
        pass

    def run(until: int, *, kills: bool) -> None:
        def on_event(event: dict[str, Any]) -> str | None:
            if event["event"] == "round" and event["round"] == until and kills:
                raise Killed
            return "stop" if event["event"] == "round" and event["round"] == until else None

        anyfit.federate(TASK, sites, run=tmp_path / "cut", resume=(tmp_path / "cut").exists(), on_event=on_event, **options)

    with pytest.raises(Killed):
        run(2, kills=True)
    assert not list((tmp_path / "cut/checkpoints").glob("*.safetensors"))
    run(2, kills=False)  # from the beginning again, and saved because it was asked to stop
    with pytest.raises(Killed):
        run(4, kills=True)
    run(5, kills=False)
    last = anyfit.federate(TASK, sites, run=tmp_path / "cut", resume=True, **options)
    for name, tensor in whole.state.model.items():
        assert torch.equal(tensor, last.state.model[name])
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


# What a review found


class Weighed(anyfit.Tabular):
    hidden: tuple[int, ...] = (4,)
    dropout: float = 0.0

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.3)

    def build_schedule(self, optimizer: Any, total_steps: int) -> None:
        return None


def test_exact_figures_do_not_leave_under_the_privacy_of_examples(sites: dict[str, pa.Table]) -> None:
    privacy = anyfit.ExamplePrivacy(noise_multiplier=1.0, delta=1e-3)
    run = anyfit.federate(TASK, sites, privacy=privacy, **{**LOCAL, "rounds": 1})
    assert run.splits == {} and run.result["sites"] == {}


def test_noise_that_was_calibrated_stays_so_that_a_longer_run_stops_at_its_budget(sites: dict[str, pa.Table], tmp_path: Path) -> None:
    options: dict[str, Any] = {**LOCAL, "privacy": anyfit.ExamplePrivacy(epsilon=2.0, delta=1e-3), "run": tmp_path / "r"}
    short = anyfit.federate(TASK, sites, **{**options, "rounds": 2})
    longer = anyfit.federate(TASK, sites, resume=True, **{**options, "rounds": 6})
    assert short.result["privacy"]["epsilon"] <= longer.result["privacy"]["epsilon"] <= 2.0
    assert longer.stopped == "budget" and longer.result["rounds"] < 6


def test_one_unit_at_several_sites_is_refused() -> None:
    table = pa.table({"x": np.arange(60.0), "patient": [f"p{row % 20}" for row in range(60)], "target": np.arange(60) % 2})
    privacy = anyfit.ExamplePrivacy(noise_multiplier=1.0, delta=1e-3, unit="patient")
    with pytest.raises(InputError, match="rows of one value at several sites"):
        anyfit.federate(anyfit.Tabular(), anyfit.partition(table, "iid", 3), rounds=1, privacy=privacy)
    third = table.append_column("ward", pa.array([f"w{row % 20 // 7}" for row in range(60)]))
    run = anyfit.federate(anyfit.Tabular(), anyfit.partition(third, "column:ward"), rounds=1, batch_size=5, privacy=privacy)
    assert run.stopped == "finished"


def test_rows_that_are_held_back_count_for_nothing() -> None:
    random = np.random.default_rng(0)
    table = pa.table({"x": random.normal(size=200), "y": random.normal(size=200), "target": random.choice(["yes", "no"], 200)})
    parts = anyfit.partition(table, "quantity:0.5", 4, seed=1)
    options: dict[str, Any] = {"rounds": 4, "steps": 1, "batch_size": None, "dtype": "float64", "test": 0.4, "device": "cpu"}
    average, scaffold = (anyfit.federate(Weighed(), parts, strategy=name, **options) for name in ("fedavg", "scaffold"))
    for name, tensor in average.state.model.items():
        assert float((tensor - scaffold.state.model[name]).abs().max()) < 1e-12
    assert sum(site["rows"] for site in average.record["sites"].values()) < 140


def test_a_resume_with_other_rows_is_refused(digits: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {**LOCAL, "rounds": 1, "run": tmp_path / "r"}
    anyfit.federate(TASK, anyfit.partition(digits["train"], "iid", 3), **options)
    options |= {"rounds": 2, "resume": True}
    with pytest.raises(StateError, match="has another partition"):
        anyfit.federate(TASK, anyfit.partition(digits["train"], "shards:1", 3, seed=5), **options)
    with pytest.raises(StateError, match="has another source"):
        anyfit.federate(TASK, anyfit.partition(Source(digits["train"], group="target"), "iid", 3), **options)
    with pytest.raises(StateError, match="validation"):
        anyfit.federate(TASK, anyfit.partition(digits["train"], "iid", 3), validation=0.2, **options)
    limited = anyfit.federate(TASK, anyfit.partition(digits["train"], "iid", 3), limits=anyfit.Limits(norm=1e6), **options)
    assert limited.record["forks"][-1]["changed"]["limits"][1]["norm"] == 1e6


@pytest.mark.parametrize("strategy", ["fedavgm:momentum=0.9", "fedadam:lr=0.1", "fednova", "fedmedian"])
def test_batch_statistics_are_plain_means_whatever_the_strategy(sites: dict[str, pa.Table], strategy: str) -> None:
    run = anyfit.federate(Normed(), sites, strategy=strategy, batch_statistics="aggregate", **{**LOCAL, "rounds": 8})
    assert float(run.state.model["2.running_var"].min()) > 0
    with pytest.raises(InputError, match="would leave each site beside its noisy weights"):
        anyfit.federate(Normed(), sites, batch_statistics="aggregate", privacy=anyfit.SitePrivacy(noise_multiplier=1.0, delta=0.1), **LOCAL)


def test_splits_that_the_data_brings_are_heeded(digits: dict[str, Any]) -> None:
    words = pa.array([("train", "train", "test", "validation")[row % 4] for row in range(digits["train"].num_rows)])
    table = digits["train"].append_column("part", words)
    cut = {"a": Source(table.slice(0, 400), split="part"), "b": Source(table.slice(400, 600), split="part")}
    run = anyfit.federate(TASK, cut, **LOCAL)
    assert {split: figures["rows"] for split, figures in run.splits.items()} == {"validation": 250, "test": 250}
    dealt = anyfit.federate(TASK, anyfit.partition(Source(table, split="part"), "iid", 3), **LOCAL)
    assert dealt.splits["test"]["rows"] == sum(word == "test" for word in words.to_pylist())


@pytest.mark.parametrize("kind", ["weights", "labels that are missing", "a site without labels"])
def test_rows_count_as_the_loss_counts_them(kind: str) -> None:
    """FedAvg with one step over all rows is training on the pooled rows, also where rows do not count alike."""
    random = np.random.default_rng(0)
    target: list[str | None] = random.choice(["yes", "no"], 60).tolist()
    if kind != "weights":
        target = [None if row % 4 == 0 or (kind.startswith("a site") and row < 10) else word for row, word in enumerate(target)]
    table = pa.table({"x": random.normal(size=60), "w": random.uniform(0.1, 3.0, 60), "target": pa.array(target)})
    weight = {"weight": "w"} if kind == "weights" else {"ignore": ("w",)}
    options: dict[str, Any] = {"batch_size": None, "dtype": "float64", "device": "cpu"}
    pooled = anyfit.fit(Weighed(), Source(table, "target", **weight), steps=3, **options)
    cut = {"a": table.slice(0, 10), "b": table.slice(10, 37), "c": table.slice(47)}
    cut = {name: Source(part, "target", **weight) for name, part in cut.items()}
    run = anyfit.federate(Weighed(), cut, rounds=3, steps=1, **options)
    for name, tensor in pooled.state.model.items():
        assert float((tensor - run.state.model[name]).abs().max()) < 1e-10


def test_prices_in_their_own_unit_are_learnt() -> None:
    random = np.random.default_rng(1)
    table = pa.table({"x": random.normal(size=400), "price": random.normal(3e5, 1e5, 400)})

    class Raw(Weighed):
        def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=1e-12)

        def build_model(self, schema: Schema) -> nn.Module:
            return nn.Linear(1, 1)

        def forward(self, model: nn.Module, batch: Any) -> Any:
            return model(batch["continuous"]).squeeze(1) * 1e5

    sites = {"a": Source(table.slice(0, 150), "price"), "b": Source(table.slice(150), "price")}
    run = anyfit.federate(Raw(lr=1.0), sites, strategy="fednova", rounds=2, batch_size=50)
    assert run.stopped == "finished" and all(bool(torch.isfinite(tensor).all()) for tensor in run.state.model.values())


def test_rounds_by_time_go_through_all_rows(sites: dict[str, pa.Table]) -> None:
    seen: set[int] = set()

    class Listens(anyfit.Tabular):
        def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=0.0)

        def step(self, model: nn.Module, batch: Any) -> Any:
            if model.training:
                seen.update(batch["continuous"].flatten().mul(1e6).round().long().tolist())
                time.sleep(0.004)
            return super().step(model, batch)

    table = pa.table({"x": np.arange(200.0), "target": np.arange(200) % 2})
    anyfit.federate(Listens(), {"a": Source(table, "target")}, rounds=40, seconds=0.005, batch_size=10)
    assert len(seen) > 120


def test_a_round_stays_where_its_evaluation_fails(sites: dict[str, pa.Table], tmp_path: Path) -> None:
    class Fails(anyfit.Image):
        def evaluate_step(self, model: nn.Module, batch: Any) -> Any:
            raise RuntimeError("no figures today")

    options: dict[str, Any] = {**LOCAL, "run": tmp_path / "r", "checkpoint_every_s": 1e6}
    with pytest.raises(RunError, match="no figures today"):
        anyfit.federate(Fails(channels=4, hidden=32), sites, validation=0.2, **options)
    assert [path.name for path in (tmp_path / "r/checkpoints").glob("step*")] == ["step-000000001.safetensors"]


def test_the_rate_of_site_privacy_stays_when_sites_have_joined(sites: dict[str, pa.Table], tmp_path: Path) -> None:
    privacy = anyfit.SitePrivacy(noise_multiplier=0.5, delta=0.01)
    options: dict[str, Any] = {**LOCAL, "privacy": privacy, "sample": 1, "run": tmp_path / "r", "faults": anyfit.Faults(joins={"large": 2})}
    first = anyfit.federate(TASK, sites, **{**options, "rounds": 3})
    again = anyfit.federate(TASK, sites, resume=True, **{**options, "rounds": 4})
    assert first.record["privacy"] == again.record["privacy"] and again.record["privacy"]["sampling_rate"] == 0.5
    with pytest.raises(InputError, match="Cyclic chooses who takes part"):
        anyfit.federate(TASK, sites, strategy="cyclic", privacy=privacy, **LOCAL)


def test_a_class_that_only_held_out_rows_have_is_heard_of_before_training() -> None:
    labels = ["a", "b"] * 20
    table = pa.table({"x": np.arange(40.0), "target": labels, "part": ["train"] * 39 + ["test"]})
    odd = table.set_column(1, "target", pa.array([*labels[:-1], "c"]))
    with pytest.raises(DataError, match=r"site 'two'.*'c'"):
        anyfit.federate(anyfit.Tabular(), {"one": Source(table, split="part"), "two": Source(odd, split="part")}, rounds=1)


def test_what_follows_the_validation_loss_has_none_at_a_site(sites: dict[str, pa.Table]) -> None:
    from anyfit import schedule

    class Plateau(anyfit.Image):
        def build_schedule(self, optimizer: Any, total_steps: int) -> Any:
            return schedule.plateau(optimizer)

    with pytest.raises(RunError, match="follows the validation loss"):
        anyfit.federate(Plateau(channels=4), sites, **LOCAL)
