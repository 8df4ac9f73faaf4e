"""Channels: what depends on what, cuts that leave a network whole, and edits that rebuild it from JSON."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anyfit
from anyfit import Source, Task
from anyfit.errors import InputError, TaskError
from anyfit.prepare import prepare
from anyfit.shrink.channels import cut, difference, groups, importance, keep, random_batch
from anyfit.tasks.edits import apply_edits, indices_of, listed
from anyfit.tree import leaves, map_tensors


class Plain(Task):
    """A task of which only `predict` is used."""


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.down = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.down(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), Block(8, 8, 1), Block(8, 16, 2)
        self.output = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.second(self.first(torch.relu(self.stem(x)))).mean((2, 3)))
        return out


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norm, self.three, self.output = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1), nn.Linear(14 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = torch.cat([x, torch.relu(self.two(x))], 1)
        x = torch.cat([x, self.three(self.norm(x))], 1)
        out: Tensor = self.output(torch.max_pool2d(x, 2).flatten(1))
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module] = nn.LSTM, layers: int = 2, bidirectional: bool = True) -> None:
        super().__init__()
        self.input, self.rnn = nn.Linear(5, 6), kind(6, 8, layers, bidirectional=bidirectional, batch_first=True)
        self.output = nn.Linear(16 if bidirectional else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.rnn(torch.relu(self.input(x)))[0][:, -1])
        return out


class Halves(nn.Module):
    """The last state of each direction, as a text network takes them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.output = nn.GRU(5, 6, bidirectional=True, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(x)[0]
        half = states.shape[2] // 2
        out: Tensor = self.output(torch.cat((states[:, -1, :half], states[:, 0, half:]), 1))
        return out


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.input, self.encoder = nn.Linear(5, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.encoder(self.input(x)).mean(1))
        return out


class Heads(nn.Module):
    """Attention of its own, whose heads can go."""

    def __init__(self, width: int = 12, each: int = 3) -> None:
        super().__init__()
        self.each, self.embed = each, nn.Embedding(9, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mix, self.norm, self.output = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        query, key, value = (part(x).unflatten(-1, (-1, self.each)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out: Tensor = self.output(self.norm(x + self.mix(mixed))[:, 0])
        return out


class Gated(nn.Module):
    """Two halves of one layer, one of which gates the other; and one channel that gates all."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.gate = nn.Linear(5, 12), nn.Linear(6, 1)
        self.output = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, -1)
        x = value * torch.sigmoid(gate)
        out: Tensor = self.output(x * torch.sigmoid(self.gate(x)))
        return out


class Tied(nn.Module):
    """Two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.first, self.second, self.output = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight
        self.first.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.input(x))
        out: Tensor = self.output(x + self.second(torch.relu(x + self.first(x))))
        return out


class Assorted(nn.Module):
    """A first state and a first token that are learnt, the larger of two layers, and a stack of them."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.token = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 1, 6))
        self.rnn, self.one, self.two, self.output = nn.RNN(5, 6, batch_first=True), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        states = self.rnn(x, self.state.expand(1, rows, -1).contiguous())[0]
        states = torch.cat((self.token.expand(rows, -1, -1), states), 1)
        one, two = self.one(states), self.two(states)
        out: Tensor = self.output(torch.stack((one.max(two), one.clamp(min=0)), 1).amax((1, 2)))
        return out


def separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, padding=1, groups=8),
        nn.Conv2d(16, 16, 1),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.GroupNorm(8, 32),
        nn.PReLU(32),
        nn.Flatten(),
        nn.Linear(32 * 4, 10),
        nn.Tanh(),
        nn.Linear(10, 3),
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ELU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.AvgPool2d(2), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )  # fmt: skip


IMAGE, STEPS, ROW = torch.zeros(1, 3, 8, 8), torch.zeros(1, 7, 5), torch.zeros(1, 5)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "separable": (separable, IMAGE),
    "transposed": (transposed, IMAGE),
    "residual": (Residual, IMAGE),
    "concatenated": (Concatenated, IMAGE),
    "lstm": (Recurrent, STEPS),
    "gru": (lambda: Recurrent(nn.GRU), STEPS),
    "rnn": (lambda: Recurrent(nn.RNN, 1, bidirectional=False), STEPS),
    "halves": (Halves, STEPS),
    "encoder": (Encoder, STEPS),
    "encoder, norm first": (lambda: Encoder(norm_first=True), STEPS),
    "heads": (Heads, torch.zeros(1, 6, dtype=torch.long)),
    "gated": (Gated, ROW),
    "tied": (Tied, ROW),
    "assorted": (Assorted, STEPS),
}


def net(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    make, batch = NETS[name]
    return make(), batch


def drawn(batch: Any, dtype: torch.dtype = torch.float64) -> Any:
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, random_batch(batch, 3))


def masked(model: nn.Module, edit: Mapping[str, Any]) -> nn.Module:
    """The dense network with all that an edit drops at zero: written without the code that makes cuts."""
    out = copy.deepcopy(model)
    named = {**dict(out.named_parameters()), **dict(out.named_buffers())}
    for name, dims in edit["tensors"].items():
        for dim, index in dims.items():
            size = named[name].shape[int(dim)]
            kept = torch.zeros(size, dtype=torch.bool)
            kept[indices_of(edit["lists"][index], size, name)] = True
            named[name].data.index_fill_(int(dim), (~kept).nonzero().flatten(), 0)
    return out


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def checked(task: Task, model: nn.Module, batch: Any, build: Callable[[], nn.Module]) -> set[str]:
    """All that must hold for a cut of half of the channels; returns the names of what was cut."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = groups(task, model, batch)
    edit = json.loads(json.dumps(cut(task, model, batch, 0.5)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the dense network was touched"
    small = apply_edits(copy.deepcopy(model), [edit])
    assert size(small) < size(model)
    named = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    places = {place for group in found for place in group.places}
    for name, dim in places:  # requested = delivered, in every tensor
        size_before = len(next(group.places[name, dim] for group in found if (name, dim) in group.places))
        gone = 0
        for group in found:
            if (name, dim) in group.places:
                each = int((group.places[name, dim] >= 0).sum()) // group.size
                gone += each * round(0.5 * group.size)
        assert named[name].shape[dim] == size_before - gone
    if all(group.exact for group in found):
        one, other = masked(model, edit).double().eval(), copy.deepcopy(small).double().eval()
        inputs = drawn(batch)
        with torch.no_grad():
            for a, b in zip(leaves(task.predict(one, inputs)), leaves(task.predict(other, inputs)), strict=True):
                assert difference(a, b) <= 1e-12
    again = apply_edits(build(), [edit])
    again.load_state_dict(small.state_dict())
    again.train()
    optimizer = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], 0.1)
    sum(leaf.square().mean() for leaf in leaves(task.predict(again, drawn(batch, torch.float32)))).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert all(tensor.isfinite().all() for tensor in again.state_dict().values())
    return {group.name for group in found}


@pytest.mark.parametrize("name", NETS)
def test_half_of_the_channels_go_and_the_rest_computes_what_it_did(name: str) -> None:
    model, batch = net(name)
    checked(Plain(), model, batch, NETS[name][0])


def test_what_belongs_together_is_found() -> None:
    def found(name: str) -> dict[str, tuple[int, tuple[str, ...]]]:
        return {group.name: (group.size, group.makers) for group in groups(Plain(), *net(name))}

    assert found("residual") == {
        "stem": (8, ("stem", "first.conv2")),
        "first.conv1": (8, ("first.conv1",)),
        "second.conv1": (16, ("second.conv1",)),
        "second.conv2": (16, ("second.conv2", "second.down.0")),
    }
    assert found("concatenated") == {"one": (6, ("one",)), "two": (4, ("two",)), "three": (4, ("three",))}
    # two filters a channel; of the convolution of four groups each goes whole, and so with what it reads
    assert found("separable") == {"0": (8, ("0", "3")), "4": (4, ("4", "8")), "12": (10, ("12",))}
    assert found("encoder") == {f"encoder.layers.{n}.linear1": (16, (f"encoder.layers.{n}.linear1",)) for n in (0, 1)}
    assert found("heads")["query"] == (4, ("query", "key", "value"))
    assert found("heads")["embed"] == (12, ("embed", "mix"))
    assert found("assorted") == {"rnn": (6, ("rnn",)), "one": (8, ("one", "two"))}
    assert found("gated") == {"both": (6, ("both",))}
    assert found("lstm") == {"input": (6, ("input",)), "rnn": (8, ("rnn",))}


def test_a_cut_of_all_gates_layers_and_directions_of_a_recurrent_network() -> None:
    model, batch = net("lstm")
    small = apply_edits(copy.deepcopy(model), [cut(Plain(), model, batch, 0.25, spare=["input"])])
    rnn: Any = small.rnn
    assert (rnn.input_size, rnn.hidden_size, small.output.in_features) == (6, 6, 12)
    assert rnn.weight_ih_l1_reverse.shape == (24, 12) and rnn._flat_weights[0] is rnn.weight_ih_l0


def test_modules_know_their_new_sizes() -> None:
    model, batch = net("separable")
    small: Any = apply_edits(model, [cut(Plain(), model, batch, 0.5)])
    assert (small[3].groups, small[3].in_channels, small[3].out_channels) == (4, 4, 8)
    assert (small[8].groups, small[8].in_channels, small[8].out_channels) == (2, 8, 16)
    assert (small[9].num_groups, small[9].num_channels, small[10].num_parameters, small[1].num_features) == (4, 16, 16, 4)
    assert (small[12].in_features, small[12].out_features, small[14].in_features) == (64, 5, 5)


def test_shared_weights_stay_shared_and_frozen_ones_frozen() -> None:
    model, batch = net("tied")
    small: Any = apply_edits(model, [cut(Plain(), model, batch, 0.5)])
    assert small.first.weight is small.second.weight and not small.first.weight.requires_grad
    assert small.first.weight.shape == (4, 4) and small.input.weight.requires_grad


# Our own tasks


def sentences() -> Source:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefghijk", k=rng.randint(3, 9))) for _ in range(24)]
    return Source(pa.table({"text": texts, "target": ["x", "y"] * 12}), target="target", types={"text": "text"})


def rows(kind: str) -> Source:
    generator = np.random.default_rng(0)
    columns: dict[str, Any] = {"a": generator.normal(size=24), "b": generator.normal(size=24), "c": ["u", "v", "w"] * 8}
    return Source(pa.table({**columns, "target": ["x", "y"] * 12 if kind == "classes" else generator.normal(size=24)}), target="target")


def images(channels: int) -> Source:
    return Source({"image": torch.zeros(12, channels, 16, 16, dtype=torch.uint8), "target": torch.arange(12) % 3})


TEXT: dict[str, Any] = {"embedding": 8, "max_length": 12}
TASKS: dict[str, tuple[Callable[[], Task], Callable[[], Source], set[str]]] = {
    "grey images": (lambda: anyfit.Image(channels=4, hidden=16), lambda: images(1), {"conv1", "conv2", "hidden"}),
    "colour images": (lambda: anyfit.Image(channels=8), lambda: images(3), {"layers.1", "layers.5", "layers.8"}),
    "classes": (lambda: anyfit.Tabular(hidden=(8, 6), rare=1), lambda: rows("classes"), {"embeddings.0", "layers.0", "layers.3"}),
    "numbers": (lambda: anyfit.Tabular(hidden=(8, 6), rare=1), lambda: rows("numbers"), {"embeddings.0", "layers.0", "layers.3"}),
    "filters": (lambda: anyfit.TextCNN(filters=4, **TEXT), sentences, {"embeddings", *(f"convolutions.{n}" for n in range(3))}),
    "one width": (lambda: anyfit.TextCNN(filters=4, widths=(3,), **TEXT), sentences, {"embeddings", "convolutions.0"}),
    "tanh": (lambda: anyfit.TextRNN(cell="tanh", hidden=6, bidirectional=False, pooling="last", **TEXT), sentences, {"embeddings", "rnn"}),
    "gru": (lambda: anyfit.TextRNN(hidden=6, layers=2, bidirectional=False, **TEXT), sentences, {"embeddings", "rnn"}),
    "lstm": (lambda: anyfit.TextRNN(cell="lstm", hidden=6, bidirectional=False, pooling="mean", **TEXT), sentences, {"embeddings", "rnn"}),
    "transformer": (lambda: anyfit.TextTransformer(heads=2, layers=1, **TEXT), sentences, {"encoder.layers.0.linear1"}),
}


@pytest.mark.parametrize("name", TASKS)
def test_networks_of_the_ready_made_tasks_are_cut(name: str) -> None:
    make, source, makers = TASKS[name]
    task = make()
    schema = prepare(task, source(), target=None, validation=None, test=None, plan={"batch_size": 4, "steps": 1, "best": False}).schema
    torch.manual_seed(0)
    model, batch = task.build_model(schema), task.example_row(schema)
    assert checked(task, model, batch, lambda: task.build_model(schema)) == makers


class Logits(Task):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch).logits


def test_layers_and_heads_of_a_transformers_model_are_cut() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, max_position_embeddings=16
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(3, 9, (1, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = {group.name: group for group in groups(Logits(), model, batch)}
    layer = "bert.encoder.layer.0"
    assert found[f"{layer}.attention.self.query"].size == 4 and found[f"{layer}.intermediate.dense"].size == 32
    assert not found["bert.embeddings.word_embeddings"].exact, "layer normalisation runs over the stream"
    checked(Logits(), model, batch, lambda: transformers.BertForSequenceClassification(config))


# How much, and which


@given(st.floats(0.01, 0.99), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=7)
def test_exactly_what_was_asked_for_goes(amount: float, least: int, multiple: int) -> None:
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 2))
    lefts = [max(before - round(amount * before), min(least, before)) for before in (7, 12)]
    if multiple > 1:
        lefts = [min(before, max(1, round(left / multiple)) * multiple) for left, before in zip(lefts, (7, 12), strict=True)]
        lefts = [
            left if left >= least else min(before, left + multiple * -(-(least - left) // multiple))
            for left, before in zip(lefts, (7, 12), strict=True)
        ]
    if lefts == [7, 12]:
        with pytest.raises(InputError, match="nothing would be cut"):
            cut(Plain(), model, torch.zeros(1, 4), amount, least=least, multiple=multiple)
    else:
        small: Any = apply_edits(copy.deepcopy(model), [cut(Plain(), model, torch.zeros(1, 4), amount, least=least, multiple=multiple)])
        assert [small[0].out_features, small[2].out_features] == lefts


def test_the_channels_of_the_smallest_norm_go_whatever_the_scale_of_their_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight.fill_(1.0)
        model[0].weight[[1, 5]] *= 0.01
        model[2].weight[:, [1, 5]] *= 0.01
        model[2].weight[[3]] *= 0.02
        model[4].weight *= 100  # of the second hidden layer every channel looks important
        model[4].weight[:, 3] *= 0.001
    small: Any = apply_edits(copy.deepcopy(model), [cut(Plain(), model, torch.zeros(1, 4), 3 / 16, scope="global")])
    assert (small[0].out_features, small[2].out_features) == (6, 7)
    assert torch.equal(small[0].weight, model[0].weight[[0, 2, 3, 4, 6, 7]])
    found = groups(Plain(), model, torch.zeros(1, 4))
    weights = dict(model.named_parameters())
    for group in found:
        score = importance(group, weights)
        assert score.square().mean().item() == pytest.approx(1.0)
    whole = importance(found[0], weights)
    squares = model[0].weight.square().sum(1) + model[2].weight.square().sum(0)
    assert torch.allclose(whole, (squares / squares.mean()).sqrt().double(), rtol=1e-6)


def test_over_all_layers_exactly_the_share_of_all_channels_goes() -> None:
    model, batch = net("residual")
    total = sum(group.size for group in groups(Plain(), model, batch))
    for amount in (0.1, 0.9):
        small = apply_edits(copy.deepcopy(model), [cut(Plain(), model, batch, amount, scope="global", least=1)])
        any_small: Any = small
        left = (any_small.stem, any_small.first.conv1, any_small.second.conv1, any_small.second.conv2)
        assert sum(conv.out_channels for conv in left) == total - round(amount * total)


def test_a_wide_network_is_cut_by_a_short_edit() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 2000, 1), nn.BatchNorm2d(2000), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18000, 2)
    )
    edit = cut(Plain(), model, torch.zeros(1, 3, 4, 4), 0.5)
    assert len(json.dumps(edit)) < 5000
    assert apply_edits(model, [edit])[5].in_features == 9000  # type: ignore[index]


# By hand


def test_channels_that_are_named_are_kept() -> None:
    model, batch = net("residual")
    edit = keep(Plain(), model, batch, {"first.conv1": [6, 1], "second.conv2": [0, 1, 2], "second.down.0": [2, 1, 0]})
    small: Any = apply_edits(copy.deepcopy(model), [edit])
    any_model: Any = model
    assert torch.equal(small.first.conv1.weight, any_model.first.conv1.weight[[1, 6]])
    assert torch.equal(small.second.down[0].weight, any_model.second.down[0].weight[:3])


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        (
            "residual",
            {"second.conv2": [0]},
            r"unevenly: .* tied to those of second.down.0 by the sum add in second; give second.down.0 the same",
        ),
        ("residual", {"second.conv2": [0], "second.down.0": [1]}, "tied to those of second.conv2 by the sum add in second"),
        ("residual", {"output": [0]}, r"layer \(='output'\) of kept has no channels that can go; there are: stem"),
        ("residual", {"first.conv1": [8]}, r"kept\['first.conv1'\] \(=\[8\]\) must be one or more of the channels 0 to 7"),
        ("residual", {"first.conv1": []}, "one or more"),
        ("separable", {"8": [0, 1, 2]}, r"channels \[0, 1, 2, 3, 4, 5, 6, 7\] go together"),
    ],
)
def test_an_uneven_choice_is_refused_by_name(name: str, kept: dict[str, list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        keep(Plain(), *net(name), kept)


# What cannot be cut


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.0}, r"amount \(=1.0\) must be above 0 and below 1"),
        ({"amount": 0}, r"amount \(=0\)"),
        ({"amount": 0.5, "least": 0}, r"least \(=0\) must be at least 1"),
        ({"amount": 0.5, "multiple": 0}, r"multiple \(=0\)"),
        ({"amount": 0.5, "spare": ["nothing"]}, r"spare \(='nothing'\) begins no layer .* there are: stem"),
        ({"amount": 0.5, "spare": ["stem", "first", "second"]}, "leaves all layers whole"),
        ({"amount": 0.99, "scope": "global", "least": 4}, "asks for 48 of 48 channels, of which 32 can go with least=4"),
        ({"amount": 0.01}, "nothing would be cut"),
    ],
)
def test_what_was_asked_wrongly_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cut(Plain(), *net("residual"), **options)


