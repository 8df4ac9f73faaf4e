"""A whole fit over ranks tells, keeps and writes what that of one process does, whoever of them dies, joins or has no disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import Dead, Rank, Ranks, current, fits, seeded
from test_cluster import EXACT, Net, joins, points, some
from torch import nn

import anyfit
from anyfit import Schema, Step, Task
from anyfit.errors import StorageError
from anyfit.fit import fit
from anyfit.metrics import AUROC, F1, MAE, R2, RMSE, Accuracy, CalibrationError, Confusion, LogLoss
from anyfit.run import Run, committed
from anyfit.state import State


class Whole(Net):
    """For `fit`: a model from a seed of its own, all metrics, a schedule that watches the evaluation."""

    extra: bool = False  # a metric that needs all outputs at once
    own: bool = False  # an evaluation that nobody knows how to share

    def build_model(self, schema: Schema) -> nn.Module:
        return seeded(super().build_model(schema), 5)

    def build_schedule(self, optimizer: Any, total_steps: int) -> anyfit.Schedule:
        return anyfit.schedule.plateau(optimizer, patience=0, factor=0.5)

    def metrics(self, schema: Schema) -> Any:
        sums = {
            "accuracy": Accuracy(),
            "f1": F1(),
            "log_loss": LogLoss(),
            "auroc": AUROC(),
            "confusion": Confusion(),
            "ece": CalibrationError(),
        }
        return {**sums, "median": lambda outputs, targets: float(outputs.median())} if self.extra else sums


class OwnEvaluation(Whole):
    def evaluate(self, model: nn.Module, batches: Any) -> dict[str, Any]:
        return {**super().evaluate(model, batches), "rows": sum(len(batch["row"]) for batch in batches)}


class Regression(Whole):
    def build_model(self, schema: Schema) -> nn.Module:
        return seeded(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)), 5)

    def metrics(self, schema: Schema) -> Any:
        return {"rmse": RMSE(), "mae": MAE(), "r2": R2()}


GIVEN: dict[str, Any] = {
    "validation": 0.2,
    "test": 0.1,
    "batch_size": 16,
    "dtype": "float64",
    "seed": 3,
    "log_every": 4,
    "evaluate_every": 5,
}


def unlike(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, numbers by more than rounding."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted(set(ours) | set(theirs))
        return [found for name in names for found in unlike(ours.get(name), theirs.get(name), f"{where}/{name}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [found for place, pair in enumerate(zip(ours, theirs, strict=True)) for found in unlike(*pair, f"{where}/{place}")]
    if isinstance(ours, float) and isinstance(theirs, float):
        return [] if abs(ours - theirs) < 1e-9 else [f"{where}: {ours} {theirs}"]
    return [] if ours == theirs else [f"{where}: {ours} {theirs}"]


def told(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without what only ranks tell."""
    return [event for event in events if event["event"] not in ("ranks", "notice", "checkpoint")]


def same_run(ours: Run, theirs: Run) -> None:
    assert max(float((ours.state.model[name] - theirs.state.model[name]).abs().max()) for name in theirs.state.model) < EXACT
    assert not unlike(ours.history, theirs.history)
    timeless = [{name: value for name, value in run.result.items() if name not in ("seconds", "ranks")} for run in (ours, theirs)]
    assert not unlike(*timeless)
    assert ours.state.position == theirs.state.position and ours.state.progress["best"] is not None


TASKS: dict[str, Task] = {
    "sums": Whole(),
    "function": Whole(extra=True),
    "own evaluation": OwnEvaluation(),
    "regression": Regression(lr=0.01),
}
LONG: dict[str, dict[str, Any]] = {"best": {"best": True, "epochs": 5}, "patience": {"patience": 2, "epochs": 40}}


