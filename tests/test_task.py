from __future__ import annotations

import re
from collections import namedtuple
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import anyfit
from anyfit import File, Schema, Task
from anyfit.errors import InputError, TaskError
from anyfit.task import task_code, task_values
from anyfit.tree import leaves

X = torch.arange(12.0).reshape(4, 3) / 10
Y = torch.tensor([0, 1, 1, 0])
SCHEMA = Schema(())


class Given(Task):
    """A task around a model that a test gives."""

    def build_model(self, schema: Schema) -> nn.Module:
        raise AssertionError


class Net(nn.Module):
    """Its forward is what a test makes of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Loss(Net):
    def forward(self, x: Tensor, target: Tensor, eval: bool = False) -> Tensor:
        return cross_entropy(self.net(x), target)


class Pair(Net):
    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return cross_entropy(logits, labels), logits


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class HuggingFace(Net):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.net(x)
        return Output(None if labels is None else cross_entropy(logits, labels), logits)


class Compiled(HuggingFace):
    """As torch.compile leaves a model: its own signature says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = HuggingFace()

    def forward(self, *arguments: Any, **named: Any) -> Output:
        return self._orig_mod(*arguments, **named)


class HetSeq(Net):
    """Its MNIST example: the loss where there is a target, and a mode for the rest."""

    def forward(self, x: Tensor, target: Tensor | None = None, eval: bool = False) -> Tensor:
        logits = self.net(x)
        return logits if eval or target is None else cross_entropy(logits, target)


class Mapped(Net):
    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.net(inputs["x"])
        return {"loss": cross_entropy(logits, inputs["labels"]), "logits": logits} if "labels" in inputs else {"logits": logits}


class Several(Net):
    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x) * scale, scale


@dataclass
class Batch:
    x: Tensor
    labels: Tensor


