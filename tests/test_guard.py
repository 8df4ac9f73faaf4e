"""What a site lets out: nothing that was not agreed, in numbers that make sense; and under site privacy a noisy vector alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

import anyfit
from anyfit import FedAvg, Limits, Schema, SitePrivacy, Task
from anyfit.errors import AnyfitError, DataError, InputError, NonFinite, Refused, RunError, StateError
from anyfit.guard import Guard
from anyfit.privacy import Accountant
from anyfit.strategy import FedMedian, FedNova, Krum, NewtonRaphson, Scaffold, TrimmedMean
from anyfit.update import COUNTS, WIDE, Group, Order, Reply, Update
from anyfit.worker import Worker

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(60, 3, generator=GENERATOR), torch.arange(60) % 2
SITES = {"a": (X[:20], Y[:20]), "b": (X[20:], Y[20:])}


class Linear(Task):
    lr: float = 0.1

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Linear(3, 2)


@dataclass(frozen=True, kw_only=True)
class Evil(FedAvg):
    """Site b sends what `spoil` makes of its update."""

    spoil: Any

    def to_json(self) -> dict[str, Any]:
        return {"name": "Evil", "values": {}}

    def local(self, turn: Any) -> Update:
        update = super().local(turn)
        return self.spoil(update) if turn.name == "b" else update


def weights(change: Callable[[Tensor], Any] = lambda sums: sums, count: Any = None, **fields: Any) -> Callable[[Update], Update]:
    """Spoil the group of weights."""

    def spoil(update: Update) -> Update:
        group = update.groups["weights"]
        fields.setdefault("exponents", group.exponents)
        return Update(
            {
                **update.groups,
                "weights": Group({"weights": change(group.sums["weights"])}, group.count if count is None else count, **fields),
            }
        )

    return spoil


def with_group(name: str, sums: dict[str, Any], count: float = 1.0) -> Callable[[Update], Update]:
    return lambda update: Update({**update.groups, name: Group(sums, count)})


def at(place: int, value: float) -> Callable[[Tensor], Tensor]:
    def put(sums: Tensor) -> Tensor:
        sums = sums.clone()
        sums[place] = value
        return sums

    return put


BAD: dict[str, tuple[Any, str]] = {
    "nan": (weights(at(2, math.nan)), "weights of weights is not finite"),
    "inf": (weights(at(0, math.inf)), "not finite"),
    "-inf": (weights(at(7, -math.inf)), "not finite"),
    "shape": (weights(lambda s: s.reshape(2, 4)), "has the shape (2, 4), but (8,) was agreed"),
    "longer": (weights(lambda s: torch.cat([s, X.flatten()])), "has the shape (188,), but (8,) was agreed"),
    "integers": (weights(lambda s: s.long()), "is of type torch.int64"),
    "float16": (weights(lambda s: s.half()), "is of type torch.float16"),
    "bool": (weights(lambda s: s > 0), "is of type torch.bool"),
    "complex": (weights(lambda s: s.to(torch.complex64)), "is no dense tensor of real numbers"),
    "sparse": (weights(lambda s: s.to_sparse()), "is no dense tensor of real numbers"),
    "list": (weights(lambda s: s.tolist()), "is no dense tensor of real numbers"),
    "array": (weights(lambda s: s.numpy()), "is no dense tensor of real numbers"),
    "units": (weights(exponents=(3,)), "counts in units that nobody agreed to"),
    "limbs": (weights(lambda s: torch.full((1, 8), 1 << 62), fixed=True), "has the shape (1, 8)"),
    "too many rows": (weights(count=41.0), "claims 41 rows, but this site has 40"),
    "negative count": (weights(count=-1.0), "count -1.0, which is no number of rows"),
    "nan count": (weights(count=math.nan), "count nan, which is no number of rows"),
    "infinite count": (weights(count=math.inf), "count inf"),
    "a text as count": (weights(count="many"), "TypeError"),
    "another name": (
        lambda u: Update({**u.groups, "weights": Group({"x": u.groups["weights"].sums["weights"]}, 40.0)}),
        "holds 'x' in 'weights'",
    ),
    "rows as a group": (with_group("rows", {"rows": X[20:]}), "holds 'rows', which the strategy did not declare"),
    "rows as a name": (
        lambda u: Update({**u.groups, "loss": Group({**u.groups["loss"].sums, "rows": X[20:]}, 40.0)}),
        "holds 'rows' in 'loss', which was not declared",
    ),
    "a long loss": (with_group("loss", {"loss": Y[20:].double()}, 40.0), "'loss' in 'loss' has the shape (40,)"),
    "no weights": (lambda u: Update({"loss": u.groups["loss"]}), "lacks 'weights', which was agreed"),
    "empty weights": (lambda u: Update({**u.groups, "weights": Group({}, 40.0)}), "lacks 'weights' in 'weights'"),
    "nothing": (lambda u: Update(), "lacks 'weights'"),
    "none": (lambda u: None, "a NoneType would leave in place of an update"),
    "an exception": (lambda u: {}["gone"], "KeyError: 'gone'"),
    "too large to add": (weights(lambda s: s + 1e9), "two updates count one group in different units"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_was_not_agreed_is_refused_and_the_site_and_the_reason_are_named(kind: str, tmp_path: Path) -> None:
    spoil, message = BAD[kind]
    options: dict[str, Any] = {"rounds": 2, "batch_size": 10, "strategy": Evil(spoil=spoil)}
    with pytest.raises(RunError, match=re.escape("site 'b' failed in round 1: ") + ".*" + re.escape(message)):
        anyfit.federate(Linear(), SITES, run=tmp_path / "r", **options)
    assert not list((tmp_path / "r/checkpoints").glob("step-*"))
    run = anyfit.federate(Linear(), SITES, quorum=1, **options)
    assert run.stopped == "finished"
    rounds = [line for line in run.history if line["event"] == "round"]
    assert [(line["missing"], set(line["sites"])) for line in rounds] == [(["b"], {"a"})] * 2
    alone = anyfit.federate(Linear(), {"a": SITES["a"]}, **{**options, "strategy": None})
    assert torch.equal(run.state.model["weight"], alone.state.model["weight"]), "what was refused moved the weights"


LIMITS: dict[str, tuple[Limits, dict[str, Any], str]] = {
    "norm": (Limits(norm=1.0), {"strategy": Evil(spoil=weights(lambda s: s + 100 * 40))}, r"site 'b' .*norm 282.8, more than .* \(1\)"),
    "bytes": (Limits(bytes=39), {}, r"site 'a' .*40 bytes, more than this site lets out \(39\)"),
    "rows": (Limits(rows=21), {}, r"site 'a': 20 rows are fewer than this site lets an update stand for \(21\)"),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_the_limits_of_a_site_hold(kind: str) -> None:
    limits, options, message = LIMITS[kind]
    with pytest.raises(AnyfitError, match=message):
        anyfit.federate(Linear(), SITES, rounds=1, batch_size=10, limits=limits, **options)
    enough = {"norm": Limits(norm=300.0), "bytes": Limits(bytes=100_000), "rows": Limits(rows=20)}[kind]
    anyfit.federate(Linear(), SITES, rounds=1, batch_size=10, limits=enough, **options)


@pytest.mark.parametrize("values", [{"rows": 0}, {"cells": 0}, {"norm": 0.0}, {"norm": math.nan}, {"bytes": -1}, {"norm": math.inf}])
def test_limits_that_are_none_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="of the limits must be above 0"):
        Limits(**values)


def test_figures_of_too_few_rows_stay_at_the_site_and_training_goes_on() -> None:
    options: dict[str, Any] = {"rounds": 1, "batch_size": 10, "validation": 0.2}
    rows = {site: told["rows"] for site, told in anyfit.federate(Linear(), SITES, **options).result["sites"].items()}
    assert rows["a"] < rows["b"] < 16
    run = anyfit.federate(Linear(), SITES, limits=Limits(rows=rows["b"]), **options)
    assert set(run.result["sites"]) == {"b"}
    assert run.splits["validation"]["rows"] == rows["b"]


# ------------------------------------------------------------------------------------------------ statistics and figures


def people(count: int, rare: int, missing: int) -> pa.Table:
    kind = ["common"] * (count - rare) + ["rare"] * rare
    age = [None] * missing + [float(i % 50) for i in range(count - missing)]
    return pa.table({"kind": kind, "age": age, "id": [f"person {i}" for i in range(count)], "target": np.arange(count) % 2})


def fitted(limits: Limits | None, rare: int = 3, missing: int = 2, sites: int = 2) -> Schema:
    source = {str(i): anyfit.Source(people(40, rare, missing), types={"id": "identifier"}) for i in range(sites)}
    run = anyfit.federate(anyfit.Tabular(), source, rounds=1, limits=limits)
    return Schema.from_json(run.record["schema"])


def test_a_category_of_fewer_rows_than_a_cell_does_not_leave_a_site() -> None:
    assert fitted(None)["kind"].categories == ("common", "rare")
    assert fitted(Limits(cells=3))["kind"].categories == ("common", "rare")
    assert fitted(Limits(cells=4))["kind"].categories == ("common",)  # though six rows hold it at both sites together
    assert fitted(None)["age"].missing and not fitted(Limits(cells=3))["age"].missing
    assert fitted(Limits(cells=3))["age"].mean == fitted(None)["age"].mean
    assert not any("person" in str(column) for column in fitted(None).columns)


def test_no_count_in_a_released_statistic_is_small() -> None:
    table, schema = people(40, 3, 2), anyfit.data.infer_schema(people(40, 3, 2), "target", [], {"id": "identifier"})
    whole = anyfit.Tabular().statistics(table, schema)
    order = Order("prepare", 0, 1, 0, values={"schema": schema.to_json()})
    update, size = Guard(Limits(cells=5)).release(order, whole, rows=40, shapes=None, seed=0, memory={})
    assert set(whole.groups) == set(update.groups) and size == update.size_bytes() < whole.size_bytes()
    assert set(update.groups["categories:kind"].sums) == {"common"} and update.count("categories:kind") == 37
    assert set(update.groups["mean:age"].sums) == {"sum", "squares"}
    few, _ = Guard(Limits(cells=41)).release(order, whole, rows=40, shapes=None, seed=0, memory={})
    assert all(not group.sums for group in few.groups.values())


class Leaks(anyfit.Tabular):
    """`prepare` and `evaluate` hold more than they should."""

    group: str = "mean:age"
    numbers: int = 1

    def statistics(self, table: pa.Table, schema: Schema) -> Update:
        return super().statistics(table, schema).joined(Update.of(self.group, {"x": torch.ones(self.numbers)}, 1.0, WIDE))


@pytest.mark.parametrize(
    ("group", "numbers", "message"),
    [
        ("rows of a", 1, "'rows of a' would leave, which no column of the schema explains"),
        ("mean:secret", 1, "'mean:secret' would leave, which no column"),
        ("categories:id", 1, "'categories:id' would leave, which no column"),
        ("squares:age", (1 << 20) + 1, "'x' in 'squares:age' holds 1,048,577 numbers"),
    ],
)
def test_statistics_that_no_column_explains_are_refused(group: str, numbers: int, message: str) -> None:
    source = anyfit.Source(people(40, 3, 2), types={"id": "identifier"})
    with pytest.raises(DataError, match=re.escape(f"site 'a': {message}")):
        anyfit.federate(Leaks(group=group, numbers=numbers), {"a": source}, rounds=1)
    anyfit.federate(Leaks(group="cubes:age"), {"a": source}, rounds=1)  # what a task counts of a column is its own affair


class Copies(anyfit.metrics.Accuracy):
    def __init__(self, size: int, value: float = 0.0) -> None:
        self.size, self.filled = size, value

    def measure(self, outputs: Tensor, targets: Tensor) -> Any:
        return {**super().measure(outputs, targets), "copy": torch.full((self.size,), self.filled)}


class Measured(Linear):
    """Names one metric and sends another."""

    size: int = 1
    value: float = 0.0
    named: bool = True

    def metrics(self, schema: Schema) -> Any:
        metric = Copies(self.size, math.nan if self.value < 0 else self.value)
        return Turncoat(accuracy=metric) if not self.named else {"accuracy": metric}


class Turncoat(dict[str, Any]):
    """Another metric each time that its names are asked for."""

    def items(self) -> Any:
        return {"rows": next(iter(self.values()))}.items()


def test_figures_leave_under_names_that_the_task_gives_and_in_sane_sizes() -> None:
    options: dict[str, Any] = {"rounds": 1, "batch_size": 10}
    run = anyfit.federate(Measured(), SITES, **options)
    assert run.splits["train"]["rows"] == 60
    for task, message in (
        (Measured(size=(1 << 20) + 1), "'copy' in 'metric:accuracy' holds 1,048,577 numbers"),
        (Measured(value=-1.0), "copy of metric:accuracy is not finite"),
        (Measured(named=False), "'metric:rows' would leave, which no metric that the task names"),
    ):
        with pytest.raises(RunError, match=re.escape(f"site 'a' failed in round 1: {message}")):
            anyfit.federate(task, SITES, validation=0.3, **options)
        told: list[str] = []  # nobody asked for figures of training rows, so they cannot fail a run
        run = anyfit.federate(task, SITES, on_event=lambda event, told=told: told.append(str(event.get("text"))), **options)
        assert run.stopped == "finished" and run.splits == {} and any(message in text for text in told)


# ------------------------------------------------------------------------------------------------ site-level privacy


class Wire:
    """Hears every reply as it leaves a site."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replies: list[tuple[Order, Reply]] = []
        answer = Worker.answer

        def heard(worker: Worker, name: str, order: Order) -> Reply:
            reply = answer(worker, name, order)
            self.replies.append((order, reply))
            return reply

        monkeypatch.setattr(Worker, "answer", heard)

    def of(self, kind: str) -> list[Reply]:
        return [reply for order, reply in self.replies if order.kind == kind]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


