"""A federation in which things go wrong: sites drop out, come late and fail, processes are killed, disks are full, ranks are many."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

import anyfit
from anyfit import Faults, FedAvg, Schema, Task
from anyfit.errors import BusyError, DataError, InputError, RunError, StateError
from anyfit.state import State
from anyfit.strategy import Cyclic, FedMedian, Scaffold, SingleSite
from anyfit.worker import Memories

GENERATOR = torch.Generator().manual_seed(0)


def many(sites: int, rows: int = 12) -> dict[str, Any]:
    """Sites of unlike sizes with some noise in their labels."""
    found = {}
    for site in range(sites):
        x = torch.randn(rows + site, 3, generator=torch.Generator().manual_seed(site))
        found[f"s{site:02d}"] = (x, (x[:, 0] + 0.3 * x[:, 1] > 0).long())
    return found


class Linear(Task):
    lr: float = 0.05

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Linear(3, 2)


OPTIONS: dict[str, Any] = {"rounds": 4, "batch_size": 5, "seed": 3}


def rounds_of(run: Any) -> list[dict[str, Any]]:
    return [line for line in run.history if line["event"] == "round"]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(tensor, b.state.model[name]) for name, tensor in a.state.model.items())


def stop_after(round: int) -> Any:
    return lambda event: "stop" if event["event"] == "round" and event["round"] == round else None


# ------------------------------------------------------------------------------------------------ who is there


def test_sites_are_sampled_by_seed() -> None:
    drawn = {}
    for seed in (3, 3, 4):
        run = anyfit.federate(Linear(), many(12), **{**OPTIONS, "seed": seed, "sample": 4, "rounds": 6})
        chosen = [tuple(line["sites"]) for line in rounds_of(run)]
        assert all(len(sites) == 4 for sites in chosen) and len(set(chosen)) > 3
        assert drawn.setdefault(seed, chosen) == chosen
    assert drawn[3] != drawn[4]
    share = anyfit.federate(Linear(), many(12), **{**OPTIONS, "sample": 0.25, "rounds": 2})
    assert [len(line["sites"]) for line in rounds_of(share)] == [3, 3]


def test_dropouts_are_missed_by_name_and_the_rest_goes_on() -> None:
    faults = Faults(dropout=0.3, seed=1)
    run = anyfit.federate(Linear(), many(8), quorum=0.25, faults=faults, **{**OPTIONS, "rounds": 6})
    lines = rounds_of(run)
    assert any(line.get("missing") for line in lines)
    for line in lines:
        assert sorted([*line["sites"], *line.get("missing", [])]) == sorted(many(8))
        weighted = sum(site["rows"] * site["loss"] for site in line["sites"].values()) / sum(s["rows"] for s in line["sites"].values())
        assert line["loss"] == pytest.approx(weighted, rel=1e-6)
    assert anyfit.federate(Linear(), many(8), quorum=0.25, faults=faults, **{**OPTIONS, "rounds": 6}).history == run.history


def test_a_straggler_past_the_deadline_is_not_waited_for() -> None:
    slow = Faults(delay_s={"s02": 1000.0})
    begun = time.monotonic()
    run = anyfit.federate(Linear(), many(4), quorum=2, deadline_s=100.0, faults=slow, **OPTIONS)
    assert time.monotonic() - begun < 60
    assert all(line["missing"] == ["s02"] for line in rounds_of(run))
    without = {name: rows for name, rows in many(4).items() if name != "s02"}
    assert same(run, anyfit.federate(Linear(), without, **OPTIONS)), "the straggler moved the weights"
    patient = anyfit.federate(Linear(), many(4), deadline_s=2000.0, faults=slow, **OPTIONS)
    assert all("missing" not in line for line in rounds_of(patient))
    random_ones = anyfit.federate(Linear(), many(4), quorum=1, deadline_s=100.0, faults=Faults(straggle=0.5, delay_s=1000.0), **OPTIONS)
    assert len({tuple(line.get("missing", ())) for line in rounds_of(random_ones)}) > 1


@pytest.mark.parametrize("quorum", [6, 0.99, None])
def test_a_quorum_that_is_never_met_stops_clearly_and_keeps_the_state(quorum: Any, tmp_path: Path) -> None:
    """From round 3 on, three of six sites are silent."""

    class From3(Faults):
        def drops(self, site: str, order: Any) -> bool:
            return order.round >= 3 and order.kind == "train" and site in ("s00", "s01", "s02")

    options = {**OPTIONS, "quorum": quorum, "checkpoint_every_s": 60.0}
    with pytest.raises(
        RunError, match=r"3 of 6 sites answered in round 3, but 6 must .*s00: no answer in time.*state after round 2 is kept"
    ):
        anyfit.federate(Linear(), many(6), faults=From3(), run=tmp_path / "r", **options)
    assert [path.name for path in (tmp_path / "r/checkpoints").glob("step*")] == ["step-000000002.safetensors"]
    again = anyfit.federate(Linear(), many(6), run=tmp_path / "r", resume=True, **options)
    whole = anyfit.federate(Linear(), many(6), **options)
    assert again.history == whole.history and same(again, whole)
    assert again.result["bytes"] == whole.result["bytes"], "what failed attempts moved is counted twice"


def test_a_round_without_its_quorum_is_tried_again_with_other_sites_and_leaves_nothing_behind() -> None:
    """What sites learnt in an attempt that did not count must not stay with them: SCAFFOLD's controls would no longer add up."""

    class First(Faults):
        def drops(self, site: str, order: Any) -> bool:
            return order.round == 2 and order.version == 1 and order.kind == "train" and site != self.one

        one = ""

    plain = anyfit.federate(Linear(), many(10), strategy=Scaffold(), sample=4, quorum=3, **OPTIONS)
    First.one = min(rounds_of(plain)[1]["sites"])
    seen: list[tuple[int, str]] = []
    run = anyfit.federate(
        Linear(),
        many(10),
        strategy=Scaffold(),
        sample=4,
        quorum=3,
        faults=First(),
        **OPTIONS,
        on_event=lambda event: seen.append((event["round"], event["site"])) if event["event"] == "reply" else None,
    )
    lines = rounds_of(run)
    assert (2, First.one) in seen, "nobody answered in the first attempt"
    assert len(lines[1]["sites"]) == 4 and list(lines[1]["sites"]) != list(rounds_of(plain)[1]["sites"])
    counted = sum(site["rows"] * site["loss"] for site in lines[1]["sites"].values()) / sum(s["rows"] for s in lines[1]["sites"].values())
    assert lines[1]["loss"] == pytest.approx(counted, rel=1e-6), "the first attempt's loss is in the figure"


