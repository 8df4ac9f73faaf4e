from __future__ import annotations

from collections import namedtuple
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import anyfit
from anyfit import Schema, Task
from anyfit.errors import TaskError
from anyfit.task import task_code, task_values

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
    if isinstance(model, Loss):
        assert step.outputs is None
    else:
        assert step.outputs.shape == (4, 2)


@pytest.mark.parametrize("model", [Plain(), HuggingFace(), Mapped()], ids=lambda value: type(value).__name__)
def test_prediction_needs_no_labels(model: nn.Module) -> None:
    assert Given().predict(model, {"x": X}).shape == (4, 2)


def test_a_model_that_only_returns_its_loss_cannot_predict_and_says_what_to_do() -> None:
    with pytest.raises(TaskError, match="returns only its loss, so there is nothing to predict with; define predict"):
        Given().predict(Loss(), (X, Y))


def test_losses_by_type_of_target() -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    def step(outputs: Tensor, target: Tensor) -> anyfit.Step:
        return Given().step(Echo(), (outputs, target))

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


def test_a_field_of_the_plan_is_refused_where_the_class_is_defined() -> None:
    with pytest.raises(TaskError, match="field 'epochs' of Wrong is a field of the plan"):

        class Wrong(Task):
            epochs: int = 3


def test_fields_are_json_values_files_or_tasks() -> None:
    class Holder(Task):
        what: Any = None

    assert task_values(Holder(what=[1, {"a": None}])) == {"what": [1, {"a": None}]}
    assert task_values(Holder(what=Holder()))["what"]["values"] == {"what": None}
    with pytest.raises(TaskError, match="must be a JSON value, a File or a task"):
        task_values(Holder(what=nn.ReLU()))


def test_code_is_told_apart_by_its_source_and_without_source_by_its_bytecode() -> None:
    namespaces: list[dict[str, Any]] = []
    for body in ("return 1", "return 2", "return 1"):
        namespace: dict[str, Any] = {"Task": Task, "__name__": "nowhere"}
        exec(f"class T(Task):\n    def forward(self, model, batch):\n        {body}\n", namespace)
        namespaces.append(namespace)
    first, second, third = (task_code(namespace["T"]) for namespace in namespaces)
    assert first == third != second
    assert task_code(Given) != task_code(anyfit.Image)


def test_collate_nests_and_pads() -> None:
    samples = [
        {"input_ids": torch.arange(n), "labels": torch.arange(n), "more": (1, [2.0, 3.0]), "pair": Named(torch.ones(2), n)} for n in (2, 3)
    ]
    batch = Given().collate(samples)
    assert batch["input_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch["labels"].tolist() == [[0, 1, -100], [0, 1, 2]]
    assert batch["pair"].x.shape == (2, 2) and batch["pair"].target.tolist() == [2, 3]
    assert Given().collate([[1, 2], [3]]).tolist() == [[1, 2], [3, 0]]


def test_adamw_takes_what_trains() -> None:
    model = Plain()
    model.net.bias.requires_grad_(False)
    (group,) = anyfit.adamw(model).param_groups
    assert [id(p) for p in group["params"]] == [id(model.net.weight)] and group["fused"]
    model.net.weight.requires_grad_(False)
    with pytest.raises(TaskError, match="no parameter that trains"):
        anyfit.adamw(model)