def many(sites: int, rows: int = 4) -> dict[str, Any]:
    x = torch.randn(sites, rows, 3, generator=torch.Generator().manual_seed(1))
    return {f"s{i:03d}": (x[i], torch.arange(rows) % 2) for i in range(sites)}


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_under_site_privacy_only_a_noisy_vector_and_a_bit_leave(wire: Wire, quantile: float | None) -> None:
    privacy = SitePrivacy(clip=0.1, noise_multiplier=1.0, delta=1e-3, quantile=quantile)
    run = anyfit.federate(Linear(), SITES, rounds=2, batch_size=10, privacy=privacy)
    expected = {"weights"} if quantile is None else {"weights", "below"}
    for reply in wire.of("train"):
        assert reply.update is not None and set(reply.update.groups) == expected
        assert all(group.count == 1.0 for group in reply.update.groups.values()), "a count tells the rows of a site"
        assert dict(reply.values) == {}, "steps tell the rows of a site"
        assert reply.size == reply.update.size_bytes() == 8 * 4 + 8 * (quantile is not None)
    assert not wire.of("evaluate"), "nobody asked for figures of rows"
    assert run.splits == {} and run.result["sites"] == {}
    assert all("loss" not in line and "loss" not in str(line["sites"]) for line in run.history)


class Constant(FedAvg):
    """Every site's change is the same, whatever its rows; of norm `size`."""

    size: float = 5.0

    def __init__(self, size: float = 5.0) -> None:
        object.__setattr__(self, "lr", 1.0)
        object.__setattr__(self, "personal", ())
        object.__setattr__(self, "size", size)

    def to_json(self) -> dict[str, Any]:
        return {"name": "Constant", "values": {}}

    def local(self, turn: Any) -> Update:
        return turn.update(torch.full_like(turn.weights, self.size / math.sqrt(turn.weights.numel())))


