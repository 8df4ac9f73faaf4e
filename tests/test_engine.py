"""The engine's arithmetic and its promises: windows, retries, several optimizers, no leaks, exact snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import anyfit
from anyfit import Plan, Schema, Step, Task
from anyfit.data import make_batches
from anyfit.engine import Trainer, make_trainer, predict, train
from anyfit.errors import InputError, Lost, NonFinite, TaskError
from anyfit.machine import seed_all
from anyfit.state import Position

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


class Flaky:
    """A group of one that loses a worker at some steps, after the gradients were made."""

    alone = False

    def __init__(self, losses: set[int]) -> None:
        self.calls, self.losses = 0, losses

    def share(self, step: int, size: int) -> slice | None:
        return slice(0, size)

    def reduce(self, gradients: Sequence[Tensor], count: Any) -> Any:
        self.calls += 1
        if self.calls in self.losses:
            for gradient in gradients:
                gradient.fill_(float("nan"))
            raise Lost("a worker is gone")
        return count

    def agree(self, flag: bool) -> bool:
        return flag


class Normed(Net):
    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_lost_worker_leads_to_the_same_step_again(accumulate: int) -> None:
    plan = Plan(batch_size=10, accumulate=accumulate, dtype="float64")
    calm = run(Normed(), points(), plan, 6, workers=Flaky(set()))
    flaky = Flaky({1, 4, 5})
    shaken = run(Normed(), points(), plan, 6, workers=flaky)
    assert flaky.calls == 9
    assert torch.equal(weights(calm), weights(shaken))
    assert all(torch.equal(a, b) for a, b in zip(calm.model.buffers(), shaken.model.buffers(), strict=True))
    alone = run(Normed(), points(), plan, 6)
    assert torch.allclose(weights(calm), weights(alone), atol=1e-12, rtol=0)


@pytest.mark.parametrize("sgd", [True, False])
@pytest.mark.parametrize("stop", range(1, 8))
def test_a_snapshot_goes_on_to_the_bit_from_every_step(stop: int, sgd: bool) -> None:
    task, plan = Net(sgd=sgd, dropout=0.5), Plan(batch_size=20, seed=3)
    whole = run(task, points(), plan, 8)
    first, batches = made(task, points(), plan)
    states = [first.snapshot() for _ in train(first, batches, stop)]
    second, batches = made(task, points(), plan)
    second.restore(states[-1])
    for _ in train(second, batches, 8):
        pass
    assert second.position == whole.position
    assert torch.equal(weights(second), weights(whole))


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


class Frozen(Net):
    def build_model(self, schema: Schema) -> nn.Module:
        model = super().build_model(schema)
        model[0].requires_grad_(False)
        return model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return anyfit.adamw(model)


def test_frozen_parameters_stay() -> None:
    before = made(Frozen(), points(), Plan())[0].model[0].weight.clone()
    trainer = run(Frozen(), points(), Plan(batch_size=10), 5)
    assert torch.equal(trainer.model[0].weight, before)


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


def test_nothing_leaks_to_the_consumer() -> None:
    """A yield inside no_grad or autocast would change the consumer's own code."""

    def clean() -> bool:
        return torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")

    trainer, batches = made(Net(), points(), Plan(batch_size=10, precision="bf16"))
    assert all(clean() for _ in train(trainer, batches, 5))
    assert all(clean() for _ in predict(Net(), trainer.model, batches, trainer.autocast()))
    assert trainer.model.training

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


class Jitter(Net):
    def augment(self, batch: Any, uniform: Any) -> Any:
        return batch[0] + 0.1 * uniform(4), batch[1]


def test_augmentation_depends_on_position_alone() -> None:
    """Neither batch size nor shares change what happens to a sample."""
    plan = Plan(batch_size=24, dtype="float64", seed=5)
    whole = made(Jitter(), points(), plan)[1].window(Position(1, 2, 1))
    small = made(Jitter(), points(), Plan(batch_size=6, accumulate=4, dtype="float64", seed=5))[1].window(Position(1, 2, 1))
    shared = [made(Jitter(), points(), plan)[1].window(Position(1, 2, 1), slice(*part)) for part in ((0, 5), (5, 24))]
    assert torch.equal(whole[0][0], torch.cat([batch[0] for batch in small]))
    assert torch.equal(whole[0][0], torch.cat([batch[0] for window in shared for batch in window]))
    other = made(Jitter(), points(), plan)[1].window(Position(1, 3, 1))
    assert not torch.equal(whole[0][0], other[0][0])


def test_uniform_is_uniform() -> None:
    from anyfit.data import uniform

    draw = uniform(1, 2, torch.arange(20_000))
    first, second = draw(3), draw(3)
    for values in (first, second):
        assert values.shape == (20_000, 3) and values.min() >= 0 and values.max() < 1
        assert abs(float(values.mean()) - 0.5) < 0.01 and abs(float(values.var()) - 1 / 12) < 0.002
    joint = torch.corrcoef(torch.cat((first, second), 1).T) - torch.eye(6)
    assert joint.abs().max() < 0.03


def test_a_model_in_evaluation_mode_in_part_gets_that_back() -> None:
    from anyfit.task import evaluating

    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
    assert model[0].training and not model[1].training


def test_weights_that_do_not_fit_are_listed() -> None:
    from anyfit.engine import load_model

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
