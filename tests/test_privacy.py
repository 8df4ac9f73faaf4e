"""Differential privacy: what is clipped, what the noise is, what it costs, and what is refused."""

from __future__ import annotations

import math
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pyarrow as pa
import pytest
import torch
from dp_accounting import rdp
from torch import Tensor, nn
from torch.utils.data import Dataset

import anyfit
from anyfit import Plan, Schema, Source, Step, Task
from anyfit.data import Ragged, make_batches
from anyfit.engine import Trainer, make_trainer, train
from anyfit.errors import DataError, InputError, NonFinite, StateError, TaskError
from anyfit.fit import fit
from anyfit.machine import seed_all
from anyfit.privacy import Accountant, ExamplePrivacy, SitePrivacy, noise_for
from anyfit.private import PrivateSteps, clipped, noise_like, sampling_rate, seeded, units_of
from anyfit.tasks.tabular import Tabular
from anyfit.tasks.text import TextCNN

CPU = torch.device("cpu")


class Net(Task):
    lr: float = 0.1
    dropout: float = 0.0

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(8, 3))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.lr)


class Convolution(Net):
    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


class Words(nn.Module):
    """Padding counts as a word here, so that a row padded to another one's length would have another gradient."""

    def __init__(self, recurrent: bool, dropout: float) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(20, 6), nn.GRU(6, 6, batch_first=True) if recurrent else None
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Tensor:
        vectors = self.dropout(self.embedding(words))
        out: Tensor = self.out(vectors.mean(1) if self.recurrent is None else self.recurrent(vectors)[0][:, -1])
        return out


class Texts(Net):
    recurrent: bool = False

    def build_model(self, schema: Schema) -> nn.Module:
        return Words(self.recurrent, self.dropout)


class Branching(Net):
    """What a row is decides what is computed: one call cannot do it for several rows."""

    def step(self, model: nn.Module, batch: Any) -> Step:
        x, y = batch
        return super().step(model, (x * 2 if float(x.sum()) > 0 else x, y))


def points(rows: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (rows,), generator=generator)


def images(rows: int = 30) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(3)), points(rows)[1]


def texts(rows: int = 30, lengths: int = 9) -> dict[str, Any]:
    generator = np.random.default_rng(2)
    words = [generator.integers(0, 20, 1 + place % lengths).tolist() for place in range(rows)]
    return {"words": Ragged.of(words), "target": points(rows)[1]}


def private(**values: Any) -> PrivateSteps:
    return PrivateSteps(**{"clip": 0.5, "noise_multiplier": 0.0, "sampling_rate": 1.0, "seed": 7, **values})


def made(task: Task, data: Any, steps: PrivateSteps | None, **plan: Any) -> tuple[Trainer, Any]:
    final = Plan(**{"dtype": "float64", "batch_size": None, "device": "cpu", **plan})
    seed_all(final.seed)
    trainer = make_trainer(task, task.build_model(Schema(())), final, 100, CPU, private=steps)
    augment = task.augment if type(task).augment is not Task.augment else None
    return trainer, make_batches(data, final, task.collate, device=CPU, augment=augment)


def gradient(task: Task, data: Any, steps: PrivateSteps, step: int = 0, **plan: Any) -> Tensor:
    """The gradient that one private step leaves, in one row."""
    trainer, batches = made(task, data, steps, **plan)
    assert trainer.private is not None
    trainer.private.backward(batches, step)
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert len(found) == sum(p.numel() for p in trainer.model.parameters()), "every parameter gets a gradient"
    return found


def by_hand(task: Task, data: Any, clip: float, rows: list[int], owners: list[int] | None = None) -> Tensor:
    """The sum of clipped gradients by one backward for each row."""
    trainer, batches = made(task, data, None)
    per_unit: dict[int, list[Tensor]] = {}
    for place, row in enumerate(rows):
        loss = task.step(trainer.model, batches.batch_of(torch.tensor([row]))).loss
        found = torch.autograd.grad(loss, list(trainer.model.parameters()))
        per_unit.setdefault(place if owners is None else owners[place], []).append(torch.cat([g.flatten() for g in found]))
    means = [torch.stack(found).mean(0) for found in per_unit.values()]
    return sum((mean * min(1.0, clip / float(mean.norm())) for mean in means), start=torch.zeros_like(means[0]))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.inner(x[:, None, :] * torch.arange(1, 4)[:, None]).split(4, 2)
        out: Tensor = self.out(nn.functional.scaled_dot_product_attention(queries, keys, values).mean(1))
        return out


