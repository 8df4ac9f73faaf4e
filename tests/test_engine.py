"""The engine's arithmetic and its promises: windows, retries, several optimizers, no leaks, exact snapshots."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Rank, Ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.utils.data import Dataset, IterableDataset

import anyfit
import anyfit.schedule
from anyfit import Plan, Schema, Step, Task
from anyfit.data import Share, make_batches, uniform
from anyfit.engine import Alone, Local, Losses, Stepped, Trainer, evaluate, load_model, make_trainer, predict, train
from anyfit.errors import DataError, InputError, Lost, NonFinite, TaskError
from anyfit.machine import seed_all
from anyfit.state import Position, State
from anyfit.task import evaluating

CPU = torch.device("cpu")


class Net(Task):
    sgd: bool = True
    dropout: float = 0.0
    lr: float = 0.1

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(8, 3))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9) if self.sgd else anyfit.adamw(model, lr=self.lr)


def points(rows: int = 70) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (rows,), generator=generator)


def made(task: Task, data: Any, plan: Plan, **options: Any) -> tuple[Trainer, Any]:
    seed_all(plan.seed)
    trainer = make_trainer(task, task.build_model(Schema(())), plan, 100, CPU, **options)
    augment = task.augment if type(task).augment is not Task.augment else None
    return trainer, make_batches(data, plan, task.collate, device=CPU, augment=augment)


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def run(task: Task, data: Any, plan: Plan, steps: int, **options: Any) -> Trainer:
    trainer, batches = made(task, data, plan, **options)
    for _ in train(trainer, batches, steps):
        pass
    return trainer


# 70 rows in windows of 24: the last window of an epoch has batches of 6, 6, 6, 4 rows
@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulation_equals_one_large_batch_for_uneven_windows(clip: float | None) -> None:
    many = run(Net(), points(), Plan(batch_size=6, accumulate=4, dtype="float64", clip=clip), 9)
    one = run(Net(), points(), Plan(batch_size=24, dtype="float64", clip=clip), 9)
    assert torch.allclose(weights(many), weights(one), atol=1e-13, rtol=0)


class Tokens(Net):
    """Targets with ignored tokens: every batch has another count (transformers#34191)."""

    mean_of_means: bool = False

    def step(self, model: nn.Module, batch: Any) -> Step:
        step = super().step(model, batch)
        return Step(step.loss, 1) if self.mean_of_means else step


def test_accumulation_counts_tokens_not_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 5, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (64, 5), generator=generator)
    y[torch.rand(64, 5, generator=generator) < torch.linspace(0, 1, 64)[:, None]] = -100
    y[40:44] = -100  # a batch may have nothing that counts
    many, one = Plan(batch_size=4, accumulate=4, dtype="float64"), Plan(batch_size=16, dtype="float64")
    exact = weights(run(Tokens(), (x, y), many, 8)) - weights(run(Tokens(), (x, y), one, 8))
    wrong = weights(run(Tokens(mean_of_means=True), (x, y), many, 8)) - weights(run(Tokens(), (x, y), one, 8))
    assert exact.abs().max() < 1e-13
    assert wrong.abs().max() > 1e-4, "the control: a mean of means must differ"


def test_labels_that_are_all_ignored_in_one_batch_spoil_neither_weights_nor_the_logged_loss() -> None:
    x, y = points(32)
    y = torch.where(torch.arange(32) % 16 < 11, -100, y)
    plan = Plan(batch_size=2, accumulate=8, dtype="float64")
    trainer, batches = made(Net(), (x, y), plan)
    assert any((batch[1] == -100).all() for batch in batches.window(Position())), "else nothing is tested"
    one, whole = made(Net(), (x, y), plan.updated(batch_size=16, accumulate=1))
    losses = Losses()
    for event, expected in zip(train(trainer, batches, 6), train(one, whole, 6), strict=True):
        assert event.loss == pytest.approx(float(expected.loss), rel=1e-12) and int(event.count) == int(expected.count)
        losses.events.append(event)
    assert losses.read() is not None
    assert torch.allclose(weights(trainer), weights(one), atol=1e-13, rtol=0)


