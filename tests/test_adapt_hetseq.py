"""HetSeq's classes as they stand: the same weights as a loop written by hand, and what is wrong with them said by name."""

from __future__ import annotations

import argparse
import ast
import copy
import re
import subprocess
import sys
import textwrap
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

import anyfit
from anyfit.adapt.hetseq import HetSeq, HetSeqRows, from_hetseq, plan_of, polynomial_decay
from anyfit.adapt.hetseq.options import ELSEWHERE, PLANNED
from anyfit.data import mix_seed
from anyfit.errors import DataError, InputError, TaskError

ROWS = 60

# ------------------------------------------------------------------ HetSeq's own classes, in few words


class Task:
    def __init__(self, args: Any) -> None:
        self.args, self.datasets = args, {}

    def build_model(self, args: Any) -> nn.Module:
        raise NotImplementedError

    def load_dataset(self, split: str, **options: Any) -> None:
        raise NotImplementedError

    def train_step(self, sample: Any, model: nn.Module, optimizer: Any, ignore_grad: bool = False) -> Any:
        raise AssertionError("the step that all HetSeq tasks share is not asked: its count is wrong")

    def update_step(self, num_updates: int) -> None:
        raise AssertionError("the base does nothing here")


class Optimizer:
    def __init__(self, args: Any) -> None:
        self.args = args

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        if not hasattr(self, "_optimizer"):
            raise NotImplementedError
        return self._optimizer

    def get_lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class Told(torch.optim.AdamW):
    """Keeps the rate of each step."""

    rates: ClassVar[list[float]] = []

    def step(self, closure: Any = None) -> Any:
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


class Adam(Optimizer):
    def __init__(self, args: Any, params: Any) -> None:
        super().__init__(args)
        self._optimizer = Told(params, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        betas = ast.literal_eval(self.args.adam_betas)
        return {"lr": self.args.lr[0], "betas": betas, "eps": self.args.adam_eps, "weight_decay": self.args.weight_decay}


class PolynomialDecay:
    def __init__(self, args: Any, optimizer: Any) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ValueError("optimizer must be an instance of Optimizer")
        args.warmup_updates = getattr(args, "warmup_updates", 0) or 0
        self.args, self.optimizer, self.best = args, optimizer, None
        self.lr = args.lr[0]
        self.warmup_factor = 1.0 / args.warmup_updates if args.warmup_updates > 0 else 1
        self.optimizer.set_lr(self.warmup_factor * self.lr)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def step(self, epoch: int, val_loss: float | None = None) -> float:
        assert val_loss is None
        anneal = getattr(self.args, "force_anneal", None)
        before = anneal is None or epoch < anneal
        self.lr = self.args.lr[min(epoch, len(self.args.lr) - 1)] if before else self.optimizer.get_lr()
        self.optimizer.set_lr(self.warmup_factor * self.lr)
        return self.optimizer.get_lr()

    def step_update(self, num_updates: int) -> float:
        warmup, total, end = self.args.warmup_updates, self.args.total_num_update, self.args.end_learning_rate
        if warmup > 0 and num_updates <= warmup:
            self.warmup_factor = num_updates / warmup
            lr = self.warmup_factor * self.lr
        elif num_updates >= total:
            lr = end
        else:
            lr = (self.lr - end) * (1 - (num_updates - warmup) / (total - warmup)) ** self.args.power + end
        self.optimizer.set_lr(lr)
        return self.optimizer.get_lr()


class Samples(torch.utils.data.Dataset):
    def __init__(self, split: str, shift: int = 0) -> None:
        generator = torch.Generator().manual_seed(len(split))
        self.x = torch.randn(ROWS + shift, 4, generator=generator, dtype=torch.float64)
        self.y = (self.x[:, 0] + self.x[:, 1] > 0).long()
        self.epochs: list[int] = []

    def __getitem__(self, index: int) -> Any:
        return self.x[index], int(self.y[index])

    def __len__(self) -> int:
        return len(self.x)

    def ordered_indices(self) -> Any:
        return np.arange(len(self))[::-1]

    def num_tokens(self, index: int) -> int:
        return 1 + index % 7

    def collater(self, samples: list[Any]) -> Any:
        return default_collate(samples) if samples else None

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor, target: Tensor, eval: bool = False) -> Any:
        return cross_entropy(self.layers(x), target)


class Points(Task):
    @classmethod
    def setup_task(cls, args: Any, **options: Any) -> Points:
        args.classes = 2  # what HetSeq's tasks do too
        return cls(args)

    def build_model(self, args: Any) -> nn.Module:
        assert args is self.args and args.classes == 2
        return Net()

    def load_dataset(self, split: str, **options: Any) -> None:
        assert split in ("train", "valid"), f"no suitable file in split {split}"
        self.datasets[split] = Samples(split)