class Attending(Net):
    def build_model(self, schema: Schema) -> nn.Module:
        return Attention()


CASES: dict[str, tuple[Task, Callable[[], Any], bool]] = {
    "perceptron": (Net(), points, True),
    "convolution": (Convolution(), images, True),
    "texts": (Texts(), texts, True),
    "attention": (Attending(), points, True),
    "gru": (Texts(recurrent=True), texts, False),
    "control flow": (Branching(), points, False),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("clip", [0.3, 1e6], ids=["clipped", "whole"])
def test_gradients_of_rows_are_those_of_one_backward_for_each(name: str, clip: float) -> None:
    task, data, at_once = CASES[name]
    found = gradient(task, data(), private(clip=clip)) * 30
    assert torch.allclose(found, by_hand(task, data(), clip, list(range(30))), atol=1e-9, rtol=0)
    single = gradient(task, data(), private(clip=clip), dtype="float32") * 30
    assert torch.allclose(single.double(), found, atol=3e-6, rtol=0)
    trainer, batches = made(task, data(), private(sampling_rate=0.5))
    list(train(trainer, batches, 3))
    assert trainer.private is not None and len(trainer.private.notices) == (0 if at_once else 1), "it is decided once, and said"


@pytest.mark.parametrize("name", ["perceptron", "texts", "gru"])
def test_rows_of_one_patient_are_one_unit(name: str) -> None:
    task, data, _ = CASES[name]
    units = torch.arange(30) ** 2 % 7  # 0, 1, 2, 4: units may even be empty
    found = gradient(task, data(), private(units=units)) * 5
    assert torch.allclose(found, by_hand(task, data(), 0.5, list(range(30)), units.tolist()), atol=1e-9, rtol=0)


def test_all_rows_of_a_drawn_patient_are_in_the_step() -> None:
    units = torch.arange(30) % 6
    steps = private(units=units, sampling_rate=0.5, seed=3)
    drawn = steps.drawn(4, 6).tolist()
    assert 0 < len(drawn) < 6, "else nothing is tested"
    rows = [row for row in range(30) if row % 6 in drawn]
    expected = by_hand(Net(), points(), 0.5, rows, [row % 6 for row in rows]) / (0.5 * 6)
    assert torch.allclose(gradient(Net(), points(), steps, 4), expected, atol=1e-9, rtol=0)


def rows_of(data: Any, kept: Tensor) -> Any:
    if isinstance(data, tuple):
        return tuple(part[kept] for part in data)
    words = [data["words"].padded(row[None])[0, : int(data["words"].lengths[row])].tolist() for row in kept]
    return {"words": Ragged.of(words), "target": data["target"][kept]}


@pytest.mark.parametrize("name", ["perceptron", "texts", "gru"])
@pytest.mark.parametrize("patient", [False, True], ids=["row", "patient"])
def test_one_unit_more_moves_the_sum_by_the_clip_at_most(name: str, patient: bool) -> None:
    task, data, _ = CASES[name]
    all_rows = torch.arange(30)
    units = all_rows % 6 if patient else None
    gone = all_rows[all_rows % 6 == 5] if patient else torch.tensor([26])  # 26: the longest text there is
    kept = all_rows[~torch.isin(all_rows, gone)]
    near = rows_of(data(), kept)
    if name == "perceptron":
        data_rows = data()
        data_rows[0][gone] *= 1e4
    else:
        data_rows = data()
    with_all = gradient(task, data_rows, private(clip=0.25, units=units)) * (6 if patient else 30)
    without = gradient(task, near, private(clip=0.25, units=None if units is None else units[kept])) * (5 if patient else 29)
    assert 0.01 < float((with_all - without).norm()) <= 0.25 * (1 + 1e-9)
    if name == "perceptron" and not patient:
        loose = gradient(task, data_rows, private(clip=1e9)) * 30 - gradient(task, near, private(clip=1e9)) * 29
        assert float(loose.norm()) > 1, "the control: without a clip it moves by more"


class Mixing(Net):
    """An augmentation that would mix rows where it is given several."""

    def augment(self, batch: Any, uniform: Any) -> Any:
        x, y = batch
        return x + x.mean(0) + 0.1 * uniform(4), y


def test_rows_are_augmented_one_by_one() -> None:
    x, y = points(12)
    both = gradient(Mixing(), (x, y), private(clip=0.25)) * 12
    less = gradient(Mixing(), (x[:-1], y[:-1]), private(clip=0.25)) * 11
    assert 0 < float((both - less).norm()) <= 0.25 * (1 + 1e-9)
    assert not torch.equal(both, gradient(Mixing(), (x, y), private(clip=0.25), step=1) * 12), "each step augments anew"


class Samples(Dataset[Any]):
    """Texts of different lengths that a collate pads."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"words": list(range(1 + index % 4)), "target": index % 3, **({"note": "x" * index} if index % 2 else {"note": ""})}


class Noted(Texts):
    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["words"]) * (1 + len(batch["note"][0]))


def test_rows_of_a_data_set_are_never_padded_to_each_other() -> None:
    found = gradient(Noted(), Samples(), private()) * 20
    assert torch.allclose(found, by_hand(Noted(), Samples(), 0.5, list(range(20))), atol=1e-9, rtol=0)


def test_the_noise_has_the_deviation_that_is_accounted_for_and_depends_on_seed_and_step_alone() -> None:
    class Wide(Net):
        def build_model(self, schema: Schema) -> nn.Module:
            return nn.Linear(4, 5000)

    def noise(data: Any, step: int = 0, **values: Any) -> Tensor:
        steps = {"clip": 0.5, "sampling_rate": 0.5, **values}
        with_noise = gradient(Wide(), data, private(noise_multiplier=3.0, **steps), step)
        return (with_noise - gradient(Wide(), data, private(**steps), step)) * 15  # the sum's noise: 30 rows at one half

    x, y = points()
    one = noise((x, y))
    assert float(one.std()) == pytest.approx(1.5, rel=0.02) and abs(float(one.mean())) < 0.05
    assert abs(float((one[:12500] * one[12500:]).mean())) < 0.1, "each parameter has its own"
    assert torch.allclose(one, noise((x * 100, 2 - y)), atol=1e-6), "the rows change nothing"
    for other in (noise((x, y), step=1), noise((x, y), seed=8)):
        assert abs(float((one * other).mean())) < 0.1 and not torch.allclose(one, other)


def test_noise_needs_all_bits_of_the_seed() -> None:
    flat = torch.zeros(5)
    draws = [noise_like(flat, 1.0, seeded(seed, 3)) for seed in (1, 1 + 2**32, 1 + 2**64, 1 + 2**127)]
    assert all(not torch.equal(one, other) for place, one in enumerate(draws) for other in draws[:place])
    assert torch.equal(draws[0], noise_like(flat, 1.0, seeded(1, 3)))
    assert "12345" not in repr(private(seed=12345))


def test_units_are_drawn_by_coins_of_their_own_at_each_step() -> None:
    steps = private(sampling_rate=0.1)
    sizes = torch.tensor([float(len(steps.drawn(step, 1000))) for step in range(300)])
    assert float(sizes.mean()) == pytest.approx(100, abs=2.5)
    assert float(sizes.std()) == pytest.approx(math.sqrt(90), rel=0.15), "a fixed size would need another accounting"
    assert torch.equal(steps.drawn(5, 1000), steps.drawn(5, 1000)) and not torch.equal(steps.drawn(5, 1000), steps.drawn(6, 1000))


def test_the_sum_is_divided_by_the_expected_number_whatever_was_drawn() -> None:
    steps = private(sampling_rate=0.2)
    assert len({len(steps.drawn(step, 30)) for step in range(3)}) > 1, "else nothing is tested"
    for step in range(3):
        rows = steps.drawn(step, 30).tolist()
        expected = by_hand(Net(), points(), 0.5, rows) / 6
        assert torch.allclose(gradient(Net(), points(), steps, step), expected, atol=1e-9, rtol=0)


def test_a_step_in_which_nobody_is_drawn_is_taken_with_noise() -> None:
    trainer, batches = made(Net(), points(), private(sampling_rate=1e-9, noise_multiplier=1.0))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    (event,) = train(trainer, batches, 1)
    assert float(event.loss) == 0 and event.count == 0 and event.position.step == 1
    assert all(not torch.equal(was, now) for was, now in zip(before, trainer.model.parameters(), strict=True))


class Table(Texts):
    """A table that the engine would train only the rows in use of."""

    def build_model(self, schema: Schema) -> nn.Module:
        model = Words(False, 0.0)
        model.embedding = nn.Embedding(20_000, 6, padding_idx=0)
        model.lookups = lambda: {"words": (model.embedding, ())}
        return model


def test_words_that_no_text_holds_get_noise_too() -> None:
    data = {"words": Ragged.of([[1, 2]] * 8), "target": torch.zeros(8, dtype=torch.int64)}
    public, batches = made(Table(), data, None)
    public.use_rows(batches)
    assert public.rows_in_use, "else nothing is tested"
    trainer, batches = made(Table(), data, private(noise_multiplier=1.0))
    before = trainer.model.embedding.weight.detach().clone()
    list(train(trainer, batches, 1))
    after = trainer.model.embedding.weight.detach()
    assert bool((after[1:] != before[1:]).all()), "rows that stand still tell which words were never there"
    assert torch.equal(after[0], before[0]), "padding is no word"


def test_a_row_that_counts_for_nothing_or_overflows_adds_nothing() -> None:
    x, y = points()
    y[3], x[5, 0] = -100, math.inf
    kept = [row for row in range(30) if row not in (3, 5)]
    expected = by_hand(Net(), (x, y), 0.5, kept)
    assert torch.allclose(gradient(Net(), (x, y), private()) * 30, expected, atol=1e-9, rtol=0)


def test_dropout_differs_from_row_to_row() -> None:
    x, y = torch.ones(40, 4, dtype=torch.float64), torch.zeros(40, dtype=torch.int64)
    trainer, batches = made(Net(dropout=0.5), (x, y), private())
    assert trainer.private is not None
    losses = trainer.private._rows(batches.batch_of(torch.arange(40)), 40).losses
    assert len(losses.unique()) > 10


@pytest.mark.parametrize("name", ["dropout", "texts", "gru"])
def test_steps_after_a_snapshot_are_those_of_a_run_that_went_on(name: str) -> None:
    """Also where a process begins with a text that no other has the length of."""
    task = {"dropout": Net(dropout=0.5), "texts": Texts(dropout=0.2), "gru": Texts(recurrent=True, dropout=0.2)}[name]
    data = texts() if isinstance(task, Texts) else points()
    steps = private(sampling_rate=0.2, noise_multiplier=1.0)
    whole, batches = made(task, data, steps, dtype="float32")
    states = [whole.snapshot() for _ in train(whole, batches, 8)]
    for state in states[:-1]:
        resumed, again = made(task, data, steps, dtype="float32")
        resumed.restore(state)
        list(train(resumed, again, 8))
        assert all(torch.equal(one, other) for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_the_log_tells_the_mean_over_rows() -> None:
    trainer, batches = made(Net(), points(), private())
    expected = trainer.task.step(trainer.model, batches.batch_of(torch.arange(30))).loss.detach()
    (event,) = train(trainer, batches, 1)
    assert float(event.loss) == pytest.approx(float(expected), rel=1e-12) and int(event.count) == 30


def event_of(steps: int, rate: float, noise: float) -> Any:
    return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)


@pytest.mark.parametrize(("steps", "rate", "noise"), [(1, 1.0, 2.0), (1000, 0.01, 1.1), (40, 0.3, 4.0)])
def test_epsilon_is_what_dp_accounting_says(steps: int, rate: float, noise: float) -> None:
    accountant = Accountant(1e-5)
    expected = rdp.RdpAccountant().compose(event_of(steps, rate, noise)).get_epsilon(1e-5)
    assert accountant.epsilon(steps, rate, noise) == pytest.approx(expected, rel=1e-12)
    assert accountant.epsilon(0, rate, noise) == 0 < expected < accountant.epsilon(2 * steps, rate, noise)
    assert accountant.epsilon(steps, rate, noise * 1.5) < expected < Accountant(1e-6).epsilon(steps, rate, noise)
    assert accountant.epsilon(steps, rate, 0.0) == math.inf


def test_epsilon_is_cheap_to_ask_for_every_round() -> None:
    accountant = Accountant(1e-5)
    accountant.epsilon(1, 0.01, 1.0)
    begun = time.process_time()
    spent = [accountant.epsilon(steps, 0.01, 1.0) for steps in range(1, 500)]
    assert spent == sorted(spent) and time.process_time() - begun < 2.0


@pytest.mark.parametrize(("epsilon", "steps", "rate"), [(3.0, 1000, 0.01), (0.5, 200, 0.1), (8.0, 10, 1.0)])
def test_noise_is_the_least_that_keeps_the_budget(epsilon: float, steps: int, rate: float) -> None:
    noise = noise_for(epsilon, 1e-5, steps, rate)
    accountant = Accountant(1e-5)
    assert accountant.epsilon(steps, rate, noise) <= epsilon < accountant.epsilon(steps, rate, noise * 0.999)
    assert accountant.allowed(epsilon, rate, noise) >= steps
    most = accountant.allowed(epsilon, rate, noise * 2)
    assert most > steps
    assert accountant.epsilon(most, rate, noise * 2) <= epsilon < accountant.epsilon(most + 1, rate, noise * 2)
    assert accountant.allowed(epsilon, rate, 0.0) == 0


def test_orders_that_do_not_converge_are_left_out_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert noise_for(8.0, 1e-4, 8, 0.1775) > 0.5
    assert Accountant(1e-4).epsilon(8, 0.1775, 0.7) > 0
    assert not caplog.records


def test_a_budget_that_no_noise_keeps_is_refused() -> None:
    with pytest.raises(InputError, match=r"no noise keeps 10 steps within epsilon \(=1e-09\) at delta"):
        noise_for(1e-9, 1e-9, 10, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"delta": 1.0}, r"delta \(=1.0\)"),
        ({"delta": 0.0}, r"delta \(=0.0\)"),
        ({"clip": 0.0}, r"clip \(=0.0\)"),
        ({"clip": math.nan}, r"clip \(=nan\)"),
        ({"epsilon": -1.0}, r"epsilon \(=-1.0\)"),
        ({"epsilon": None}, r"noise_multiplier and epsilon of the privacy are both None"),
        ({"noise_multiplier": -0.1}, r"noise_multiplier \(=-0.1\)"),
        ({"noise_multiplier": 0.0}, r"noise_multiplier \(=0\) keeps no budget"),
    ],
)
@pytest.mark.parametrize("kind", [ExamplePrivacy, SitePrivacy])
def test_values_are_checked_when_they_are_made(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**{"delta": 1e-5, "epsilon": 3.0, **values})


def test_adaptive_clipping_splits_the_noise_as_the_paper_does() -> None:
    adaptive = SitePrivacy(delta=1e-5, noise_multiplier=1.0, quantile=0.5)
    updates, bits = adaptive.split(1.0, 100)
    assert bits == 5.0 and updates == pytest.approx((1 - 10**-2) ** -0.5)
    for sites in (2, 10, 1000):  # together they cost what the noise multiplier says: 1 / z^2 adds up
        updates, bits = adaptive.split(1.0, sites)
        assert updates**-2 + (2 * bits) ** -2 == pytest.approx(1.0) and updates < 1.16
    assert SitePrivacy(delta=1e-5, noise_multiplier=1.0).split(1.0, 10) == (1.0, 0.0)
    with pytest.raises(InputError, match=r"bits_noise \(=0.5\) must be above half of the noise multiplier \(=1.0\)"):
        SitePrivacy(delta=1e-5, noise_multiplier=1.0, quantile=0.5, bits_noise=0.5).split(1.0, 10)
    with pytest.raises(InputError, match=r"quantile \(=1.0\)"):
        SitePrivacy(delta=1e-5, epsilon=1.0, quantile=1.0)


def test_the_clip_follows_the_quantile_of_norms() -> None:
    privacy = SitePrivacy(delta=1e-5, epsilon=1.0, quantile=0.7)
    norms, clip = torch.linspace(0.1, 10, 200), 0.05
    for _ in range(200):
        clip = privacy.next_clip(clip, float((norms <= clip).double().sub(0.5).sum()), len(norms))
    assert clip == pytest.approx(float(norms.quantile(0.7)), rel=0.05)
    assert SitePrivacy(delta=1e-5, epsilon=1.0).next_clip(2.0, -3.0, 10) == 2.0


def test_an_update_is_brought_within_the_clip() -> None:
    flat = torch.tensor([3.0, 4.0])
    within, norm = clipped(flat, 2.5)
    assert norm == 5.0 and torch.allclose(within, torch.tensor([1.5, 2.0]))
    assert torch.equal(clipped(flat, 5.0)[0], flat) and torch.equal(clipped(flat * 0, 1.0)[0], flat * 0)
    with pytest.raises(NonFinite, match="nan"):
        clipped(flat * math.nan, 1.0)
    assert float(noise_like(torch.zeros(100_000, dtype=torch.float64), 2.0, seeded(1)).std()) == pytest.approx(2.0, rel=0.02)


class OwnStep(Net):
    def train_step(self, trainer: Trainer, window: Any) -> Step | None:
        return super().train_step(trainer, window)


class BatchNormed(Net):
    frozen: bool = False

    def build_model(self, schema: Schema) -> nn.Module:
        norm = nn.BatchNorm1d(8)
        if self.frozen:
            norm.train = lambda mode=True: nn.Module.train(norm, False)  # type: ignore[method-assign]
        return nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 3))


class Counting(Net):
    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 8), nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten(), nn.Linear(8, 3)
        )


REFUSED: dict[str, tuple[Task, dict[str, Any], str]] = {
    "train_step": (OwnStep(), {}, "OwnStep has a train_step of its own"),
    "batch norm": (BatchNormed(), {}, r"layer 1 \(BatchNorm1d\) takes statistics over rows.*GroupNorm"),
    "accumulate": (Net(), {"accumulate": 2}, r"accumulate \(=2\) does not go with privacy"),
    "precision": (Net(), {"precision": "bf16"}, r"precision \(='bf16'\) does not go with privacy"),
    "dtype": (Net(), {"dtype": "bfloat16"}, r"dtype \(='bfloat16'\) does not go with privacy"),
    "clip": (Net(), {"clip": 1.0}, r"clip \(=1.0\) does not go with privacy"),
    "bucket": (Texts(), {"bucket": True}, r"bucket \(=True\) does not go with privacy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_bounded_is_refused(name: str) -> None:
    task, plan, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        made(task, texts() if isinstance(task, Texts) else points(), private(), **plan)


def test_statistics_that_a_model_keeps_of_its_rows_are_refused() -> None:
    trainer, batches = made(Counting(), points(), private())
    with pytest.raises(TaskError, match=r"buffer 2\.running_mean of the model changes"):
        list(train(trainer, batches, 1))


def test_frozen_statistics_are_taken() -> None:
    gradient(BatchNormed(frozen=True), points(), private())


def test_rows_with_weights_are_refused() -> None:
    x, y = points()
    trainer, batches = made(Net(), {"x": x, "target": y, "weight": torch.ones(30)}, private())
    with pytest.raises(TaskError, match="rows have sample weights"):
        list(train(trainer, batches, 1))


def test_rows_that_cannot_be_drawn_are_refused() -> None:
    x, y = points()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), sampler=list(range(20)), batch_size=4)
    with pytest.raises(DataError, match="LoaderBatches cannot"):
        fit(Net(), loader, steps=1, device="cpu", privacy=ExamplePrivacy(noise_multiplier=1.0, delta=1e-5))


def test_bad_numbers_of_steps_are_refused() -> None:
    for values, message in (({"sampling_rate": 1.5}, "sampling_rate"), ({"clip": 0.0}, "clip"), ({"seed": -1}, "seed")):
        with pytest.raises(InputError, match=message):
            private(**values)
    with pytest.raises(InputError, match=r"batch_size \(=9\) is larger than the 8 units"):
        sampling_rate(9, 8)
    assert sampling_rate(None, 8) == 1.0 and sampling_rate(2, 8) == 0.25
    assert [private(sampling_rate=rate).steps_per_epoch for rate in (1.0, 0.25, 0.3)] == [1, 4, 3]


# ------------------------------------------------------------------ fit


def patients(rows: int = 240) -> pa.Table:
    generator = np.random.default_rng(5)
    x = generator.normal(size=(rows, 2))
    return pa.table(
        {
            "patient": [f"p{row % 60}" for row in range(rows)],
            "a": x[:, 0],
            "b": x[:, 1],
            "sick": np.where(x[:, 0] + 0.3 * x[:, 1] > 0, "yes", "no"),
        }
    )


PRIVACY = ExamplePrivacy(noise_multiplier=1.0, delta=1e-3)


def trained(privacy: ExamplePrivacy | None = PRIVACY, data: Any = None, **options: Any) -> anyfit.Run:
    source = Source(patients() if data is None else data, target="sick")
    return fit(Tabular(hidden=(8,)), source, privacy=privacy, **{"batch_size": 24, "epochs": 3, "device": "cpu", "log_every": 5, **options})


def test_a_fit_tells_what_it_spent() -> None:
    notices: list[str] = []
    run = trained(ExamplePrivacy(epsilon=4.0, delta=1e-3), on_event=lambda e: notices.append(e["text"]) if e["event"] == "notice" else None)
    record, lines = run.record["privacy"], [line for line in run.history if line["event"] == "step"]
    assert run.stopped == "finished" and run.result["steps"] == 30
    assert record["sampling_rate"] == 0.1 and record["units"] == 240 and record["unit"] is None and record["epsilon"] == 4.0
    assert record["noise_multiplier"] == pytest.approx(noise_for(4.0, 1e-3, 30, 0.1))
    assert run.result["privacy"] == {"epsilon": lines[-1]["epsilon"], "delta": 1e-3, "steps": 30}
    assert 3.99 < lines[-1]["epsilon"] <= 4.0 and [line["epsilon"] for line in lines] == sorted(line["epsilon"] for line in lines)
    assert lines[1]["epsilon"] == pytest.approx(Accountant(1e-3).epsilon(10, 0.1, record["noise_multiplier"]))
    assert any("statistics that preprocessing is fitted with" in text and "not covered" in text for text in notices)


def test_without_noise_epsilon_is_not_told_as_a_number() -> None:
    run = trained(ExamplePrivacy(noise_multiplier=0.0, delta=1e-3))
    assert run.result["privacy"]["epsilon"] is None and run.history[0]["epsilon"] is None


def test_each_fit_has_noise_of_its_own() -> None:
    """A seed that is public, as the plan's is, would let anyone take the noise off."""
    one, other = (torch.cat([p.detach().flatten() for p in trained(seed=1).model.parameters()]) for _ in range(2))
    assert not torch.allclose(one, other)


def test_a_patient_is_a_unit_and_no_feature() -> None:
    run = trained(ExamplePrivacy(noise_multiplier=1.0, delta=1e-3, unit="patient"), batch_size=6)
    assert run.record["privacy"]["units"] == 60 and run.record["privacy"]["sampling_rate"] == 0.1 and run.result["steps"] == 30
    assert "patient" not in [column.name for column in Schema.from_json(run.record["schema"]).columns]
    assert "patient" in [column.name for column in Schema.from_json(trained().record["schema"]).columns], "the control"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (patients().drop_columns(["patient"]), r"unit \(='patient'\) of the privacy is not a column; the columns are: a, b, sick"),
        (patients().set_column(0, "patient", pa.array([None, *["p"] * 239])), "column 'patient' has 1 rows without a value"),
        (points(), r"unit \(='patient'\) of the privacy needs a table"),
    ],
    ids=["missing", "empty", "no table"],
)
def test_a_unit_that_cannot_be_told_is_refused(data: Any, message: str) -> None:
    task = Net() if isinstance(data, tuple) else Tabular()
    with pytest.raises(DataError, match=message):
        fit(
            task,
            data if isinstance(data, tuple) else Source(data, target="sick"),
            epochs=1,
            device="cpu",
            privacy=ExamplePrivacy(noise_multiplier=1.0, delta=1e-3, unit="patient"),
        )


