"""Ranks learn what one process learns: whatever their shares, whoever of them dies or joins, wherever in a step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from ranks import Death, Line, Rank, Ranks, alone, apart, built, current, learn, made, note, until
from torch import Tensor, nn

import anyfit
from anyfit import Plan, Schema, Step, Task
from anyfit.cluster import Balancer
from anyfit.data import Ragged
from anyfit.engine import Trainer
from anyfit.errors import RunError, TaskError
from anyfit.fit import fit

STEPS, FEW = 50, 24  # of what is promised, and of what stands beside it
EXACT = 1e-10
PLAN = Plan(batch_size=24, dtype="float64", seed=3)


class Net(Task):
    """Plain layers; it notes which rows it sees."""

    lr: float = 0.1
    adamw: bool = False

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.adamw:
            return anyfit.adamw(model, lr=self.lr / 10, weight_decay=0.1)
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)

    def build_schedule(self, optimizer: Any, total_steps: int) -> anyfit.Schedule:
        return anyfit.schedule.cosine(optimizer, total_steps, warmup=0.1)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        note(batch["row"])
        return model(batch["x"])


def some(*quick: Any, **axes: Any) -> pytest.MarkDecorator:
    """All combinations; those that are not `quick` run with the slow tests."""
    every = [case if len(axes) > 1 else case[0] for case in product(*axes.values())]
    assert all(case in every for case in quick)
    marked = [(case if len(axes) > 1 else (case,), () if case in quick else pytest.mark.slow) for case in every]
    ids = ["-".join(type(part).__name__ if isinstance(part, Task) else str(part) for part in case) for case, _ in marked]
    return pytest.mark.parametrize(tuple(axes), [pytest.param(*case, marks=mark) for case, mark in marked], ids=ids)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sums in each step, though the models are small."""
    monkeypatch.setattr("anyfit.cluster.buckets.FIRST_BYTES", 100)
    monkeypatch.setattr("anyfit.cluster.buckets.MOST_BYTES", 500)