def controls(memories: Memories, sites: dict[str, Any], round: int) -> torch.Tensor:
    """The mean of the sites' controls by rows; a site that never took part has none."""
    rows = sum(len(y) for _, y in sites.values())
    total = torch.zeros(8, dtype=torch.float64)
    for name, (_, y) in sites.items():
        control = memories.read(name, round + 1).get("control")
        if control is not None:
            total += control.double() * len(y) / rows
    return total


def test_scaffold_keeps_its_sum_when_sites_are_lost_and_rounds_are_retried(tmp_path: Path) -> None:
    sites = many(8)
    faults = Faults(dropout=0.3, seed=4)
    options = {**OPTIONS, "rounds": 6, "strategy": Scaffold(), "sample": 5, "quorum": 3, "run": tmp_path / "r"}
    run = anyfit.federate(Linear(), sites, faults=faults, **options)
    assert any(line.get("missing") for line in rounds_of(run))
    state = State.load(max((tmp_path / "r/checkpoints").glob("step-*")))
    expected = controls(Memories(tmp_path / "r/sites"), sites, 6)
    everywhere = state.extras["strategy"]["controls"] / sum(len(y) for _, y in sites.values())
    assert torch.allclose(everywhere, expected, atol=1e-6)
    assert float(expected.abs().max()) > 1e-3