@pytest.mark.parametrize("sgd", [True, False], ids=["sgd", "adamw"])
def test_a_window_in_which_nothing_counts_is_the_same_step_however_it_is_cut(sgd: bool) -> None:
    """Momentum and weight decay move the weights, or they do not; the number of batches must not decide."""
    x, y = points(64)
    many, one = Plan(batch_size=4, accumulate=4, dtype="float64"), Plan(batch_size=16, dtype="float64")
    y[made(Net(), (x, y), one)[1].order(0)[32:48]] = -100
    alone = weights(run(Net(sgd=sgd), (x, y), one, 4))
    assert torch.allclose(weights(run(Net(sgd=sgd), (x, y), many, 4)), alone, atol=1e-12, rtol=0)
    for worker in ranked(Net(sgd=sgd), (x, y), one, 4, "5:11"):
        assert torch.allclose(weights(worker), alone, atol=1e-12, rtol=0)
    for plan in (many, one):
        assert weights(run(Net(sgd=sgd), (x, y), plan.updated(dtype="float32", precision="fp16"), 4)).isfinite().all()


class Weighted(Net):
    """Sample weights: the count is their sum, which may be below one."""

    def step(self, model: nn.Module, batch: Any) -> Step:
        x, y = batch
        weight = x[:, 0].abs() / 50
        each = cross_entropy(model(x), y, reduction="none")
        return Step((each * weight).sum() / weight.sum(), weight.sum(), logs={"twice": 2 * each.detach() @ weight / weight.sum()})