def options(**more: Any) -> argparse.Namespace:
    given = {
        "max_sentences": 8,
        "update_freq": [2],
        "max_update": 20,
        "clip_norm": 0.5,
        "seed": 5,
        "lr": [0.05],
        "optimizer": "adam",
        "adam_betas": "(0.8, 0.95)",
        "adam_eps": 1e-6,
        "weight_decay": 0.1,
        "lr_scheduler": "PolynomialDecayScheduler",
        "warmup_updates": 6,
        "total_num_update": 18,
        "end_learning_rate": 0.001,
        "power": 1.5,
    }
    return argparse.Namespace(**{**given, **more})


def order(seed: int, epoch: int, count: int = ROWS) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(seed, epoch))).tolist()


def by_hand(args: argparse.Namespace, steps: int, make: Any = None) -> tuple[dict[str, Tensor], list[float]]:
    """HetSeq's controller on one rank, with the mean over rows that it meant: optimizer, decay, clipping and epochs as it has them."""
    data, model = Samples("train"), Net().double()
    holder = Adam(args, model.parameters())
    holder._optimizer = make(model.parameters()) if make else torch.optim.AdamW(model.parameters(), **holder.optimizer_config)
    scheduler, listed = PolynomialDecay(args, holder), data.ordered_indices()
    scheduler.step(0)
    scheduler.step_update(0)
    rates: list[float] = []
    for epoch in range(steps):
        places = order(args.seed, epoch)
        batches = [places[start : start + args.max_sentences] for start in range(0, ROWS, args.max_sentences)]
        for first in range(0, len(batches), args.update_freq[0]):
            window = batches[first : first + args.update_freq[0]]
            for batch in window:
                x, y = default_collate([data[int(listed[place])] for place in batch])
                (model(x, y) * len(batch) / sum(map(len, window))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)
            rates.append(holder.get_lr())
            holder.step()
            holder.optimizer.zero_grad()
            scheduler.step_update(len(rates))
            if len(rates) == steps:
                return {name: value.detach().clone() for name, value in model.state_dict().items()}, rates
        scheduler.step(epoch + 1)
        scheduler.step_update(len(rates))
    raise AssertionError


def apart(one: Any, other: Any) -> float:
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def told(run: Any) -> list[float]:
    """The rate after each step."""
    return [line["lr"] for line in run.history if line["event"] == "step"]


# ------------------------------------------------------------------ the same weights


@pytest.mark.parametrize(
    "more",
    [{}, {"warmup_updates": 0, "power": 1.0}, {"lr": [0.05, 0.03, 0.01]}, {"force_anneal": 2}],
    ids=["warm-up", "no warm-up", "a rate for each epoch", "annealed"],
)
def test_all_four_classes_are_the_loop_written_by_hand(more: Any) -> None:
    weights, rates = by_hand(options(**more), 20)
    Told.rates = []
    task, rows = from_hetseq(Points, options(**more), optimizer=Adam, scheduler=PolynomialDecay)
    run = anyfit.fit(task, rows, dtype="float64")
    assert run.result["steps"] == 20 and len(rows) == ROWS
    assert pytest.approx(rates, abs=1e-15) == Told.rates and len(set(rates)) > 10
    assert apart(run.model.state_dict(), weights) < 1e-10
    assert apart(run.model.state_dict(), Net().double().state_dict()) > 0.05