def private(sites: dict[str, Any], rounds: int = 1, size: float = 5.0, sample: Any = None, **fields: Any) -> Any:
    fields = {"delta": 1e-4, **fields}
    return anyfit.federate(Linear(), sites, rounds=rounds, strategy=Constant(size), privacy=SitePrivacy(**fields), sample=sample)


def vectors(wire: Wire) -> Tensor:
    return torch.stack([reply.update.sums("weights")["weights"] for reply in wire.of("train") if reply.update is not None])


def test_the_clip_bounds_what_leaves(wire: Wire) -> None:
    private(many(3), noise_multiplier=0.0, clip=0.25, size=5.0)
    private(many(3), noise_multiplier=0.0, clip=0.25, size=0.2)
    norms = torch.linalg.vector_norm(vectors(wire), dim=1)
    assert norms.tolist() == pytest.approx([0.25] * 3 + [0.2] * 3, rel=1e-6)


def test_the_noise_of_the_sum_has_the_promised_deviation_and_no_site_repeats_it(wire: Wire) -> None:
    clip, noise, sites = 0.5, 2.0, 400
    private(many(sites), noise_multiplier=noise, clip=clip)
    each = vectors(wire)
    hidden = torch.full((8,), clip / math.sqrt(8), dtype=torch.float64)
    drawn = each - hidden
    assert len(torch.unique(drawn, dim=0)) == sites
    std = float(drawn.std()) * math.sqrt(sites)  # of the sum of that many
    assert std == pytest.approx(noise * clip, rel=4 / math.sqrt(2 * sites * 8))
    assert float(drawn.mean().abs()) < 4 * noise * clip / math.sqrt(sites) / math.sqrt(sites * 8)