@some(("sums", "patience"), ("regression", "best"), kind=TASKS, long=LONG)
def test_a_fit_tells_the_same_and_stops_at_the_same_step(kind: str, long: str) -> None:
    """Evaluation in parts, what is best, patience, a schedule that watches the evaluation, and all lines of the log."""
    task, more = TASKS[kind], LONG[long]
    data = points(150) if kind != "regression" else {**points(150), "target": points(150)["x"].sum(1)}
    events: list[dict[str, Any]] = []
    one = fit(task, data, on_event=events.append, **GIVEN, **more)
    together = Ranks(3, shares="3:2:1")
    runs = together.run(fits(task, data, **GIVEN, **more))
    for run in runs:
        same_run(run, one)
    assert not unlike(told(together.all[0].events), told(events))
    assert not together.all[1].events, "rank 0 alone tells"
    assert len({line.get("lr") for line in one.history}) > 2, "the plateau was met"
    if "patience" in more:
        assert one.stopped == "patience"


def dies(rank: int, when: dict[str, Any]) -> Any:
    """Rank 0 dies as it tells of something."""

    def on_event(here: Rank, event: dict[str, Any]) -> None:
        if here.local == rank and all(event.get(name) == value for name, value in when.items()):
            raise Dead

    return on_event


MOMENTS: list[dict[str, Any]] = [
    {"event": "start"},
    {"event": "step", "step": 8},
    {"event": "evaluate", "step": 10},
    {"event": "checkpoint"},
    {"event": "ranks", "step": 12},
    {"event": "evaluate", "split": "test"},
]


@some(*MOMENTS[1:4:2], MOMENTS[-1], when=MOMENTS)
def test_who_takes_over_from_rank_0_goes_on_with_its_log(when: dict[str, Any], tmp_path: Path) -> None:
    """The next rank writes the run on, to the line."""
    given = {**GIVEN, "best": True, "epochs": 4}
    one = fit(Whole(), points(150), run=tmp_path / "one", **given)
    together = Ranks(3)
    runs = together.run(fits(Whole(), points(150), run=tmp_path / "ranks", on_event=dies(0, when), **given))
    assert runs[0] is None
    for run in runs[1:]:
        same_run(run, one)
    same_folder(tmp_path / "ranks", tmp_path / "one")


def same_folder(ours: Path, theirs: Path) -> None:
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (ours, theirs)]
    assert not unlike(*lines)
    results = [json.loads((folder / "result.json").read_text()) for folder in (ours, theirs)]
    assert not unlike(*({name: value for name, value in result.items() if name not in ("seconds", "ranks")} for result in results))
    states = [State.load(last) for last in (committed(ours)[-1], committed(theirs)[-1])]
    assert not unlike(*({name: tensor.tolist() for name, tensor in state.model.items()} for state in states))
    best = [State.load(folder / "checkpoints" / "best.safetensors") for folder in (ours, theirs)]
    assert best[0].position == best[1].position
    assert not unlike(*({name: tensor.tolist() for name, tensor in state.model.items()} for state in best))
    assert not [path for path in (ours / "checkpoints").iterdir() if path.name.startswith(".")], "nothing is left of what was not finished"


@some((1, 2), (3, 1), (2, 3), before=[1, 2, 3], after=[1, 2, 3])
def test_a_run_is_resumed_on_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, and of what a log line tells of."""
    given = {**GIVEN, "best": True, "epochs": 4}
    one = fit(Whole(adamw=True), points(150), run=tmp_path / "one", **given)

    def go(count: int, resume: bool, on_event: Any) -> Run:
        options = {**given, "run": tmp_path / "ranks", "resume": resume}
        if count == 1:
            return fit(Whole(adamw=True), points(150), on_event=lambda event: on_event(None, event), **options)
        return Ranks(count, shares=":".join("321"[:count])).run(fits(Whole(adamw=True), points(150), on_event=on_event, **options))[0]

    stopped = go(before, False, lambda _, event: "stop" if event["event"] == "evaluate" and event["step"] == 10 else None)
    assert stopped.stopped == "asked" and stopped.state.position.step == 10
    resumed = go(after, True, lambda _, event: None)
    assert max(float((resumed.state.model[name] - one.state.model[name]).abs().max()) for name in one.state.model) < EXACT
    lines = [line for line in resumed.history if line["event"] != "stop"]
    assert not unlike(lines, [line for line in one.history if line["event"] != "stop"])


def test_a_rank_joins_a_fit_and_knows_its_best_and_its_log(tmp_path: Path) -> None:
    given = {**GIVEN, "best": True, "epochs": 6}
    one = fit(Whole(adamw=True), points(150), run=tmp_path / "one", **given)

    def on_event(here: Rank, event: dict[str, Any]) -> None:
        if here.local == 0 and event["event"] == "step" and event["step"] == 12:
            joins(12)(here, 12)

    together = Ranks(2)
    runs = together.run(fits(Whole(adamw=True), points(150), run=tmp_path / "ranks", on_event=on_event, **given))
    assert len(runs) == 3
    for run in runs:
        same_run(run, one)
    same_folder(tmp_path / "ranks", tmp_path / "one")
    notices = [event["text"] for event in together.all[0].events if event["event"] == "notice"]
    assert "ranks: 1 joined; 3 go on from step 13" in notices


def shard_writers(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Do something at one rank while it writes its part of a checkpoint, from a thread beside."""
    plain = State.save_shard

    def save_shard(self: State, path: Path, rank: int, size: int, *more: Any) -> Any:
        act(path, rank)
        return plain(self, path, rank, size, *more)

    monkeypatch.setattr(State, "save_shard", save_shard)


