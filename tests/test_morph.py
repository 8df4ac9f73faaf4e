"""Morphs: children that compute what their parents do, or inherit what overlaps; none shares anything with another."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_channels import NETS, Plain, Residual, net, rows
from torch import Tensor, nn

import anyfit
from anyfit import Task
from anyfit.engine import load_model
from anyfit.errors import InputError, TaskError
from anyfit.schema import Schema
from anyfit.shrink.channels import difference, random_batch
from anyfit.shrink.morph import grow, morph, morphs
from anyfit.state import State
from anyfit.task import task_values
from anyfit.tasks.edits import Skip, apply_edits
from anyfit.tasks.shrunk import Morphed
from anyfit.worker import hash_of


def outputs(model: nn.Module, inputs: Tensor, *, training: bool) -> Tensor:
    """Of a copy in float64, with dropout off."""
    model = copy.deepcopy(model).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
    with torch.no_grad():
        out: Tensor = model(inputs)
    return out


def storages(weights: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in weights.values() if tensor.numel()}


def trained(model: nn.Module, batch: Tensor) -> nn.Module:
    """Some steps, so that batch statistics and all weights are not those of a fresh network."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        inputs = torch.randn((6, *batch.shape[1:]), generator=generator) if batch.is_floating_point() else batch.expand(6, -1)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