def test_rows_with_one_value_are_one_unit() -> None:
    units = units_of(patients(), "patient")
    assert len(units) == 240 and int(units.max()) == 59 and torch.equal(units[:60], units[60:120])


def test_training_stops_where_the_budget_ends(tmp_path: Path) -> None:
    notices: list[str] = []
    told = lambda e: notices.append(e["text"]) if e["event"] == "notice" else None  # noqa: E731
    budget = Accountant(1e-3).epsilon(17, 0.1, 1.0) * 1.0001
    privacy = ExamplePrivacy(noise_multiplier=1.0, epsilon=budget, delta=1e-3)
    run = trained(privacy, run=tmp_path / "run", on_event=told)
    assert run.stopped == "budget" and run.result["steps"] == 17 and run.result["privacy"]["epsilon"] <= budget
    assert run.history[-1] == {"event": "stop", "step": 17, "reason": "budget"}
    assert any("pays for 17 of 30 steps" in text for text in notices)
    assert run.state.position.step == 17 and run.splits == {}
    again = trained(privacy, run=tmp_path / "run", resume=True)
    assert again.stopped == "budget" and again.result["steps"] == 17, "what was spent stays spent"
    for one, other in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InputError, match=r"epsilon \(=0.001\) does not pay for one step"):
        trained(ExamplePrivacy(noise_multiplier=1.0, epsilon=0.001, delta=1e-3))