def test_counts_may_be_sums_of_sample_weights() -> None:
    many, batches = made(Weighted(), points(), Plan(batch_size=4, accumulate=3, dtype="float64"))
    one, whole = made(Weighted(), points(), Plan(batch_size=12, dtype="float64"))
    for event, expected in zip(train(many, batches, 8), train(one, whole, 8), strict=True):
        assert 0 < float(event.count) < 1 and float(event.count) == pytest.approx(float(expected.count), rel=1e-12)
        assert float(event.loss) == pytest.approx(float(expected.loss), rel=1e-12)
        assert event.logs is not None and float(event.logs["twice"]) == pytest.approx(2 * float(event.loss), rel=1e-12)
    assert torch.allclose(weights(many), weights(one), atol=1e-13, rtol=0)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_are_divided_then_corrected_then_clipped(accumulate: int) -> None:
    """A correction sees the mean gradient and its rate; the norm that is clipped is that of what it leaves."""
    seen: list[tuple[float, list[Tensor]]] = []

    def correct(gradients: Sequence[Tensor], lr: float) -> None:
        seen.append((lr, [gradient.clone() for gradient in gradients]))
        for gradient in gradients:
            gradient.mul_(1000)

    x, y = points(24)
    plan = Plan(batch_size=24 // accumulate, accumulate=accumulate, dtype="float64", clip=0.05)
    trainer, batches = made(Net(lr=0.1), (x, y), plan, correct=correct)
    before = weights(trainer)
    cross_entropy(trainer.model(x), y).backward()
    exact = [parameter.grad.clone() for parameter in trainer.model.parameters() if parameter.grad is not None]
    trainer.forget()
    for _ in train(trainer, batches, 1):
        pass
    ((lr, found),) = seen
    assert lr == 0.1 and all(torch.allclose(a, b, atol=1e-14, rtol=0) for a, b in zip(found, exact, strict=True))
    assert float((weights(trainer) - before).norm()) == pytest.approx(0.1 * 0.05, rel=1e-4)


def test_the_logged_loss_of_a_window_is_weighted() -> None:
    x, y = points(10)
    trainer, batches = made(Net(), (x, y), Plan(batch_size=4, accumulate=3, dtype="float64"))
    expected = cross_entropy(trainer.model(x), y)
    (event,) = train(trainer, batches, 1)
    assert torch.allclose(event.loss, expected) and int(event.count) == 10


class Twice(Net):
    """Its own loop: two backward passes of a window of one."""

    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> None:
        for x, y in window:
            for part in (slice(0, 3), slice(3, None)):
                trainer.backward(self.step(trainer.model, (x[part], y[part])))
        trainer.apply()


def test_a_second_backward_before_apply_is_added_exactly() -> None:
    plan = Plan(batch_size=10, dtype="float64")
    assert torch.allclose(weights(run(Twice(), points(), plan, 5)), weights(run(Net(), points(), plan, 5)), atol=1e-13, rtol=0)


class Flaky(Alone):
    """A group of one that loses a worker at some steps, after the gradients were made."""

    alone = False

    def __init__(self, losses: set[int]) -> None:
        self.calls, self.losses = 0, losses

    def share(self, position: Position, units: int) -> Share:
        self.shares = [Share(0, units)]
        return self.shares[0]

    def reduce(self, parameters: Sequence[nn.Parameter], local: Local) -> Local:
        self.calls += 1
        if self.calls in self.losses:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
            raise Lost("a worker is gone")
        return local


class Normed(Net):
    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def ranked(task: Task, data: Any, plan: Plan, steps: int, shares: str) -> list[Trainer]:
    """The same over real ranks, as threads, which start with the weights that `run` starts with."""
    lock = threading.Lock()

    def work(rank: Rank) -> Trainer:
        rank.meet()
        with lock:  # they share torch's generator, and draw from it here alone
            trainer, batches = made(task, data, plan, workers=rank.group)
        rank.group.every(lambda: True)
        for _ in train(trainer, batches, steps):
            pass
        rank.group.done()
        return trainer

    return Ranks(shares.count(":") + 1, shares=shares).run(work)


# 64 rows in windows of 24: the last window of an epoch has 16 rows, of which the first worker gets none in the last case
@pytest.mark.parametrize("shares", ["5:19", "2:1", "1:1:22", "1:100"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_unequal_workers_take_the_steps_of_one(shares: str, accumulate: int) -> None:
    plan = Plan(batch_size=24 // accumulate, accumulate=accumulate, dtype="float64", clip=0.5)
    alone = run(Net(), points(64), plan, 7)
    for worker in ranked(Net(), points(64), plan, 7, shares):
        assert torch.allclose(weights(worker), weights(alone), atol=1e-12, rtol=0)


class Counting(Net):
    """Counts its own steps, before the reduction that may fail."""

    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> Step | None:
        if "steps" not in trainer.extras:
            trainer.extras["steps"] = Counter()
        trainer.extras["steps"].count += 1
        return super().train_step(trainer, window)


def test_a_lost_worker_undoes_what_the_step_did_to_extras() -> None:
    for losses in ({2, 3}, {1, 4}):  # at a later step, and at the one that made the extra
        assert run(Counting(), points(), Plan(batch_size=10), 4, workers=Flaky(losses)).extras["steps"].count == 4


def test_a_worker_lost_between_two_optimizers_leaves_neither_ahead() -> None:
    """The first optimizer has stepped when the second one's reduction fails; the step is tried again as a whole."""
    plan = Plan(batch_size=10, dtype="float64")
    calm, shaken = (run(Two(), points(), plan, 4, workers=Flaky(losses)) for losses in (set(), {2, 7}))
    assert torch.equal(weights(calm), weights(shaken))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_lost_worker_leads_to_the_same_step_again(accumulate: int) -> None:
    plan = Plan(batch_size=10, accumulate=accumulate, dtype="float64")
    calm = run(Normed(), points(), plan, 6, workers=Flaky(set()))
    flaky = Flaky({1, 4, 5})
    shaken = run(Normed(), points(), plan, 6, workers=flaky)
    assert flaky.calls == 9
    assert torch.equal(weights(calm), weights(shaken))
    assert all(torch.equal(a, b) for a, b in zip(calm.model.buffers(), shaken.model.buffers(), strict=True))
    exact = plan.updated(exact_dropout=True)  # other masks are drawn for each worker
    shaken, alone = run(Normed(), points(), exact, 6, workers=Flaky({2, 6})), run(Normed(), points(), exact, 6)
    assert torch.allclose(weights(shaken), weights(alone), atol=1e-12, rtol=0)


class Pictures(Net):
    """Convolutions, whose moments have strides; buffers; a schedule; and numbers drawn from every generator that a step may use."""

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 25, 3)
        )

    def build_schedule(self, optimizer: Any, total_steps: int) -> anyfit.Schedule:
        return anyfit.Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5))

    def step(self, model: nn.Module, batch: Any) -> Step:
        step = super().step(model, batch)
        return Step(step.loss * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand())), step.count)


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 2, 5, 5, generator=generator), torch.randint(0, 3, (30,), generator=generator)