class Scaled(nn.Module):
    """A width that is a number in the program."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.input, self.other, self.output = how, nn.Linear(4, 8), nn.Linear(4, 6), nn.Linear(8, 2)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.input(x))
        inner = inner * inner.shape[1] if self.how == "shape" else inner.view(-1, 2, 4).flatten(1)
        out: Tensor = self.output(inner) + self.last(torch.relu(self.other(x)))
        return out


@pytest.mark.parametrize(("how", "message"), [("shape", "computes other values"), ("view", "invalid for input")])
def test_a_cut_that_changes_more_than_it_says_is_refused_by_the_layers_name(how: str, message: str) -> None:
    model, batch = Scaled(how), torch.zeros(1, 4)
    with pytest.raises(TaskError, match=rf"{message}.*spare=\['input'\]"):
        cut(Plain(), model, batch, 0.5)
    small: Any = apply_edits(model, [cut(Plain(), model, batch, 0.5, spare=["input"])])
    assert (small.input.out_features, small.other.out_features) == (8, 3)


def test_an_operation_that_is_not_known_keeps_what_it_touches() -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.output = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.output(self.input(x).roll(1, 1))
            return out

    assert groups(Plain(), Rolled(), torch.zeros(1, 4)) == []
    with pytest.raises(InputError, match=r"no channel can go: all are tied to roll .*not known here"):
        cut(Plain(), Rolled(), torch.zeros(1, 4), 0.5)


# Edits


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=12))
def test_a_list_says_which_entries_are_there_and_how_often(runs: list[tuple[int, int]]) -> None:
    expected, start = [], 0
    for length, count in runs:
        expected += list(range(start, start + length)) * count
        start += length
    if not expected:
        with pytest.raises(InputError, match="keeps none"):
            indices_of(listed(runs), start, "it")
    else:
        assert indices_of(json.loads(json.dumps(listed(runs))), start, "it").tolist() == expected


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"edit": "cut"}, r"edit \(='cut'\) must be one of take, deeper"),
        ({"edit": "skip"}, "edit 'skip' lacks layer"),
        ({"edit": "skip", "layer": "0", "size": 3}, r"has size \(=3\), which means nothing there"),
        (
            {"edit": "take", "lists": [], "tensors": {"99.weight": {}}},
            r"tensor '99.weight' of an edit is not in the network; it has: 0.weight",
        ),
        ({"edit": "take", "lists": [[[1, "11"]]], "tensors": {"0.weight": {"4": 0}}}, r"dim \(='4'\) of 0.weight must be below 4"),
        ({"edit": "take", "lists": [], "tensors": {"0.weight": {"0": 0}}}, r"list \(=0\) for dimension 0 of 0.weight must be below 0"),
        ({"edit": "take", "lists": [[[1, "11"]]], "tensors": {"0.weight": {"0": 0}}}, "a list of 2 entries .* which has 8"),
        ({"edit": "take", "lists": [[[1, "11000000"]]], "tensors": {"0.weight": {"0": 0}}}, "tensors of 0 do not agree"),
        ({"edit": "take", "lists": ["11"], "tensors": {"0.weight": {"0": 0}}}, r"must be \[\[block, counts\], ...\]"),
        (
            {"edit": "take", "lists": [[[1, "1" * 31 + "0"]]], "tensors": {"8.weight": {"0": 0}}},
            "4 groups of 8 channels, which can only be taken whole",
        ),
        ({"edit": "kernel", "layer": "0", "size": 4}, r"size \(=4\) for 0 must be its kernel \(3, 3\) with an even number more"),
        ({"edit": "kernel", "layer": "2", "size": 5}, "is a ReLU; name a convolution"),
        ({"edit": "kernel", "layer": "42", "size": 5}, r"layer \(='42'\) is not in the network; it has: 0, 1"),
        ({"edit": "skip", "layer": "0"}, "makes 8 channels of 3, so skip would change"),
        ({"edit": "drop", "layer": "12"}, "makes 10 channels of 128"),
        ({"edit": "split", "layer": "8", "rank": 1}, "of 4 groups"),
        ({"edit": "split", "layer": "0", "rank": 9}, r"rank \(=9\) for 0 must be 1 to 8"),
        ({"edit": "replace", "layer": "2", "kind": "max"}, r"kind \(='max'\) for 2 \(a ReLU\) must be one of relu6"),
        ({"edit": "replace", "layer": "0", "kind": "relu"}, "has no other kind"),
        ({"edit": "deeper", "layer": "0", "kind": "conv2d", "width": 8, "kernel": 2}, r"kernel \(=2\) .* odd number"),
        ({"edit": "deeper", "layer": "0", "kind": "conv9d", "width": 8}, r"kind \(='conv9d'\)"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused_by_layer_and_value(edit: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_edits(separable(), [edit])


def test_the_inside_of_a_multihead_attention_is_not_taken() -> None:
    model, _ = net("encoder")
    tensors = {"encoder.layers.0.self_attn.out_proj.weight": {"0": 0}}
    with pytest.raises(InputError, match="is inside a MultiheadAttention"):
        apply_edits(model, [{"edit": "take", "lists": [[[1, "11111110"]]], "tensors": tensors}])


def test_shared_weights_must_be_taken_alike() -> None:
    model, _ = net("tied")
    tensors = {"first.weight": {"0": 0}, "second.weight": {"0": 1}}
    with pytest.raises(InputError, match=r"second\.weight is tied to another tensor"):
        apply_edits(model, [{"edit": "take", "lists": [[[1, "11111110"]], [[1, "01111111"]]], "tensors": tensors}])
