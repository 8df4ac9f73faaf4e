"""Strategies against the mathematics of their papers: numpy on the same sums, pooled optima, and liars among the sites."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_one_idea import OPTIONS, Plain, difference, table
from torch import Tensor, nn

import anyfit
from anyfit.data import Source, read_splits
from anyfit.errors import InputError, StateError, TaskError
from anyfit.federate import Faults, Local, federate
from anyfit.fit import fit
from anyfit.schema import Schema
from anyfit.strategy import (
    STRATEGIES,
    Cyclic,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBN,
    FedMedian,
    FedNova,
    FedPCA,
    FedProx,
    FedYogi,
    Krum,
    NewtonRaphson,
    Scaffold,
    Server,
    SingleSite,
    Strategy,
    TrimmedMean,
    strategy_of,
)
from anyfit.task import Step, Task
from anyfit.tasks import PCA
from anyfit.update import Layout, Update
from anyfit.values import canonical
from anyfit.worker import Memories

# ---------------------------------------------------------------------------------------------------- bowls: known optima


class Point(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1.0, 1.0, width))


class Bowl(Task):
    """Each row (h, t) is a quadratic h / 2 (w - t)^2. All rows of a site are the same, so that batches change nothing."""

    lr: float = 0.1
    momentum: float = 0.0

    def build_model(self, schema: Schema) -> nn.Module:
        return Point(3)

    def step(self, model: nn.Module, batch: Any) -> Step:
        h_B3, t_B3 = batch
        return Step((0.5 * h_B3 * (model.w - t_B3).square()).sum(1).mean(), len(h_B3))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)

    def build_schedule(self, optimizer: Any, total_steps: int) -> None:
        return None


Bowls = Mapping[str, tuple[int, list[float], list[float]]]  # site -> rows, h, t
UNLIKE: Bowls = {
    "few": (4, [1.0, 0.2, 3.0], [5.0, -2.0, 1.0]),
    "more": (9, [0.3, 2.0, 1.0], [-3.0, 1.0, 4.0]),
    "most": (20, [2.0, 1.0, 0.1], [0.5, 3.0, -6.0]),
}
ROWS = 4  # of a batch: few has 1 step in an epoch, more 3, most 5


def sites_of(bowls: Bowls) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (torch.tensor([h] * rows, dtype=torch.float64), torch.tensor([t] * rows, dtype=torch.float64))
        for name, (rows, h, t) in bowls.items()
    }


def optimum(bowls: Bowls) -> np.ndarray:
    total = sum(rows * np.array(h) * np.array(t) for rows, h, t in bowls.values())
    return np.asarray(total / sum(rows * np.array(h) for rows, h, _ in bowls.values()))


def learnt(strategy: Strategy, *, rounds: int, bowls: Bowls = UNLIKE, task: Bowl | None = None, **options: Any) -> np.ndarray:
    options = {"batch_size": ROWS, "dtype": "float64", "seed": 1, **options}
    run = federate(task or Bowl(), sites_of(bowls), strategy=strategy, rounds=rounds, **options)
    return run.state.model["w"].numpy()


def by_hand(rounds: int, steps: Sequence[int], *, mu: float = 0.0, momentum: float = 0.0, kind: str = "", lr: float = 0.1) -> np.ndarray:
    """FedAvg, FedProx, FedNova and SCAFFOLD (option II) as their papers have them, on the bowls, sites weighted by rows."""
    rows = np.array([bowl[0] for bowl in UNLIKE.values()], float)
    share = rows / rows.sum()
    h, t = (np.array([bowl[place] for bowl in UNLIKE.values()]) for place in (1, 2))
    x, c_i = np.linspace(-1.0, 1.0, 3), np.zeros((3, 3))
    c = np.zeros(3)
    for _ in range(rounds):
        deltas, new_c, lengths = [], c_i.copy(), []
        for i, count in enumerate(steps):
            y, velocity, weights = x.copy(), np.zeros(3), np.zeros(count)
            for k in range(count):
                gradient = h[i] * (y - t[i]) + mu * (y - x)
                if kind == "scaffold":
                    gradient = gradient - c_i[i] + c
                velocity = momentum * velocity + gradient
                y = y - lr * velocity
                weights[: k + 1] += momentum ** np.arange(k + 1)[::-1]  # how often each gradient is in the change
            new_c[i] = c_i[i] - c + (x - y) / (count * lr)
            lengths.append(weights.sum())
            deltas.append((y - x) / (weights.sum() if kind == "nova" else 1.0))
        x = x + (share @ np.array(lengths) if kind == "nova" else 1.0) * (share @ np.array(deltas))
        c, c_i = c + share @ (new_c - c_i), new_c
    return x


@pytest.mark.parametrize(
    ("strategy", "how"),
    [(FedAvg(), {}), (FedProx(mu=0.7), {"mu": 0.7}), (FedNova(), {"kind": "nova"}), (Scaffold(), {"kind": "scaffold"})],
    ids=["FedAvg", "FedProx", "FedNova", "Scaffold"],
)
def test_several_unequal_local_steps_are_those_of_the_paper(strategy: Strategy, how: dict[str, Any]) -> None:
    assert np.abs(learnt(strategy, rounds=7) - by_hand(7, [1, 3, 5], **how)).max() < 1e-10


def test_fednova_heeds_momentum_as_the_paper_does() -> None:
    found = learnt(FedNova(), rounds=5, task=Bowl(lr=0.05, momentum=0.8))
    assert np.abs(found - by_hand(5, [1, 3, 5], kind="nova", momentum=0.8, lr=0.05)).max() < 1e-10


def test_scaffold_reaches_the_pooled_optimum_that_fedavg_misses() -> None:
    target = optimum(UNLIKE)
    averaged = np.abs(learnt(FedAvg(), rounds=60, steps=10) - target).max()
    controlled = np.abs(learnt(Scaffold(), rounds=60, steps=10) - target).max()
    assert controlled < 1e-9 < 0.2 < averaged


def test_fednova_takes_away_the_bias_of_unequal_steps() -> None:
    bowls = {name: (rows, [1.0, 1.0, 1.0], t) for name, (rows, _, t) in UNLIKE.items()}
    task, target = Bowl(lr=0.02), optimum(bowls)
    averaged, normalised = (np.abs(learnt(s, rounds=150, bowls=bowls, task=task) - target).max() for s in (FedAvg(), FedNova()))
    assert averaged > 0.5
    assert normalised < averaged / 20  # what is left is of the order of the learning rate


def test_fednova_counts_steps_over_rows_without_end() -> None:
    bowl = {"large": (3000, [1.0, 0.2, 3.0], [5.0, -2.0, 1.0])}
    assert np.abs(learnt(FedNova(), rounds=1, steps=1500, bowls=bowl) - [5.0, -2.0, 1.0]).max() < 1e-9


@pytest.mark.parametrize("strategy", [FedAvg(), Scaffold(), FedMedian(), FedNova()], ids=lambda strategy: strategy.name)
def test_losses_and_gradients_of_the_scale_of_prices(strategy: Strategy) -> None:
    random = np.random.default_rng(0)
    parts = {name: pa.table({"x": (x := random.normal(size=rows)), "price": 1e6 + 1e5 * x}) for name, rows in (("a", 200), ("b", 90))}
    run = federate(anyfit.Tabular(), parts, strategy=strategy, rounds=4, epochs=3, batch_size=16, target="price", seed=1)
    assert 0 < run.history[-1]["loss"] < run.history[0]["loss"]


def test_fedprox_stays_nearer_to_the_start() -> None:
    start = np.linspace(-1.0, 1.0, 3)
    moved = [np.linalg.norm(learnt(FedProx(mu=mu), rounds=1, steps=20) - start) for mu in (0.0, 0.5, 5.0)]
    assert moved[0] > 1.2 * moved[1] > 1.2 * 1.2 * moved[2] > 0


class Seen(Scaffold):
    """Keeps what the server knows after each round."""

    def finish(self, server: Server, total: Update) -> Tensor:
        weights = super().finish(server, total)
        SERVERS.append(server)
        return weights


SERVERS: list[Server] = []


def test_scaffolds_control_is_the_mean_of_the_sites_with_partial_participation_and_newcomers(tmp_path: Path) -> None:
    SERVERS.clear()
    faults = Faults(joins={"more": 5}, dropout=0.3)
    learnt(Seen(), rounds=9, steps=3, sample=2, quorum=2, faults=faults, run=tmp_path / "r")
    memories = Memories(tmp_path / "r/sites")
    sites = {name: memories.read(name, 100).get("control", torch.zeros(3)).numpy() for name in UNLIKE}
    assert all(np.abs(control).max() > 0 for control in sites.values())
    rows = {name: bowl[0] for name, bowl in UNLIKE.items()}
    expected = sum(rows[name] * sites[name] for name in rows) / sum(rows.values())
    assert np.abs(Seen().begin(SERVERS[-1])["control"].numpy() - expected).max() < 1e-11
    assert len(list((tmp_path / "r/sites").glob("*.safetensors"))) <= 2 * 3  # of the last checkpoint and of the one before


# ------------------------------------------------------------------------------------- one local step: what must be equal


@pytest.fixture(scope="module")
def sites() -> dict[str, pa.Table]:
    return {"north": table(5, 1), "south": table(40, 2), "west": table(52, 3)}


def together(sites: Any, strategy: Strategy | None = None, rounds: int = 5, task: Task | None = None, **options: Any) -> dict[str, Tensor]:
    given = {"target": "target", "steps": 1, **OPTIONS, **options}
    return dict(federate(task or Plain(), sites, strategy=strategy, rounds=rounds, **given).state.model)


@pytest.mark.parametrize("strategy", [Scaffold(), FedProx(mu=0.0), FedProx(mu=10.0), FedAvgM(momentum=0.0), FedNova()], ids=str)
def test_with_one_local_step_all_are_fedavg(sites: dict[str, pa.Table], strategy: Strategy) -> None:
    assert difference(together(sites), together(sites, strategy)) < 1e-12


@pytest.mark.parametrize("strategy", [FedProx(mu=0.0), FedAvgM(momentum=0.0), FedNova()], ids=str)
def test_with_equal_local_steps_too(sites: dict[str, pa.Table], strategy: Strategy) -> None:
    assert difference(together(sites, steps=4), together(sites, strategy, steps=4)) < 1e-12


def test_scaffold_with_several_local_steps_is_another(sites: dict[str, pa.Table]) -> None:
    assert difference(together(sites, steps=4), together(sites, Scaffold(), steps=4)) > 1e-4


@pytest.fixture(scope="module")
def adult(data_folder: Path) -> pa.Table:
    return read_splits(Source(data_folder / "adult/adult_train.csv.gz", "income"), None, None, wants_validation=False)["train"]


def test_fedavg_is_fit_on_adult_over_uneven_sites(adult: pa.Table) -> None:
    rows = adult.slice(0, 6000)
    assert any(column.null_count for column in rows.columns), "no missing value, so nothing is shown of them"
    parts = {"a": rows.slice(0, 7), "b": rows.slice(7, 300), "c": rows.slice(307, 1500), "d": rows.slice(1807)}
    alone, start = (fit(Plain(), rows, target="income", steps=steps, **OPTIONS).state.model for steps in (4, 1))
    assert difference(dict(alone), dict(start)) > 1e-2
    assert difference(dict(alone), together(parts, rounds=4, target="income")) < 1e-10
    assert difference(dict(alone), together(parts, Scaffold(), rounds=4, target="income")) < 1e-10


# ------------------------------------------------------------------------------------------------- the server's own steps


def server_of(weights: np.ndarray, sites: int = 3, rows: float = 10.0) -> Server:
    return Server(torch.from_numpy(weights), Layout({"w": weights.shape}, torch.float64), 1, sites, rows)


def adaptive(kind: str, weights: np.ndarray, deltas: Sequence[np.ndarray], lr: float, tau: float, beta1: float, beta2: float) -> np.ndarray:
    """Algorithm 2 of Reddi et al. 2021."""
    x, m, v = weights, np.zeros_like(weights), np.full_like(weights, tau**2)
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        squared = delta**2
        if kind == "adagrad":
            v = v + squared
        elif kind == "yogi":
            v = v - (1 - beta2) * squared * np.sign(v - squared)
        else:
            v = beta2 * v + (1 - beta2) * squared
        x = x + lr * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize(("kind", "cls"), [("adam", FedAdam), ("yogi", FedYogi), ("adagrad", FedAdagrad)])
@given(seed=st.integers(0, 10**6), beta1=st.sampled_from([0.0, 0.9]), beta2=st.sampled_from([0.5, 0.99]))
@settings(max_examples=15)
def test_adaptive_steps_are_those_of_the_paper(kind: str, cls: Any, seed: int, beta1: float, beta2: float) -> None:
    random = np.random.default_rng(seed)
    weights, deltas = random.normal(size=6), random.normal(size=(5, 6)) * 10.0 ** random.integers(-4, 2, size=(5, 1))
    server, strategy = server_of(weights), cls(lr=0.05, tau=1e-2, beta1=beta1, beta2=beta2)
    for delta in deltas:
        server = replace(server, weights=strategy.finish(server, Update.of("weights", {"weights": torch.from_numpy(delta * 10)}, 10.0)))
    assert np.abs(server.weights.numpy() - adaptive(kind, weights, deltas, 0.05, 1e-2, beta1, beta2)).max() < 1e-12


def test_moments_stay_with_the_server_between_rounds() -> None:
    """Through the rounds of a federation: 1 site whose change is known at each round."""
    bowls: Bowls = {"one": (4, [1.0, 0.5, 2.0], [3.0, -1.0, 0.0])}
    h, t = np.array(bowls["one"][1]), np.array(bowls["one"][2])
    x = np.linspace(-1.0, 1.0, 3)
    m, v, velocity, other = np.zeros(3), np.full(3, 1e-4), np.zeros(3), x
    for _ in range(6):
        delta = -0.1 * h * (x - t)
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        x = x + 0.3 * m / (np.sqrt(v) + 1e-2)
        velocity = 0.9 * velocity - 0.1 * h * (other - t)
        other = other + 0.5 * velocity
    assert np.abs(learnt(FedAdam(lr=0.3, tau=1e-2), rounds=6, bowls=bowls) - x).max() < 1e-11
    assert np.abs(learnt(FedAvgM(lr=0.5), rounds=6, bowls=bowls) - other).max() < 1e-11


# ------------------------------------------------------------------------------------------------------------ second order


class Logistic(Task):
    """One logit, no intercept."""

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Linear(4, 1, bias=False)

    def step(self, model: nn.Module, batch: Any) -> Step:
        x_B4, y_B = batch
        return Step(nn.functional.binary_cross_entropy_with_logits(model(x_B4)[:, 0], y_B.to(x_B4.dtype)), len(y_B))


def arrays(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    random, found = np.random.default_rng(seed), {}
    for name, rows in (("a", 6), ("b", 31), ("c", 80)):
        x = random.normal(size=(rows, 4)) * [1.0, 3.0, 0.2, 1.0] + random.normal(size=4)
        y = (x @ [1.0, -0.5, 2.0, 0.0] + random.logistic(size=rows) > 0).astype(np.int64)
        found[name] = (torch.from_numpy(x), torch.from_numpy(y))
    return found


EXACT: dict[str, Any] = {"dtype": "float64", "batch_size": 16, "seed": 1}


def test_newton_raphson_is_the_pooled_solution_in_few_rounds() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    sites, l2 = arrays(), 0.02
    x, y = (np.concatenate([part[place].numpy() for part in sites.values()]) for place in (0, 1))
    pooled = linear_model.LogisticRegression(C=1 / (l2 * len(x)), fit_intercept=False, tol=1e-12, solver="newton-cholesky").fit(x, y)
    run = federate(Logistic(), sites, strategy=NewtonRaphson(l2=l2), rounds=8, **EXACT)
    assert np.abs(run.state.model["weight"].numpy() - pooled.coef_).max() < 1e-8
    damped = federate(Logistic(), sites, strategy=NewtonRaphson(l2=l2, damping=0.05), rounds=60, **EXACT)
    assert np.abs(damped.state.model["weight"].numpy() - pooled.coef_).max() < 1e-8  # damping slows, and changes no optimum
    first, whole = (federate(Logistic(), sites, strategy=NewtonRaphson(l2=l2, **d), rounds=1, **EXACT) for d in ({"damping": 5.0}, {}))
    assert float(first.state.model["weight"].norm()) < float(whole.state.model["weight"].norm())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_newton_raphson_refuses_a_hessian_that_has_no_inverse(dtype: str, sites: dict[str, pa.Table]) -> None:
    twice = {name: (x.index_select(1, torch.tensor([0, 1, 2, 0])), y) for name, (x, y) in arrays().items()}
    with pytest.raises(InputError, match=r"cannot be inverted in round 1 .*l2 or damping above 0"):
        federate(Logistic(), twice, strategy=NewtonRaphson(), rounds=1, **{**EXACT, "dtype": dtype})
    federate(Logistic(), twice, strategy=NewtonRaphson(damping=1e-3), rounds=1, **{**EXACT, "dtype": dtype})
    task = Plain(hidden=())  # two logits, of which only the difference counts
    sites = {name: rows.drop_columns(["kind"]) for name, rows in sites.items()}
    with pytest.raises(InputError, match="cannot be inverted in round 1"):
        together(sites, NewtonRaphson(), rounds=1, task=task, dtype=dtype)
    together(sites, NewtonRaphson(l2=1e-2), rounds=3, task=task, dtype=dtype)


def test_newton_raphson_sees_through_dropout_and_parameters_that_are_not_used() -> None:
    class Noisy(Logistic):
        def build_model(self, schema: Schema) -> nn.Module:
            model = nn.Linear(4, 1, bias=False)
            model.drop, model.idle = nn.Dropout(0.5), nn.Parameter(torch.ones(2))
            return model

        def step(self, model: nn.Module, batch: Any) -> Step:
            return super().step(model, (model.drop(batch[0]), batch[1]))

    found, plain = (federate(task, arrays(), strategy=NewtonRaphson(l2=0.1), rounds=6, **EXACT) for task in (Noisy(), Logistic()))
    assert np.abs((found.state.model["weight"] - plain.state.model["weight"]).numpy()).max() < 1e-10
    assert found.state.model["idle"].abs().max() < 1e-12  # l2 alone


def test_newton_raphson_refuses_too_many_parameters(sites: dict[str, pa.Table]) -> None:
    with pytest.raises(InputError, match=re.escape("sends a Hessian, which 5,417 parameters are too many for (4,096 at most)")):
        together(sites, NewtonRaphson(), task=Plain(hidden=(600,)))


def test_fed_pca_is_pca_of_all_rows() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    sites = {name: (x,) for name, (x, _) in arrays().items()}
    x = np.concatenate([part[0].numpy() for part in sites.values()])
    run = federate(PCA(components=3), sites, strategy=FedPCA(), rounds=1, **EXACT)
    pooled = decomposition.PCA(3).fit(x)
    mean, components = run.state.model["mean"].numpy(), run.state.model["components"].numpy()
    assert np.abs(mean - x.mean(0)).max() < 1e-10
    signs = np.sign((components * pooled.components_).sum(1, keepdims=True))
    assert np.abs(components - signs * pooled.components_).max() < 1e-10
    values, vectors = np.linalg.eigh(np.cov(x.T))
    assert np.abs(np.abs(components) - np.abs(vectors[:, ::-1][:, :3].T)).max() < 1e-10
    projected = anyfit.predict(run, (torch.from_numpy(x),)).numpy()
    assert projected.shape == (117, 3)
    assert np.abs(projected - signs.T * pooled.transform(x)).max() < 1e-9
    assert run.splits["train"]["loss"] == pytest.approx(values[0] * 116 / 117, rel=1e-9)
    again = federate(PCA(components=3), sites, strategy=FedPCA(), rounds=3, **EXACT)
    assert all(torch.equal(run.state.model[name], again.state.model[name]) for name in run.state.model)


def test_pca_takes_tables_and_images_and_says_what_it_cannot(sites: dict[str, pa.Table]) -> None:
    run = federate(PCA(), sites, strategy=FedPCA(), rounds=1, target="target", **EXACT)
    assert anyfit.predict(run, sites["west"]).shape == (52, 2)
    digits = read_splits(Source("digits"), None, None, wants_validation=False)["train"]
    run = federate(PCA(components=5), {"a": digits.slice(0, 200), "b": digits.slice(200, 90)}, strategy=FedPCA(), rounds=1)
    assert anyfit.predict(run, digits.slice(0, 7)).shape == (7, 5)
    with pytest.raises(anyfit.errors.DataError, match=re.escape("components (=4) must be from 1 to the 3 numbers of a row")):
        federate(PCA(components=4), sites, strategy=FedPCA(), rounds=1, target="target")
    with pytest.raises(InputError, match="FedPCA needs a model that exchanges `mean` and `components`"):
        together(sites, FedPCA())


def test_gradient_steps_on_pca_get_near() -> None:
    x = torch.cat([part for part, _ in arrays().values()])
    run = fit(PCA(components=2), (x,), **{**EXACT, "epochs": 150, "batch_size": 8})
    values = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))
    assert anyfit.evaluate(run, (x,))["loss"] < 1.02 * values[:2].sum()


# ------------------------------------------------------------------------------------------------------------------ liars


@given(rows=st.lists(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), min_size=1, max_size=9), trim=st.sampled_from([0.0, 0.1, 0.4]))
@settings(max_examples=60)
def test_median_and_trimmed_mean_are_numpys(rows: list[list[float]], trim: float) -> None:
    changes = np.array(rows)
    updates = [Update.of("weights", {"weights": torch.from_numpy(row * n)}, n) for n, row in enumerate(changes, 1)]

    def of(strategy: Strategy) -> np.ndarray:
        return strategy.finish(server_of(np.zeros(4)), strategy.combine(updates)).numpy()

    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-9}
    np.testing.assert_allclose(of(FedMedian()), np.median(changes, 0), **close)
    cut = min(int(np.ceil(trim * len(changes) - 1e-9)), (len(changes) - 1) // 2)
    np.testing.assert_allclose(of(TrimmedMean(trim=trim)), np.sort(changes, 0)[cut : len(changes) - cut].mean(0), **close)


@given(st.integers(0, 10**6), st.integers(0, 2), st.integers(1, 3))
@settings(max_examples=30)
def test_krum_is_the_papers(seed: int, liars: int, keep: int) -> None:
    changes = np.random.default_rng(seed).normal(size=(7, 5))
    scores = [sum(sorted(((a - b) ** 2).sum() for j, b in enumerate(changes) if j != i)[: 7 - liars - 2]) for i, a in enumerate(changes)]
    expected = changes[np.argsort(scores, kind="stable")[:keep]].mean(0)
    assert np.abs(Krum(liars=liars, keep=keep).one(torch.from_numpy(changes)).numpy() - expected).max() < 1e-12


class Lies:
    """Some sites send what they like: NaN, a huge change, or one in the other direction."""

    lies: dict[str, float]

    def local(self, turn: Any) -> Update:
        update = super().local(turn)  # type: ignore[misc]
        factor = self.lies.get(turn.name, 1.0)
        return turn.update(update.mean("weights")["weights"] * factor)


def lying(strategy: type[FedAvg], lies: dict[str, float]) -> Any:
    """A strategy some of whose sites multiply their change."""
    return dataclass(frozen=True, kw_only=True)(type("Lying", (Lies, strategy), {"lies": lies}))


HONEST: Bowls = {f"s{place}": (4 + place, [1.0, 1.0, 1.0], [1.0 + 0.01 * place, 2.0, -3.0 - 0.01 * place]) for place in range(7)}


@pytest.mark.parametrize("factor", [1e5, -10.0])
@pytest.mark.parametrize("strategy", [FedMedian, TrimmedMean, Krum])
def test_liars_break_fedavg_and_not_the_robust(factor: float, strategy: type[FedAvg]) -> None:
    liars = dict.fromkeys(("s1", "s5"), factor)
    options: dict[str, Any] = {FedMedian: {}, TrimmedMean: {"trim": 0.3}, Krum: {"liars": 2}}[strategy]
    honest = learnt(FedAvg(), rounds=1, steps=1, bowls={name: bowl for name, bowl in HONEST.items() if name not in liars})
    moved = np.abs(honest - np.linspace(-1.0, 1.0, 3)).max()
    assert np.abs(learnt(lying(strategy, liars)(**options), rounds=1, steps=1, bowls=HONEST) - honest).max() < 0.02
    assert np.abs(learnt(lying(FedAvg, liars)(), rounds=1, steps=1, bowls=HONEST) - honest).max() > moved


def test_nan_of_a_site_is_refused_by_the_guard() -> None:
    liar = lying(FedMedian, {"s1": float("nan")})
    with pytest.raises(anyfit.errors.RunError, match="site 's1' failed in round 1: weights of weights is not finite"):
        learnt(liar(), rounds=1, steps=1, bowls=HONEST)
    assert np.isfinite(learnt(liar(), rounds=1, bowls=HONEST, quorum=5)).all()


def test_krum_says_how_many_sites_it_needs() -> None:
    with pytest.raises(InputError, match=re.escape("Krum with liars=1 and keep=1 needs more than 4 updates, but 3 came")):
        learnt(Krum(), rounds=1)


def test_every_site_counts_the_same_in_a_trimmed_mean_of_nothing() -> None:
    mean = np.mean([learnt(FedAvg(), rounds=1, steps=2, bowls={name: bowl}) for name, bowl in UNLIKE.items()], 0)
    assert np.abs(learnt(TrimmedMean(trim=0.0), rounds=1, steps=2) - mean).max() < 1e-12
    assert np.abs(learnt(FedAvg(), rounds=1, steps=2) - mean).max() > 1e-2


# ------------------------------------------------------------------------------------------- who takes part, what stays


def test_cyclic_goes_from_site_to_site_and_single_site_stays() -> None:
    x = np.linspace(-1.0, 1.0, 3)
    for name in ("few", "more", "most", "few"):
        h, t = (np.array(part) for part in UNLIKE[name][1:])
        x = t + (x - t) * (1 - 0.1 * h) ** 2
    assert np.abs(learnt(Cyclic(), rounds=4, steps=2) - x).max() < 1e-12
    alone = learnt(FedAvg(), rounds=3, steps=2, bowls={"more": UNLIKE["more"]})
    assert np.abs(learnt(SingleSite(site="more"), rounds=3, steps=2) - alone).max() < 1e-12
    with pytest.raises(InputError, match=re.escape("site (='none') of SingleSite is no site; there are: few, more, most")):
        learnt(SingleSite(site="none"), rounds=1)


class Normed(Plain):
    """With batch statistics."""

    def build_model(self, schema: Schema) -> nn.Module:
        model = super().build_model(schema)
        model.layers.insert(1, nn.BatchNorm1d(8))
        return model


@pytest.mark.parametrize(
    ("strategy", "stays"),
    [
        (FedBN(), {"layers.1." + name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}),
        (FedAvg(personal=("layers.4.*", "layers.1.*")), {"layers.4.weight", "layers.4.bias", "layers.1.weight"}),
    ],
    ids=["fedbn", "personal"],
)
def test_what_is_personal_stays_differs_and_counts_in_evaluation(
    sites: dict[str, pa.Table], strategy: FedAvg, stays: set[str], tmp_path: Path
) -> None:
    run = federate(Normed(), sites, strategy=strategy, rounds=3, steps=2, target="target", run=tmp_path / "r", **OPTIONS)
    memories = Memories(tmp_path / "r/sites")
    own = {name: memories.read(name, 100)["own"] for name in sites}
    for name in stays:
        assert not torch.equal(own["south"][name], run.state.model[name])
        assert name.endswith("tracked") or not torch.equal(own["south"][name], own["west"][name])
    size = sum(tensor.numel() for name, tensor in run.model.named_parameters() if name not in own["west"])
    assert run.record["exchanged"] == size
    assert all(line["bytes_down"] == 3 * 8 * size and line["bytes_up"] == 3 * 8 * (size + 1) for line in run.history)
    for name, rows in sites.items():
        run.model.load_state_dict({**run.state.model, **own[name]})
        expected = anyfit.evaluate(run, rows)
        assert run.result["sites"][name]["loss"] == pytest.approx(expected["loss"], rel=1e-9)


def test_unknown_personal_names_and_models_without_normalisation_are_refused(sites: dict[str, pa.Table]) -> None:
    with pytest.raises(InputError, match=re.escape("personal (='head.*') of FedAvg matches no name of the model; there are: ")):
        together(sites, FedAvg(personal=("head.*",)))
    with pytest.raises(InputError, match=re.escape("personal (='layers.*') of FedAvg must be a tuple of patterns: ('layers.*',)")):
        together(sites, FedAvg(personal="layers.*"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the model has no layer that FedBN keeps at home"):
        together(sites, FedBN())
    with pytest.raises(TaskError, match="leaves nothing to exchange"):
        together(sites, FedAvg(personal=("*",)))


# -------------------------------------------------------------------------------------------- arrival, resume, and names

ALL: list[Strategy] = [cls() for cls in STRATEGIES.values() if cls not in (SingleSite, Krum, NewtonRaphson)]
ALL += [SingleSite(site="b"), Krum(liars=0), NewtonRaphson(l2=0.1), FedAvg(lr=0.5, personal=("layers.4.*", "layers.1.*"))]


def case_of(strategy: Strategy) -> tuple[Task, dict[str, Any]]:
    """A task that it can learn, and how."""
    parts = {"a": table(12, 1), "b": table(40, 2), "c": table(25, 3)}
    if isinstance(strategy, NewtonRaphson):  # embeddings make no convex loss
        parts = {name: rows.drop_columns(["kind"]) for name, rows in parts.items()}
    task = {NewtonRaphson: Plain(hidden=()), FedPCA: PCA()}.get(type(strategy), Plain())
    home = isinstance(strategy, FedBN) or getattr(strategy, "personal", ())
    return Normed() if home else task, {"sites": parts, "strategy": strategy, "target": "target", "steps": 2, **OPTIONS}


class Backwards(Local):
    """Its sites answer in the other order."""

    def send(self, order: Any, to: Sequence[str]) -> None:
        super().send(order, list(reversed(to)))


@pytest.mark.parametrize("strategy", ALL, ids=lambda strategy: strategy.name)
def test_arrival_changes_no_bit(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    task, options = case_of(strategy)
    first = federate(task, rounds=3, **options)
    monkeypatch.setitem(federate.__globals__, "Local", Backwards)
    second = federate(task, rounds=3, **options)
    assert first.history == second.history
    assert all(torch.equal(tensor, second.state.model[name]) for name, tensor in first.state.model.items())


class Cut(Exception):
    pass


@pytest.mark.parametrize("strategy", ALL, ids=lambda strategy: strategy.name)
def test_resume_is_exact_and_knows_the_strategy(strategy: Strategy, tmp_path: Path) -> None:
    task, options = case_of(strategy)
    options |= {"batch_size": 10, "sample": 1.0 if strategy.needs == "each" else 2}
    whole = federate(task, rounds=4, run=tmp_path / "whole", **options)

    def cut(event: dict[str, Any]) -> None:
        if event["event"] == "reply" and event["round"] == 3:
            raise Cut

    with pytest.raises(Cut):
        federate(task, rounds=4, run=tmp_path / "cut", on_event=cut, **options)
    again = federate(task, rounds=4, run=tmp_path / "cut", resume=True, **options)
    assert all(torch.equal(tensor, again.state.model[name]) for name, tensor in whole.state.model.items())
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    for path in (tmp_path / "whole/sites").glob("*"):
        assert path.read_bytes() == (tmp_path / "cut/sites" / path.name).read_bytes()
    record = json.loads((tmp_path / "cut/run.json").read_text())["strategy"]
    assert canonical(record) == canonical(strategy.to_json())
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in record["values"].items()}
    assert STRATEGIES[record["name"].lower()](**fields) == strategy
    if not isinstance(strategy, FedPCA):
        with pytest.raises(StateError, match="has the strategy"):
            federate(task, rounds=5, run=tmp_path / "cut", resume=True, **{**options, "strategy": replace(strategy, lr=0.123)})


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("fedavg", FedAvg()),
        ("FedProx:mu=0.1", FedProx(mu=0.1)),
        ("fed-adam:lr=0.5,beta1=0", FedAdam(lr=0.5, beta1=0.0)),
        ("trimmed_mean:trim=0.25", TrimmedMean(trim=0.25)),
        ("krum:liars=2,keep=3", Krum(liars=2, keep=3)),
        ("singlesite:site=north", SingleSite(site="north")),
        ("fedavg:personal=head.*;norm.*", FedAvg(personal=("head.*", "norm.*"))),
        ("fedbn:normalisation=LayerNorm", FedBN(normalisation=("LayerNorm",))),
        ("newton-raphson:l2=0.1", NewtonRaphson(l2=0.1)),
        ("fedpca", FedPCA()),
        ("scaffold:lr=0.5", Scaffold(lr=0.5)),
    ],
)
def test_strategies_by_name(text: str, strategy: Strategy) -> None:
    assert strategy_of(text) == strategy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("average", "strategy (='average') is not known; there are: fedavg, fedavgm, fedprox"),
        ("fedavg:mu=1", "'mu' is no field of FedAvg; it has: lr, personal"),
        ("fedpca:k", "'k' is no field of FedPCA; it has: none"),
        ("singlesite", "write singlesite:site=NAME"),
        ("fedprox:mu=-1", "mu (=-1.0) of FedProx must be 0 or more"),
        ("fedprox:lr=0", "lr (=0.0) of FedProx must be above 0"),
        ("fedavg:lr=-1", "lr (=-1.0) of FedAvg must be above 0"),
        ("fedavg:lr=inf", "lr (='inf') must be a finite number"),
        ("fedavgm:momentum=1", "momentum (=1.0) of FedAvgM must be from 0 to below 1"),
        ("fedyogi:tau=0", "tau (=0.0) of FedYogi must be above 0"),
        ("fedadam:beta2=1", "beta2 (=1.0) of FedAdam must be from 0 to below 1"),
        ("trimmedmean:trim=0.5", "trim (=0.5) of TrimmedMean must be from 0 to below 0.5"),
        ("krum:keep=0", "of Krum must be at least 0 and 1"),
        ("krum:liars=x", "liars"),
        ("newtonraphson:damping=-1", "damping (=-1.0) of NewtonRaphson must be 0 or more"),
    ],
)
def test_what_no_strategy_can_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        strategy_of(text)


class SignSGD(Strategy):
    """Signs travel, and the majority decides (Bernstein et al. 2018): a strategy of one's own is one small class."""

    def local(self, turn: Any) -> Update:
        return turn.update(turn.train().sign())

    def finish(self, server: Server, total: Update) -> Tensor:
        return server.weights + 0.1 * total.mean("weights")["weights"].sign()


