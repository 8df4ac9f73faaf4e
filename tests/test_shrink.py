"""The verbs of shrink: what is asked for is delivered, survives checkpoints, sites and files, and the C computes what was evaluated."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from ranks import Ranks, alone, apart, learn
from torch import Tensor, nn

from anyfit.data import Source
from anyfit.errors import InputError, RunError, StateError, TaskError
from anyfit.federate import federate
from anyfit.fit import fit
from anyfit.load import load
from anyfit.privacy import SitePrivacy
from anyfit.program import QuantizedNetwork
from anyfit.schema import Schema
from anyfit.shrink import compiled, export, morph, program_of, prune, quantize, resources, sparsity_of
from anyfit.shrink.export import raw_rows
from anyfit.shrink.opened import open_model, state_of
from anyfit.state import State
from anyfit.strategy import Calibrate, FedAdam, FedAvg
from anyfit.task import Step, Task
from anyfit.tasks.shrunk import Morphed, Pruned, Quantized, prunable, prune_to, zeros_kept
from anyfit.trained import evaluate, open_run
from anyfit.values import Plan

needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C compiler")
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 64, "seed": 1}


class Small(Task):
    """A classifier of four numbers."""

    width: int = 16
    lr: float = 0.01

    def plan(self) -> Plan:
        return Plan(epochs=4, batch_size=16)

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(4, self.width), nn.ReLU(), nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, 3))


def points(rows: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def trained(task: Task, data: Any, **plan: Any) -> tuple[Task, State]:
    run = fit(task, data, **plan)
    return task, state_of(run.model, run)


@pytest.fixture(scope="module")
def small() -> tuple[Task, State]:
    return trained(Small(), points(), seed=1)


@pytest.fixture(scope="module")
def digits() -> tuple[Task, State]:
    return trained(load("image", {"channels": 6, "hidden": 24}), "digits", epochs=8, batch_size=32, seed=1)


def correct(task: Task, state: State, data: Any) -> float:
    found = open_model(task, state)
    pairs = [
        (task.predict(found.model, batch).argmax(1), batch["target"] if isinstance(batch, dict) else batch[-1])
        for batch in found.batches(data, 10**6)
    ]
    return float(torch.cat([a == b for a, b in pairs]).float().mean())


# ------------------------------------------------------------------ pruning


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("ramp", ["cubic", "linear", "once"])
def test_the_sparsity_asked_for_is_delivered(small: tuple[Task, State], ramp: Any, scope: Any) -> None:
    task, state = prune(*small, points(), 0.77, ramp=ramp, scope=scope, seed=1, epochs=4)
    weights = prunable(open_model(task, state).model)
    groups = [list(weights.values())] if scope == "global" else [[weight] for weight in weights.values()]
    for group in groups:
        size = sum(weight.numel() for weight in group)
        assert sum(int((weight == 0).sum()) for weight in group) == round(0.77 * size)
    assert all(not bool((tensor == 0).all()) for name, tensor in state.model.items() if "bias" in name)


def test_pruning_at_once_needs_no_data(small: tuple[Task, State]) -> None:
    task, state = prune(*small, amount=0.5)
    assert sparsity_of(open_model(task, state).model) == pytest.approx(0.5, abs=0.002)
    assert not bool((small[1].model["0.weight"] == 0).any())  # the parent is as it was


def test_a_ramp_ends_before_the_training_does() -> None:
    task = Pruned(task=Small(), amount=0.9, begin=0.2, end=0.6)
    assert [task.sparsity(p) for p in (0.0, 0.2, 0.6, 1.0)] == [0.0, 0.0, 0.9, 0.9]
    rising = [task.sparsity(p / 100) for p in range(101)]
    assert rising == sorted(rising) and rising[30] > 0.9 * 0.25  # cubic: faster than linear at first
    assert task.settles() == 0.6


def test_the_best_weights_are_never_from_before_the_end_of_the_ramp() -> None:
    """Defect 4 of the original: the best weights came from an early epoch, whose sparsity was another."""
    task = Pruned(task=Small(), amount=0.95, begin=0.1, end=0.7)
    run = fit(task, points(400), validation=points(100, 1), epochs=20, best=True, seed=1)
    losses = [line["loss"] for line in run.history if line["event"] == "evaluate"]
    assert losses.index(min(losses)) < 13  # a control: without the rule an early one would win
    assert run.result["best"]["step"] >= 0.7 * run.result["steps"]
    assert sparsity_of(run.model) == pytest.approx(0.95, abs=0.002)


def test_masks_survive_a_stop_and_a_resume(tmp_path: Path) -> None:
    task, options = Pruned(task=Small(), amount=0.8), {"seed": 1, "epochs": 6, "checkpoint_every_s": 0.0}
    whole = fit(task, points(), run=tmp_path / "whole", **options)
    for stop in (9, 20, 31):

        def told(event: dict[str, Any], stop: int = stop) -> str | None:
            return "stop" if event["event"] == "step" and event["step"] >= stop else None

        fit(task, points(), run=tmp_path / f"{stop}", on_event=told, log_every=1, **options)
        again = fit(task, points(), run=tmp_path / f"{stop}", resume=True, **options)
        assert all(torch.equal(again.model.state_dict()[name], tensor) for name, tensor in whole.model.state_dict().items())
    opened, state = open_run(tmp_path / "whole")
    assert isinstance(opened, Pruned) and opened.amount == 0.8 and isinstance(opened.task, Small)
    assert sparsity_of(open_model(opened, state).model) == pytest.approx(0.8, abs=0.002)
    assert evaluate(tmp_path / "whole", points())["accuracy"] > 0.6


def test_zeros_stay_at_every_site_and_the_server_alone_makes_them() -> None:
    task = Pruned(task=Small(), amount=0.8, begin=0.2, end=0.6)
    sites = {"a": points(60, 1), "b": points(40, 2), "c": points(90, 3)}
    seen: list[int] = []
    for strategy in (None, FedAdam(lr=0.05)):  # whose momentum would move what is pruned
        run = federate(task, sites, rounds=8, strategy=strategy, epochs=2, batch_size=16, seed=1)
        zeros = sum(int((weight == 0).sum()) for weight in prunable(run.model).values())
        seen.append(zeros)
        assert zeros == round(0.8 * sum(weight.numel() for weight in prunable(run.model).values()))
    # an order that carries zeros gets them back from any site
    alone = federate(task, {"a": sites["a"]}, rounds=1, epochs=3, weights=dict(run.model.state_dict()), seed=2)
    for name, weight in prunable(run.model).items():
        assert bool((dict(alone.model.named_parameters())[name][weight == 0] == 0).all())


def test_a_tensor_that_begins_as_zeros_is_not_taken_for_pruned() -> None:
    fresh, worn = torch.zeros(3, 3), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    keep = zeros_kept([fresh, worn])
    fresh += 1
    worn += 1
    keep()
    assert bool((fresh == 1).all()) and worn.tolist() == [[0.0, 2.0], [3.0, 0.0]]


def test_equal_magnitudes_are_cut_to_the_count() -> None:
    weights = [torch.ones(10, 10), torch.ones(4, 5)]
    prune_to(weights, 0.25)
    assert sum(int((weight == 0).sum()) for weight in weights) == 30


@pytest.mark.parametrize("amount", [0.0, 1.0, -0.1, 2.0])
def test_an_amount_that_leaves_nothing_or_does_nothing_is_refused(small: tuple[Task, State], amount: float) -> None:
    for structured in (False, True):
        with pytest.raises(InputError, match=rf"amount \(={amount}\) must be"):
            prune(*small, points(), amount, structured=structured)


def test_training_without_data_is_refused(small: tuple[Task, State]) -> None:
    with pytest.raises(InputError, match="data is missing"):
        prune(*small, amount=0.5, epochs=2)
    with pytest.raises(InputError, match="data is missing"):
        quantize(*small, None)
    with pytest.raises(InputError, match="no weights"):
        prune(small[0], State(), points(), 0.5)


def test_a_training_that_was_stopped_delivers_nothing(small: tuple[Task, State]) -> None:
    with pytest.raises(RunError, match="not delivered"):
        prune(*small, points(), 0.5, epochs=2, on_event=lambda event: "stop" if event["event"] == "step" else None, log_every=1)


def test_fewer_channels_are_a_smaller_network_and_a_task_again(digits: tuple[Task, State], tmp_path: Path) -> None:
    task, state = prune(*digits, "digits", 0.5, structured=True, **QUICK)
    assert sum(tensor.numel() for tensor in state.model.values()) < 0.35 * sum(tensor.numel() for tensor in digits[1].model.values())
    assert state.model["conv1.weight"].shape[0] == 3
    run = fit(task, "digits", weights=dict(state.model), run=tmp_path / "run", **QUICK)
    again, loaded = open_run(tmp_path / "run")
    assert isinstance(again, Pruned) and again.kept == task.kept  # type: ignore[attr-defined]
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in run.model.state_dict().items())
    assert len((tmp_path / "run" / "run.json").read_bytes()) < 20_000
    both, sparse = prune(task, state, "digits", 0.5, **QUICK)  # and on
    assert sparsity_of(open_model(both, sparse).model) == pytest.approx(0.5, abs=0.002)


# ------------------------------------------------------------- quantization


def test_int8_keeps_what_was_learnt(digits: tuple[Task, State], tmp_path: Path) -> None:
    task, state = quantize(*digits, "digits")
    assert abs(correct(task, state, "digits") - correct(*digits, "digits")) < 0.01
    again = load(
        "anyfit.tasks.shrunk:Quantized",
        json.loads(json.dumps({"task": {"task": "image", "values": {"channels": 6, "hidden": 24}}, "inputs": task.inputs})),
    )
    assert correct(again, state, "digits") == correct(task, state, "digits")
    with pytest.raises(TaskError, match="quantized already"):
        quantize(task, state, "digits")


def test_training_in_int8_goes_on_and_its_run_evaluates_as_the_device_computes(digits: tuple[Task, State], tmp_path: Path) -> None:
    rough, worse = prune(*digits, amount=0.6)
    before = correct(*quantize(rough, worse, "digits")[:2], "digits")
    task, state = quantize(rough, worse, "digits", lr=1e-3, epochs=4, batch_size=32, seed=1, run=tmp_path / "run")
    assert correct(task, state, "digits") > before + 0.03
    assert sparsity_of(open_model(task, state).model) == pytest.approx(0.6, abs=0.002)  # zeros stay
    figures = evaluate(tmp_path / "run", "digits")
    assert figures["accuracy"] == pytest.approx(correct(task, state, "digits"), abs=1e-6)


def test_calibrating_over_sites_gives_the_ranges_of_all_rows(small: tuple[Task, State]) -> None:
    x, y = points(150, 4)
    sites = {"a": (x[:20], y[:20]), "b": (x[20:90], y[20:90]), "c": (x[90:], y[90:])}
    row = (x[:1],)
    here = quantize(*small, (x, y), calibration=10**6, inputs=row)
    there = quantize(*small, sites, calibration=10**6, inputs=row, fit=partial(federate, rounds=1))
    assert all(torch.equal(here[1].model[name], tensor) for name, tensor in there[1].model.items())
    assert here[0] == there[0]


def test_rounds_in_int8_train_over_sites(small: tuple[Task, State]) -> None:
    sites = {"a": points(60, 1), "b": points(40, 2), "c": points(90, 3)}
    weak = prune(*small, amount=0.7)
    task, state = quantize(*weak, sites, inputs=(points()[0][:1],), fit=partial(federate, rounds=1))
    trained_task, after = quantize(*weak, sites, inputs=(points()[0][:1],), fit=partial(federate, batch_size=16), rounds=6, epochs=2)
    assert correct(trained_task, after, points(300, 9)) > correct(task, state, points(300, 9))
    assert torch.equal(after.model["ranges"], state.model["ranges"])
    assert sparsity_of(open_model(trained_task, after).model) == pytest.approx(0.7, abs=0.01)


def test_calibrate_is_for_quantized_tasks_alone() -> None:
    with pytest.raises(InputError, match="give a Quantized task"):
        federate(Small(), {"a": points()}, strategy=Calibrate(), rounds=1)


class OwnStep(Small):
    def step(self, model: nn.Module, batch: Any) -> Step:
        return super().step(model, batch)


def test_a_step_of_ones_own_cannot_be_trained_in_int8() -> None:
    task, state = trained(OwnStep(), points(), seed=1)
    quantized, int8 = quantize(task, state, points())  # after training it can
    assert correct(quantized, int8, points()) > 0.6
    with pytest.raises(TaskError, match="step of its own"):
        quantize(task, state, points(), epochs=1)


class OnlyLoss(Small):
    def build_model(self, schema: Schema) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 3)

            def forward(self, input: Tensor, target: Tensor) -> Tensor:
                return nn.functional.cross_entropy(self.layer(input), target)

        return Model()


def test_a_model_that_gives_only_its_loss_must_define_predict() -> None:
    task, state = trained(OnlyLoss(), {"input": points()[0], "target": points()[1]}, seed=1)
    with pytest.raises(TaskError, match=r"without its target.*define predict"):
        quantize(task, state, {"input": points()[0], "target": points()[1]})


# ------------------------------------------------------------------- export


def test_only_a_trained_quantized_task_becomes_c(small: tuple[Task, State], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not quantized"):
        export(*small, tmp_path / "net.c")
    task, state = quantize(*small, points())
    with pytest.raises(InputError, match="untrained"):
        export(task, State(model=state.model, schema=state.schema), tmp_path / "net.c")
    zero = {name: torch.zeros_like(tensor) if name == "ranges" else tensor for name, tensor in state.model.items()}
    with pytest.raises(InputError, match="not calibrated"):
        export(task, State(model=zero, schema=state.schema, position=state.position), tmp_path / "net.c")
    with pytest.raises(InputError, match=r"must end in .c or .onnx"):
        export(task, state, tmp_path / "net.bin")
    for name in ("2nets", "int", "a-b", "main"):
        with pytest.raises(InputError, match="name"):
            export(task, state, tmp_path / "net.c", name=name)
    assert not list(tmp_path.iterdir())


def rows_through_c(task: Task, state: State, folder: Path, raw: dict[str, np.ndarray[Any, Any]]) -> tuple[Any, Any, Any]:
    """What the program gives for raw rows, what the compiled C gives, and the artifact."""
    artifact = export(task, state, folder / "net.c")
    assert artifact.program is not None
    expected = artifact.program.run(raw)
    binary = compiled.build(folder, "net", folder, sanitize=True)
    rows = np.concatenate([np.ascontiguousarray(part).reshape(len(part), -1) for part in raw.values()], 1)
    return expected, compiled.run(binary, rows, expected.logits.shape[1]), artifact


@needs_compiler
def test_c_of_an_image_network_equals_the_integers(digits: tuple[Task, State], tmp_path: Path) -> None:
    task, state = quantize(*prune(*digits, "digits", 0.5, structured=True, **QUICK), "digits")
    found = open_model(task, state)
    batch = next(found.batches("digits", 200))
    raw = raw_rows(program_of(task, state), batch)
    expected, given, artifact = rows_through_c(task, state, tmp_path, raw)
    assert np.array_equal(given.logits, expected.logits) and np.array_equal(given.answers, expected.answers)
    assert np.array_equal(expected.answers, task.predict(found.model, batch).argmax(1).numpy())
    assert artifact.figures["compiled"] and artifact.figures["ram_bytes"] == artifact.figures["arena_bytes"]


@needs_compiler
@pytest.mark.parametrize("target", ["income", "age"])
def test_c_takes_raw_columns_with_gaps_and_categories(tmp_path: Path, target: str) -> None:
    rng = np.random.default_rng(1)
    age = rng.normal(40, 12, 300)
    hours = np.where(rng.random(300) < 0.2, np.nan, rng.normal(38, 9, 300))
    job = rng.choice(["clerk", "cook", "pilot"], 300)
    income = np.where((age > 40) ^ (job == "pilot"), "high", "low")
    table = pa.table({"age": age, "hours": pa.array(hours, from_pandas=True), "job": job, "income": income})
    task, state = trained(load("tabular", {"hidden": (16, 8)}), table, target=target, epochs=8, seed=1, batch_size=32)
    quantized, int8 = quantize(task, state, table, target=target)
    schema = Schema.from_json(int8.schema or {})
    numbers = [column.name for column in schema.of_type("continuous")]
    codes = [
        [(column.categories or ()).index(value) + 2 for value in table[column.name].to_pylist()] for column in schema.of_type("categorical")
    ]
    columns = [table[name].to_numpy(zero_copy_only=False) for name in numbers]
    raw = np.stack([*columns, *codes], 1).astype(np.float32)
    expected, given, artifact = rows_through_c(quantized, int8, tmp_path, {"raw": raw})
    assert np.array_equal(given.logits, expected.logits) and np.array_equal(given.answers, expected.answers)
    header = (tmp_path / "net.h").read_text()
    place = len(numbers) + [column.name for column in schema.of_type("categorical")].index("job")
    codes = "   ".join(f"   {code} {job}\n" for code, job in enumerate(("clerk", "cook", "pilot"), 2))
    assert f"{place}: job, a code, of which 0 is missing, 1 any other,\n   {codes}" in header
    assert f"{numbers.index('hours')}: hours, a number, NaN where it is missing" in header
    found = open_model(quantized, int8)
    batch = quantized.build_dataset(table, "test", schema)
    outputs = quantized.predict(found.model, batch).detach()
    reals = expected.accumulators * artifact.program.result_scale
    assert np.mean(np.abs(reals.reshape(outputs.shape) - outputs.numpy()) < 3 * float(outputs.std()) / 64) > 0.99
    if target == "age":
        assert artifact.program.task == "numbers"
        assert np.corrcoef(reals[:, 0], age)[0, 1] > 0.3
    else:
        assert np.mean(expected.answers == (outputs.argmax(1) if outputs.shape[-1] == 2 else (outputs.reshape(-1) > 0)).numpy()) > 0.98


class Words(Task):
    """Ids through an embedding and a plain recurrent network."""

    def build_model(self, schema: Schema) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.rnn, self.out = nn.Embedding(12, 5), nn.RNN(5, 7, batch_first=True), nn.Linear(7, 2)

            def forward(self, ids: Tensor) -> Tensor:
                return self.out(self.rnn(self.words(ids))[1][-1])  # type: ignore[no-any-return]

        return Model()


@needs_compiler
def test_c_of_a_recurrent_network_equals_the_integers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 12, (200, 9), generator=generator)
    data = {"ids": ids, "target": (ids[:, -3:].sum(1) > 16).long()}
    task, state = quantize(*trained(Words(), data, epochs=30, batch_size=16, seed=1), data)
    raw = {"ids": ids.numpy().astype(np.int32)}
    raw["ids"][0, 0], raw["ids"][1, 3] = -5, 2**30
    expected, given, _ = rows_through_c(task, state, tmp_path, raw)
    assert np.array_equal(given.logits, expected.logits) and np.array_equal(given.answers, expected.answers)
    assert np.mean(expected.answers[2:] == data["target"].numpy()[2:]) > 0.8


def test_a_tokenizer_is_refused_by_its_column(tmp_path: Path) -> None:
    table: Any = pa.table({"text": ["good film", "bad film", "good", "bad"] * 10, "label": ["y", "n", "y", "n"] * 10})
    table = Source(table, types={"text": "text"})
    task, state = trained(
        load("text-rnn", {"cell": "tanh", "bidirectional": False, "embedding": 8, "hidden": 8}), table, target="label", epochs=1, seed=1
    )
    with pytest.raises(TaskError, match=r"column 'text' is text.*tokenizer"):
        quantize(task, state, table, target="label")


def test_what_is_shrunk_is_one_task_within_another(digits: tuple[Task, State]) -> None:
    task, state = quantize(*prune(*digits, amount=0.5), "digits")
    assert isinstance(task, Quantized) and isinstance(task.task, Pruned) and task.task.task == digits[0]
    assert isinstance(open_model(task, state).model, QuantizedNetwork)
    with pytest.raises(TaskError, match="must be a task"):
        Pruned(task="image", amount=0.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="amount"):
        Pruned(task=digits[0], amount=1.0)
    with pytest.raises(InputError, match="begin"):
        Pruned(task=digits[0], amount=0.5, begin=0.8, end=0.2)


def test_ranks_prune_the_weights_that_one_process_prunes() -> None:
    task, plan = Pruned(task=Small(), amount=0.8), Plan(batch_size=16, steps=30, seed=1, dtype="float64")
    single, _ = alone(task, points(), plan, 30)
    for trainer in Ranks(2, shares="5:1").run(learn(task, points(), plan, 30)):
        assert apart(trainer, single) < 1e-10
        assert sparsity_of(trainer.model) == sparsity_of(single.model) > 0.4


def test_shapes_that_the_server_chose_are_trained_at_all_sites(small: tuple[Task, State]) -> None:
    sites = {"a": points(60, 1), "b": points(40, 2), "c": points(90, 3)}
    task, state = prune(*small, sites, 0.5, structured=True, inputs=(points()[0][:1],), fit=partial(federate, batch_size=16), rounds=4)
    assert state.model["0.weight"].shape == (8, 4) and state.model["2.weight"].shape == (8, 8)
    assert correct(task, state, points(300, 9)) > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["pruned", "quantized"])
def test_ranks_of_processes_find_a_task_within_a_task(wrap: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\nfrom anyfit import Task\n\n\nclass Mine(Task):\n    def build_model(self, schema):\n"
        "        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    task, state = trained(load(f"{file}:Mine"), points(), epochs=4, batch_size=16, seed=1)
    wrapped, weights = prune(task, state, amount=0.5) if wrap == "pruned" else quantize(task, state, points())
    run = fit(wrapped, points(), weights=dict(weights.model), nproc=2, epochs=2, batch_size=16, seed=1, run=tmp_path / "run")
    assert run.result["ranks"] == 2
    code = (
        "import sys; from anyfit import open_run; task, state = open_run(sys.argv[1]); print(type(task).__name__, type(task.task).__name__)"
    )
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=True).stdout
    assert told.split() == [wrap.capitalize(), "Mine"]


# ------------------------------------------------- what was wrong once


class Shifted(Small):
    """`predict` gives other units than those that the loss is of."""

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return super().predict(model, batch) * 1e3 + 5e3


def test_a_predict_of_its_own_cannot_be_trained_in_int8() -> None:
    task, state = trained(Shifted(), points(), seed=1)
    assert correct(*quantize(task, state, points()), points()) > 0.6
    with pytest.raises(TaskError, match="predict of Shifted gives something else than forward"):
        quantize(task, state, points(), epochs=1)


class Averaged(Small):
    """An own loop that puts an average of the weights in place after each step."""

    def train_step(self, trainer: Any, window: Any) -> Step | None:
        step = super().train_step(trainer, window)
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                mean = self.means.setdefault(name, torch.ones_like(weight) * 0.01)
                mean.lerp_(weight, 0.5)
                weight.copy_(mean)
        return step

    means = {}  # noqa: RUF012 - no field: it has no annotation


def test_weights_that_are_moved_after_a_step_are_held_too() -> None:
    Averaged.means.clear()
    run = fit(Pruned(task=Averaged(), amount=0.8), points(), seed=1, epochs=4)
    assert sparsity_of(run.model) == pytest.approx(0.8, abs=0.002)


def test_personal_layers_of_a_pruned_task_are_refused() -> None:
    with pytest.raises(InputError, match=r"personal layers .* zero"):
        federate(Pruned(task=Small(), amount=0.8), {"a": points(60, 1), "b": points(60, 2)}, rounds=2, strategy=FedAvg(personal=("4.*",)))


def test_site_privacy_leaves_ranges_as_they_are(small: tuple[Task, State]) -> None:
    task, state = quantize(*small, points())
    sites = {f"s{index}": points(40, index) for index in range(4)}
    privacy = SitePrivacy(noise_multiplier=1.0, clip=1.0, delta=1e-3)
    run = federate(task, sites, rounds=2, batch_size=16, weights=dict(state.model), privacy=privacy, seed=1)
    assert torch.equal(run.model.ranges, state.model["ranges"])


def test_calibrating_leaves_the_folder_to_the_training(small: tuple[Task, State], tmp_path: Path) -> None:
    sites = {"a": points(60, 1), "b": points(40, 2)}
    task, _ = quantize(*small, sites, fit=partial(federate, run=tmp_path / "run", compress="int8", batch_size=16), rounds=2)
    assert type(open_run(tmp_path / "run")[0]) is type(task)  # and no inputs were needed: there is one


def test_a_child_can_be_quantized_and_exported(small: tuple[Task, State], tmp_path: Path) -> None:
    task, state = morph(*small, "wider", "0", width=24, batch=points()[0][:1])
    assert isinstance(task, Morphed) and task.label == "exact"
    artifact = export(*quantize(task, state, points()), tmp_path / "wide.c")
    assert (tmp_path / "wide.c").exists() and artifact.figures["ram_bytes"] > 0
    assert "array" not in repr(artifact)
    assert resources(task, state, points()[0][:1]).parameters > resources(*small, points()[0][:1]).parameters


def test_what_is_quantized_is_neither_cut_nor_morphed(small: tuple[Task, State]) -> None:
    task, state = quantize(*small, points())
    with pytest.raises(TaskError, match="prune comes before"):
        prune(task, state, points(), 0.5, structured=True)
    with pytest.raises(TaskError, match="morph comes before"):
        morph(task, state, "wider", "0", width=24)
    assert resources(task, state).parameters > 0


def test_options_that_mean_nothing_are_refused(small: tuple[Task, State]) -> None:
    for call in (lambda: prune(*small, points(), 0.5, epoch=3), lambda: quantize(*small, points(), nope=1)):
        with pytest.raises(InputError, match="neither an option of training nor a field of the plan"):
            call()
    for wrong in ({"ramp": "foo"}, {"scope": "foo"}):
        with pytest.raises(InputError, match=r"\(='foo'\) must be one of"):
            Pruned(task=small[0], amount=0.5, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"amount \(='0.5'\)"):
        prune(*small, points(), "0.5")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"calibration \(='x'\)"):
        quantize(*small, points(), calibration="x")  # type: ignore[arg-type]
    broken = {name: tensor * float("nan") for name, tensor in small[1].model.items()}
    with pytest.raises(StateError, match="not finite"):
        quantize(small[0], State(model=broken, position=small[1].position), points())


def test_no_layer_is_pruned_to_nothing(small: tuple[Task, State]) -> None:
    with pytest.raises(InputError, match=r"leave nothing of 4.weight"):
        prune(small[0], small[1], amount=0.99, scope="layer")
    with pytest.raises(InputError, match="fewer than one"):
        prune(small[0], small[1], amount=0.999)
    task, state = prune(small[0], small[1], amount=0.98)
    assert all(bool(weight.any()) for weight in prunable(open_model(task, state).model).values())


def test_what_a_weight_is_computed_from_is_not_pruned() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 3))
    assert list(prunable(model)) == ["1.weight"]