def test_a_resume_is_exact_and_the_seed_goes_with_the_end(tmp_path: Path) -> None:
    seeds: list[str] = []

    def keep(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] == 10:
            secret = tmp_path / "run" / "noise.seed"
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600
            seeds.append(secret.read_text())
            shutil.copytree(tmp_path / "run", tmp_path / "killed")

    privacy = ExamplePrivacy(epsilon=4.0, delta=1e-3)
    whole = trained(privacy, run=tmp_path / "run", on_event=keep)
    resumed = trained(privacy, run=tmp_path / "killed", resume=True)
    assert resumed.result["steps"] == whole.result["steps"] == 30
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed.history == whole.history and resumed.result["privacy"] == whole.result["privacy"]
    for folder in ("run", "killed"):
        assert not (tmp_path / folder / "noise.seed").exists()
        assert all(seeds[0].encode() not in file.read_bytes() for file in (tmp_path / folder).rglob("*") if file.is_file())
        assert all(str(int(seeds[0], 16)).encode() not in file.read_bytes() for file in (tmp_path / folder).rglob("*") if file.is_file())


def test_a_resume_keeps_the_privacy_that_it_began_with(tmp_path: Path) -> None:
    privacy = ExamplePrivacy(epsilon=4.0, delta=1e-3)
    run = trained(privacy, run=tmp_path / "run")
    for other in (None, ExamplePrivacy(epsilon=5.0, delta=1e-3), ExamplePrivacy(epsilon=4.0, delta=1e-3, clip=2.0)):
        with pytest.raises(StateError, match="was made with privacy="):
            trained(other, run=tmp_path / "run", resume=True)
    longer = trained(privacy, run=tmp_path / "run", resume=True, epochs=5)
    assert longer.record["privacy"] == run.record["privacy"], "less noise after the fact would be a lie about what came before"
    assert longer.stopped == "budget" and longer.result["privacy"]["epsilon"] <= 4.0
    public = trained(None, run=tmp_path / "public")
    assert "privacy" not in public.record and "privacy" not in public.result
    with pytest.raises(StateError, match="was made with privacy="):
        trained(privacy, run=tmp_path / "public", resume=True)