def adadelta(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adadelta(parameters, lr=0.9, rho=0.8, eps=1e-5, weight_decay=0.01)


@pytest.mark.parametrize(
    ("more", "make"),
    [
        ({}, None),
        ({"total_num_update": 12, "power": 2.0}, None),
        ({"lr": [0.9], "optimizer": "adadelta", "adadelta_rho": 0.8, "adadelta_eps": 1e-5, "dadelta_weight_decay": 0.01}, adadelta),
    ],
    ids=["adam", "past the end of the decay", "adadelta"],
)
def test_options_alone_are_the_loop_written_by_hand(more: Any, make: Any) -> None:
    weights, rates = by_hand(options(**more), 20, make)
    task, rows = from_hetseq(Points, options(**more))
    run = anyfit.fit(task, rows, dtype="float64", log_every=1)
    assert told(run)[:-1] == pytest.approx(rates[1:], abs=1e-15) and rates[0] == 0.0
    assert apart(run.model.state_dict(), weights) < 1e-10


def test_without_a_rate_the_optimizer_is_anyfits_own() -> None:
    task, rows = from_hetseq(Points, {"max_sentences": 16, "max_epoch": 2})
    run = anyfit.fit(task, rows, log_every=1)
    assert run.result["steps"] == 8 and told(run) == [1e-3] * 8


def test_more_ranks_there_are_more_batches_of_a_step_here() -> None:
    """A step has the samples that it had on that many ranks, so rate and decay stay what they were."""
    one = from_hetseq(Points, options(update_freq=[6]), optimizer=Adam, scheduler=PolynomialDecay)
    three = from_hetseq(Points, options(distributed_world_size=3), optimizer=Adam, scheduler=PolynomialDecay)
    runs = [anyfit.fit(task, rows, dtype="float64") for task, rows in (one, three)]
    assert three[0].plan().accumulate == 6
    assert apart(*(run.model.state_dict() for run in runs)) == 0.0


class Heavy(Points):
    """A model with dropout, and a class of its own for each part."""

    def build_model(self, args: Any) -> nn.Module:
        torch.manual_seed(1)
        net = Net()
        net.layers.insert(2, nn.Dropout(0.3))
        return net


@pytest.mark.parametrize("more", [{"force_anneal": 2, "lr": [0.05, 0.04]}, {"lr": [0.05, 0.03, 0.01]}], ids=["annealed", "rates"])
def test_a_resume_is_exact_within_an_epoch(tmp_path: Path, more: Any) -> None:
    def fit(**given: Any) -> Any:
        task, rows = from_hetseq(Heavy, options(**more), optimizer=Adam, scheduler=PolynomialDecay)
        return anyfit.fit(task, rows, log_every=1, **given)

    whole = fit()
    stopped = fit(run=tmp_path / "run", on_event=lambda event: "stop" if event.get("step") == 10 else None)
    assert stopped.result["steps"] == 10 and stopped.state.position.offset == 2
    again = fit(run=tmp_path / "run", resume=True)
    assert apart(whole.model.state_dict(), again.model.state_dict()) == 0.0 and told(again) == told(whole)


def test_a_changed_rate_counts_after_a_resume(tmp_path: Path) -> None:
    def fit(rate: float, **given: Any) -> Any:
        task, rows = from_hetseq(Points, options(lr=[rate]), optimizer=Adam, scheduler=PolynomialDecay)
        return anyfit.fit(task, rows, log_every=1, run=tmp_path / "run", **given)

    first = fit(0.05, on_event=lambda event: "stop" if event.get("step") == 10 else None)
    second = fit(0.5, resume=True)
    assert told(second)[:10] == told(first)
    assert told(second)[10] == pytest.approx((0.5 - 0.001) * (1 - 5 / 12) ** 1.5 + 0.001)


def test_update_step_hears_of_every_step() -> None:
    heard = []

    class Hearing(Points):
        def update_step(self, num_updates: int) -> None:
            heard.append(num_updates)

    globals()["Hearing"], Hearing.__qualname__ = Hearing, "Hearing"
    for scheduler, more in ((PolynomialDecay, {}), (None, {}), (None, {"lr": None, "lr_scheduler": None})):
        heard.clear()
        task, rows = from_hetseq(Hearing, options(**more), optimizer=Adam if scheduler else None, scheduler=scheduler)
        anyfit.fit(task, rows)
        assert heard == list(range(1, 21))


# ------------------------------------------------------------------ what models return, and steps of one's own


class Both(Net):
    def forward(self, x: Tensor, target: Tensor, eval: bool = False) -> Any:
        return super().forward(x, target), self.layers(x)


class WithOutputs(Points):
    def build_model(self, args: Any) -> nn.Module:
        return Both()


def test_a_tuple_of_loss_and_outputs_has_metrics_and_predictions() -> None:
    task, rows = from_hetseq(WithOutputs, options(), optimizer=Adam, scheduler=PolynomialDecay)
    run = anyfit.fit(task, rows, test=task.rows("valid"), dtype="float64")
    assert apart(run.model.state_dict(), by_hand(options(), 20)[0]) < 1e-10
    valid = task.rows("valid")
    right = (anyfit.predict(run, valid).argmax(1) == valid.dataset.y.flip(0)).double().mean()
    assert run.splits["test"]["accuracy"] == pytest.approx(float(right)) and right > 0.8
    loss_alone = anyfit.fit(*from_hetseq(Points, options()), validation=0.2)
    assert set(loss_alone.splits["validation"]) == {"loss", "rows"}
    with pytest.raises(TaskError, match="returns only its loss, so there is nothing to predict with"):
        anyfit.predict(loss_alone, valid)


class Words(Net):
    def forward(self, x: Tensor, target: Tensor) -> Any:
        logits = self.layers(x)
        return {"loss": cross_entropy(logits, target), "logits": logits[:, None, :].expand(-1, 3, -1)}


class OfWords(Points):
    def build_model(self, args: Any) -> nn.Module:
        return Words()


def test_outputs_that_are_not_those_of_the_last_label_are_no_metrics() -> None:
    task, rows = from_hetseq(OfWords, options())
    assert set(anyfit.fit(task, rows, test=0.3).splits["test"]) == {"loss", "rows"}


class Vectors(Samples):
    """Samples as dicts, and a length that makes batches uneven."""

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index], "labels": self.y[index]}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm, self.layers, self.dropout = (
            nn.BatchNorm1d(4),
            nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)),
            nn.Dropout(0.5),
        )

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return cross_entropy(self.dropout(self.layers(self.norm(x))), labels)