def test_what_is_remembered_of_a_turn_that_did_not_count_goes_but_not_what_it_cost(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        memories = Memories(folder)
        memories.write("a", 1, {"control": torch.ones(1)})
        memories.write("a", 2, {"control": torch.zeros(1), "spent": 7})
        memories.write("b", 2, {"control": torch.zeros(1)})
        memories.settle(2, {"c"})
        assert memories.read("a", 3) == {"control": torch.ones(1), "spent": 7}
        assert memories.read("b", 3) == {}


def test_what_no_checkpoint_needs_is_forgotten(tmp_path: Path) -> None:
    """Checkpoints after rounds 2 and 5, now round 8."""
    memories = Memories(tmp_path)
    for site, rounds in {"a": range(1, 9), "b": (1, 4), "c": (7,), "d": (3,)}.items():
        for round in rounds:
            memories.write(site, round, {"round": round})
    memories.commit((2, 5, 8))
    for again in (memories, Memories(tmp_path)):
        told = {site: [again.read(site, at + 1).get("round") for at in (2, 5, 8)] for site in "abcd"}
        assert told == {"a": [2, 5, 8], "b": [1, 4, 4], "c": [None, None, 7], "d": [None, 3, 3]}
    assert len(list(tmp_path.iterdir())) == 7
    memories.cut(5)
    assert Memories(tmp_path).read("c", 9) == {} and memories.read("a", 9) == {"round": 5}


def test_memories_of_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    """Where the newest checkpoint is torn, a user deletes it and goes on from the one before."""
    options = {**OPTIONS, "strategy": Scaffold(), "sample": 3, "checkpoint_every_s": 0.0}
    anyfit.federate(Linear(), many(5), run=tmp_path / "r", **options)
    whole = (tmp_path / "r/metrics.jsonl").read_bytes()
    last = max((tmp_path / "r/checkpoints").glob("step-*"))
    content = last.read_bytes()
    last.write_bytes(content[:-7])
    with pytest.raises(StateError, match=r"the last good one is .*step-000000003.safetensors"):
        anyfit.federate(Linear(), many(5), run=tmp_path / "r", resume=True, **options)
    last.unlink()
    anyfit.federate(Linear(), many(5), run=tmp_path / "r", resume=True, **options)
    assert last.read_bytes() == content and (tmp_path / "r/metrics.jsonl").read_bytes() == whole


def test_new_sites_join_when_they_come_and_on_resume(tmp_path: Path) -> None:
    notices: list[str] = []
    sites = many(4)
    run = anyfit.federate(
        Linear(),
        sites,
        faults=Faults(joins={"s03": 3}),
        run=tmp_path / "r",
        **OPTIONS,
        on_event=lambda event: notices.append(event["text"]) if event["event"] == "notice" else None,
    )
    assert [len(line["sites"]) for line in rounds_of(run)] == [3, 3, 4, 4]
    assert "site s03 joins in round 3 with 15 rows" in notices
    record = json.loads((tmp_path / "r/run.json").read_text())
    assert record["sites"]["s03"] == {"rows": 15, "notes": ["joined in round 3"]}
    more = {**sites, "extra": many(6)["s05"]}
    again = anyfit.federate(Linear(), more, run=tmp_path / "r", resume=True, **{**OPTIONS, "rounds": 6})
    assert [len(line["sites"]) for line in rounds_of(again)] == [3, 3, 4, 4, 5, 5]
    with pytest.raises(InputError, match="joins of Faults names 'nobody', which is no site"):
        anyfit.federate(Linear(), sites, faults=Faults(joins={"nobody": 2}), **OPTIONS)
    with pytest.raises(StateError, match="has other s03 rows"):
        anyfit.federate(
            Linear(), {k: v for k, v in more.items() if k != "s03"}, run=tmp_path / "r", resume=True, **{**OPTIONS, "rounds": 7}
        )


@dataclass(frozen=True, kw_only=True)
class Fails(FedAvg):
    """Site s01 fails from round 3 on."""

    error: Any = RuntimeError

    def to_json(self) -> dict[str, Any]:
        return {"name": "Fails", "values": {}}

    def local(self, turn: Any) -> Any:
        if turn.name == "s01" and turn.order.round >= 3:
            raise self.error("the disk of this hospital is gone")
        return super().local(turn)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, DataError])
def test_a_site_that_fails_stops_the_round_or_is_gone_without(error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"site 's01' failed in round 3: .*the disk of this hospital is gone") as caught:
        anyfit.federate(Linear(), many(3), strategy=Fails(error=error), run=tmp_path / "r", **OPTIONS)
    assert isinstance(caught.value.__cause__, error), "where it happened is lost"
    run = anyfit.federate(Linear(), many(3), strategy=Fails(error=error), quorum=2, run=tmp_path / "r", resume=True, **OPTIONS)
    assert [line.get("missing") for line in rounds_of(run)] == [None, None, ["s01"], ["s01"]]