def test_the_divisor_is_public() -> None:
    """The expected number of sites, not how many were drawn: of 40 sites at the rate 1/4, 10."""
    sites, start = many(40), anyfit.federate(Linear(), many(40), rounds=1, strategy=Constant(0.0)).state.model["weight"]
    rounds, drawn, seen = 6, [], set()
    moved = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            assert event["sites"] == {}, "the log tells who took part"
            drawn.append(event["answered"])
            seen.add(event["answered"])

    for round in range(1, rounds + 1):
        drawn.clear()
        run = anyfit.federate(
            Linear(),
            sites,
            rounds=round,
            strategy=Constant(1.0),
            sample=10,
            on_event=listen,
            privacy=SitePrivacy(noise_multiplier=0.0, clip=1.0, delta=1e-4),
        )
        moved.append(float((run.state.model["weight"] - start).mean()) * math.sqrt(8))
        assert moved[-1] == pytest.approx(sum(drawn) / 10, abs=1e-4)
    assert len(seen) > 1, "as many sites in each round: that is not Poisson sampling"


def test_a_round_that_nobody_is_drawn_for_is_noise_alone(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("anyfit.federate"), "secret_seed", lambda folder: 1)  # who is drawn is secret otherwise
    sites, moved, rounds = many(3), [], []
    anyfit.federate(
        Linear(),
        sites,
        rounds=8,
        sample=1,
        seed=5,
        strategy=Constant(1.0),
        privacy=SitePrivacy(noise_multiplier=1.0, clip=0.5, delta=1e-4, quantile=0.5),
        on_event=lambda event: rounds.append(event) if event["event"] == "round" else None,
    )
    empty = [line for line in rounds if not line["answered"]]
    assert empty and len(empty) < 8
    assert all(line["epsilon"] > 0 and line["clip"] > 0 for line in empty)
    sent = [order.tensors["weights"] for order, _ in wire.replies if order.kind == "train"]
    assert len({tuple(vector.tolist()) for vector in sent}) == len({order.round for order, _ in wire.replies if order.kind == "train"})
    assert moved == []