class OwnStep(Points):
    """As HetSeq's task for named entities has it: samples are dicts, rows are counted, and something more is logged."""

    def build_model(self, args: Any) -> nn.Module:
        return Plain()

    def load_dataset(self, split: str, **options: Any) -> None:
        self.datasets[split] = Vectors(split, shift=2)

    def train_step(self, sample: Any, model: nn.Module, optimizer: Any, ignore_grad: bool = False) -> Any:
        model.train()
        loss = model(**sample)
        if ignore_grad:
            loss *= 0
        size = len(sample["labels"])
        optimizer.backward(loss)
        return (
            loss,
            size,
            {"nsentences": size, "loss": loss.data, "sample_size": size, "ones": sample["labels"].double().mean(), "name": "x"},
        )


def test_a_train_step_of_its_own_is_called_and_gives_count_and_logs() -> None:
    task, rows = from_hetseq(OwnStep, options(max_update=0, max_epoch=1, max_sentences=4, update_freq=[16], lr_scheduler=None, lr=None))
    run = anyfit.fit(task, rows, log_every=1, test=task.rows("valid"))
    (line,) = [line for line in run.history if line["event"] == "step"]
    assert line["logs"] == {"ones": pytest.approx(float(rows.dataset.y.double().mean()))}
    again = anyfit.evaluate(run, task.rows("valid"))
    assert again["loss"] == pytest.approx(run.splits["test"]["loss"], abs=1e-12)  # model.train() within changed nothing: no dropout,
    assert again["rows"] == ROWS + 2 and not any(name in vars(run.model) for name in ("train",))
    assert run.model.norm.num_batches_tracked == 16  # and no batch statistics


class Sums(Points):
    """Losses as fairseq means them: a sum, and what it is to be divided by."""

    def train_step(self, sample: Any, model: nn.Module, optimizer: Any, ignore_grad: bool = False) -> Any:
        loss = model(*sample) * len(sample[1])
        optimizer.backward(loss / 4)
        optimizer.backward(loss * 3 / 4)  # two parts of one loss
        return loss, float(len(sample[1])), {}


class SumNet(Net):
    def forward(self, x: Tensor, target: Tensor) -> Any:
        return cross_entropy(self.layers(x), target, reduction="sum")


class SumModel(Points):
    def build_model(self, args: Any) -> nn.Module:
        return SumNet()


@pytest.mark.parametrize("cls", [Sums, SumModel])
def test_losses_that_are_sums_are_divided_once(cls: type) -> None:
    task, rows = from_hetseq(cls, options(), optimizer=Adam, scheduler=PolynomialDecay, reduction="sum")
    run = anyfit.fit(task, rows, dtype="float64")
    assert apart(run.model.state_dict(), by_hand(options(), 20)[0]) < 1e-10
    (problem,) = anyfit.check(task, rows, batch_size=16, dtype="float64")["problems"]
    assert "nothing to predict" in problem
    wrong, _ = from_hetseq(cls, options())
    assert any("the count is not the loss's denominator" in problem for problem in anyfit.check(wrong, rows, batch_size=16)["problems"])


class Alone:
    """Without a base: everything here is its own."""

    def __init__(self, args: Any) -> None:
        self.args, self.datasets, self.steps = args, {}, 0

    build_model, load_dataset = Points.build_model, Points.load_dataset

    def train_step(self, sample: Any, model: nn.Module, optimizer: Any, ignore_grad: bool) -> Any:
        self.steps += 1
        loss = model(*sample)
        optimizer.backward(loss)
        return loss, torch.tensor(len(sample[1])), {}


def test_a_class_without_a_base_and_without_setup_task() -> None:
    args = options()
    args.classes = 2
    task, rows = from_hetseq(Alone, args)
    with pytest.raises(AssertionError):  # its args are a copy, as build_model is told
        Points(args).build_model(options())
    anyfit.fit(task, rows)
    assert task._theirs.task.steps == 40  # 8 batches an epoch, 2 for each step, 20 steps


# ------------------------------------------------------------------ rows


class Listed(Samples):
    """A random order of some rows, which fairseq draws from numpy's global generator."""

    def ordered_indices(self) -> Any:
        return np.random.permutation(len(self))[:50]


class OfListed(Points):
    def load_dataset(self, split: str, **options: Any) -> None:
        self.datasets[split] = Listed(split)