class Rows(Dataset[tuple[Tensor, ...]]):
    """The same rows one by one."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)


def same(a: Trainer, b: Trainer) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return a.position == b.position and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def goes_on_to_the_bit(task: Task, data: Any, plan: Plan, stop: int, steps: int, folder: Path) -> tuple[Trainer, State]:
    """Stop, save, load in new objects that were seeded otherwise, go on; compare with a fit that was never stopped."""
    whole = run(task, data, plan, steps)
    first, batches = made(task, data, plan)
    for _ in train(first, batches, stop):
        pass
    first.snapshot().save(folder / "state")
    assert not same(first, whole)
    second, batches = made(task, data, plan)
    seed_all(99)
    state = State.load(folder / "state")
    second.restore(state)
    for _ in train(second, batches, steps):
        pass
    assert same(second, whole) and second.learning_rate() == whole.learning_rate()
    return second, state


@pytest.mark.parametrize("sgd", [True, False], ids=["sgd", "adamw"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stop", range(1, 7))
def test_a_snapshot_goes_on_to_the_bit_from_every_step(stop: int, channels_last: bool, sgd: bool, tmp_path: Path) -> None:
    """Two epochs of four steps, the last of them short."""
    plan = Plan(batch_size=8, seed=3, channels_last=channels_last)
    goes_on_to_the_bit(Pictures(sgd=sgd, lr=0.01), pictures(), plan, stop, 8, tmp_path)


class Flipped(Pictures):
    """Changes its batches by the numbers it is handed."""

    def augment(self, batch: Any, uniform: Any) -> Any:
        return torch.where(uniform(1, 1, 1) < 0.5, batch[0], batch[0].flip(3)), batch[1]


class FlippedByTorch(Pictures):
    """Changes its batches as torchvision's transforms do: by torch's own generator."""

    def augment(self, batch: Any, uniform: Any) -> Any:
        return torch.where(torch.rand(len(batch[0]), 1, 1, 1) < 0.5, batch[0], batch[0].flip(3)), batch[1]


@pytest.mark.parametrize("task", [Flipped(), FlippedByTorch()], ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("rows", [tuple, Rows], ids=["tensors", "data set"])
@pytest.mark.parametrize("stop", [1, 6])
def test_a_snapshot_goes_on_to_the_bit_with_augmentation(stop: int, rows: Any, task: Task, tmp_path: Path) -> None:
    goes_on_to_the_bit(task, rows(pictures()), Plan(batch_size=8, seed=3), stop, 8, tmp_path)


def test_the_consumer_may_stop_between_any_two_steps_and_go_on() -> None:
    task, plan = Net(dropout=0.5), Plan(batch_size=20)
    trainer, batches = made(task, points(), plan)
    seen = []
    for total in (1, 2, 5, 5, 9):
        seen += [(event.epoch, event.offset, event.ends_epoch, event.position) for event in train(trainer, batches, total)]
    places = [(epoch, offset) for epoch in range(3) for offset in range(4)][:10]
    assert seen == [(*at, at[1] == 3, Position(n + 1, *places[n + 1])) for n, at in enumerate(places[:9])]
    assert same(trainer, run(task, points(), plan, 9))


def test_a_snapshot_is_a_copy_and_so_is_what_is_restored() -> None:
    trainer, batches = made(Net(sgd=False), points(), Plan(batch_size=10))
    state = next(trainer.snapshot() for _ in train(trainer, batches, 1))
    kept = {name: tensor.clone() for name, tensor in state.model.items()}
    moments = state.optimizers["main"]["state"][0]["exp_avg"].clone()
    trainer.restore(state)
    for _ in train(trainer, batches, 4):
        pass
    assert all(torch.equal(state.model[name], tensor) for name, tensor in kept.items())
    assert torch.equal(state.optimizers["main"]["state"][0]["exp_avg"], moments)


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Gan(Task):
    """Two networks with an optimizer each, the second one trained at every other step, as a counter in extras says."""

    logs: bool = False

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.ModuleDict({"critic": nn.Linear(4, 1), "maker": nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.2))})

    def build_optimizer(self, model: nn.Module) -> dict[str, Any]:  # type: ignore[override]
        return {"critic": anyfit.adamw(model["critic"], lr=0.05), "maker": torch.optim.SGD(model["maker"].parameters(), 0.1, 0.9)}

    def build_schedule(self, optimizer: Any, total_steps: int) -> Any:
        return {"maker": anyfit.schedule.cosine(optimizer["maker"], total_steps)}

    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> None:
        if "turns" not in trainer.extras:
            trainer.extras["turns"] = Counter()
        turns, (real, _), size = trainer.extras["turns"], window[0], len(window[0][0])
        critic, maker = trainer.model["critic"], trainer.model["maker"]
        with torch.no_grad():
            fake = maker(torch.randn(size, 2, dtype=real.dtype))
        loss = softplus(-critic(real)).mean() + softplus(critic(fake)).mean()
        trainer.backward(Step(loss, size, logs={"critic_loss": loss.detach()} if self.logs else None))
        trainer.apply("critic")
        if turns.count % 2:
            loss = softplus(-critic(maker(torch.randn(size, 2, dtype=real.dtype)))).mean()
            trainer.backward(Step(loss, size, logs={"maker_loss": loss.detach()} if self.logs else None))
            trainer.apply("maker")
        turns.count += 1


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_gan_goes_on_to_the_bit_with_both_optimizers_and_its_extras(stop: int, tmp_path: Path) -> None:
    resumed, state = goes_on_to_the_bit(Gan(), points(), Plan(batch_size=16, seed=2), stop, 7, tmp_path)
    assert set(state.optimizers) == {"critic", "maker"} and set(state.schedules) == {"maker"}
    assert state.extras == {"turns": {"count": stop}}
    assert resumed.extras["turns"].count == 7


def test_logs_of_several_passes_need_not_have_one_name() -> None:
    trainer, batches = made(Gan(logs=True), points(), Plan(batch_size=16))
    logs = [dict(event.logs or {}) for event in train(trainer, batches, 2)]
    assert [set(each) for each in logs] == [{"critic_loss"}, {"critic_loss", "maker_loss"}]
    assert all(torch.isfinite(value) for each in logs for value in each.values())


def test_an_apply_moves_its_own_optimizers_weights_only() -> None:
    trainer, batches = made(Gan(), points(), Plan(batch_size=16))
    before = trainer.snapshot().model
    for _ in train(trainer, batches, 1):
        pass
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"critic.weight", "critic.bias"}


@pytest.mark.parametrize(
    "put",
    [
        lambda extras, counter: extras.__setitem__("c", counter),
        lambda extras, counter: extras.setdefault("c", counter),
        lambda extras, counter: extras.update(c=counter),
    ],
    ids=["set", "setdefault", "update"],
)
def test_extras_get_their_saved_state_whichever_way_they_come_in(put: Any) -> None:
    first, _ = made(Net(), points(), Plan())
    first.extras["c"] = saved = Counter()
    saved.count = 5
    second, _ = made(Net(), points(), Plan())
    second.restore(first.snapshot())
    assert second.snapshot().extras == {"c": {"count": 5}}, "one that nobody has asked for yet is kept"
    put(second.extras, counter := Counter())
    assert counter.count == 5
    counter.count += 1
    assert second.snapshot().extras == {"c": {"count": 6}}
    with pytest.raises(TaskError, match=re.escape("extras['c'] (a object) needs state_dict and load_state_dict to be checkpointed")):
        put(made(Net(), points(), Plan())[0].extras, object())


class Frozen(Net):
    """Frozen, though its optimizer was given every parameter."""

    def build_model(self, schema: Schema) -> nn.Module:
        model = super().build_model(schema)
        model[0].requires_grad_(False)
        return model


@pytest.mark.parametrize("sgd", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_frozen_parameters_stay(sgd: bool, accumulate: int) -> None:
    before = made(Frozen(), points(), Plan())[0].model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    after = run(Frozen(sgd=sgd), points(), Plan(batch_size=10, accumulate=accumulate), 5).model.state_dict()
    assert [name for name in after if torch.equal(after[name], before[name])] == ["0.weight", "0.bias"]


class Two(Net):
    """Two optimizers that take turns."""

    def build_optimizer(self, model: nn.Module) -> dict[str, Any]:  # type: ignore[override]
        return {"a": anyfit.adamw(model[0], lr=0.1), "b": anyfit.adamw(model[3], lr=0.1)}

    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> None:
        for name in ("a", "b"):
            for batch in window:
                trainer.backward(self.step(trainer.model, batch))
            trainer.apply(name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_optimizers_take_turns_on_fresh_weights(precision: str) -> None:
    """Under autocast the casts of the old weights must not serve the second pass."""
    x, y = points(10)
    plan = Plan(batch_size=10, precision=precision)  # type: ignore[arg-type]
    trainer, batches = made(Two(), (x, y), plan)
    seen: list[float] = []
    step = Two.step
    losses = []

    class Watching(Two):
        def step(self, model: nn.Module, batch: Any) -> Step:
            found = step(self, model, batch)
            losses.append(found.loss.item())
            seen.append(model[0].weight.sum().item())
            return found

    trainer, batches = made(Watching(), (x, y), plan)
    for _ in train(trainer, batches, 1):
        pass
    assert seen[0] != seen[1], "the second pass sees what the first one changed"
    with torch.no_grad(), trainer.autocast():
        trainer_a, _ = made(Two(), (x, y), plan)
        trainer_a.model[0].load_state_dict(trainer.model[0].state_dict())
        expected = Two().step(trainer_a.model, next(iter(batches))).loss
    assert losses[1] == pytest.approx(float(expected), abs=1e-6)
    assert set(trainer.snapshot().optimizers) == {"a", "b"}
    trainer.backward(Two().step(trainer.model, next(iter(batches))))
    with pytest.raises(TaskError, match=r"apply\(name='c'\) names no optimizer; there are: a, b"):
        trainer.apply("c")


class NoApply(Net):
    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> None:
        trainer.backward(self.step(trainer.model, window[0]))


class NoBackward(Net):
    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> None:
        trainer.apply()


class NoStep(Net):
    def step(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).sum()


@pytest.mark.parametrize(
    ("task", "message"),
    [(NoApply(), "without apply"), (NoBackward(), "before backward"), (NoStep(), "return anyfit.Step")],
    ids=lambda value: str(type(value).__name__),
)
def test_an_own_loop_that_is_wrong_is_told_so(task: Task, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        run(task, points(), Plan(), 1)


def test_nothing_leaks_to_the_consumer(tmp_path: Path) -> None:
    """A yield inside no_grad or autocast would change the consumer's own code."""

    def clean() -> bool:
        return torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")

    trainer, batches = made(Net(), points(), Plan(batch_size=10, precision="bf16"))
    inside: list[bool] = []

    class Looks(Net):
        def forward(self, model: nn.Module, batch: Any) -> Any:
            inside.append(torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() == model.training)
            return super().forward(model, batch)

    trainer.task = Looks()
    for _ in train(trainer, batches, 5):
        assert clean()
        assert "loss" in evaluate(Looks(), trainer.model, batches, trainer.autocast())
        assert clean() and trainer.model.training
    for _ in predict(Looks(), trainer.model, batches, trainer.autocast()):
        assert clean() and trainer.model.training, "in evaluation mode only while it predicts"
    assert inside and all(inside)
    events: list[str] = []

    def told(event: dict[str, Any]) -> None:
        assert clean(), event
        events.append(event["event"])

    options = {"validation": 0.2, "test": 0.2, "best": True, "epochs": 2, "batch_size": 10, "precision": "bf16"}
    anyfit.fit(Net(), points(), run=tmp_path / "r", on_event=told, **options)
    assert {"start", "step", "evaluate", "stop", "checkpoint"} <= set(events)

    class Breaks(Net):
        def predict(self, model: nn.Module, batch: Any) -> Any:
            raise KeyError("x")

    with pytest.raises(KeyError):
        next(predict(Breaks(), trainer.model, batches))
    assert clean() and trainer.model.training