@some(28, step=[14, 28])
def test_a_rank_without_disk_ends_all_and_is_named(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, rank: int) -> None:
        if rank == 1 and str(step) in path.name:
            raise StorageError(f"cannot write {path}: No space left on device; free some space and resume")

    shard_writers(monkeypatch, full)
    given = {**GIVEN, "best": True, "epochs": 4}
    errors = Ranks(3).run(fits(Whole(), points(150), run=tmp_path / "ranks", **given), raises=False)
    for error in errors:
        assert isinstance(error, StorageError) and "No space left on device" in str(error), errors
    assert all("rank 1 of node 0" in str(errors[rank]) for rank in (0, 2))
    before = len(committed(tmp_path / "ranks"))
    assert before >= 1, "what was there is kept"


@some((1, False), (0, True), rank=[0, 1], last=[False, True])
def test_a_rank_that_dies_as_it_writes_its_part_of_a_checkpoint(
    rank: int, last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the best checkpoint is lost nor the last one, which is waited for."""
    given = {**GIVEN, "best": True, "epochs": 4}
    one = fit(Whole(), points(150), run=tmp_path / "one", **given)
    assert one.result["best"]["step"] < 28 == one.result["steps"]
    step, dead = 28 if last else one.result["best"]["step"], []

    def kill(path: Path, number: int) -> None:
        if number == rank and str(step) in path.name and not dead:
            dead.append(number)
            raise Dead

    shard_writers(monkeypatch, kill)
    runs = Ranks(3).run(fits(Whole(), points(150), run=tmp_path / "ranks", **given))
    assert runs[rank] is None and dead
    for run in (run for run in runs if run is not None):
        same_run(run, one)
    same_folder(tmp_path / "ranks", tmp_path / "one")


class Falls(Whole):
    """Its rank 1 dies in its second evaluation."""

    def evaluate_step(self, model: nn.Module, batch: Any) -> Step:
        rank = current()
        if rank is not None and rank.local == 1:
            rank.pending.append(-1)
            if rank.pending.count(-1) == 3:
                raise Dead
        return super().evaluate_step(model, batch)


def test_a_rank_that_dies_in_an_evaluation_leaves_no_batch_uncounted() -> None:
    given = {**GIVEN, "best": True, "epochs": 4, "batch_size": 4, "validation": 0.4}
    one = fit(Whole(), points(150), **given)
    runs = Ranks(3).run(fits(Falls(), points(150), **given))
    assert runs[1] is None
    same_run(runs[0], one)
    same_run(runs[2], one)


class Waving(Whole):
    def build_schedule(self, optimizer: Any, total_steps: int) -> anyfit.Schedule:
        return anyfit.schedule.cosine(optimizer, total_steps)


def test_options_of_the_optimizer_are_overridden_at_all_ranks() -> None:
    given = {**GIVEN, "epochs": 3, "best": True}
    overridden = {**given, "optimizer_overrides": {"lr": 0.02, "momentum": 0.5}}
    one = fit(Waving(), points(150), **overridden)
    for run in Ranks(2).run(fits(Waving(), points(150), **overridden)):
        same_run(run, one)
    assert one.history[0]["lr"] == pytest.approx(fit(Waving(), points(150), **given).history[0]["lr"] / 5)