def test_the_adaptive_clip_goes_to_the_quantile_of_the_norms() -> None:
    for start in (0.01, 30.0):
        run = private(many(20), rounds=60, size=0.7, clip=start, noise_multiplier=0.0, quantile=0.5, clip_lr=0.5)
        clips = [line["clip"] for line in run.history]
        assert abs(math.log(clips[-1] / 0.7)) < 0.3 < abs(math.log(start / 0.7))
    run = private(many(20), rounds=3, size=0.7, clip=0.5, noise_multiplier=0.0)
    assert [line["clip"] for line in run.history] == [0.5] * 3


def test_epsilon_per_round_is_that_of_dp_accounting() -> None:
    accounting = pytest.importorskip("dp_accounting")
    run = private(many(20), rounds=4, noise_multiplier=1.3, sample=5)
    for line in run.history:
        accountant = accounting.rdp.RdpAccountant()
        event = accounting.PoissonSampledDpEvent(0.25, accounting.GaussianDpEvent(1.3))
        accountant.compose(event, line["round"])
        assert line["epsilon"] == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-9)
    assert run.result["privacy"]["epsilon"] == run.history[-1]["epsilon"] and run.result["privacy"]["steps"] == 4
    assert private(many(4), noise_multiplier=0.0).history[0]["epsilon"] is None  # infinite