def test_fp16_scales_its_loss() -> None:
    trainer = run(Net(sgd=False), points(), Plan(batch_size=10, precision="fp16", accumulate=2), 20)
    assert trainer.scaler is not None and trainer.scaler.get_scale() > 0
    assert torch.isfinite(weights(trainer)).all()
    assert trainer.snapshot().scaler["scale"] == trainer.scaler.get_scale()


class Both(Two):
    """Two optimizers after one backward pass."""

    def train_step(self, trainer: Trainer, window: Sequence[Any]) -> None:
        for batch in window:
            trainer.backward(self.step(trainer.model, batch))
        trainer.apply()


def test_fp16_unscales_every_optimizer_by_the_same_scale() -> None:
    """The scale may change once a step, not between two optimizers."""
    trainer, batches = made(Both(), points(), Plan(batch_size=10, precision="fp16"))
    assert trainer.scaler is not None
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "growth_interval": 1, "scale": 4.0})
    plain, same = made(Both(), points(), Plan(batch_size=10))
    for scaled, exact in zip(train(trainer, batches, 3), train(plain, same, 3), strict=True):
        assert scaled.position == exact.position
    assert trainer.scaler.get_scale() == 4.0 * 2**3
    assert torch.allclose(weights(trainer), weights(plain), atol=2e-2)