# 70 rows in steps of 24: the last one of an epoch has 22
def points(rows: int = 70, width: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return {"x": x, "row": torch.arange(rows), "target": torch.randint(0, 3, (rows,), generator=generator)}


def close(lines: Sequence[Line], expected: Sequence[Line]) -> bool:
    """Steps, losses (of what counts), counts and logs."""
    return all(
        step == other
        and set(logs) == set(more)
        and all(abs(logs[name] - more[name]) < EXACT for name in logs)
        and (not count or abs(loss - truth) < EXACT)
        and abs(count - number) < 1e-9
        for (step, loss, count, logs), (other, truth, number, more) in zip(lines, expected[-len(lines) :] if lines else [], strict=True)
    )


def exactly(
    task: Task, data: Any, plan: Plan = PLAN, steps: int = FEW, ranks: int | Ranks = 2, deaths: Sequence[Death] = (), **options: Any
) -> Ranks:
    """Hold ranks to what one process does; those who are left have its weights, and told of its losses."""
    between = options.pop("between", None)
    one, lines = alone(task, data, plan, steps)
    together = ranks if isinstance(ranks, Ranks) else Ranks(ranks, **options)
    trainers = together.run(learn(task, data, plan, steps, deaths=deaths, between=between))
    left = [(rank, trainer) for rank, trainer in zip(together.all, trainers, strict=True) if trainer is not None]
    assert len(left) == len(together.all) - len({death.rank for death in deaths})
    for rank, trainer in left:
        assert apart(trainer, one) < EXACT, rank.local
        assert close(rank.losses, lines) and rank.losses[-1][0] == steps
    start, _ = alone(task, data, plan, 1)
    assert apart(start, one) > 1e-3, "nothing was learnt, so equality would say nothing"
    return together


def each_row_once(together: Ranks, task: Task, data: Any, plan: Plan = PLAN) -> None:
    """Every row of every step was taken by one rank, and by one only."""
    single = Ranks(1)
    single.run(learn(task, data, plan, max(len(rank.losses) for rank in together.all)))
    for step, rows in single.all[0].rows.items():
        assert sorted(row for rank in together.all for row in rank.rows.get(step, ())) == sorted(rows), step


@some("1", "1:1", "5:1", "1:1000000", "3:2:1", shares=["1", "1:1", "5:1", "1:1000000", "1000000:1", "3:2:1", "1:1:1:1:1"])
def test_ranks_of_any_shares_take_the_steps_of_one(shares: str) -> None:
    count = shares.count(":") + 1
    together = exactly(Net(), points(), steps=STEPS, ranks=count, shares="equal" if shares in ("1", "1:1") else shares)
    each_row_once(together, Net(), points())
    epoch = sorted(row for step in range(3) for rank in together.all for row in rank.rows[step])
    assert epoch == list(range(70)), "each sample exactly once per epoch"
    if count > 1 and "000" in shares:
        assert {share for rank in together.all for step in rank.shares for share in step} == {0, 24, 22}
    if shares == "5:1":
        assert together.all[0].shares[0] == [20, 4]


def test_one_rank_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a process that is asked to be one of one, nor the last one that is left."""

    def made(*_: object) -> None:
        raise AssertionError("a group was made")

    monkeypatch.setattr("torch.distributed.ProcessGroupGloo", made)
    together = Ranks(1).run(learn(Net(), points(), PLAN, 3))
    fit_alone = fit(Net(), points(), nproc=1, steps=3, batch_size=24)
    assert len(together) == 1 and fit_alone.result["steps"] == 3 and not torch.distributed.is_initialized()


def test_shares_that_change_from_step_to_step_leave_no_trace() -> None:
    def between(rank: Rank, step: int) -> None:
        members = rank.group.generation.members
        speeds = dict(zip(members, ((step % 5, (step + 2) % 3 + 1, step % 7 + 1)), strict=True))
        rank.group.balance = Balancer(members, fixed={member: max(speed, 1e-3) for member, speed in speeds.items()})

    together = exactly(Net(), points(), steps=STEPS, ranks=3, between=between)
    assert len({tuple(shares) for shares in together.all[0].shares}) > 20
    assert together.all[0].shares == together.all[1].shares == together.all[2].shares
    each_row_once(together, Net(), points())


def test_measured_shares_follow_the_clock_and_change_nothing() -> None:
    """Which shares come of it is the clock's; all ranks agree on them, and the weights do not depend on them."""
    together = exactly(Net(), points(), ranks=2, shares="measured")
    assert together.all[0].shares == together.all[1].shares
    assert all(sum(shares) in (24, 22) for shares in together.all[0].shares)


# ---------------------------------------------------------------------- what a step may be


def sentences() -> dict[str, Tensor]:
    """Labels of words, most of which are left out: every part of a step has another count, and some have none."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(70, 5, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (70, 5), generator=generator)
    y[torch.rand(70, 5, generator=generator) < torch.linspace(0, 1, 70)[:, None]] = -100
    y[::3] = -100
    return {"x": x, "row": torch.arange(70), "target": y}


@some(("5:1", 1), ("23:1", 4), shares=["1:1", "5:1", "23:1"], accumulate=[1, 4])
def test_counts_are_those_of_the_labels(shares: str, accumulate: int) -> None:
    plan = PLAN.updated(batch_size=24 // accumulate, accumulate=accumulate)
    together = exactly(Net(), sentences(), plan, STEPS, shares=shares, deaths=[Death(1, 30, "tail")])
    assert len({count for _, _, count, _ in together.all[0].losses}) > 20, "else nothing is tested"


class MeanOfMeans(Net):
    """The mistake: a rank's mean counts the same, however much it is the mean of."""

    def step(self, model: nn.Module, batch: Any) -> Step:
        return Step(super().step(model, batch).loss, 1)


@pytest.mark.parametrize("data", [points(), sentences()], ids=["rows", "words"])
def test_a_mean_of_means_fails(data: Any) -> None:
    one, _ = alone(Net(), data, PLAN, STEPS)
    for task, far in ((Net(), False), (MeanOfMeans(), True)):
        for trainer in Ranks(2, shares="5:1").run(learn(task, data, PLAN, STEPS)):
            assert (apart(trainer, one) > 1e-4) is far and (apart(trainer, one) > EXACT) is far


@some(False, True, adamw=[False, True])
def test_a_step_in_which_no_label_counts_is_that_of_one_process(adamw: bool) -> None:
    """Momentum and weight decay move the weights, or they do not; how the step is cut must not decide."""
    data, plan = points(), PLAN.updated(batch_size=7)
    data["target"][made(Net(), data, plan)[1].order(0)[7:21]] = -100  # type: ignore[attr-defined]
    together = exactly(Net(adamw=adamw), data, plan, shares="5:1")
    assert [count for _, _, count, _ in together.all[0].losses[:4]] == [7, 0, 0, 7]


class Words(Net):
    """The mean of the vectors of a text's words."""

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.ModuleList([nn.Embedding(30, 6), nn.Linear(6, 3)])

    def forward(self, model: Any, batch: Any) -> Any:
        note(batch["row"])
        real = torch.arange(batch["ids"].shape[1]) < batch["lengths"][:, None]
        vectors = model[0](batch["ids"]) * real[:, :, None]
        return model[1](vectors.sum(1) / batch["lengths"].clamp(min=1)[:, None])


def texts(rows: int = 70) -> dict[str, Any]:
    ids = Ragged.of([[(row * 7 + place) % 29 + 1 for place in range(row * 5 % 13)] for row in range(rows)])
    return {"ids": ids, "row": torch.arange(rows), "target": points(rows)["target"]}


PACKED = {"rows": {}, "bucket": {"bucket": True}, "max_tokens": {"max_tokens": 60, "accumulate": 3}}


@some(("5:1", "rows"), ("1:100000", "bucket"), ("3:2:1", "max_tokens"), shares=["1:1", "5:1", "1:100000", "3:2:1"], packed=PACKED)
def test_texts_of_all_lengths_are_shared_by_their_words(shares: str, packed: str) -> None:
    plan = PLAN.updated(**PACKED[packed])
    together = exactly(Words(lr=0.3), texts(), plan, STEPS, ranks=shares.count(":") + 1, shares=shares)
    each_row_once(together, Words(lr=0.3), texts(), plan)
    words = {sum(shares) for shares in together.all[0].shares}
    assert max(words) > 70, "a unit is a word"


@some(("1:1", None), ("5:1", 0.05), shares=["1:1", "5:1", "1:1000000"], clip=[None, 0.05])
def test_accumulation_and_clipping_come_before_and_after_the_division(shares: str, clip: float | None) -> None:
    """The norm that is clipped is that of the whole step's mean."""
    plan = PLAN.updated(batch_size=6, accumulate=4, clip=clip)
    together = exactly(Net(), points(), plan, STEPS, shares=shares, deaths=[Death(1, 20, "tail")])
    each_row_once(together, Net(), points(), plan) if shares == "1:1" else None
    one, _ = alone(Net(), points(), PLAN.updated(clip=clip), STEPS)
    assert apart(together.all[0].trainer, one) < EXACT, "update frequency is nothing but a larger batch"


def test_rows_at_once_that_memory_holds_only_cut_the_work() -> None:
    def between(rank: Rank, step: int) -> None:
        if step == 5 and rank.local == 1:
            rank.group.cap = 3

    together = exactly(Net(), points(), between=between)
    assert together.all[0].shares[0] == [12, 12] and together.all[0].shares[6] == [21, 3]
    each_row_once(together, Net(), points())


class Weighted(Net):
    """Rows have weights; and further means are logged, one of them by few batches."""

    def step(self, model: nn.Module, batch: Any) -> Step:
        step = super().step(model, batch)
        logs = {"twice": 2 * step.loss.detach()}
        if bool((batch["row"] % 35 == 3).any()):
            logs["seldom"] = torch.tensor(7.0, dtype=torch.float64)
        return Step(step.loss, step.count, step.outputs, step.targets, logs)


def test_weighted_rows_and_logs_that_only_one_rank_gives() -> None:
    data = points()
    data["weight"] = data["x"][:, 0].abs() / 50
    together = exactly(Weighted(), data, ranks=3, shares="5:1:1", deaths=[Death(1, 10, "tail")])
    given = [set(logs) for _, _, _, logs in together.all[0].losses]
    assert {"twice"} in given and {"twice", "seldom"} in given
    assert all(0 < count < 1 for _, _, count, _ in together.all[0].losses)


class Forked(nn.Module):
    """A part that few rows use, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.common, self.rare = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        out = self.common(hidden)
        few = row % 35 == 0
        if bool(few.any()):
            out = out.clone()
            out[few] = out[few] + self.rare(hidden[few])
        return out


class Fork(Net):
    def build_model(self, schema: Schema) -> nn.Module:
        return Forked()

    def forward(self, model: nn.Module, batch: Any) -> Any:
        note(batch["row"])
        return model(batch["x"], batch["row"])


@some(True, adamw=[False, True])
def test_a_parameter_is_trained_in_the_steps_in_which_some_rank_uses_it(adamw: bool) -> None:
    """Where no rank does, it has no gradient, rather than one of zero that weight decay and momentum would act upon."""
    together = exactly(Fork(adamw=adamw), points(), ranks=3, deaths=[Death(2, 16, "backward")])
    used = [any(row % 35 == 0 for rank in together.all for row in rank.rows.get(step, ())) for step in range(FEW)]
    assert True in used and False in used, "else nothing is tested"
    assert torch.equal(together.all[0].trainer.model.unused.weight, built(Fork(), PLAN).unused.weight.double())


class Dropped(Net):
    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))

    def augment(self, batch: Any, uniform: Any) -> Any:
        return {**batch, "x": batch["x"] + 0.1 * uniform(4)}


@some(4, accumulate=[1, 4])
def test_dropout_and_augmentation_follow_the_sample(accumulate: int) -> None:
    plan = PLAN.updated(batch_size=24 // accumulate, accumulate=accumulate, exact_dropout=True)
    exactly(Dropped(), points(), plan, ranks=3, shares="5:1:1", deaths=[Death(1, 10, "sums")])


# ---------------------------------------------------------------------- inner loops of one's own


class Passes(Net):
    """Several passes over the window, a step after each; and a batch in two parts."""

    def build_schedule(self, optimizer: Any, total_steps: int) -> None:
        return None

    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> None:
        for _ in range(2):
            for batch in window:
                for part in (slice(0, 2), slice(2, None)):
                    if len(batch["row"][part]):
                        trainer.backward(self.step(trainer.model, {name: value[part] for name, value in batch.items()}))
            trainer.apply()


class Turns(Passes):
    """Two optimizers that take turns, the second one at every other step, as a counter in extras says."""

    def build_optimizer(self, model: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"a": anyfit.adamw(model[0], lr=0.02), "b": torch.optim.SGD(model[2].parameters(), 0.1, 0.9)}

    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> None:
        if "turns" not in trainer.extras:
            trainer.extras["turns"] = Counter()
        turns = trainer.extras["turns"]
        for name in ("a", "b") if turns.count % 2 else ("a",):
            for batch in window:
                trainer.backward(self.step(trainer.model, batch))
            trainer.apply(name)
        turns.count += 1


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@some((Passes(), "5:1:1"), (Turns(), "1:1:100000"), task=[Passes(), Turns()], shares=["1:1:1", "5:1:1", "1:1:100000"])
def test_an_own_loop_learns_the_same(task: Task, shares: str) -> None:
    plan = PLAN.updated(batch_size=12, accumulate=2)
    exactly(task, points(), plan, STEPS, ranks=3, shares=shares)


@some(
    (Passes(), "backward"),
    (Turns(), "tail"),
    (Turns(), "commit"),
    task=[Passes(), Turns()],
    where=["backward", "sums", "tail", "sent", "commit", "next"],
)
def test_an_own_loop_is_tried_again_as_a_whole(task: Task, where: str) -> None:
    together = exactly(task, points(), ranks=3, shares="3:2:1", deaths=[Death(1, 9, where)], between=joins(15))
    assert [len(shares) for shares in together.all[0].shares][-1] == 3
    if isinstance(task, Turns):
        assert together.all[0].trainer.extras["turns"].count == FEW == together.all[-1].trainer.extras["turns"].count


@some((Net(), 1), (Turns(), 1), (Weighted(), 2), task=[Net(), Passes(), Turns(), Weighted()], exchange=[1, 2])
def test_ranks_of_which_one_is_an_exchange_behind_find_together(task: Task, exchange: int) -> None:
    """A connection that breaks for one rank just after the others had its part: nobody is lost, and one does not know what all others know."""

    def breaks(rank: Rank, step: int) -> None:
        calls = 0
        wait = rank.group._wait

        def broken(work: Any) -> None:
            nonlocal calls
            wait(work)
            if tail:
                calls += 1
                if calls == exchange:
                    rank.group._wait = wait  # type: ignore[method-assign]
                    raise RuntimeError("the connection broke")

        def watched(payload: bytes) -> list[bytes]:
            nonlocal tail
            tail = True
            try:
                return plain(payload)
            finally:
                tail = False

        tail = False
        if rank.local == 1 and step == 9:
            plain = rank.group.exchange
            rank.group._wait, rank.group.exchange = broken, watched  # type: ignore[method-assign]

    exactly(task, points(), ranks=3, between=breaks)


class Raw(Net):
    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> None:
        for batch in window:
            self.step(trainer.model, batch).loss.backward()
        trainer.optimizers["main"].step()


def test_an_optimizer_that_is_stepped_behind_the_ranks_back_is_refused_by_name() -> None:
    with pytest.raises(TaskError, match=r"train_step of Raw calls SGD.step\(\) itself, so ranks would go apart; call trainer.backward"):
        Ranks(2).run(learn(Raw(), points(), PLAN, 3))


class Apart(Passes):
    """Its first rank takes one more step on what it alone sees."""

    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> None:
        rank = current()
        for _ in range(2 if rank is None or rank.local == 0 else 1):
            for batch in window:
                trainer.backward(self.step(trainer.model, batch))
            trainer.apply()


def test_ranks_that_call_apply_unlike_each_other_are_told() -> None:
    """Else the sums of one step of a rank would meet those of another step of the other."""
    with pytest.raises(TaskError, match=r"apply\(\)"):
        Ranks(2).run(learn(Apart(), points(), PLAN, 10))


def test_weights_that_went_apart_are_found() -> None:
    def between(rank: Rank, step: int) -> None:
        if step == 5 and rank.local == 1:
            with torch.no_grad():
                rank.trainer.model[0].weight.mul_(1.001)

    with pytest.raises(RunError, match=r"the weights of rank 1 \(.*\) are not those of rank 0 \(they differ by 1.0e-03\)"):
        Ranks(2).run(learn(Net(), points(), PLAN, 10, between=between))


# ---------------------------------------------------------------------- batch statistics


class Normed(Net):
    """Batch statistics over rows."""

    momentum: float | None = 0.1

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=self.momentum), nn.Tanh(), nn.Linear(8, 3))


class Pictures(Net):
    """Batch statistics over rows and space."""

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4, affine=False),
            nn.Flatten(),
            nn.Linear(4 * 9, 3),
        )


def pictures() -> dict[str, Tensor]:
    x = torch.randn(70, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"x": x + 3, "row": torch.arange(70), "target": points()["target"]}


NORMED: dict[str, tuple[Task, Any]] = {
    "1d": (Normed(), points()),
    "mean": (Normed(momentum=None), points()),
    "2d": (Pictures(), pictures()),
}


@some(("1d", "5:1"), ("mean", "1:1000000"), ("2d", "3:2:1"), kind=NORMED, shares=["1:1", "5:1", "1:1000000", "3:2:1", "1:1000000:1"])
def test_batch_statistics_are_those_of_the_whole_step(kind: str, shares: str) -> None:
    """Buffers too; and a rank without rows takes part and counts nothing."""
    task, data = NORMED[kind]
    together = exactly(task, data, ranks=shares.count(":") + 1, shares=shares)
    each_row_once(together, task, data)
    for rank in together.all:
        assert {type(layer).__name__ for layer in rank.trainer.model} & {"BatchNorm1d", "BatchNorm2d"}, "its own layers again"


@some("backward", where=["forward", "backward", "tail", "commit"])
def test_batch_statistics_of_a_step_that_failed_are_taken_back(where: str) -> None:
    exactly(Normed(), points(), ranks=3, shares="3:1:1000000", deaths=[Death(1, 10, where)])


def test_who_joins_shares_batch_statistics_too() -> None:
    exactly(Normed(), points(), between=joins(10))


def test_batch_statistics_where_no_label_of_a_part_counts() -> None:
    data = points()
    data["target"][::2] = -100
    exactly(Normed(), data, PLAN.updated(batch_size=4), ranks=3)


# ---------------------------------------------------------------------- memory


class Heavy(Net):
    """Runs out of memory at some ranks, above some number of rows at once."""

    holds: tuple[int, ...] = (1000, 5)
    where: str = "forward"

    def out(self, batch: Any) -> bool:
        rank = current()
        return rank is not None and len(batch["row"]) > self.holds[rank.local]

    def forward(self, model: nn.Module, batch: Any) -> Any:
        if self.where == "forward" and self.out(batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        out = super().forward(model, batch)
        if self.where == "backward" and self.out(batch):
            out.register_hook(full)
        return out


def full(gradient: Tensor) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@some(("forward", (1000, 5)), ("backward", (3, 5)), where=["forward", "backward"], holds=[(1000, 5), (3, 5), (1, 1)])
def test_a_rank_that_runs_out_of_memory_takes_less_at_once_and_loses_no_step(where: str, holds: tuple[int, ...]) -> None:
    together = exactly(Heavy(where=where, holds=holds), points())
    assert together.all[0].shares == together.all[1].shares
    assert together.all[0].shares[-2][1] <= 12 and (holds[0] < 1000 or together.all[0].shares[-2][1] <= 5)
    each_row_once(together, Net(), points())


def test_a_row_that_does_not_fit_alone_is_told() -> None:
    with pytest.raises(RunError, match=r"one row alone does not fit"):
        Ranks(2).run(learn(Heavy(holds=(1000, 0)), points(), PLAN, 5))


# ---------------------------------------------------------------------- deaths

POINTS = ["forward", "backward", "sums", "tail", "sent", "commit", "next"]


@some(*((where, 2 * (number % 2)) for number, where in enumerate(POINTS)), where=POINTS, rank=[0, 2])
def test_a_rank_that_dies_inside_a_step_changes_nothing(where: str, rank: int) -> None:
    together = exactly(
        Net(), points(), steps=STEPS if where == "backward" else FEW, ranks=3, shares="3:2:1", deaths=[Death(rank, 20, where)]
    )
    if where in ("forward", "backward", "sums", "tail"):
        together.all[rank].rows.pop(20, None)
    elif where == "commit":  # the others know that its part counts
        together.all[rank].rows[20] = together.all[rank].pending
    if where != "sent":  # whether the others took its part depends on who was first
        each_row_once(together, Net(), points())


@some("sums", "commit", where=POINTS)
def test_of_many_ranks_all_hear_of_a_death(where: str) -> None:
    """A ring of connections tells only the neighbours of the dead one."""
    exactly(Net(), points(), ranks=6, deaths=[Death(3, 5, where)])


def test_ranks_die_until_one_is_left() -> None:
    deaths = [Death(0, 5, "backward"), Death(2, 5, "tail"), Death(3, 9, "commit"), Death(4, 15, "sums")]
    together = exactly(Net(), points(), ranks=5, deaths=deaths)
    assert [len(shares) for shares in together.all[1].shares][::4] == [5, 5, 3, 2, 1, 1]


@some("sums", "tail", where=["forward", "sums", "tail", "next"])
def test_a_rank_that_stops_without_a_word_counts_as_dead(where: str) -> None:
    """Its connections stay open, as those of a process that was stopped; later it wakes up and finds itself left behind."""
    together = Ranks(3, timeout_s=2.0)
    deaths = [Death(1, 20, where, "stops")]
    one, lines = alone(Net(), points(), PLAN, STEPS)
    trainers = together.run(learn(Net(), points(), PLAN, STEPS, deaths=deaths), raises=False)
    assert isinstance(trainers[1], RunError) and "the others went on without it" in str(trainers[1])
    for rank in (0, 2):
        assert isinstance(trainers[rank], Trainer), trainers[rank]
        assert apart(trainers[rank], one) < EXACT and close(together.all[rank].losses, lines)


# ---------------------------------------------------------------------- joiners


def joins(at: int, count: int = 1) -> Any:
    """Call rank 0's friends at a step, and wait until they have said that they are there."""

    def between(rank: Rank, step: int) -> None:
        if rank.local == 0 and step == at:
            for _ in range(count):
                rank.ranks.join()
            coordinator = rank.ranks.meeting.coordinator
            until(lambda: len(coordinator.waiting) == count, "those who join")
            until(lambda: rank.member.wanted == rank.group.generation.number, "their wish")

    return between


@some((1, True), (2, False), start=[1, 2], adamw=[False, True])
def test_who_joins_takes_part_and_changes_nothing(start: int, adamw: bool) -> None:
    together = exactly(Net(adamw=adamw), points(), steps=STEPS, ranks=start, between=joins(10, 2))
    assert len(together.all) == start + 2 and [len(shares) for shares in together.all[0].shares][-1] == start + 2
    for rank in together.all[start:]:
        assert rank.losses[0][0] in (12, 13) and sum(map(len, rank.rows.values())) > 100
    each_row_once(together, Net(), points())


def test_one_joins_after_another_has_died() -> None:
    together = exactly(Net(), points(), ranks=3, deaths=[Death(1, 5, "sums")], between=joins(10))
    assert [len(shares) for shares in together.all[0].shares][::5] == [3, 2, 2, 3, 3]


TASKS: list[tuple[Task, Any]] = [
    (Net(), points()),
    (Net(adamw=True), sentences()),
    (Turns(), points()),
    (Passes(), points()),
    (Weighted(), {**points(), "weight": points()["x"][:, 0].abs()}),
    (Normed(), points()),
    (Words(lr=0.3), texts()),
]


@some(0, 1, seed=range(60))
def test_whatever_happens_to_ranks_what_is_learnt_is_that_of_one(seed: int) -> None:
    """Deaths of all but one at any points of any steps, newcomers at some, whatever the task."""
    draw = random.Random(seed)
    count, (task, data) = draw.randint(2, 5), draw.choice(TASKS)
    dying = draw.sample(range(count), draw.randint(1, count - 1))
    deaths = [Death(rank, draw.randrange(FEW), draw.choice(POINTS)) for rank in dying]
    calls = {draw.randrange(1, FEW - 2) for _ in range(draw.randint(0, 2))}

    def between(rank: Rank, step: int) -> None:
        if rank.group.rank == 0 and step in calls:
            calls.discard(step)
            rank.ranks.join()
            coordinator = rank.ranks.meeting.coordinator
            until(lambda: coordinator.waiting, "who joins")

    shares = ":".join(str(draw.choice([1, 1, 2, 5, 1000000])) for _ in range(count))
    together = Ranks(count, shares=draw.choice([shares, "measured"]))
    found = together.run(learn(task, data, PLAN, FEW, deaths=deaths, between=between), raises=False)
    one, lines = alone(task, data, PLAN, FEW)
    for rank, trainer in zip(together.all, found, strict=True):
        if trainer is None:
            assert rank.local in dying
        elif isinstance(trainer, Trainer):
            assert apart(trainer, one) < EXACT and close(rank.losses, lines) and trainer.position.step == FEW
        else:  # who handed it the state died meanwhile, or it came too late
            assert rank.local >= count and ("join again" in str(trainer) or "has ended" in str(trainer)), trainer
    assert all(isinstance(found[rank], Trainer) for rank in range(count) if rank not in dying)