def test_a_round_in_which_no_row_counts_is_refused(tmp_path: Path) -> None:
    class Nothing(FedAvg):
        def local(self, turn: Any) -> Any:
            return turn.update(turn.train(), 0.0 if turn.order.round == 2 else None)

    with pytest.raises(RunError, match="round 2 has no row at any site"):
        anyfit.federate(Linear(), many(2), strategy=Nothing(), run=tmp_path / "r", **OPTIONS)
    assert len(list((tmp_path / "r/checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize(("strategy", "chosen"), [(Cyclic(), ["s00", "s01", "s02", "s00"]), (SingleSite(site="s01"), ["s01"] * 4)])
def test_strategies_that_choose_who_takes_part(strategy: Any, chosen: list[str]) -> None:
    run = anyfit.federate(Linear(), many(3), strategy=strategy, **OPTIONS)
    assert [list(line["sites"]) for line in rounds_of(run)] == [[name] for name in chosen]


# ------------------------------------------------------------------------------------------------ what sites hold

TABLE = pa.table({"x": np.arange(40.0), "kind": ["a", "b"] * 20, "target": np.arange(40) % 2})


def test_two_sites_with_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two sites are named 'a'"):
        anyfit.federate(anyfit.Tabular(), [tmp_path / "x/a.csv", tmp_path / "y/a.csv"], rounds=1)
    with pytest.raises(InputError, match="two sites have one name"):
        anyfit.federate(anyfit.Tabular(), {1: TABLE, "1": TABLE}, rounds=1)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (TABLE.drop_columns(["kind"]), "site 'b' has another schema than 'a': column 'kind' is None there"),
        (TABLE.append_column("extra", pa.array([1.0] * 40)), "column 'extra'"),
        (TABLE.set_column(0, "x", pa.array(["one", "two"] * 20)), "column 'x' is ('categorical', ()) there and ('continuous', ()) here"),
    ],
)
def test_different_schemas_are_refused_by_name(other: pa.Table, message: str) -> None:
    with pytest.raises(DataError) as caught:
        anyfit.federate(anyfit.Tabular(), {"a": TABLE, "b": other}, rounds=1)
    assert message in str(caught.value)


@pytest.mark.parametrize("first", ["all", "none"])
@pytest.mark.parametrize("column", ["x", "kind"])
def test_a_column_that_one_site_lacks_throughout_is_filled(column: str, first: str) -> None:
    kind = TABLE.schema.field(column).type
    blank = TABLE.set_column(TABLE.column_names.index(column), column, pa.nulls(40, kind))
    sites = {"a": blank, "b": TABLE} if first == "none" else {"a": TABLE, "b": blank}
    run = anyfit.federate(anyfit.Tabular(), sites, rounds=2, batch_size=10)
    schema = Schema.from_json(run.record["schema"])
    assert schema["x"].mean == pytest.approx(19.5) and schema["kind"].categories == ("a", "b")
    assert run.result["sites"]["a"]["rows"] == 40


def test_a_category_that_comes_later_is_other() -> None:
    late = TABLE.set_column(1, "kind", pa.array(["new", "a"] * 20))
    run = anyfit.federate(anyfit.Tabular(), {"a": TABLE, "late": late}, rounds=3, faults=Faults(joins={"late": 2}), batch_size=10)
    assert Schema.from_json(run.record["schema"])["kind"].categories == ("a", "b")
    assert len(rounds_of(run)[2]["sites"]) == 2 and run.result["sites"]["late"]["rows"] == 40


@pytest.mark.parametrize("kind", ["table", "tensors", "partition"])
def test_sites_of_one_class_or_few_rows_take_part_and_are_named(kind: str, tmp_path: Path) -> None:
    sites: Any
    if kind == "table":
        sites = {"even": TABLE.take(list(range(0, 40, 2))), "tiny": TABLE.slice(0, 4), "whole": TABLE}
        task: Any = anyfit.Tabular()
    elif kind == "tensors":
        x, y = torch.randn(40, 3, generator=GENERATOR), torch.arange(40) % 2
        sites, task = {"even": (x[::2], y[::2]), "tiny": (x[:4], y[:4]), "whole": (x, y)}, Linear()
    else:
        wide = TABLE.append_column("site", pa.array(["tiny"] * 4 + ["even", "whole"] * 18))
        sites, task = anyfit.partition(wide, "column:site"), anyfit.Tabular()
    run = anyfit.federate(task, sites, rounds=2, batch_size=10, run=tmp_path / "r")
    record = json.loads((tmp_path / "r/run.json").read_text())["sites"]
    assert record["even"]["notes"] == ["one class only"]
    assert record["tiny"]["notes"] == ["fewer rows than a batch"]
    assert kind == "partition" or "notes" not in record["whole"]
    assert set(rounds_of(run)[0]["sites"]) == {"even", "tiny", "whole"}


def test_a_thousand_sites_are_dealt_and_trained_in_seconds() -> None:
    x = torch.randn(20_000, 3, generator=GENERATOR)
    begun = time.process_time()
    for how in ("iid", "dirichlet:0.3", "shards:2", "quantity:1.0"):
        parts = anyfit.partition((x, (x[:, 0] > 0).long()), how, 1000)
        assert len(parts) == 1000 and sum(parts.rows_of(name) for name in parts) == 20_000
    run = anyfit.federate(Linear(), parts, rounds=2, sample=100, batch_size=10)
    assert time.process_time() - begun < 20
    assert run.record["sites"].keys() == set(parts) and len(rounds_of(run)[0]["sites"]) == 100


# ------------------------------------------------------------------------------------------------ local work and figures


def test_patience_counts_rounds_and_the_best_round_is_kept(tmp_path: Path) -> None:
    class Worse(FedAvg):
        """Learns for two rounds, then unlearns."""

        def finish(self, server: Any, total: Any) -> Any:
            step = super().finish(server, total) - server.weights
            return server.weights + (step if server.round <= 2 else -3 * step)

    options = {**OPTIONS, "rounds": 20, "strategy": Worse(), "validation": 0.3, "patience": 3}
    run = anyfit.federate(Linear(), many(3, 40), run=tmp_path / "r", **options)
    assert run.stopped == "patience" and run.result["best"]["round"] == 2 and len(rounds_of(run)) == 5
    told = [line for line in run.history if line["event"] == "evaluate"]
    assert [line["best"] for line in told] == [True, True, False, False, False]
    assert run.splits["validation"]["loss"] == told[1]["loss"], "the model is not that of the best round"
    assert run.splits["validation"]["rows"] == sum(site["rows"] for site in run.result["sites"].values())
    resumed = anyfit.federate(Linear(), many(3, 40), run=tmp_path / "r", resume=True, **options)
    assert resumed.stopped == "patience" and resumed.history == run.history and resumed.splits == run.splits
    every = anyfit.federate(Linear(), many(3, 40), **{**OPTIONS, "rounds": 5, "validation": 0.3, "evaluate_every": 2})
    assert [line["round"] for line in every.history if line["event"] == "evaluate"] == [2, 4, 5]


def test_a_kill_between_a_checkpoint_and_its_second_name_loses_no_best_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS, "validation": 0.3, "best": True}
    whole = anyfit.federate(Linear(), many(3, 40), run=tmp_path / "whole", **options)
    assert whole.result["best"]["round"] == 4

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("anyfit.run.Folder.mark_best", die)
        with pytest.raises(Killed):
            anyfit.federate(Linear(), many(3, 40), run=tmp_path / "cut", **{**options, "rounds": 1})
    again = anyfit.federate(Linear(), many(3, 40), run=tmp_path / "cut", resume=True, **{**options, "rounds": 1})
    assert (tmp_path / "cut/checkpoints/best.safetensors").exists()
    assert again.splits["validation"]["loss"] == again.result["best"]["loss"]