class Explodes(Net):
    at: int = 7

    def step(self, model: nn.Module, batch: Any) -> Step:
        found = super().step(model, batch)
        COUNT.append(1)
        return Step(found.loss * float("nan") if len(COUNT) == self.at else found.loss, found.count, found.outputs, found.targets)


COUNT: list[int] = []


def test_a_loss_that_is_not_finite_is_named_with_its_step_and_batch() -> None:
    COUNT.clear()
    with pytest.raises(NonFinite, match=r"loss \(=nan\) is not finite at step 7 \(epoch 1, batch 2\)"):
        anyfit.fit(Explodes(), points(40), batch_size=10, epochs=3)


def test_the_first_of_several_bad_losses_is_named_and_good_ones_are_averaged_by_count() -> None:
    def stepped(step: int, loss: float, count: Any) -> Stepped:
        return Stepped(Position(step, 0, step), torch.tensor(loss), count, 0, step - 1, {"twice": torch.tensor(2 * loss)})

    losses = Losses([stepped(1, 1.0, 1), stepped(2, 4.0, torch.tensor(3)), stepped(3, float("nan"), 0)])
    assert losses.read() == (13 / 4, {"twice": pytest.approx(13 / 2)})
    assert losses.read() is None, "each step is read once"
    losses.events = [stepped(4, 1.0, 1), stepped(5, float("inf"), 2), stepped(6, float("nan"), 2)]
    with pytest.raises(NonFinite, match=r"loss \(=inf\) is not finite at step 5 \(epoch 0, batch 4\); lower the learning rate"):
        losses.read()