def test_rows_are_those_of_ordered_indices() -> None:
    before = np.random.get_state()[1].copy()
    one, other = (from_hetseq(OfListed, options())[1] for _ in range(2))
    assert (np.random.get_state()[1] == before).all()
    assert len(one) == 50 and one.indices.equal(other.indices) and len(set(one.indices.tolist())) == 50
    assert not from_hetseq(OfListed, options(seed=6))[1].indices.equal(one.indices)
    first = one[0]
    assert set(first) == {"input", "target"} and first["input"].equal(one.dataset.x[one.indices[0]]) and len(first) == 2
    assert one.lengths.tolist() == [1 + index % 7 for index in one.indices.tolist()]
    assert set(one.collate([one[0].value, one[1].value])[1].shape) == {2}


def test_epochs_are_counted_from_one() -> None:
    task, rows = from_hetseq(Points, options(max_update=0, max_epoch=3))
    anyfit.fit(task, rows)
    assert rows.dataset.epochs == [1, 2, 3]


class Counting(Samples):
    """A collater that shows whose batches these are."""

    def collater(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return {"x": x + 1, "labels": y}


class OfCounting(Points):
    def load_dataset(self, split: str, **options: Any) -> None:
        self.datasets[split] = Counting(split)

    def build_model(self, args: Any) -> nn.Module:
        return Seen()


class Seen(Net):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        assert x.mean() > 0.5
        return super().forward(x, labels), self.layers(x)


@pytest.mark.parametrize("more", [{}, {"workers": 1}], ids=["here", "in a worker process"])
def test_batches_are_the_collaters_wherever_rows_are_read(more: Any) -> None:
    task, rows = from_hetseq(OfCounting, options(max_update=3))
    run = anyfit.fit(task, rows, validation=0.2, test=task.rows("valid"), **more)
    assert anyfit.evaluate(run, task.rows("valid"))["loss"] == pytest.approx(run.splits["test"]["loss"], abs=1e-9)
    assert anyfit.predict(run, rows).shape == (ROWS, 2)
    changed = task.replaced(args={**task.args, "lr": [0.1]})
    assert "_theirs" not in vars(changed) and "_theirs" not in vars(copy.deepcopy(task)) and "_theirs" in vars(task)
    anyfit.fit(changed, rows)


def test_batches_stay_within_a_budget_of_tokens() -> None:
    task, rows = from_hetseq(Points, options(max_tokens=24, max_sentences=None, update_freq=[1], max_update=0, max_epoch=1))
    sizes, widest = [], []

    def collate(samples: list[Any]) -> Any:
        sizes.append(len(samples))
        places = [int((rows.dataset.x == sample[0]).all(1).nonzero()) for sample in samples]
        widest.append(max(rows.dataset.num_tokens(place) for place in places) * len(samples))
        return default_collate(samples)

    rows.dataset.collater = collate
    run = anyfit.fit(task, rows)
    assert run.result["steps"] == len(sizes) < 20 and sum(sizes) == ROWS
    assert max(widest) <= 24 < 2 * min(widest) + 8 and len(set(sizes)) > 2


class Bare:
    """A data set that is no torch Dataset and has only what it must."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return torch.ones(4) * index, index % 2


class OfBare(Points):
    def load_dataset(self, split: str, **options: Any) -> None:
        self.datasets[split] = Bare()


def test_without_a_collater_torch_collates() -> None:
    task, rows = from_hetseq(OfBare, {"max_epoch": 1})
    assert not hasattr(rows, "lengths") and rows.indices.tolist() == list(range(20))
    assert anyfit.fit(task, rows, batch_size=10).result["steps"] == 2
    (x, y) = task.collate([rows[3], rows[4]])
    assert x[:, 0].tolist() == [3.0, 4.0] and y.tolist() == [1, 0]
    assert task.collate([torch.ones(2), torch.zeros(2)]).shape == (2, 2)  # rows of another origin


# ------------------------------------------------------------------ what cannot be


def attempt(cls: Any, args: Any, **more: Any) -> None:
    task, rows = from_hetseq(cls, options() if args is None else args, **more)
    anyfit.fit(task, rows)


def refused(match: str, cls: Any, args: Any = None, error: type[Exception] = TaskError, **more: Any) -> None:
    with pytest.raises(error, match=re.escape(match)):
        attempt(cls, args, **more)


class NoModel(Points):
    build_model = Task.build_model


class NotATask:
    pass


class NoLoading(Points):
    load_dataset = Task.load_dataset


class NoDatasets(Points):
    def __init__(self, args: Any) -> None:
        self.args = args


class FillsNothing(Points):
    def load_dataset(self, split: str, **options: Any) -> None:
        self.datasets["other"] = Samples("train")


class OwnBatches(Points):
    def get_batch_iterator(self, dataset: Any, **options: Any) -> None: ...


def test_a_task_that_lacks_something_is_named() -> None:
    here = f"{__name__}:"
    refused(f"task (='{here}NoModel') defines no build_model(args)", NoModel)
    refused(f"task (='{here}NotATask') defines no build_model(args), which a HetSeq task has", NotATask)
    refused(f"task (='{here}NoLoading') defines no load_dataset(split)", NoLoading)
    refused(f"task (='{here}NoDatasets') has no dict `datasets`", NoDatasets)
    refused(f"task (='{here}OwnBatches') has a get_batch_iterator of its own", OwnBatches)
    refused("filled other; it must set self.datasets['train']", FillsNothing, error=DataError)
    refused(
        f"split (='tset'): load_dataset of {here}Points fails: AssertionError: no suitable file in split tset",
        Points,
        split="tset",
        error=DataError,
    )
    refused("args (a list) must be an argparse.Namespace", Points, [1])
    refused("args.made (=<object", Points, options(made=object()))
    refused("task (a Points) must be a class, or a reference to one", Points(options()))
    refused("task (='Points') must be file.py:Class or module:Class", "Points")
    refused("has no class 'Nothing'", f"{__name__}:Nothing")
    refused("task file (='nowhere.py') does not exist", "nowhere.py:Points")

    class Local(Points):
        pass

    refused("is defined within a function, where nothing finds it again", Local)


class NoLength:
    def __getitem__(self, index: int) -> Any: ...


class NoItems:
    def __len__(self) -> int:
        return 3


class BadOrder(Samples):
    def ordered_indices(self) -> Any:
        return [0, 1, ROWS]


class NoOrder(Samples):
    def ordered_indices(self) -> Any:
        return "first"


class Empty(Samples):
    def ordered_indices(self) -> Any:
        return []


class BadTokens(Samples):
    def num_tokens(self, index: int) -> Any:
        return (1, 2) if index == 4 else 1


class NoBatch(Samples):
    def collater(self, samples: list[Any]) -> Any:
        return None


def test_a_data_set_that_lacks_something_is_named() -> None:
    for dataset, match in (
        (NoLength(), "data set (a NoLength) defines no __len__"),
        (NoItems(), "data set (a NoItems) defines no __getitem__"),
        (BadOrder("train"), f"gave {ROWS}; its {ROWS} samples are 0 to {ROWS - 1}"),
        (NoOrder("train"), "ordered_indices of data set (a NoOrder) gave <U5 (='first'); give whole numbers"),
        (Empty("train"), "data set (a Empty) has no rows: its length is 60, and ordered_indices gave (0,)"),
    ):
        with pytest.raises(DataError, match=re.escape(match)):
            HetSeqRows(dataset)
    with pytest.raises(DataError, match=re.escape("num_tokens(4) of data set (a BadTokens) gave (1, 2)")):
        _ = HetSeqRows(BadTokens("train")).lengths
    with pytest.raises(DataError, match=r"collater of data set \(a NoBatch\) gave None for 2 samples"):
        HetSeqRows(NoBatch("train")).collate([1, 2])


class Loose(Points):
    def build_model(self, args: Any) -> nn.Module:
        return nn.Bilinear(4, 1, 3)


class Stepping(Points):
    def train_step(self, sample: Any, model: nn.Module, optimizer: Any, ignore_grad: bool = False) -> Any:
        model(*sample).backward()
        optimizer.step()


class Silent(Points):
    def train_step(self, sample: Any, model: nn.Module, optimizer: Any, ignore_grad: bool = False) -> Any:
        model(*sample).backward()
        return 0, 1, {}


class OneValue(Points):
    def train_step(self, sample: Any, model: nn.Module, optimizer: Any, ignore_grad: bool = False) -> Any:
        optimizer.backward(model(*sample))
        return 0


class NoCount(Points):
    def train_step(self, sample: Any, model: nn.Module, optimizer: Any, ignore_grad: bool = False) -> Any:
        optimizer.backward(model(*sample))
        return 0, None, {}


class ManyLosses(Points):
    def train_step(self, sample: Any, model: nn.Module, optimizer: Any, ignore_grad: bool = False) -> Any:
        optimizer.backward(torch.ones(3))
        return 0, 1, {}


class Pairs(Samples):
    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.x[index, :1]


class OfLoose(Loose):
    def load_dataset(self, split: str, **options: Any) -> None:
        self.datasets[split] = Pairs(split)


def test_a_step_that_cannot_be_kept_is_named() -> None:
    refused("OfLoose returned a tensor of shape (8, 3); HetSeq's models return their loss", OfLoose)
    refused("Stepping asks for optimizer.step, but the engine divides, clips and steps", Stepping)
    refused("Silent did not call optimizer.backward(loss)", Silent)
    refused("OneValue returned a int; return (loss, sample_size, logging_output)", OneValue)
    refused("NoCount returned sample_size (=None)", NoCount)
    refused("ManyLosses gave optimizer.backward a Tensor that is not one number", ManyLosses)


class Clipping(Adam):
    def clip_grad_norm(self, max_norm: float) -> None: ...


class Hollow(Optimizer):
    def __init__(self, args: Any, params: Any) -> None:
        super().__init__(args)


class Direct(torch.optim.SGD):
    def __init__(self, args: Any, params: Any) -> None:
        super().__init__(params, lr=args.lr[0])


class Kept:
    """Holds its optimizer under the public name."""

    def __init__(self, args: Any, params: Any) -> None:
        self.optimizer = torch.optim.SGD(params, lr=args.lr[0])


class Frozen(Points):
    def build_model(self, args: Any) -> nn.Module:
        return Net().requires_grad_(False)


class HalfAScheduler:
    def __init__(self, args: Any, optimizer: Any) -> None: ...

    def step(self, epoch: int, val_loss: float | None = None) -> None: ...


class Careless:
    """Asks nothing of the optimizer but what HetSeq's has, and keeps things that are no JSON."""

    def __init__(self, args: Any, optimizer: Any) -> None:
        self.optimizer, self.seen, self.table = optimizer, deque(), {"by": [1, {"k": (None, True)}], "bad": {1: 2}}
        assert optimizer.args is args or optimizer.args == args
        assert len(list(optimizer.params)) == 4 and optimizer.get_lr() == 0.05

    def step(self, epoch: int, val_loss: float | None = None) -> None:
        self.seen.append(epoch)

    def step_update(self, num_updates: int) -> float:
        self.optimizer.set_lr(0.05 / (1 + num_updates))
        return self.optimizer.get_lr()


def test_optimizers_and_schedulers_of_other_shapes(tmp_path: Path) -> None:
    refused("Clipping overrides clip_grad_norm, which the engine does itself", Points, optimizer=Clipping)
    refused("Hollow(args, params) holds no torch optimizer; keep one as self._optimizer", Points, optimizer=Hollow)
    refused("the model has no parameter that trains", Frozen, optimizer=Adam)
    refused("HalfAScheduler defines no step_update", Points, scheduler=HalfAScheduler)
    refused("PolynomialDecay(args, optimizer) wants an optimizer class of its own", Points, scheduler=PolynomialDecay)
    refused("args.optimizer (='sgd') must be 'adam' or 'adadelta'", Points, options(optimizer="sgd"))
    refused("args.lr_scheduler (='cosine') must be 'PolynomialDecayScheduler'", Points, options(lr_scheduler="cosine"))
    refused("args.lr (=[]) must be a number", Points, options(lr=[]))
    refused("args.lr (=[0.1, 0.2]) changes with the epoch", Points, options(lr=[0.1, 0.2]))
    refused("args.force_anneal (=3) needs the scheduler class", Points, options(force_anneal=3))
    refused("args.adam_betas (='0.9') must be two numbers", Points, options(adam_betas="0.9"))
    refused("args.adam_betas (='__import__(0)') must be two numbers", Points, options(adam_betas="__import__(0)"))
    weights = []
    for optimizer in (Direct, Kept, None):
        task, rows = from_hetseq(Points, options(optimizer="adadelta"), optimizer=optimizer)
        weights.append(anyfit.fit(task, rows, dtype="float64").model.state_dict())
    assert apart(weights[0], weights[1]) == 0.0 and apart(weights[0], weights[2]) > 1e-3
    for optimizer in (Direct, None):
        task, rows = from_hetseq(Points, options(), optimizer=optimizer, scheduler=Careless)
        run = anyfit.fit(task, rows, log_every=1, run=tmp_path / str(optimizer))
        assert told(run)[-1] == pytest.approx(0.05 / 21)


# ------------------------------------------------------------------ options


def test_options_become_fields_of_the_plan() -> None:
    found = plan_of(
        argparse.Namespace(
            max_epoch=5,
            max_update=0,
            max_sentences=32,
            max_tokens=4096,
            update_freq=[4],
            distributed_world_size=8,
            clip_norm=25.0,
            seed=19940802,
            num_workers=-1,
            log_interval=10,
            cpu=True,
            lr=[0.1],
            data="folder",
            mine=1,
            distributed_init_method="file:///shared/meeting",
        )
    )
    assert found.plan == {
        "epochs": 5,
        "batch_size": 32,
        "max_tokens": 4096,
        "accumulate": 32,
        "clip": 25.0,
        "seed": 19940802,
        "workers": 0,
        "log_every": 10,
        "device": "cpu",
    }
    assert set(found.left) == {"lr", "data", "mine", "distributed_init_method"} and found.refused == []
    assert "--rdzv" in found.left["distributed_init_method"] and "no option of HetSeq" in found.left["mine"]
    assert anyfit.Plan().updated(**found.plan).accumulate == 32
    short = plan_of({"max_update": 7, "clip_norm": 0, "log_interval": 1, "cpu": False})
    assert short.plan == {"steps": 7, "clip": None} and list(short.left) == ["log_interval"] and "log_every" in short.left["log_interval"]
    assert plan_of({"max_tokens": 100}).plan == {"batch_size": None, "max_tokens": 100}
    assert plan_of({}) == ({}, {}, [])


def test_whichever_of_epochs_and_updates_ends_first_counts() -> None:
    for updates, steps in ((100, 12), (5, 5)):  # 60 rows in steps of 16
        args = options(max_epoch=3, max_update=updates)
        task, rows = from_hetseq(Points, args)
        assert task.limit == ("max_epoch" if steps == 12 else "max_update")
        assert anyfit.fit(task, rows).result["steps"] == steps
        assert [len(plan_of(args).refused), len(plan_of(args, 60).refused)] == [1, 0]
        with pytest.raises(TaskError, match=r"max_epoch \(=3\) and max_update \(=\d+\) are both given"):
            HetSeq(task=task.task, args=task.args).plan()
    with pytest.raises(TaskError, match="which ends first is not known: set one of them to 0"):
        from_hetseq(Points, options(max_epoch=3, max_tokens=50))


def test_options_that_would_change_the_training_are_refused_at_once() -> None:
    wrong = {"update_freq": [1, 2], "min_lr": 0.0, "curriculum": 2, "required_batch_size_multiple": 3, "use_bmuf": True}
    assert [line.partition(" ")[0] for line in plan_of(options(**wrong)).refused] == list(wrong)
    with pytest.raises(TaskError, match="5 options of HetSeq cannot be honoured:") as error:
        from_hetseq(Points, options(**wrong))
    assert all(f"{name} (={value!r})" in str(error.value) for name, value in wrong.items())
    harmless = {"update_freq": [2, 2], "min_lr": -1, "curriculum": 1, "required_batch_size_multiple": 4, "use_bmuf": False}
    assert plan_of(options(**harmless)).refused == []
    for name, value in (
        ("max_sentences", "8"),
        ("update_freq", [0]),
        ("seed", -1),
        ("max_epoch", 1.5),
        ("clip_norm", "25"),
        ("max_tokens", True),
    ):
        with pytest.raises(InputError, match=re.escape(f"{name} (=")):
            plan_of({name: value})


def test_the_page_names_every_option() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "hetseq.md").read_text()
    known = {*ELSEWHERE, *(option for options in PLANNED.values() for option in options)}
    missing = [name for name in sorted(known) if f"`--{name.replace('_', '-')}`" not in page and f"`--{name}`" not in page]
    assert not missing
    assert [field for field in PLANNED if field not in anyfit.Plan.__dataclass_fields__] == []