def test_seconds_of_local_work_and_an_optimizer_that_is_kept() -> None:
    run = anyfit.federate(Linear(), many(2), rounds=2, seconds=0.02, batch_size=5)
    assert len(rounds_of(run)) == 2 and rounds_of(run)[1]["loss"] < rounds_of(run)[0]["loss"]
    for given in ({"epochs": 1}, {"steps": 3}):
        with pytest.raises(InputError, match=r"seconds \(=1.0\) excludes epochs and steps"):
            anyfit.federate(Linear(), many(2), rounds=1, seconds=1.0, **given)
    kept = anyfit.federate(Linear(), many(2), keep_optimizer=True, **OPTIONS)
    reset = anyfit.federate(Linear(), many(2), **OPTIONS)
    assert rounds_of(kept)[0]["loss"] == rounds_of(reset)[0]["loss"] and not same(kept, reset)


def test_schedules_run_over_the_whole_federation_as_over_one_fit() -> None:
    """One site with all rows: the rate of each step is that of a fit as long as all rounds."""
    from anyfit.schedule import cosine

    class Decays(Linear):
        def build_schedule(self, optimizer: Any, total_steps: int) -> Any:
            return cosine(optimizer, total_steps, warmup=0.2)

    rates: list[float] = []

    class Watched(FedAvg):
        def local(self, turn: Any) -> Any:
            change = turn.train()
            rates.append(turn.trainer.learning_rate())
            return turn.update(change)

    sites = {"one": many(1)["s00"]}
    anyfit.federate(Decays(), sites, strategy=Watched(), **{**OPTIONS, "rounds": 6, "epochs": 2})
    seen: list[float] = []
    anyfit.fit(
        Decays(),
        sites["one"],
        epochs=12,
        batch_size=5,
        seed=3,
        log_every=1,
        on_event=lambda event: seen.append(event["lr"]) if event["event"] == "step" else None,
    )
    per_round = len(seen) // 6
    assert rates == pytest.approx([seen[per_round * (round + 1) - 1] for round in range(6)], rel=1e-9)