class Simple(nn.Module):
    """One of each: convolution, batch norm, flatten, recurrence of words, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.point = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.dropout, self.hidden, self.output = nn.Dropout(0.5), nn.Linear(54, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.max_pool2d(torch.relu(self.point(x)), 2).flatten(1)
        out: Tensor = self.output(torch.relu(self.hidden(self.dropout(x))))
        return out


def simple() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    batch = torch.zeros(1, 2, 6, 6)
    return trained(Simple(), batch), batch


EXACT: list[tuple[Callable[[], tuple[nn.Module, Tensor]], dict[str, Any]]] = [
    (simple, {"edit": "wider", "layer": "conv", "width": 7}),  # a few copies
    (simple, {"edit": "wider", "layer": "conv", "width": 20}),  # three of some, four of others
    (simple, {"edit": "wider", "layer": "point", "width": 9}),  # flattened behind
    (simple, {"edit": "wider", "layer": "hidden", "width": 11}),
    (simple, {"edit": "deeper", "layer": "norm"}),
    (simple, {"edit": "deeper", "layer": "point", "kernel": 5}),
    (simple, {"edit": "deeper", "layer": "hidden"}),
    (simple, {"edit": "deeper", "layer": "conv", "relu": None}),
    (simple, {"edit": "kernel", "layer": "conv"}),
    (simple, {"edit": "kernel", "layer": "point", "size": [5, 3]}),
    (simple, {"edit": "skip", "layer": "point"}),
    (simple, {"edit": "split", "layer": "conv"}),
    (lambda: net("residual"), {"edit": "wider", "layer": "stem", "width": 11}),  # both sides of a sum
    (lambda: net("residual"), {"edit": "skip", "layer": "first"}),  # a whole block
    (lambda: net("residual"), {"edit": "split", "layer": "second.conv1"}),  # with a stride
    (lambda: net("concatenated"), {"edit": "wider", "layer": "one", "width": 8}),
    (lambda: net("separable"), {"edit": "wider", "layer": "0", "width": 12}),  # depthwise behind
    (lambda: net("separable"), {"edit": "wider", "layer": "4", "width": 24}),  # groups behind
    (lambda: net("lstm"), {"edit": "wider", "layer": "rnn", "width": 11}),
    (lambda: net("gru"), {"edit": "wider", "layer": "rnn", "width": 9}),
    (lambda: net("rnn"), {"edit": "wider", "layer": "rnn", "width": 17}),
    (lambda: net("encoder"), {"edit": "wider", "layer": "encoder.layers.0.linear1", "width": 20}),
    (lambda: net("heads"), {"edit": "wider", "layer": "query", "width": 15}),  # one head more
    (lambda: net("heads"), {"edit": "wider", "layer": "embed", "width": 24}),  # a layer norm over two of each
    (lambda: net("tied"), {"edit": "wider", "layer": "input", "width": 9}),
]


@pytest.mark.parametrize(("make", "edit"), EXACT, ids=[f"{edit['edit']}-{edit['layer']}-{index}" for index, (_, edit) in enumerate(EXACT)])
def test_an_exact_child_computes_what_its_parent_does(make: Callable[[], tuple[nn.Module, Tensor]], edit: dict[str, Any]) -> None:
    parent, batch = make()
    before = copy.deepcopy(parent.state_dict())
    child = grow(Plain(), parent, batch, **edit)
    assert child.label == "exact"
    assert sum(p.numel() for p in child.model.parameters()) > sum(p.numel() for p in parent.parameters())
    inputs = random_batch(batch, 5, seed=7)
    for training in (False, True):  # in float64 what is off is the rounding of weights to float32
        assert difference(outputs(parent, inputs, training=training), outputs(child.model, inputs, training=training)) < 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items()), "the parent was touched"
    assert not storages(parent.state_dict()) & storages(child.model.state_dict())
    fresh = apply_edits(make()[0], json.loads(json.dumps(child.edits)))
    fresh.load_state_dict(child.model.state_dict())
    assert torch.equal(outputs(fresh, inputs, training=False), outputs(child.model, inputs, training=False))


INHERIT: list[dict[str, Any]] = [
    {"edit": "narrow", "layer": "conv", "width": 4},
    {"edit": "drop", "layer": "point"},
    {"edit": "split", "layer": "conv", "rank": 2},
    {"edit": "replace", "layer": "conv", "kind": "separable"},
    {"edit": "wider", "layer": "conv", "width": 8, "noise": 0.1},
]


@pytest.mark.parametrize("edit", INHERIT, ids=lambda edit: f"{edit['edit']}-{edit.get('noise', '')}")
def test_other_children_say_that_they_inherit(edit: dict[str, Any]) -> None:
    parent, batch = simple()
    child = grow(Plain(), parent, batch, **edit)
    inputs = random_batch(batch, 5, seed=7)
    apart = difference(outputs(parent, inputs, training=False), outputs(child.model, inputs, training=False))
    assert child.label == "inherit" and 1e-4 < apart < 3
    own, theirs = child.model.state_dict(), parent.state_dict()
    assert torch.equal(own["output.weight"], theirs["output.weight"]), "what overlaps was not taken over"
    trained(child.model.train(), batch)


def test_a_narrow_child_keeps_the_strongest_channels() -> None:
    parent, batch = simple()
    any_parent: Any = parent
    with torch.no_grad():
        for tensor in (any_parent.conv.weight, any_parent.conv.bias, any_parent.norm.weight, any_parent.norm.bias):
            tensor[[1, 4]] *= 1e-3
        any_parent.point.weight[:, [1, 4]] *= 1e-3
    child: Any = grow(Plain(), parent, batch, edit="narrow", layer="conv", width=4).model
    assert torch.equal(child.conv.weight, any_parent.conv.weight[[0, 2, 3, 5]])


def test_activations_and_pools_change_their_kind() -> None:
    torch.manual_seed(0)
    parent, batch = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)), torch.zeros(1, 1, 6, 6)
    child: Any = grow(Plain(), parent, batch, edit="replace", layer="1", kind="gelu").model
    assert isinstance(child[1], nn.GELU)
    child = grow(Plain(), child, batch, edit="replace", layer="2", kind="average").model
    assert isinstance(child[2], nn.AvgPool2d) and child[2].stride == 2
    child = grow(Plain(), child, batch, edit="replace", layer="2", kind="maximum").model
    assert isinstance(child[2], nn.MaxPool2d) and torch.equal(child[0].weight, parent[0].weight)  # type: ignore[union-attr]


def test_what_was_added_is_learnt() -> None:
    parent, batch = simple()
    child: Any = grow(Plain(), parent, batch, edit="skip", layer="point").model
    assert isinstance(child.point, Skip) and child.point.scale.item() == 0
    trained(child.train(), batch)
    assert child.point.scale.item() != 0
    deep: Any = grow(Plain(), parent, batch, edit="deeper", layer="hidden").model
    trained(deep.train(), batch)
    assert not torch.equal(deep.hidden[2].weight, torch.eye(10))


def test_a_full_split_is_exact_and_a_lower_one_the_nearest() -> None:
    parent, batch = simple()
    any_parent: Any = parent
    before = any_parent.conv.weight.detach()

    def product(model: Any) -> Tensor:
        depthwise, pointwise = model.conv
        ranks = depthwise.weight.detach().view(2, -1, 3, 3)
        return torch.einsum("oir,irhw->oihw", pointwise.weight.detach().view(6, 2, -1), ranks)

    errors = []
    for rank in (1, 2, 4, 6):
        child = grow(Plain(), parent, batch, edit="split", layer="conv", rank=rank)
        errors.append(float((product(child.model) - before).norm() / before.norm()))
        assert child.label == ("exact" if rank == 6 else "inherit")
        values = torch.linalg.svdvals(before.flatten(2).transpose(0, 1))
        assert errors[-1] == pytest.approx(float(values[:, rank:].square().sum().sqrt() / before.norm()), abs=1e-5)  # Eckart and Young
    assert errors == sorted(errors, reverse=True)


# Refusals


def test_batch_statistics_would_notice_a_normalised_identity_so_none_is_put_in() -> None:
    """An identity convolution with fresh batch norm keeps evaluation, but not training: the check of both modes is what tells."""
    parent, batch = simple()
    child: Any = copy.deepcopy(parent)
    identity, norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, eps=1e-30)
    with torch.no_grad():
        nn.init.dirac_(identity.weight)
        nn.init.zeros_(identity.bias)  # type: ignore[arg-type]
    child.norm = nn.Sequential(child.norm, nn.ReLU(), identity, norm)
    with pytest.raises(TaskError, match="does not keep what the network computes in training"):
        sys.modules["anyfit.shrink.morph"]._compare(Plain(), copy.deepcopy(parent).double(), child.double(), batch, True, "deeper of norm")


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("residual", {"edit": "grow", "layer": "stem"}, r"edit \(='grow'\) must be one of wider, deeper"),
        ("residual", {"edit": "wider", "layer": "output", "width": 9}, r"layer \(='output'\) has no channels .* there are: stem, first.conv2"),
        ("residual", {"edit": "wider", "layer": "stem", "width": 8}, r"width \(=8\) of stem must be more than its 8"),
        ("residual", {"edit": "wider", "layer": "stem"}, "edit 'wider' was given no options: missing 1 required"),
        ("residual", {"edit": "wider", "layer": "stem", "size": 9}, "edit 'wider' was given size: got an unexpected keyword"),
        ("separable", {"edit": "wider", "layer": "8", "width": 33}, r"width \(=33\) of 8 must be more than its 32, in steps of 8"),
        ("heads", {"edit": "wider", "layer": "embed", "width": 15}, "in evaluation .* such as a normalisation over them; .* double the width"),
        ("residual", {"edit": "narrow", "layer": "stem", "width": 8}, r"width \(=8\) of stem must be 1 or more and less than its 8"),
        ("residual", {"edit": "narrow", "layer": "stem", "width": 0}, r"width \(=0\)"),
        ("residual", {"edit": "skip", "layer": "second"}, "needs an output of its input's shape"),
        ("residual", {"edit": "skip", "layer": "second.conv1"}, "stride"),
        ("residual", {"edit": "drop", "layer": "first.bn9"}, r"layer \(='first.bn9'\) is not in the network"),
        ("residual", {"edit": "deeper", "layer": "first.bn2", "relu": "before"}, "does not keep what the network computes in evaluation"),
        ("lstm", {"edit": "deeper", "layer": "rnn"}, "gives no tensor|kind must be given"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(name: str, edit: dict[str, Any], message: str) -> None:
    model, batch = net(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        grow(Plain(), model, batch, **edit)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


# All that can be done


def test_all_that_is_listed_can_be_done() -> None:
    torch.manual_seed(0)
    model, batch = Residual(), torch.zeros(1, 3, 8, 8)
    found = morphs(Plain(), model, batch)
    assert {edit["edit"] for edit in found} == {"wider", "narrow", "deeper", "kernel", "skip", "split", "drop", "replace"}
    assert json.loads(json.dumps(found)) == found
    kinds = {edit["edit"]: edit for edit in found}
    for edit in [edit for edit in found if edit["edit"] in ("wider", "narrow") or kinds[edit["edit"]] is edit]:
        child = grow(Plain(), model, batch, **edit)
        exact = edit["edit"] in ("wider", "deeper", "kernel", "skip", "split")
        assert child.label == ("exact" if exact else "inherit")
    assert {"edit": "skip", "layer": "second.conv1"} not in found


# Tasks and states


def fitted() -> tuple[Task, State]:
    run = anyfit.fit(anyfit.Tabular(hidden=(8, 6), rare=1), rows("classes"), steps=3, batch_size=8)
    return run.task, run.state


def test_a_child_is_a_task_that_knows_edits_and_parent_and_shares_nothing() -> None:
    task, state = fitted()
    before = {name: tensor.clone() for name, tensor in state.model.items()}
    random = torch.get_rng_state()
    (one, first), (two, second) = (morph(task, state, "wider", "layers.0", width=12) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(one, Morphed) and one == two and one.label == "exact" and one.parent == hash_of(state.model)
    for name, tensor in first.model.items():
        assert torch.equal(tensor, second.model[name])
    assert not storages(first.model) & storages(second.model) and not storages(first.model) & storages(state.model)
    for tensor in first.model.values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.items()), "the parent was touched"
    assert any(tensor.any() for tensor in second.model.values()), "a sibling was touched"


def test_a_grandchild_is_built_from_json_and_trained_on() -> None:
    task, state = fitted()
    child, weights = morph(task, state, {"edit": "deeper", "layer": "layers.0"})
    grandchild, last = morph(child, weights, "narrow", "layers.3", width=4)
    values = json.loads(json.dumps(task_values(grandchild)))
    assert values["label"] == "inherit" and values["task"]["values"]["label"] == "exact"
    assert values["parent"] == hash_of(weights.model) and values["task"]["values"]["parent"] == hash_of(state.model)
    schema = Schema.from_json(state.schema or {})
    inner = Morphed(task=task, **{name: value for name, value in values["task"]["values"].items() if name != "task"})
    again = Morphed(task=inner, **{name: value for name, value in values.items() if name != "task"})
    assert again == grandchild
    load_model(again.build_model(schema), last.model)
    run = anyfit.fit(grandchild, rows("classes"), weights=dict(last.model), steps=2, batch_size=8)
    assert run.state.model["layers.3.weight"].shape == (4, 8) and run.stopped == "finished"


def test_the_hash_of_weights_is_of_names_and_values() -> None:
    weights = {"a": torch.arange(3.0), "b": torch.zeros(2)}
    same = {"b": torch.zeros(2), "a": torch.arange(3.0)}
    assert hash_of(weights) == hash_of(same)
    assert hash_of(weights) != hash_of({"a": torch.arange(3.0), "c": torch.zeros(2)})
    assert hash_of(weights) != hash_of({"a": torch.arange(3.0), "b": torch.ones(2)})
    assert hash_of({"a": torch.zeros(2, 3)}) != hash_of({"a": torch.zeros(3, 2)})
    assert set(NETS) >= {"residual", "lstm"}