def test_polynomial_decay_follows_another_first_rate() -> None:
    """The end is a rate, not a share of the first one."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = polynomial_decay(optimizer, total_num_update=4, end_learning_rate=0.1)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.advance()
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])


# ------------------------------------------------------------------ elsewhere

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import anyfit
from anyfit.adapt.hetseq import from_hetseq
from test_adapt_hetseq import Points, WithOutputs, options

class Mine(WithOutputs):
    pass

def train():
    return from_hetseq(Mine, options())[1]

if __name__ == "__main__":
    task, rows = from_hetseq(Mine, options())
    run = anyfit.fit(task, rows, test=task.rows("valid"), run="run", seed=1)
    print(run.record["task"]["values"]["task"], run.splits["test"]["loss"])
"""


def test_a_task_is_found_again_by_its_file(tmp_path: Path) -> None:
    """A script's classes, a run folder, another process: by reference alone."""
    file = tmp_path / "classes.py"
    file.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))
    done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, loss = done.stdout.split()
    assert name == f"{file.resolve()}:Mine"
    task, _ = anyfit.open_run(tmp_path / "run")
    assert isinstance(task, HetSeq)
    assert anyfit.evaluate(tmp_path / "run", task.rows("valid"))["loss"] == pytest.approx(float(loss), abs=1e-12)
    assert anyfit.load("anyfit.adapt.hetseq:HetSeq", {"task": name, "args": {"lr": [0.1]}}).build_model(anyfit.Schema(())) is not None


RANKS = """
import sys
sys.path.insert(0, {tests!r})
import anyfit
from anyfit.adapt.hetseq import from_hetseq
from test_adapt_hetseq import Adam, Points, PolynomialDecay, options

class Mine(Points):
    pass

def train():
    return from_hetseq(Mine, options())[1]

if __name__ == "__main__":
    task, rows = from_hetseq(Mine, options(), optimizer=Adam, scheduler=PolynomialDecay)
    one = anyfit.fit(task, rows, dtype="float64").model.state_dict()
    two = anyfit.fit(task, f"{{__file__}}:train", dtype="float64", nproc=2).model.state_dict()
    print(max(float((one[name] - two[name]).abs().max()) for name in one))
"""


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    file = tmp_path / "classes.py"
    file.write_text(textwrap.dedent(RANKS.format(tests=str(Path(__file__).parent))))
    done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-10