def test_what_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not go with privacy"):
        trained(run=tmp_path / "run", accumulate=2)
    assert not (tmp_path / "run").exists()


class Bucketed(TextCNN):
    def plan(self) -> Plan:
        return super().plan().updated(bucket=True, clip=1.0)


def test_a_text_task_goes_without_its_buckets() -> None:
    words = ["good", "fine", "great"]
    texts = [" ".join(words[: 1 + row % 3]) if row % 2 else "bad " * (1 + row % 4) for row in range(80)]
    source = Source(
        pa.table({"text": texts, "kind": ["a" if row % 2 else "b" for row in range(80)]}), target="kind", types={"text": "text"}
    )
    notices: list[str] = []
    run = fit(
        Bucketed(),
        source,
        privacy=PRIVACY,
        batch_size=16,
        steps=3,
        device="cpu",
        on_event=lambda e: notices.append(e["text"]) if e["event"] == "notice" else None,
    )
    assert run.result["steps"] == 3 and any("the task's bucket and clip is left out" in text for text in notices)
    with pytest.raises(InputError, match=r"bucket \(=True\) does not go with privacy"):
        fit(Bucketed(), source, privacy=PRIVACY, batch_size=16, steps=3, device="cpu", bucket=True)


def test_a_balanced_task_is_refused() -> None:
    with pytest.raises(TaskError, match="rows have sample weights"):
        fit(Tabular(balance=True), Source(patients(), target="sick"), epochs=1, batch_size=24, device="cpu", privacy=PRIVACY)


@pytest.mark.slow
def test_adult_is_learnt_at_epsilon_three(data_folder: Path) -> None:
    begun = time.process_time()
    run = fit(
        Tabular(hidden=(64,), dropout=0.0, lr=5e-3),
        data_folder / "adult/adult_train.csv.gz",
        target="income",
        test=data_folder / "adult/adult_test.csv.gz",
        privacy=ExamplePrivacy(clip=0.5, epsilon=3.0, delta=1e-5),
        batch_size=1024,
        epochs=8,
        device="cpu",
    )
    seconds = time.process_time() - begun
    assert run.splits["test"]["accuracy"] > 0.80 and run.result["privacy"]["epsilon"] <= 3.0
    assert seconds < 60, f"{seconds:.0f} CPU seconds"