def test_a_strategy_of_ones_own_is_one_small_class() -> None:
    found = learnt(SignSGD(), rounds=100)
    assert np.abs(found - learnt(SignSGD(), rounds=101)).max() == pytest.approx(0.1)
    majority = np.array([0.5, 3.0, -6.0])  # of most, which has more than half of the rows
    assert np.abs(found - majority).max() < 0.11


def test_the_best_round_is_looked_at_with_what_sites_kept_then(tmp_path: Path) -> None:
    """Local heads of a later round would not fit the best round's shared layers."""
    options: dict[str, Any] = {"strategy": FedAvg(personal=("layers.3.*",)), "validation": 0.3, "batch_size": 8, "seed": 3}
    coins = np.random.default_rng(0)  # there is nothing to learn, so what is learnt does harm
    rows = {
        name: table(60, seed).set_column(4, "target", pa.array(coins.choice(["yes", "no"], 60)))
        for name, seed in (("north", 1), ("south", 2), ("west", 3))
    }
    task = Wild(hidden=(8,), dropout=0.0)
    run = anyfit.federate(task, rows, target="target", rounds=12, best=True, run=tmp_path / "r", **options)
    best = run.result["best"]["round"]
    assert best < 12, "the last round is the best, so this says nothing"
    lines = {line["round"]: line for line in run.history if line["event"] == "evaluate"}
    assert run.result["splits"]["validation"]["loss"] == pytest.approx(lines[best]["loss"], rel=1e-6)
    assert run.result["sites"] == lines[best]["sites"]
    kept = {path.name for path in (tmp_path / "r/sites").iterdir()}
    assert {f"north.{best:07d}.safetensors", "north.0000012.safetensors"} <= kept


class Wild(anyfit.Tabular):
    """Learns too fast, so that the validation loss rises again."""

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)

    def build_schedule(self, optimizer: Any, total_steps: int) -> None:
        return None