Named = namedtuple("Named", "x target")
EXPECTED = cross_entropy(Plain()(X), Y)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Plain(), (X, Y)),
        (Plain(), [X, Y]),
        (Plain(), {"x": X, "target": Y}),
        (Plain(), {"image": X, "labels": Y}),
        (Plain(), {"x": X, "target": Y, "not_for_the_model": X}),
        (Plain(), Batch(X, Y)),
        (Plain(), Named(X, Y)),
        (nn.Sequential(Plain()), {"features": X, "target": Y}),
        (Loss(), (X, Y)),
        (Loss(), {"x": X, "target": Y}),
        (Pair(), (X, Y)),
        (Pair(), {"x": X, "labels": Y}),
        (HuggingFace(), {"x": X, "labels": Y}),
        (HuggingFace(), (X, Y)),
        (HuggingFace(), {"x": X, "target": Y}),
        (Compiled(), {"x": X, "labels": Y}),
        (Compiled(), (X, Y)),
        (HetSeq(), (X, Y)),
        (HetSeq(), {"x": X, "target": Y}),
        (Mapped(), {"x": X, "labels": Y}),
        (Several(), (X, torch.ones(4, 1), Y)),
        (Several(), {"scale": torch.ones(4, 1), "x": X, "target": Y}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_default_step_finds_loss_count_outputs_and_target(model: nn.Module, batch: Any) -> None:
    step = Given().step(model, batch)
    assert torch.allclose(step.loss, EXPECTED)
    assert int(step.count) == 4
    assert step.targets is not None and torch.equal(step.targets, Y)
    if isinstance(model, Loss | HetSeq):
        assert step.outputs is None
    else:
        assert step.outputs.shape == (4, 2)


@pytest.mark.parametrize("model", [Plain(), HuggingFace(), Mapped(), HetSeq()], ids=lambda value: type(value).__name__)
def test_prediction_needs_no_labels(model: nn.Module) -> None:
    for batch in ({"x": X},) if isinstance(model, Mapped) else ({"x": X}, (X,), X):  # it takes its inputs by name
        assert Given().predict(model, batch).shape == (4, 2)


def test_a_loss_without_a_target_counts_rows() -> None:
    class Autoencoder(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).square().mean()

    for batch in ({"x": X}, (X,), X):
        step = Given().step(Autoencoder(), batch)
        assert step.loss.dim() == 0 and step.count == 4 and step.targets is None and step.outputs is None


def test_a_models_own_loss_counts_the_labels_that_are_not_ignored() -> None:
    step = Given().step(Pair(), (X, torch.tensor([0, -100, 1, -100])))
    assert int(step.count) == 2 and torch.allclose(step.loss, cross_entropy(Pair().net(X[[0, 2]]), Y[[0, 1]]))


def test_a_model_that_only_returns_its_loss_cannot_predict_and_says_what_to_do() -> None:
    with pytest.raises(TaskError, match="returns only its loss, so there is nothing to predict with; define predict"):
        Given().predict(Loss(), (X, Y))


def test_losses_by_type_of_target() -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    def step(outputs: Tensor, target: Tensor) -> anyfit.Step:
        return Given().step(Echo(), (outputs, target))

    several = torch.tensor([[0, 1, 1], [1, -100, 0], [0, 0, 0], [1, 1, -100]])
    kept = several != -100
    assert torch.allclose(step(X, several).loss, binary_cross_entropy_with_logits(X[kept], several[kept].float()))
    assert int(step(X, several).count) == 10
    floats = torch.tensor([0.5, 1.0, 0.0, 2.0])
    assert torch.allclose(step(X[:, :1], floats).loss, mse_loss(X[:, 0], floats)) and step(X[:, :1], floats).count == 4
    assert torch.allclose(step(X[:, 0], Y).loss, binary_cross_entropy_with_logits(X[:, 0], Y.float()))
    ignored = torch.tensor([0, -100, 1, -100])
    assert torch.allclose(step(X, ignored).loss, cross_entropy(X[[0, 2]], ignored[[0, 2]])) and int(step(X, ignored).count) == 2
    tokens, labels = torch.randn(2, 5, 3), torch.tensor([[0, 1, 2, -100, -100], [1, -100, -100, -100, -100]])
    assert (
        torch.allclose(step(tokens, labels).loss, cross_entropy(tokens.reshape(-1, 3), labels.reshape(-1)))
        and int(step(tokens, labels).count) == 4
    )
    nothing = step(tokens, torch.full((2, 5), -100))
    assert float(nothing.loss) == 0 and int(nothing.count) == 0
    assert step(X.bfloat16(), Y).loss.dtype == torch.float32
    with pytest.raises(TaskError, match="differ in size"):
        step(X, floats)
    with pytest.raises(TaskError, match="without target or labels"):
        Given().step(Echo(), {"x": X})


@pytest.mark.parametrize("shape", [(4,), (2, 5)])
def test_a_batch_in_which_nothing_counts_has_no_gradient(shape: tuple[int, ...]) -> None:
    """So that it adds nothing to the window it is in."""
    logits = torch.randn(*shape, 3, requires_grad=True)
    step = Given().step(nn.Identity(), (logits, torch.full(shape, -100)))
    (step.loss * step.count).backward()
    assert int(step.count) == 0 and logits.grad is not None and not logits.grad.any()


def test_a_batch_that_the_model_cannot_take_is_named() -> None:
    with pytest.raises(TaskError, match="forward wants x, scale, but the batch has image, target"):
        Given().forward(Several(), {"image": X, "target": Y})


def test_a_subclass_is_a_frozen_keyword_only_dataclass() -> None:
    class Mine(Task):
        width: int = 4
        not_a_field = 3

    class More(Mine):
        depth: int = 1

    assert More(depth=2) == More(width=4, depth=2) != More()
    assert hash(Mine()) == hash(Mine(width=4))
    with pytest.raises(FrozenInstanceError):
        Mine().width = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Mine(4)  # type: ignore[misc]
    assert task_values(More()) == {"width": 4, "depth": 1}


def test_fields_are_replaced_by_what_their_annotation_says() -> None:
    class Typed(Task):
        width: int = 4
        rates: tuple[float, ...] = ()
        words: File | None = None
        inner: Task | None = None

    task = Typed().replaced(width="8", rates="0.5,1", inner=Given())
    assert task == Typed(width=8, rates=(0.5, 1.0), inner=Given()) and type(task.rates[1]) is float
    assert Typed().replaced() == Typed()
    with pytest.raises(InputError, match=re.escape("width (='wide') must be a whole number")):
        task.replaced(width="wide")
    with pytest.raises(InputError, match=re.escape("inner (=3) must be Task or none")):
        task.replaced(inner=3)
    with pytest.raises(TaskError, match="depth is no field of Typed; it has: inner, rates, width, words"):
        task.replaced(depth=3)


def test_a_field_of_the_plan_is_refused_where_the_class_is_defined() -> None:
    with pytest.raises(TaskError, match=r"field 'epochs' of Wrong is a field of the plan too; give its default in plan\(\) instead"):

        class Wrong(Task):
            epochs: int = 3

    class Right(Task):
        rate: float = 0.1

    with pytest.raises(TaskError, match="field 'seed' of Later"):

        class Later(Right):
            seed: int = 3


class Holder(Task):
    what: Any = None


def test_fields_are_json_values_files_or_tasks(tmp_path: Path) -> None:
    assert task_values(Holder(what=[1, {"a": None}])) == {"what": [1, {"a": None}]}
    assert task_values(Holder(what=(1, (2.5, "a")))) == {"what": [1, [2.5, "a"]]}
    assert task_values(Holder(what=Holder())) == {"what": {"task": f"{__name__}:Holder", "values": {"what": None}}}
    (tmp_path / "w").write_text("a")
    file = File.of(tmp_path / "w")
    assert task_values(Holder(what=file)) == {"what": {"path": str(tmp_path / "w"), "sha256": file.sha256}}


@pytest.mark.parametrize("value", [nn.ReLU(), {1: 2}, {1, 2}, torch.ones(1), float("nan"), [float("inf")], b"x"], ids=repr)
def test_a_field_that_is_no_json_value_is_named(value: Any) -> None:
    with pytest.raises(TaskError, match=r"field what \(=.*\) of Holder must be a JSON value, a File or a task"):
        task_values(Holder(what=value))


def test_a_task_without_a_model_says_what_to_define() -> None:
    with pytest.raises(TaskError, match=re.escape("Holder has no model; define build_model(self, schema)")):
        Holder().build_model(SCHEMA)


SOURCE = "class T(Task):\n    def forward(self, model, batch):\n        return {}\n"
BODIES = ["1", "2", "model.first(batch)", "model.second(batch)", "(lambda x: x + 1)(batch)", "(lambda x: x * 2)(batch)"]


@pytest.mark.parametrize("with_source", [True, False])
def test_code_is_told_apart_with_and_without_its_source(with_source: bool, tmp_path: Path) -> None:
    """An interactive session has no source; its bytecode names what it calls apart from what it does."""

    def code(body: str, name: str) -> str:
        if with_source:
            (tmp_path / f"{name}.py").write_text("from anyfit import Task\n" + SOURCE.format(body))
            return task_code(anyfit.load(f"{tmp_path / name}.py:T"))
        namespace: dict[str, Any] = {"Task": Task, "__name__": "nowhere"}
        exec(SOURCE.format(body), namespace)
        return task_code(namespace["T"]())

    first = [code(body, f"a{index}") for index, body in enumerate(BODIES)]
    again = [code(body, f"b{index}") for index, body in enumerate(BODIES)]
    assert first == again and len(set(first)) == len(BODIES)


def test_code_covers_the_classes_that_a_task_inherits_from() -> None:
    class Child(Given):
        pass

    class Other(Holder):
        pass

    assert len({task_code(cls()) for cls in (Given, Holder, Child, Other)}) == 4
    assert task_code(Child()) == task_code(Child())


def test_collate_nests_and_pads() -> None:
    samples = [
        {"input_ids": torch.arange(n), "labels": torch.arange(n), "more": (1, [2.0, 3.0]), "pair": Named(torch.ones(2), n)} for n in (2, 3)
    ]
    batch = Given().collate(samples)
    assert batch["input_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch["labels"].tolist() == [[0, 1, -100], [0, 1, 2]]
    assert batch["pair"].x.shape == (2, 2) and batch["pair"].target.tolist() == [2, 3]
    assert batch["more"][0].tolist() == [1, 1] and batch["more"][1].tolist() == [[2.0, 3.0], [2.0, 3.0]]
    assert Given().collate([[1, 2], [3]]).tolist() == [[1, 2], [3, 0]]
    assert Given().collate([torch.ones(2, 3), torch.ones(1, 3)]).tolist() == [[[1.0] * 3] * 2, [[1.0] * 3, [0.0] * 3]]
    assert Given().collate([{"id": "a"}, {"id": "b"}]) == {"id": ["a", "b"]}


@dataclass
class Tagged:
    ids: Tensor
    labels: Tensor


Tags = namedtuple("Tags", "ids labels")


KINDS = {
    "dataclass": Tagged,
    "named tuple": Tags,
    "tuple": lambda ids, labels: (ids, labels),
    "dict": lambda ids, labels: {"ids": ids, "labels": labels},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("make", [torch.arange, np.arange], ids=["torch", "numpy"])
def test_sequences_are_padded_so_that_no_padding_counts(kind: Any, make: Any) -> None:
    """Whatever the batch is: a label padded with 0 would be learnt as class 0."""
    batch = Given().collate([kind(make(n), make(n)) for n in (2, 3)])
    ids, labels = leaves(batch)
    assert ids.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert labels.tolist() == [[0, 1, -100], [0, 1, 2]]


def test_only_the_batchs_own_last_item_is_padded_as_labels() -> None:
    """A pair of inputs within a batch is no sample and its target; -100 would be looked up in an embedding."""
    inputs = [(torch.arange(n), torch.arange(n)) for n in (2, 3)]
    for samples in ([(pair, 1) for pair in inputs], [{"pair": pair, "target": 1} for pair in inputs], [(list(pair), 1) for pair in inputs]):
        assert [leaf.tolist() for leaf in leaves(Given().collate(samples))] == [[[0, 1, 0], [0, 1, 2]]] * 2 + [[1, 1]]


@pytest.mark.parametrize("samples", [[[], [1, 2]], [[1, 2], []]])
def test_an_empty_sequence_of_whole_numbers_stays_one(samples: list[list[int]]) -> None:
    """An empty text must not turn the token numbers of its batch into floats."""
    batch = Given().collate(samples)
    assert batch.tolist() == [[*sample, *[0] * (2 - len(sample))] for sample in samples] and not batch.is_floating_point()


def test_a_pair_of_numbers_is_a_sample_and_its_target() -> None:
    x, y = Given().collate([(0.5, 1), (1.5, 0)])
    assert x.tolist() == [0.5, 1.5] and y.tolist() == [1, 0] and not y.is_floating_point()


def test_adamw_takes_what_trains() -> None:
    model = Plain()
    model.net.bias.requires_grad_(False)
    (group,) = anyfit.adamw(model).param_groups
    assert [id(p) for p in group["params"]] == [id(model.net.weight)] and group["fused"]
    model.net.weight.requires_grad_(False)
    with pytest.raises(TaskError, match="no parameter that trains"):
        anyfit.adamw(model)


def test_the_default_optimizer_takes_its_rate_from_the_field_lr() -> None:
    class Fast(Given):
        lr: float = 0.5

    assert [task.build_optimizer(Plain()).param_groups[0]["lr"] for task in (Given(), Fast(), Fast(lr=2.0))] == [1e-3, 0.5, 2.0]


def test_a_site_shares_the_parameters_that_train() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    named = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, tensor in named if Given().shared(name, tensor)] == ["0.weight", "1.weight", "1.bias"]