def test_figures_of_fractions_are_those_of_the_pooled_rows() -> None:
    sites = {"a": TABLE.slice(0, 25), "b": TABLE.slice(25)}
    run = anyfit.federate(anyfit.Tabular(), sites, rounds=2, batch_size=10, validation=0.3, test=0.3)
    parts = {name: anyfit.data.take_fraction(table, 0.3, group=None, salt="test") for name, table in sites.items()}
    expected = anyfit.evaluate(run, pa.concat_tables([held for _, held in parts.values()]))
    assert run.splits["test"]["rows"] == sum(held.num_rows for _, held in parts.values()) == expected["rows"]
    assert run.splits["test"].pop("confusion") == expected["confusion"]
    for name, value in run.splits["test"].items():
        assert value == pytest.approx(expected[name], rel=1e-5), name
    assert {site: told["rows"] for site, told in run.result["sites"].items()} == {name: held.num_rows for name, (_, held) in parts.items()}
    fairness = run.result["fairness"]["accuracy"]
    each = {site: told["accuracy"] for site, told in run.result["sites"].items()}
    assert fairness["lowest"] == min(each.values()) and fairness["highest"] == max(each.values())
    assert fairness["mean"] == pytest.approx(sum(each.values()) / 2) and each[fairness["worst_site"]] == fairness["lowest"]
    assert fairness["deviation"] == pytest.approx((fairness["highest"] - fairness["lowest"]) / 2)


# ------------------------------------------------------------------------------------------------ kills, disks, processes

