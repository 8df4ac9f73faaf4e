"""Used rows: training only the word vectors that texts hold is the same as training all of them, and nobody sees the difference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

import anyfit
import anyfit.schedule
from anyfit import Plan, Schema, Step, Task
from anyfit.data import make_batches
from anyfit.data.ragged import Ragged, RaggedBatches
from anyfit.embedding import SMALLEST, WORTH
from anyfit.engine import Trainer, evaluate, make_trainer, predict, train
from anyfit.errors import DataError, TaskError
from anyfit.machine import seed_all

CPU = torch.device("cpu")
WORDS, WIDTH = 1100, 64  # of the table: just large enough to be worth it
USED = 60  # ids that texts hold; the others are never seen
assert WORDS * WIDTH >= SMALLEST and USED / WORDS < WORTH


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "sparse": {"sparse": True},
    "max_norm": {"max_norm": 1.0},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
}


class Reader(nn.Module):
    """The mean of word vectors, and a linear layer; some words are taken for unknown (id 1)."""

    def __init__(self, task: Words) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH, padding_idx=0, **OPTIONS[task.option])
        self.out = nn.Linear(WIDTH, 3)
        self.unknown, self.tied = task.unknown, task.tied
        if task.tied:
            self.other = nn.Linear(WIDTH, WORDS, bias=False)
            self.other.weight = self.table.weight

    def lookups(self) -> dict[str, tuple[nn.Embedding, tuple[int, ...]]]:
        return {"input_ids": (self.table, (1,))}

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        if self.training and self.unknown:
            dropped = torch.rand(input_ids.shape) < self.unknown
            input_ids = torch.where(dropped & (input_ids != 0), 1, input_ids)
        words = self.table(input_ids)
        real = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return self.out((words * real[:, :, None]).sum(1) / lengths[:, None])


class Words(Task):
    optimizer: str = "adamw"
    lr: float = 0.02
    weight_decay: float = 0.1
    unknown: float = 0.0
    tied: bool = False
    scheduled: bool = False
    option: str = ""  # of nn.Embedding

    def build_model(self, schema: Schema) -> nn.Module:
        return Reader(self)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        kinds: dict[str, Any] = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=self.lr, weight_decay=self.weight_decay, fused=True),
            "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=self.lr, weight_decay=self.weight_decay, amsgrad=True),
            "adam": lambda p: torch.optim.Adam(p, lr=self.lr),
            "adam-l2": lambda p: torch.optim.Adam(p, lr=self.lr, weight_decay=0.1),
            "sgd": lambda p: torch.optim.SGD(p, lr=self.lr, momentum=0.9, nesterov=True),
            "sgd-plain": lambda p: torch.optim.SGD(p, lr=self.lr),
            "sgd-l2": lambda p: torch.optim.SGD(p, lr=self.lr, momentum=0.9, weight_decay=0.1),
            "rmsprop": lambda p: torch.optim.RMSprop(p, lr=self.lr),
            "sparse": lambda p: torch.optim.SGD(p, lr=self.lr),
        }
        return kinds[self.optimizer](model.parameters())

    def build_schedule(self, optimizer: Any, total_steps: int) -> anyfit.Schedule | None:
        return anyfit.schedule.cosine(optimizer, 20, warmup=0.2) if self.scheduled else None


def texts(rows: int = 90) -> dict[str, Any]:
    """Ids from 2 to 1098 in steps, of 1 to 9 words; the largest id is not among them."""
    generator = torch.Generator().manual_seed(0)
    known = torch.arange(USED) * 18 + 2
    lengths = torch.randint(1, 10, (rows,), generator=generator)
    ids = [known[torch.randint(0, USED, (int(length),), generator=generator)].tolist() for length in lengths]
    return {"input_ids": Ragged.of(ids), "target": torch.randint(0, 3, (rows,), generator=generator)}


def made(task: Task, plan: Plan, **options: Any) -> tuple[Trainer, RaggedBatches]:
    seed_all(plan.seed)
    trainer = make_trainer(task, task.build_model(Schema(())), plan, 20, CPU, **options)
    augment = task.augment if type(task).augment is not Task.augment else None
    return trainer, RaggedBatches(texts(), plan, device=CPU, augment=augment)


def run(task: Task, plan: Plan, steps: int, **options: Any) -> tuple[Trainer, list[float]]:
    trainer, batches = made(task, plan, **options)
    losses = [float(event.loss) for event in train(trainer, batches, steps)]
    return trainer, losses


def differences(a: Trainer, b: Trainer) -> float:
    """The largest difference of any number of weights and optimizer state, which must have the same names and shapes."""
    assert list(a.model.state_dict()) == list(b.model.state_dict())
    pairs = [(x, b.model.state_dict()[name]) for name, x in a.model.state_dict().items()]
    for name, optimizer in a.optimizers.items():
        ours, theirs = optimizer.state_dict(), b.optimizers[name].state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        assert list(ours["state"]) == list(theirs["state"])
        for key, state in ours["state"].items():
            assert list(state) == list(theirs["state"][key])
            pairs += [(x, y) for x, y in zip(state.values(), theirs["state"][key].values(), strict=True) if isinstance(x, Tensor)]
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)


SAME = {
    "adamw": {},
    "adamw without decay": {"weight_decay": 0.0},
    "adamw with amsgrad, not fused": {"optimizer": "adamw-amsgrad"},
    "adam": {"optimizer": "adam"},
    "momentum": {"optimizer": "sgd"},
    "plain sgd": {"optimizer": "sgd-plain"},
    "unknown words": {"unknown": 0.3},
    "schedule": {"scheduled": True},
    "schedule, momentum, unknown words": {"scheduled": True, "optimizer": "sgd", "unknown": 0.3},
}
PLANS = {
    "plain": {},
    "accumulated": {"accumulate": 3, "batch_size": 8},
    "clipped": {"clip": 0.05},
    "bucketed, accumulated and clipped": {"bucket": True, "accumulate": 2, "batch_size": 7, "clip": 0.05},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("task", SAME.values(), ids=SAME)
def test_used_rows_give_the_weights_the_moments_and_the_losses_of_the_whole_table(task: dict[str, Any], plan: dict[str, Any]) -> None:
    for dtype, tolerance in (("float64", 1e-12), ("float32", 2e-6)):
        options = {"batch_size": 20, "dtype": dtype, **plan}
        part, losses = run(Words(**task), Plan(**options), 14)
        whole, expected = run(Words(**task), Plan(**options, used_rows=False), 14)
        assert part.rows_in_use == [(USED + 2, WORDS)] and not whole.rows_in_use
        assert differences(part, whole) <= tolerance
        assert losses == pytest.approx(expected, rel=0, abs=tolerance)


class Loud(Words):
    """Losses that fp16 cannot hold until the scale has come down: the first steps are skipped."""

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int | Tensor]:
        loss, count = super().loss(outputs, batch)
        return loss * 1e4, count


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-amsgrad"], ids=["fused", "plain"])
def test_a_step_that_fp16_skips_decays_nothing(optimizer: str) -> None:
    plan = Plan(batch_size=20, precision="fp16")
    part, _ = run(Loud(optimizer=optimizer), plan, 14)
    whole, _ = run(Loud(optimizer=optimizer), plan.updated(used_rows=False), 14)
    assert part.scaler is not None and part.scaler.get_scale() < 65536 and part.rows_in_use
    assert differences(part, whole) < 1e-6


def test_a_row_that_no_text_holds_is_decayed_and_nothing_else() -> None:
    trainer, batches = made(Words(), Plan(batch_size=20, dtype="float64"))
    before = trainer.model.table.weight.detach().clone()
    for _ in train(trainer, batches, 5):
        pass
    after = trainer.model.table.weight
    assert torch.allclose(after[-1], before[-1] * (1 - 0.02 * 0.1) ** 5, atol=1e-15)
    assert not torch.allclose(after[2], before[2] * (1 - 0.02 * 0.1) ** 5, atol=1e-4)
    assert not after[0].any(), "padding stays zero"


class Own(Words):
    def train_step(self, trainer: Trainer, window: Any) -> Step | None:
        return super().train_step(trainer, window)


class Hooked(Words):
    """Someone listens at the table."""

    hook: str = "forward"

    def build_model(self, schema: Schema) -> nn.Module:
        model = super().build_model(schema)
        table = model.table
        {
            "forward": lambda: table.register_forward_hook(lambda *_: None),
            "before": lambda: table.register_forward_pre_hook(lambda *_: None),
            "backward": lambda: table.register_full_backward_hook(lambda *_: None),
            "before backward": lambda: table.register_full_backward_pre_hook(lambda *_: None),
            "gradient": lambda: table.weight.register_hook(lambda gradient: gradient * 2),
            "accumulated": lambda: table.weight.register_post_accumulate_grad_hook(lambda weight: None),
            "weight norm": lambda: nn.utils.parametrizations.weight_norm(table),
        }[self.hook]()
        return model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01)


class Listened(Words):
    """Someone listens at the optimizer, and would see other parameters there."""

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(model)
        optimizer.register_step_post_hook(lambda *_: None)
        return optimizer


class Frozen(Words):
    def build_model(self, schema: Schema) -> nn.Module:
        model = super().build_model(schema)
        model.table.weight.requires_grad_(False)
        return model


class Subclassed(Words):
    def build_model(self, schema: Schema) -> nn.Module:
        class Table(nn.Embedding):
            pass

        model = super().build_model(schema)
        model.table = Table(WORDS, WIDTH, padding_idx=0)
        return model


REFUSED: dict[str, Task] = {
    "sparse": Words(option="sparse", optimizer="sparse"),
    "max_norm": Words(option="max_norm"),
    "scale_grad_by_freq": Words(option="scale_grad_by_freq"),
    "tied": Words(tied=True),
    "frozen": Frozen(),
    "subclass": Subclassed(),
    "own train_step": Own(),
    "Adam with L2": Words(optimizer="adam-l2"),
    "SGD with L2": Words(optimizer="sgd-l2"),
    "other optimizer": Words(optimizer="rmsprop"),
    "optimizer hook": Listened(),
    **{
        f"{hook} hook": Hooked(hook=hook)
        for hook in ("forward", "before", "backward", "before backward", "gradient", "accumulated", "weight norm")
    },
}


@pytest.mark.parametrize("task", REFUSED.values(), ids=REFUSED)
def test_where_it_would_not_be_the_same_the_whole_table_is_trained(task: Task) -> None:
    trainer, batches = made(task, Plan(batch_size=20))
    trainer.use_rows(batches)
    assert trainer.rows_in_use == []


def test_high_coverage_or_a_small_table_is_trained_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORTH", 0.05), ("SMALLEST", WORDS * WIDTH + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(f"anyfit.embedding.{name}", value)
            trainer, _ = run(Words(), Plan(batch_size=20), 1)
            assert trainer.rows_in_use == []
    assert run(Words(), Plan(batch_size=20), 1)[0].rows_in_use


def test_moments_of_unused_rows_refuse_it() -> None:
    """A state that other texts made: its rows still move."""
    trainer, batches = made(Words(), Plan(batch_size=20))
    trainer.model.table.weight.grad = torch.ones(WORDS, WIDTH)
    trainer.optimizers["main"].step()
    trainer.forget()
    next(train(trainer, batches, 1))
    assert trainer.rows_in_use == []


def test_a_correction_of_gradients_and_arrays_without_texts_are_left_alone() -> None:
    trainer, batches = made(Words(), Plan(batch_size=20), correct=lambda gradients, lr: None)
    next(train(trainer, batches, 1))
    assert trainer.rows_in_use == []
    trainer, _ = made(Words(), Plan(batch_size=20))
    ids = torch.randint(2, 9, (40, 5))
    data = {"input_ids": ids, "lengths": torch.full((40,), 5), "target": torch.zeros(40, dtype=torch.int64)}
    next(train(trainer, make_batches(data, Plan(batch_size=20), None, device=CPU), 1))
    assert trainer.rows_in_use == []


# Whoever looks sees the whole table


def test_at_any_moment_the_model_and_the_optimizer_are_whole() -> None:
    part, batches = made(Words(), Plan(batch_size=20, dtype="float64"))
    whole, same = made(Words(), Plan(batch_size=20, dtype="float64", used_rows=False))
    for _ in zip(train(part, batches, 8), train(whole, same, 8), strict=True):
        assert differences(part, whole) < 1e-12
        assert part.model.table.weight.shape == (WORDS, WIDTH)
        (group,) = part.optimizers["main"].param_groups
        assert any(parameter is part.model.table.weight for parameter in group["params"])
        state = part.snapshot()
        assert state.model["table.weight"].shape == (WORDS, WIDTH)
        assert torch.equal(state.optimizers["main"]["state"][0]["exp_avg"], part.optimizers["main"].state_dict()["state"][0]["exp_avg"])
        everything = RaggedBatches(
            {"input_ids": Ragged.of([[WORDS - 1, 7], [3]]), "target": torch.tensor([0, 1])}, Plan(batch_size=2), device=CPU, shuffle=False
        )
        assert evaluate(part.task, part.model, everything)["loss"] == pytest.approx(
            evaluate(whole.task, whole.model, everything)["loss"], rel=1e-12
        )
        assert torch.allclose(*(next(iter(predict(t.task, t.model, everything))) for t in (part, whole)), atol=1e-12)
        assert torch.equal(copy.deepcopy(part.model).table(torch.tensor([WORDS - 1])), part.model.table.weight[-1:])


def test_looking_between_steps_changes_no_bit() -> None:
    for task in (Words(scheduled=True, unknown=0.2), Words(optimizer="sgd", unknown=0.2)):
        quiet, losses = run(task, Plan(batch_size=20), 12)
        watched, batches = made(task, Plan(batch_size=20))
        seen = []
        for index, event in enumerate(train(watched, batches, 12)):
            seen.append(float(event.loss))
            if index in (0, 1, 2, 5, 9):
                watched.snapshot()
        assert seen == losses and differences(quiet, watched) == 0.0


def test_a_weight_decay_that_begins_later_finds_the_rows_as_they_are() -> None:
    """A schedule may change the decay while the table is apart."""
    ends = []
    for used_rows in (True, False):
        trainer, batches = made(Words(weight_decay=0.0), Plan(batch_size=20, dtype="float64", used_rows=used_rows))
        (group,) = trainer.optimizers["main"].param_groups
        with torch.no_grad():
            trainer.model.table.weight[-1] = 1.0
        for index, _ in enumerate(train(trainer, batches, 9)):
            if index == 1:  # between looks: rows are whole, and someone changes one that no text holds
                with torch.no_grad():
                    trainer.model.table.weight[-1] = 2.0
            if index in (3, 6):
                group["weight_decay"] = 0.1 if index == 3 else 0.0
        ends.append(trainer)
    assert differences(*ends) < 1e-12


@pytest.mark.parametrize("task", [Words(scheduled=True, unknown=0.2), Words(optimizer="sgd", unknown=0.2)], ids=["adamw", "sgd"])
def test_a_resume_from_any_step_goes_on_to_the_bit(task: Task) -> None:
    plan = Plan(batch_size=20, seed=3)
    whole, losses = run(task, plan, 11)
    for stop in range(1, 10):
        first, batches = made(task, plan)
        before = [float(event.loss) for event in train(first, batches, stop)]
        state = first.snapshot()
        second, batches = made(task, plan)
        second.restore(state)
        after = [float(event.loss) for event in train(second, batches, 11)]
        assert before + after == losses and differences(second, whole) == 0.0


TABLE = pa.table(
    {
        "text": [f"{'good' if index % 2 else 'bad'} word{index % 17} and word{index % 13}" for index in range(160)],
        "target": ["yes" if index % 2 else "no" for index in range(160)],
    }
)
SHAPE: dict[str, Any] = {"embedding": 2048, "filters": 8, "widths": (3,), "dropout": 0.3}


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_killed_fit_goes_on_to_the_bit_whenever_it_was_saved(stop: int, tmp_path: Path) -> None:
    """Checkpoints of the one run stand after every step, of the other at the ends of epochs; a text column tells rows apart."""

    class Killed(Exception):
        pass

    task = anyfit.TextCNN(**SHAPE, unknown=0.1)
    rows = TABLE.slice(0, 100)
    more = TABLE.append_column("split", [["train"] * 100 + ["test"] * 60])
    options: dict[str, Any] = {"epochs": 2, "batch_size": 20, "log_every": 3, "best": False}
    assert rows.num_rows == 100
    source = anyfit.Source(more, split="split")
    whole = anyfit.fit(task, source, run=tmp_path / "whole", **options)
    seen = 0

    def kill(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += event["event"] == "checkpoint"
        if seen == stop:
            raise Killed

    with pytest.raises(Killed):
        anyfit.fit(task, source, run=tmp_path / "cut", on_event=kill, checkpoint_every_s=0.0, **options)
    again = anyfit.fit(task, source, run=tmp_path / "cut", resume=True, **options)
    last = f"checkpoints/step-{whole.result['steps']:09d}.safetensors"
    for name in (last, "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert again.splits == whole.splits


class Wide(anyfit.TextCNN):
    """A vocabulary with words that the training rows do not hold, as a given tokenizer has."""

    def num_words(self, schema: Schema) -> int:
        return 3 * super().num_words(schema)


def test_a_fit_says_how_many_rows_are_in_use_and_gives_the_whole_table() -> None:
    events: list[dict[str, Any]] = []
    options: dict[str, Any] = {"epochs": 2, "batch_size": 20, "best": False, "dtype": "float64"}
    part = anyfit.fit(Wide(**SHAPE), TABLE, test=0.2, on_event=events.append, **options)
    whole = anyfit.fit(Wide(**SHAPE), TABLE, test=0.2, used_rows=False, **options)
    assert [event["text"] for event in events if event["event"] == "notice"] == [
        "22 of 75 word vectors are in use; only those are updated, to the same effect"
    ]
    assert part.model.embeddings.weight.shape == (75, 2048) == part.state.model["embeddings.weight"].shape
    assert part.splits["test"]["loss"] == pytest.approx(whole.splits["test"]["loss"], rel=1e-10)
    for name, tensor in whole.state.model.items():
        assert torch.allclose(part.state.model[name], tensor, atol=1e-12, rtol=0)


def test_federated_rounds_are_those_of_the_whole_table() -> None:
    sites = {"a": TABLE.slice(0, 50), "b": TABLE.slice(50)}
    options: dict[str, Any] = {"rounds": 3, "batch_size": 20, "dtype": "float64"}
    part = anyfit.federate(Wide(**SHAPE), sites, test=TABLE, **options)
    whole = anyfit.federate(Wide(**SHAPE), sites, test=TABLE, used_rows=False, **options)
    for name, tensor in whole.state.model.items():
        assert torch.allclose(part.state.model[name], tensor, atol=1e-9, rtol=0)  # updates travel in fixed point
    assert part.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=1e-9)


# What is looked up and was not announced


class Shifted(Words):
    """Augmentation that makes ids which no training text holds."""

    by: int = 1

    def augment(self, batch: Any, uniform: Any) -> Any:
        return {**batch, "input_ids": batch["input_ids"] + self.by}


def test_an_id_that_no_text_holds_is_said_to_be_one() -> None:
    trainer, batches = made(Shifted(), Plan(batch_size=20))
    with pytest.raises(DataError, match=r"id \d+ is looked up in training, but no training text holds it.*used_rows=False"):
        next(train(trainer, batches, 1))
    assert trainer.model.table.weight.shape == (WORDS, WIDTH), "the table is put back"
    run(Shifted(), Plan(batch_size=20, used_rows=False), 1)


@pytest.mark.parametrize("used_rows", [True, False])
def test_an_id_beyond_the_vocabulary_is_no_label_problem(used_rows: bool) -> None:
    with pytest.raises(DataError) as caught:
        run(Shifted(by=WORDS), Plan(batch_size=20, used_rows=used_rows), 1)
    assert "label" not in str(caught.value) and "id" in str(caught.value)


def test_a_label_that_does_not_fit_is_still_said_to_be_one() -> None:
    trainer, _ = made(Words(), Plan(batch_size=20))
    columns = {**texts(), "target": torch.full((90,), 3)}
    with pytest.raises(DataError, match="a label does not fit"):
        next(train(trainer, RaggedBatches(columns, Plan(batch_size=20), device=CPU), 1))


class Penalised(Words):
    """A loss that reads the table beside its lookups."""

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, int | Tensor]:
        loss, count = super().loss(outputs, batch)
        return loss + 0.1 * MODELS[-1].table.weight.square().sum(), count

    def build_model(self, schema: Schema) -> nn.Module:
        MODELS.append(super().build_model(schema))
        return MODELS[-1]


MODELS: list[Any] = []


@pytest.fixture(autouse=True)
def _forget_models() -> Iterator[None]:
    yield
    MODELS.clear()


def test_a_loss_that_reads_the_table_itself_is_refused_rather_than_ignored() -> None:
    with pytest.raises(TaskError, match="used_rows=False"):
        run(Penalised(), Plan(batch_size=20), 1)
    run(Penalised(), Plan(batch_size=20, used_rows=False), 1)