def test_a_budget_that_is_used_up_stops_the_run_and_a_resume_buys_nothing(tmp_path: Path, wire: Wire) -> None:
    rounds = 3
    budget = Accountant(1e-4).epsilon(rounds, 1.0, 2.0) + 1e-6
    privacy = SitePrivacy(noise_multiplier=2.0, epsilon=budget, delta=1e-4)
    options: dict[str, Any] = {"rounds": 10, "strategy": Constant(1.0), "privacy": privacy, "run": tmp_path / "r"}
    notices: list[str] = []
    run = anyfit.federate(Linear(), many(4), on_event=lambda e: notices.append(e["text"]) if e["event"] == "notice" else None, **options)
    assert run.stopped == "budget" and len(run.history) == rounds and run.result["privacy"]["epsilon"] <= budget
    assert any("round 4 would pass the budget" in text for text in notices)
    asked = len(wire.of("train"))
    again = anyfit.federate(Linear(), many(4), resume=True, **options)
    assert again.stopped == "budget" and again.history == run.history and len(wire.of("train")) == asked
    assert torch.equal(again.state.model["weight"], run.state.model["weight"])
    with pytest.raises(StateError, match="made with privacy="):
        anyfit.federate(Linear(), many(4), resume=True, **{**options, "privacy": SitePrivacy(noise_multiplier=2.0, delta=1e-4)})
    with pytest.raises(StateError, match="made with privacy="):
        anyfit.federate(Linear(), many(4), resume=True, **{**options, "privacy": None})


def test_private_rounds_resume_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.randbits", lambda bits: 0x1234567890ABCDEF1234567890ABCDEF)
    options: dict[str, Any] = {
        "rounds": 5,
        "sample": 0.5,
        "privacy": SitePrivacy(noise_multiplier=1.0, delta=1e-4, quantile=0.5, clip=0.3),
        "compress": "int8",
    }
    whole = anyfit.federate(Linear(), many(6), run=tmp_path / "whole", **options)

    def stop(event: dict[str, Any]) -> str | None:
        return "stop" if event["event"] == "round" and event["round"] == 2 else None

    cut = anyfit.federate(Linear(), many(6), run=tmp_path / "cut", on_event=stop, **options)
    assert cut.stopped == "asked" and len(cut.history) == 2
    again = anyfit.federate(Linear(), many(6), run=tmp_path / "cut", resume=True, **options)
    assert again.history == whole.history
    assert torch.equal(again.state.model["weight"], whole.state.model["weight"])


@pytest.mark.parametrize("strategy", [FedMedian(), TrimmedMean(), Krum(), Scaffold(), FedNova(), NewtonRaphson()], ids=lambda s: s.name)
def test_strategies_that_need_more_than_a_noisy_sum_are_refused(strategy: Any) -> None:
    with pytest.raises(InputError, match=f"{strategy.name} needs more of each site than a noisy sum"):
        anyfit.federate(Linear(), many(5), strategy=strategy, rounds=1, privacy=SitePrivacy(noise_multiplier=1.0, delta=1e-4))


def test_a_limit_on_the_norm_and_a_clip_exclude_each_other() -> None:
    with pytest.raises(InputError, match=re.escape("norm (=1.0) of the limits and the clip of the privacy exclude each other")):
        anyfit.federate(Linear(), SITES, rounds=1, limits=Limits(norm=1.0), privacy=SitePrivacy(noise_multiplier=1.0, delta=1e-4))