SCRIPT = """
import json, os, secrets, signal, sys
import torch
from torch import nn
import anyfit
from anyfit import Faults, Schema, SitePrivacy, Task
from anyfit.strategy import FedAvgM, FedMedian, Scaffold, strategy_of
from anyfit.worker import Memories, Worker

torch.set_num_threads(1)
secrets.randbits = lambda bits: 1 << (bits - 1)  # private runs that must be equal need one secret


class Linear(Task):
    lr: float = 0.05

    def build_model(self, schema):
        return nn.Linear(3, 2)


def many(sites, rows=12):
    found = {}
    for site in range(sites):
        x = torch.randn(rows + site, 3, generator=torch.Generator().manual_seed(site))
        found[f"s{site:02d}"] = (x, (x[:, 0] + 0.3 * x[:, 1] > 0).long())
    return found


WHOLE = {"rounds": 5, "batch_size": 5, "seed": 3}
HARD = {"checkpoint_every_s": 0.0, "sample": 5, "quorum": 2, "faults": Faults(dropout=0.3, seed=4)}
RUNS = {
    "fedavg": {"validation": 0.3, "best": True},
    "scaffold": {"strategy": Scaffold(), **HARD},
    "seldom": {"strategy": Scaffold(), **HARD, "checkpoint_every_s": 60.0},
    "topk": {"compress": "topk:0.3", "strategy": FedAvgM(), "keep_optimizer": True, **HARD},
    "int8": {"compress": "int8", "compress_down": "bf16", "checkpoint_every_s": 60.0},
    "private": {"privacy": SitePrivacy(noise_multiplier=1.0, delta=1e-4, clip=0.3, quantile=0.5), "sample": 0.5},
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(when):
    kind, _, rest = when.partition(":")
    replies = 0

    def on_event(event):
        if kind == "checkpoint" and event["event"] == "checkpoint" and event["round"] == int(rest):
            die()
        if kind == "stop" and event["event"] == "round" and event["round"] == int(rest):
            return "stop"

    if kind == "reply":  # between the turns of two sites
        train = Worker._train

        def trains(self, name, order):
            nonlocal replies
            replies += 1
            if replies == int(rest) + 1:
                die()
            return train(self, name, order)

        Worker._train = trains
    if kind == "commit":
        commit = Memories.commit

        def dies(self, rounds):
            if max(rounds) == int(rest):
                die()
            commit(self, rounds)

        Memories.commit = dies
    if kind == "half":
        commit_forget = Memories._forget

        def half(self, site, round):
            commit_forget(self, site, round)
            if round == int(rest):
                die()

        Memories._forget = half
    return on_event


def main(folder, names, when="none", resume="no", sites=7):
    for name in names.split(","):
        options = {**WHOLE, **RUNS[name]}
        anyfit.federate(
            Linear(), many(sites), run=f"{folder}/{name}", resume=resume == "yes", on_event=arm(when), **options
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "federation_script.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


def content(run: Path) -> dict[str, bytes]:
    """All that must be equal between two runs."""
    assert not [*run.glob("checkpoints/.*"), *run.glob("sites/.*")], "a killed write left its temporary file"
    files = [*run.glob("checkpoints/*.safetensors"), *run.glob("sites/*.safetensors"), run / "metrics.jsonl"]
    if run.name == "seldom":  # when the checkpoint before the last was due, and what goes with it, may differ
        newest = {path.name.split(".")[0]: path for path in sorted(run.glob("sites/*.safetensors"))}
        files = [max(run.glob("checkpoints/step-*")), *newest.values(), run / "metrics.jsonl"]
    found = {str(path.relative_to(run)): path.read_bytes() for path in files}
    result = json.loads((run / "result.json").read_text())
    found["result"] = json.dumps({name: value for name, value in result.items() if name != "seconds"}).encode()
    return found


def differences(a: Path, b: Path) -> list[str]:
    one, other = content(a), content(b)
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


EVERY = "fedavg,scaffold,seldom,topk,int8,private"


@pytest.fixture(scope="module")
def whole(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of the script, undisturbed, in one process."""
    folder = tmp_path_factory.mktemp("whole")
    done = start(script, folder, EVERY)
    assert done.returncode == 0, done.stderr
    assert any(line.get("missing") for line in map(json.loads, (folder / "scaffold/metrics.jsonl").read_text().splitlines()))
    return folder


KILLS = {
    "scaffold": ["reply:2", "commit:2"],
    "topk": ["reply:1", "commit:1", "reply:5", "half:2"],
}


