"""fit, evaluate, predict from Python: events, resume, early stopping, sources, other people's models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import anyfit
from anyfit import Plan, Schedule, Source, Step, Task
from anyfit.errors import DataError, InputError, StateError
from anyfit.schema import Schema


class Line(Task):
    """A small net with dropout on (x, y)."""

    lr: float = 0.01

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def points(rows: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    return x, (x[:, :3] @ torch.randn(3, 3, generator=generator)).argmax(1)


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_nothing_is_written_unless_a_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = anyfit.fit(Line(), points(), epochs=2)
    assert run.path is None and not list(tmp_path.iterdir())
    assert run.stopped == "finished" and run.result["steps"] == 8


def test_fit_leaves_the_callers_random_numbers_alone() -> None:
    import random

    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    anyfit.fit(Line(), points(), epochs=1, seed=3)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_events_come_in_one_order_and_equal_the_log(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    run = anyfit.fit(Line(), points(), validation=0.25, epochs=3, log_every=2, best=True, run=tmp_path / "r", on_event=events.append)
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start"
    ends = [index for index, event in enumerate(events) if event["event"] == "evaluate"]
    assert len(ends) == 3
    for index in ends[:-1]:
        assert kinds[index - 1 : index + 2] == ["step", "evaluate", "checkpoint"]
    assert kinds[ends[-1] - 1 :] == ["step", "evaluate", "stop", "checkpoint"]
    written = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert written == run.history == [event for event in events if event["event"] in ("step", "evaluate", "stop")]


@pytest.mark.parametrize("stop", range(1, 13))
def test_resume_is_exact_at_every_step(stop: int, tmp_path: Path) -> None:
    """Stopped after any step, also where no log line was due, and gone on with in a new object."""

    class Stop(Exception):
        pass

    options: dict[str, Any] = {
        "epochs": 4,
        "log_every": 3,
        "validation": 0.2,
        "best": True,
        "batch_size": 50,
        "checkpoint_every_s": 0.0,
        "seed": 4,
    }
    whole = anyfit.fit(Line(), points(), run=tmp_path / "whole", **options)
    seen = 0

    def interrupt(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += event["event"] == "checkpoint"
        if seen == stop:
            raise Stop

    with pytest.raises(Stop):
        anyfit.fit(Line(), points(), run=tmp_path / "cut", on_event=interrupt, **options)
    again = anyfit.fit(Line(), points(), run=tmp_path / "cut", resume=True, **options)
    assert again.history == whole.history
    assert equal(again.state.model, whole.state.model)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    last = f"checkpoints/step-{whole.result['steps']:09d}.safetensors"
    assert (tmp_path / "cut" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_resume_with_validation_but_without_a_best_checkpoint(tmp_path: Path) -> None:
    options = {"validation": 0.2, "batch_size": 50}
    whole = anyfit.fit(Line(), points(), epochs=4, **options)
    anyfit.fit(Line(), points(), epochs=2, run=tmp_path / "r", **options)
    again = anyfit.fit(Line(), points(), epochs=4, run=tmp_path / "r", resume=True, **options)
    assert equal(again.state.model, whole.state.model)
    assert not (tmp_path / "r/checkpoints/best.safetensors").exists()
    asked = anyfit.fit(Line(), points(), epochs=6, best=True, run=tmp_path / "r", resume=True, **options)
    assert asked.record["forks"][-1]["changed"]["best"] == [False, True]


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = anyfit.fit(Line(), points(), run=tmp_path / "r", epochs=2)
    again = anyfit.fit(Line(), points(), run=tmp_path / "r", epochs=2, resume=True)
    assert equal(first.state.model, again.state.model) and again.history == first.history


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": points(200, 1)}, "has other train rows"),
        ({"seed": 8}, "seed (=8) was 0"),
        ({"batch_size": 20}, "batch_size (=20) was 64"),
    ],
)
def test_resume_refuses_what_would_not_be_the_same_run(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    anyfit.fit(Line(), points(), run=tmp_path / "r", epochs=1)
    arguments = {"data": points(), "epochs": 2, **change}
    with pytest.raises(StateError, match=message.replace("(", r"\(").replace(")", r"\)")):
        anyfit.fit(Line(), run=tmp_path / "r", resume=True, **arguments)


def test_resume_refuses_other_code(tmp_path: Path) -> None:
    for folder, source in (("a", TASK), ("b", TASK.replace("nn.Linear(4, self.width)", "nn.Linear(4, self.width, True)"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(source)
    anyfit.fit(anyfit.load(f"{tmp_path}/a/mine.py:Mine"), points(), run=tmp_path / "r", epochs=1)
    with pytest.raises(StateError, match="other code"):
        anyfit.fit(anyfit.load(f"{tmp_path}/b/mine.py:Mine"), points(), run=tmp_path / "r", epochs=2, resume=True)


def test_a_forked_learning_rate_counts_from_the_checkpoint_on(tmp_path: Path) -> None:
    anyfit.fit(Line(lr=0.01), points(), run=tmp_path / "r", epochs=1)
    forked = anyfit.fit(Line(lr=0.5), points(), run=tmp_path / "r", epochs=2, resume=True)
    assert [line["lr"] for line in forked.history if line["event"] == "step"] == [0.01, 0.5]
    assert forked.record["forks"] == [{"step": 4, "changed": {"lr": [0.01, 0.5], "epochs": [1, 2]}}]


class Given(Line):
    """Validation losses as written, so that early stopping can be told what happened."""

    losses: tuple[float, ...] = ()

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
        CALLS.append(sum(1 for _ in batches))
        return {"loss": self.losses[len(CALLS) - 1], "batches": CALLS[-1]}


CALLS: list[int] = []


def test_early_stopping_keeps_the_best_and_stops_after_patience(tmp_path: Path) -> None:
    CALLS.clear()
    losses = (1.0, 0.5, 0.6, 0.49, 0.7, 0.8, 0.9, 0.1, 0.1, 0.1)
    run = anyfit.fit(Given(losses=losses), points(), validation=0.2, epochs=20, patience=3, min_delta=0.02, run=tmp_path / "r")
    assert run.stopped == "patience"
    assert run.result["best"]["loss"] == 0.5 and run.result["best"]["step"] == 2 * 3
    assert run.result["steps"] == 5 * 3  # 0.49 is no better than 0.5 by min_delta, so three in vain are 0.6, 0.49, 0.7
    _, best = anyfit.open_run(tmp_path / "r")
    assert best.position.step == 6
    assert equal(best.model, dict(run.model.state_dict()))
    assert not equal(run.state.model, dict(run.model.state_dict()))


def test_validation_is_taken_from_the_rows_where_best_is_asked() -> None:
    run = anyfit.fit(Line(), points(), epochs=1, best=True)
    assert set(run.record["data"]) == {"train", "validation"}
    assert sum(part["rows"] for part in run.record["data"].values()) == 200


def test_schedules_step_when_they_say() -> None:
    class Scheduled(Line):
        def build_schedule(self, optimizer: Any, total_steps: int) -> Schedule:
            return Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1), every="epoch")

    run = anyfit.fit(Scheduled(lr=1.0), points(), epochs=3, log_every=1)
    rates = [line["lr"] for line in run.history if line["event"] == "step"]
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.001])


def test_the_caller_overrides_the_tasks_plan() -> None:
    class Planned(Line):
        def plan(self) -> Plan:
            return Plan(epochs=5, batch_size=100)

    assert anyfit.fit(Planned(), points()).result["steps"] == 10
    assert anyfit.fit(Planned(), points(), steps=3).result["steps"] == 3
    with pytest.raises(InputError, match="patiense is no field of the plan"):
        anyfit.fit(Planned(), points(), patiense=3)


class Items(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        self.x, self.y = points()
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_every_kind_of_source_gives_the_same_fit() -> None:
    x, y = points()
    options = {"epochs": 2, "batch_size": 32, "seed": 1}
    expected = anyfit.fit(Line(), (x, y), **options).state.model
    dataset = Items()
    for data in ((x.numpy(), y.numpy()), TensorDataset(x, y), dataset):
        assert equal(anyfit.fit(Line(), data, **options).state.model, expected)
    assert dataset.epochs == [0, 1]
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    assert equal(anyfit.fit(Line(), loader, epochs=2, seed=1).state.model, expected)
    assert equal(anyfit.fit(Line(), dataset, workers=2, **options).state.model, expected)


def test_a_loader_with_a_sampler_of_its_own_runs_and_says_what_it_loses() -> None:
    x, y = points()
    loader = DataLoader(TensorDataset(x, y), batch_size=25, sampler=WeightedRandomSampler(torch.ones(200), 100))
    events: list[dict[str, Any]] = []
    run = anyfit.fit(Line(), loader, epochs=2, on_event=events.append)
    assert run.result["steps"] == 8
    assert any("without seek, shares or exact resume" in event.get("text", "") for event in events)
    with pytest.raises(DataError, match="cannot be split by fraction"):
        anyfit.fit(Line(), loader, epochs=1, validation=0.1)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*points(), strict=True)


def test_a_stream_trains_by_steps_over_its_end() -> None:
    run = anyfit.fit(Line(), Stream(), steps=9, batch_size=64)
    assert run.result["steps"] == 9 and run.result["epochs"] == 2
    with pytest.raises(InputError, match="pass steps="):
        anyfit.fit(Line(), Stream(), epochs=1)


def test_float_numpy_arrays_become_the_plans_type() -> None:
    x, y = points()
    run = anyfit.fit(Line(), (x.double().numpy(), y.numpy()), epochs=1, dtype="float64")
    assert run.model[0].weight.dtype == torch.float64


def test_data_sets_of_dicts_and_padding() -> None:
    class Ragged(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": torch.arange(1, 3 + index % 5), "labels": torch.tensor(index % 2)}

    class Bag(Task):
        def build_model(self, schema: Schema) -> nn.Module:
            class Net(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.table, self.out = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 2)

                def forward(self, input_ids: Tensor) -> Tensor:
                    return self.out(self.table(input_ids).sum(1))

            return Net()

    assert anyfit.fit(Bag(), Ragged(), epochs=1, batch_size=8, test=0.25).splits["test"]["rows"] in range(1, 30)


def test_group_keeps_rows_together_and_split_column_decides() -> None:
    table = pa.table({"x": np.arange(300.0), "patient": np.arange(300) // 10, "target": np.arange(300) % 2})
    run = anyfit.fit(anyfit.Tabular(), Source(table, group="patient"), epochs=1, validation=0.3, batch_size=16)
    assert run.record["data"]["validation"]["rows"] % 10 == 0
    assert [column["name"] for column in run.record["schema"]["columns"]] == ["x", "target"]
    fold = pa.table({"x": np.arange(90.0), "fold": ["train", "test", "validation"] * 30, "target": np.arange(90) % 2})
    run = anyfit.fit(anyfit.Tabular(), Source(fold, split="fold"), epochs=1, batch_size=8)
    assert {split: part["rows"] for split, part in run.record["data"].items()} == {"train": 30, "test": 30, "validation": 30}
    assert "fold" not in [column["name"] for column in run.record["schema"]["columns"]]


def test_regression_is_learnt_in_the_targets_unit() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=600)
    table = pa.table({"x": x, "target": 1000 + 50 * x})
    run = anyfit.fit(anyfit.Tabular(dropout=0.0), table, test=0.2, epochs=30, batch_size=32)
    assert run.splits["test"]["rmse"] < 5 and run.splits["test"]["r2"] > 0.98


def test_predict_needs_no_target_and_equals_the_model(tmp_path: Path) -> None:
    x, y = points()
    run = anyfit.fit(Line(), (x, y), epochs=2, run=tmp_path / "r")
    run.model.eval()
    expected = run.model(x)
    assert torch.allclose(anyfit.predict(run, (x, y)), expected)
    assert torch.allclose(anyfit.predict(run, (x,)), expected)
    figures = anyfit.evaluate(run, (x, y))
    assert figures["accuracy"] == pytest.approx(float((expected.argmax(1) == y).float().mean()))
    with pytest.raises(StateError, match="lives in no file"):
        anyfit.open_run(_renamed(tmp_path / "r"))
    assert torch.allclose(anyfit.predict(tmp_path / "r", (x,), task=Line()), expected)


def _renamed(path: Path) -> Path:
    record = json.loads((path / "run.json").read_text())
    record["task"]["reference"] = None
    (path / "run.json").write_text(json.dumps(record))
    return path


def test_a_model_that_returns_only_its_loss_is_told_of_at_the_start() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.net(x), target)

    class OnlyLoss(Task):
        def build_model(self, schema: Schema) -> nn.Module:
            return Own()

    events: list[dict[str, Any]] = []
    run = anyfit.fit(OnlyLoss(), points(), epochs=1, test=0.2, on_event=events.append)
    assert any("returns its loss only" in event.get("text", "") for event in events)
    assert set(run.splits["test"]) == {"loss", "rows"}
    with pytest.raises(InputError, match="define predict"):
        anyfit.predict(run, points())


def test_plain_function_metrics_get_all_outputs_and_the_log_says_so() -> None:
    seen = []

    class Own(Line):
        def metrics(self, schema: Schema) -> dict[str, Any]:
            def share(outputs: Tensor, targets: Tensor) -> float:
                seen.append((outputs.shape, targets.shape))
                return float((outputs.argmax(1) == targets).float().mean())

            return {"share": share}

    events: list[dict[str, Any]] = []
    run = anyfit.fit(Own(), points(), epochs=1, batch_size=8, test=0.2, on_event=events.append)
    assert any("held in memory" in event.get("text", "") for event in events)
    rows = run.splits["test"]["rows"]
    assert seen == [((rows, 3), (rows,))] and 0 <= run.splits["test"]["share"] <= 1


def test_step_logs_are_averaged_by_count() -> None:
    class Logged(Line):
        def step(self, model: nn.Module, batch: Any) -> Step:
            step = super().step(model, batch)
            return Step(step.loss, step.count, step.outputs, step.targets, {"first": batch[0][:, 0].mean()})

    x, y = points(100)
    run = anyfit.fit(Logged(), (x, y), epochs=1, batch_size=64)
    assert run.history[0]["logs"]["first"] == pytest.approx(float(x[:, 0].mean()), abs=1e-6)
    assert anyfit.evaluate(run, (x, y))["first"] == pytest.approx(float(x[:, 0].mean()), abs=1e-6)


def test_weights_of_a_run_start_another() -> None:
    first = anyfit.fit(Line(), points(), epochs=3)
    second = anyfit.fit(Line(lr=0.0), points(), steps=1, weights=first)
    assert second.record["weights"]["left"] == []
    assert max(float((second.state.model[name] - tensor).abs().max()) for name, tensor in first.model.state_dict().items()) < 1e-6


def test_bf16_and_channels_last_train(tmp_path: Path) -> None:
    plain = anyfit.fit(anyfit.Image(channels=8), "digits", test=0.2, epochs=8, seed=1)
    fast = anyfit.fit(anyfit.Image(channels=8), "digits", test=0.2, epochs=8, seed=1, precision="bf16", channels_last=True)
    assert fast.model.conv1.weight.dtype == torch.float32
    assert abs(fast.splits["test"]["accuracy"] - plain.splits["test"]["accuracy"]) < 0.05


def test_a_task_of_this_file_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    task = anyfit.load(f"{tmp_path / 'mine.py'}:Mine", {"width": "8"})
    run = anyfit.fit(task, points(), epochs=1, run=tmp_path / "r")
    found, state = anyfit.open_run(tmp_path / "r")
    assert found == task and equal(state.model, run.state.model)


TASK = """
from torch import nn
import anyfit