def test_weights_that_explode_in_the_last_step_are_found_by_the_evaluation() -> None:
    """The training loss was finite before the step; metrics of NaN must not hide what happened."""
    x, y = points(40)
    with pytest.raises(NonFinite, match=r"validation loss \(=.*\) is not finite after step 1; lower the learning rate"):
        anyfit.fit(Binary(lr=1e38), (x, y.clamp(max=1)), validation=(x, y.clamp(max=1)), batch_size=None, epochs=1)


class Binary(Net):
    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("where", ["train", "validation"])
def test_a_label_out_of_range_is_a_data_error(where: str) -> None:
    x, y = points(40)
    good, bad = (x, y), (x, torch.where(torch.arange(40) == 25, 7, y))
    data, validation = (bad, good) if where == "train" else (good, bad)
    with pytest.raises(DataError, match="a label does not fit the model's outputs"):
        anyfit.fit(Net(), data, validation=validation, batch_size=10, epochs=1)


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*points(40), strict=True)


class Jitter(Net):
    def augment(self, batch: Any, uniform: Any) -> Any:
        return batch[0] + 0.1 * uniform(4), batch[1]


def test_augmentation_depends_on_position_alone() -> None:
    """Neither batch size nor shares change what happens to a sample."""
    plan = Plan(batch_size=24, dtype="float64", seed=5)
    whole = made(Jitter(), points(), plan)[1].window(Position(1, 2, 1))
    small = made(Jitter(), points(), Plan(batch_size=6, accumulate=4, dtype="float64", seed=5))[1].window(Position(1, 2, 1))
    shared = [made(Jitter(), points(), plan)[1].window(Position(1, 2, 1), Share(*part)) for part in ((0, 5), (5, 24))]
    assert torch.equal(whole[0][0], torch.cat([batch[0] for batch in small]))
    assert torch.equal(whole[0][0], torch.cat([batch[0] for window in shared for batch in window]))
    other = made(Jitter(), points(), plan)[1].window(Position(1, 3, 1))
    assert not torch.equal(whole[0][0], other[0][0])