@pytest.mark.parametrize("name", ["scaffold", pytest.param("topk", marks=pytest.mark.slow)])
def test_kills_between_two_sites_leave_no_trace(name: str, script: Path, whole: Path, tmp_path: Path) -> None:
    for when in KILLS[name]:
        done = start(script, tmp_path, name, when, "yes")
        assert done.returncode == -9, f"the kill {when} came too late to be one: {done.stderr}"
    done = start(script, tmp_path, name, "none", "yes")
    assert done.returncode == 0, done.stderr
    assert differences(tmp_path / name, whole / name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seldom", "int8", "private", "scaffold"])
def test_kills_at_random_replies_leave_no_trace(name: str, script: Path, whole: Path, tmp_path: Path) -> None:
    draw, kills = random.Random(name), 0
    for _ in range(4):
        kills += start(script, tmp_path, name, f"reply:{draw.randint(1, 9)}", "yes").returncode == -9
    done = start(script, tmp_path, name, "none", "yes")
    assert done.returncode == 0 and kills >= 2, done.stderr
    assert differences(tmp_path / name, whole / name) == []


@contextmanager
def full(limit: int) -> Iterator[None]:
    """No file may grow beyond: what a full disk is to a writer."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [100, 2500])
def test_a_full_disk_loses_nothing(limit: int, tmp_path: Path) -> None:
    """Neither where a site's memory does not fit, nor where the state does not."""
    options = {**OPTIONS, "strategy": Scaffold(), "sample": 3, "checkpoint_every_s": 0.0, "run": tmp_path / "r"}
    whole = anyfit.federate(Linear(), many(5), **{**options, "run": tmp_path / "whole"})
    anyfit.federate(Linear(), many(5), on_event=stop_after(2), **options)
    kept = {path: path.read_bytes() for path in (tmp_path / "r/checkpoints").glob("step-*")}
    assert kept
    with full(limit), pytest.raises(RunError, match=r"cannot write .*free some space"):
        anyfit.federate(Linear(), many(5), resume=True, **options)
    assert {path: path.read_bytes() for path in (tmp_path / "r/checkpoints").glob("step-*")} == kept
    again = anyfit.federate(Linear(), many(5), resume=True, **options)
    assert again.history == whole.history and differences(tmp_path / "r", tmp_path / "whole") == []


def test_two_processes_on_one_run_folder_are_refused(tmp_path: Path) -> None:
    tried: list[str] = []

    def second(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and not tried:
            with pytest.raises(BusyError, match="in use by another process") as caught:
                anyfit.federate(Linear(), many(2), run=tmp_path / "r", resume=True, **OPTIONS)
            tried.append(str(caught.value))

    run = anyfit.federate(Linear(), many(2), run=tmp_path / "r", on_event=second, **OPTIONS)
    assert tried and run.stopped == "finished" and len(rounds_of(run)) == 4


# ------------------------------------------------------------------------------------------------ ranks


def launch(script: Path, ranks: int, *arguments: Any) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str]]:
    done = []
    try:
        for process in processes:
            _, error = process.communicate(timeout=timeout)
            done.append((process.returncode, error))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return done


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_the_same_bits_as_one_process(ranks: int, script: Path, whole: Path, tmp_path: Path) -> None:
    for code, error in finish(launch(script, ranks, tmp_path, EVERY)):
        assert code == 0, error
    for name in EVERY.split(","):
        assert differences(tmp_path / name, whole / name) == [], name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", "topk", "seldom", "private"])
def test_a_run_goes_on_over_another_number_of_ranks(name: str, script: Path, whole: Path, tmp_path: Path) -> None:
    for code, error in finish(launch(script, 2, tmp_path, name, "stop:2")):
        assert code == 0, error
    assert len((tmp_path / name / "checkpoints/step-000000002.safetensors").read_bytes()) > 0
    assert not (tmp_path / name / "checkpoints/step-000000003.safetensors").exists(), "one rank was asked to stop and the others went on"
    for code, error in finish(launch(script, 3, tmp_path, name, "none", "yes")):
        assert code == 0, error
    assert differences(tmp_path / name, whole / name) == []


ODD = """
from dataclasses import dataclass
from federation_script import *

RANK = int(os.environ["RANK"])


@dataclass(frozen=True, kw_only=True)
class Odd(Scaffold):
    def local(self, turn):
        if turn.order.round == 2 and RANK == 1:
            if sys.argv[1] == "killed":
                die()
            if sys.argv[1] == "raises":
                raise SystemExit("rank 1 leaves")
            if sys.argv[1] == "site":
                raise ValueError("a bad row")
        return super().local(turn)


try:
    anyfit.federate(Linear(), many(4), run=sys.argv[2], strategy=FedMedian() if sys.argv[1] == "each" else Odd(), **WHOLE)
except anyfit.errors.AnyfitError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("what", ["killed", *(pytest.param(what, marks=pytest.mark.slow) for what in ("site", "raises", "each"))])
def test_a_rank_that_is_lost_stops_the_others_soon_and_says_so(what: str, script: Path, tmp_path: Path) -> None:
    odd = script.with_name("odd_script.py")
    odd.write_text(ODD)
    processes = launch(odd, 2, what, tmp_path / "r")
    (first, error), (second, other) = finish(processes, 60)
    if what in ("killed", "raises"):
        assert first == 1 and "RunError: another rank failed or is gone" in error and "resume goes on" in error, error
        assert (second, "rank 1 leaves" in other) == ((-9, False) if what == "killed" else (1, True))
        assert len(list((tmp_path / "r/checkpoints").glob("step-*"))) == 1
    elif what == "site":
        for text in (error, other):
            assert "RunError: site 's" in text and "failed in round 2: ValueError: a bad row" in text, text
    else:
        for text in (error, other):
            assert "InputError: FedMedian needs each site's update, but ranks tell each other sums only" in text, text
        assert isinstance(FedMedian(), FedAvg)