class Mine(anyfit.Task):
    width: int = 4

    def build_model(self, schema):
        return nn.Sequential(nn.Linear(4, self.width), nn.Linear(self.width, schema.num_classes))
"""


@pytest.mark.slow
def test_mnist_reaches_099(data_folder: Path) -> None:
    run = anyfit.fit(anyfit.Image(), data_folder / "mnist", epochs=3, seed=1)
    assert run.splits["test"]["accuracy"] >= 0.990


@pytest.mark.slow
def test_adult_reaches_0855(data_folder: Path) -> None:
    folder = data_folder / "adult"
    found = [
        anyfit.fit(anyfit.Tabular(), folder / "adult_train.csv.gz", target="income", test=folder / "adult_test.csv.gz", seed=seed)
        for seed in (1, 2, 3)
    ]
    assert sum(run.splits["test"]["accuracy"] for run in found) / 3 >= 0.855
    schema = Schema.from_json(found[0].state.schema)
    assert "?" not in (schema["workclass"].categories or ())


class Counted(Line):
    """Keeps an average of its weights, made at the first step that needs it."""

    def train_step(self, trainer: Any, window: Any) -> None:
        if "average" not in trainer.extras:
            trainer.extras["average"] = Average(trainer.model)
        super().train_step(trainer, window)
        trainer.extras["average"].update(trainer.model)


class Average:
    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def update(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            self.weights[name].lerp_(tensor, 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


def test_extras_are_checkpointed_though_the_task_makes_them_late(tmp_path: Path) -> None:
    whole = anyfit.fit(Counted(), points(), epochs=3)
    anyfit.fit(Counted(), points(), epochs=1, run=tmp_path / "r")
    again = anyfit.fit(Counted(), points(), epochs=3, run=tmp_path / "r", resume=True)
    assert equal(again.state.extras["average"]["weights"], whole.state.extras["average"]["weights"])
    assert not equal(again.state.extras["average"]["weights"], again.state.model)


def test_what_training_said_of_its_data_holds_for_later_rows() -> None:
    table = pa.table(
        {"x": [str(n) if n % 7 else "-" for n in range(300)], "flag": [n % 3 == 0 for n in range(300)], "y": [n % 2 for n in range(300)]}
    )
    run = anyfit.fit(anyfit.Tabular(), anyfit.Source(table, target="y", missing=["-"], types={"x": "continuous"}), epochs=1)
    assert anyfit.evaluate(run, table) == anyfit.evaluate(run, anyfit.Source(table, missing=["-"]))
    words = table.set_column(1, "flag", pa.array(["True" if n % 3 == 0 else "FALSE" for n in range(300)]))
    assert torch.equal(anyfit.predict(run, words), anyfit.predict(run, table)), "a truth value is one however it is spelt"


def test_numbers_are_no_moments_and_few_rows_no_error() -> None:
    days = pa.array([f"2024-05-{1 + n % 28:02d}" for n in range(30)]).cast(pa.date32())
    told: list[str] = []
    run = anyfit.fit(
        anyfit.Tabular(),
        pa.table({"day": days, "y": [n % 15 for n in range(30)]}),
        target="y",
        epochs=1,
        on_event=lambda event: told.append(event["text"]) if event["event"] == "notice" else None,
    )
    assert "there are 30 rows to train on, so a batch has 30 in place of 256" in told
    assert any("15 whole numbers are taken for classes" in text for text in told)
    with pytest.raises(DataError, match="column 'day' is a datetime but holds int64; write moments as dates"):
        anyfit.predict(run, pa.table({"day": [1577836800]}))