def test_augmentation_is_not_skipped_in_silence() -> None:
    """A stream has no positions that it could depend on: it runs, is refused, or the user is told."""

    class Marked(Jitter):
        def augment(self, batch: Any, uniform: Any) -> Any:
            calls.append(batch)
            return super().augment(batch, uniform)

    calls: list[Any] = []
    notices: list[str] = []
    try:
        anyfit.fit(Marked(), Endless(), steps=2, batch_size=10, on_event=lambda event: notices.append(event.get("text", "")))
    except InputError as error:
        notices.append(str(error))
    assert calls or any("augment" in notice for notice in notices)


def test_uniform_is_uniform() -> None:
    draw = uniform(1, 2, torch.arange(20_000))
    first, second = draw(3), draw(3)
    for values in (first, second):
        assert values.shape == (20_000, 3) and values.min() >= 0 and values.max() < 1
        assert abs(float(values.mean()) - 0.5) < 0.01 and abs(float(values.var()) - 1 / 12) < 0.002
        counts = torch.histc(values, 20, 0, 1)
        assert (counts - 3000).abs().max() < 5 * 3000**0.5, "each twentieth holds its share"
    other = uniform(1, 3, torch.arange(20_000))(3)
    joint = torch.corrcoef(torch.cat((first, second, other), 1).T) - torch.eye(9)
    assert joint.abs().max() < 0.03, "neither columns, calls nor epochs go together"
    assert torch.corrcoef(torch.stack((first[1:, 0], first[:-1, 0])))[0, 1].abs() < 0.03, "nor neighbours"
    assert draw().shape == (20_000,)
    again = uniform(1, 2, torch.tensor([19_999, 3]))
    assert torch.equal(again(3), first[[19_999, 3]]) and torch.equal(again(3), second[[19_999, 3]])


def test_a_model_in_evaluation_mode_in_part_gets_that_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
    assert model[0].training and not model[1].training


def test_weights_that_do_not_fit_are_listed() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(InputError, match=r"missing: bias; not in the model: other; weight: \(3, 5\) for \(3, 2\)"):
        load_model(model, {"weight": torch.zeros(3, 5), "other": torch.zeros(1)})


def test_a_generator_of_batches_is_never_asked_for_the_same_step_in_another_way() -> None:
    """Windows are pure: asked again, out of order, they are the same."""
    batches = made(Net(), points(), Plan(batch_size=10))[1]

    def window(epoch: int, offset: int) -> Iterator[Tensor]:
        return (batch[0] for batch in batches.window(Position(0, epoch, offset)))

    first = [torch.cat(list(window(*at))) for at in ((0, 0), (1, 3), (0, 6), (0, 0), (1, 3))]
    assert torch.equal(first[0], first[3]) and torch.equal(first[1], first[4])
    assert not torch.equal(first[0], first[1])