ORDER = Order("train", 3, 1, 7, values={"clip": 1.0, "noise": 1.0, "bits_noise": 1.0, "noise_sites": 4})


def released(update: Tensor, seed: int = 11, order: Order = ORDER, quantile: float | None = 0.5) -> Update:
    guard = Guard(privacy=SitePrivacy(noise_multiplier=1.0, delta=1e-4, quantile=quantile))
    whole = Update.of("weights", {"weights": update * 5}, 5.0)
    return guard.release(order, whole, rows=5, shapes={"weights": {"weights": (6,)}}, seed=seed, memory={})[0]


def noise_of(update: Tensor, **options: Any) -> Tensor:
    return released(update, **options).sums("weights")["weights"] - update


def test_an_order_sent_again_gets_the_same_answer_and_nothing_else_the_same_noise() -> None:
    """Two updates under one noise would show their difference."""
    change = torch.full((6,), 0.1)
    first = noise_of(change)
    assert torch.equal(noise_of(change), first)
    assert torch.equal(released(change).sums("below")["below"], released(change).sums("below")["below"])
    others = [
        noise_of(change + 1e-3),
        noise_of(change, seed=12),
        noise_of(change, order=Order("train", 4, 1, 7, values=ORDER.values)),
        noise_of(change, order=Order("train", 3, 2, 7, values=ORDER.values)),
        noise_of(change, order=Order("train", 3, 1, 7, values={**ORDER.values, "noise_sites": 1})) / 2,
        noise_of(change, order=Order("train", 3, 1, 7, values={**ORDER.values, "noise": 0.5})) * 2,
    ]
    for other in others:
        assert float((other - first).abs().min()) > 1e-6
    assert torch.equal(noise_of(change, order=Order("train", 3, 1, 8, values=ORDER.values)), first), "the order's seed is the server's"


def test_who_knows_the_order_does_not_know_the_noise(wire: Wire) -> None:
    """The same federation twice: the same orders in the first round, but other noise, for the secret is drawn anew."""
    for _ in range(2):
        private(many(2), noise_multiplier=1.0)
    orders = [order for order, _ in wire.replies if order.kind == "train"]
    assert orders[0].values == orders[2].values and torch.equal(orders[0].tensors["weights"], orders[2].tensors["weights"])
    first, second = vectors(wire)[:2], vectors(wire)[2:]
    assert float((first - second).abs().min()) > 1e-9


def test_a_codec_under_privacy_works_on_the_noisy_vector_and_remembers_nothing(wire: Wire) -> None:
    privacy = SitePrivacy(noise_multiplier=1.0, clip=0.1, delta=1e-4)
    run = anyfit.federate(Linear(), SITES, rounds=2, batch_size=10, privacy=privacy, compress="topk:0.25")
    assert all(int((vector != 0).sum()) == 2 for vector in vectors(wire))
    assert [line["bytes_up"] for line in run.history] == [2 * 2 * 8] * 2
    guard, memory = Guard(codec=anyfit.codec.Codec("topk", 0.25), privacy=privacy), dict[str, Any]()
    guard.release(
        ORDER,
        Update.of("weights", {"weights": torch.ones(6)}, 1.0),
        rows=1,
        shapes={"weights": {"weights": (6,)}},
        seed=1,
        memory=memory,
    )
    assert not memory


def test_a_private_update_that_is_not_finite_is_refused() -> None:
    with pytest.raises(Refused, match="is not finite"):
        released(torch.tensor([math.nan] * 6))
    with pytest.raises((Refused, NonFinite), match="finite"):
        released(torch.tensor([3e38] * 6))


def test_counts_of_whole_numbers_are_counted_cell_by_cell() -> None:
    order = Order("prepare", 0, 1, 0, values={"schema": {"columns": [{"name": "x", "type": "continuous"}]}})
    update = Update.of("histogram:x", {"wide": torch.tensor([9, 0, 8]), "thin": torch.tensor([9, 1, 8])}, 30.0, COUNTS)
    out, _ = Guard(Limits(cells=5)).release(order, update, rows=30, shapes=None, seed=0, memory={})
    assert set(out.groups["histogram:x"].sums) == {"wide"}
