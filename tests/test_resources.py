"""What a prediction costs, from its graph."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import anyfit
from anyfit.errors import InputError, TaskError
from anyfit.program.operations import Input, Operation, Program
from anyfit.report.memory import draw_memory, draw_tradeoff
from anyfit.schema import Schema
from anyfit.shrink.resources import program_resources, resources
from anyfit.task import Task

TASK = Task()


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1, groups=4), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 8, 2, stride=2, groups=2), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(128, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """A stem, a block that widens and narrows beside a skip, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.narrow(torch.relu_(self.norm(self.wide(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.embed(ids))[:, 0])  # type: ignore[no-any-return]


def counted(model: nn.Module, inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.train()(inputs)  # in evaluation mode torch takes a fused encoder layer, which its counter does not know
    return int(counter.get_total_flops()) // 2


# ------------------------------------------------------------------ multiply-accumulates and parameters


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(cnn(), torch.rand(1, 1, 28, 28)), (Residual(), torch.rand(1, 3, 32, 32)), (Attending(), torch.arange(7)[None])],
    ids=["cnn", "residual", "transformer"],
)
def test_multiply_accumulates_are_half_of_torchs_flops(model: nn.Module, inputs: Tensor) -> None:
    found = resources(TASK, model, inputs)
    assert found.macs == counted(model, inputs) > 0
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.unknown == ()
    assert found.macs == sum(row.macs for row in found.rows)
    assert found.parameters == sum(row.parameters for row in found.rows)
    for kind, footprint in found.footprints.items():
        assert footprint.weights.bytes == sum(row.bytes[kind] for row in found.rows)
        assert footprint.arena.lower_bound == max(row.live[kind] for row in found.rows)


class Product(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda x: x @ x.transpose(1, 2), 4 * 4 * 6),
        (lambda x: torch.bmm(x, x.transpose(1, 2)), 4 * 4 * 6),
        (lambda x: torch.addmm(torch.ones(6), x[0].T, x[0]), 6 * 6 * 4),
        (lambda x: torch.einsum("bij,bkj->bik", x, x), 4 * 4 * 6),
        (lambda x: torch.einsum("...ij,...ik", x, x), 6 * 6 * 4),
        (lambda x: torch.einsum("bij->bji", x), 0),
        (lambda x: torch.mv(x[0], x[0, 0]), 4 * 6),
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x), 2 * 4 * 4 * 6),
        (lambda x: x.softmax(1) * torch.sigmoid(x) + x.amax(2, keepdim=True), 0),
    ],
)
def test_products_are_counted(function: Any, macs: int) -> None:
    found = resources(TASK, Product(function), torch.rand(1, 4, 6))
    assert (found.macs, found.unknown) == (macs, ())


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_are_counted(kind: Any, gates: int) -> None:
    model = kind(5, 7, num_layers=2, bidirectional=True, batch_first=True)
    found = resources(TASK, Product(lambda x: x), torch.rand(1, 9, 5))
    assert found.macs == 0
    found = resources(TASK, model, torch.rand(1, 9, 5))
    first, second = 7 * gates * (5 + 7), 7 * gates * (14 + 7)
    assert found.macs == 9 * 2 * (first + second)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    cell = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}[kind](5, 7)
    assert resources(TASK, cell, torch.rand(1, 5)).macs == first


def test_an_operation_without_a_rule_is_listed() -> None:
    found = resources(TASK, Product(lambda x: torch.linalg.inv(x @ x.transpose(1, 2)) + torch.cdist(x, x)), torch.rand(1, 4, 6))
    assert found.unknown == ("cdist", "linalg_inv")
    assert found.macs == 4 * 4 * 6


def test_what_no_output_needs_costs_nothing() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(6, 2), nn.Linear(6, 1000)

        def forward(self, x: Tensor) -> Tensor:
            self.other(x)
            return self.used(x)  # type: ignore[no-any-return]

    found = resources(TASK, Both(), torch.rand(1, 6))
    assert (found.parameters, found.macs, found.footprints["float"].arena.bytes) == (14, 12, 32)


# ------------------------------------------------------------------ memory


def test_a_residual_network_holds_its_skip() -> None:
    found = resources(TASK, Residual(), torch.rand(1, 3, 32, 32))
    int8, whole = found.footprints["int8"], found.footprints["float"]
    assert int8.arena.lower_bound == int8.arena.bytes == 32_768  # skip, wide map and what comes of it
    assert int8.per_layer == 24_576  # what the largest input and output of a layer would say
    assert (whole.arena.bytes, whole.per_layer) == (4 * 32_768, 4 * 24_576)
    assert int8.arena.exact and whole.arena.exact
    narrow = next(row for row in found.rows if row.layer == "narrow")
    assert narrow.live == {"int8": 32_768, "float": 131_072}


def test_a_plain_network_holds_an_input_and_an_output() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(12 * 14 * 14, 10),
    )  # fmt: skip
    found = resources(TASK, model, torch.rand(1, 1, 28, 28))
    whole = found.footprints["float"]
    assert whole.arena.bytes == whole.per_layer == 2 * 12 * 28 * 28 * 4 == 75_264
    assert found.footprints["int8"].arena.bytes == 2 * 12 * 28 * 28
    operations = [row.operation for row in found.rows]
    assert operations == ["conv2d", "batch_norm", "conv2d", "relu", "max_pool2d", "linear"]  # no views, nor what writes into its input
    assert [row.layer for row in found.rows] == ["0", "1", "3", "4", "5", "7"]
    assert [row.shape for row in found.rows][-2:] == [(12, 14, 14), (10,)]


def test_views_are_the_memory_that_they_view() -> None:
    whole = resources(TASK, Product(lambda x: x.reshape(-1).unsqueeze(0).detach().contiguous().expand(1, 24).relu()), torch.rand(1, 4, 6))
    assert whole.footprints["float"].arena.bytes == 96  # relu takes the input's place
    sliced = resources(TASK, Product(lambda x: torch.cat([x[:, :1].relu(), x.mean(1, keepdim=True)], 1)), torch.rand(1, 4, 6))
    assert sliced.footprints["float"].arena.bytes == 96 + 24 + 24  # the slice keeps all of the input, and works beside it
    copied = resources(TASK, Product(lambda x: x.transpose(1, 2).reshape(1, 24)), torch.rand(1, 4, 6))
    assert copied.footprints["float"].arena.bytes == 192
    parts = resources(TASK, Product(lambda x: x.chunk(2, 2)[0] @ x.chunk(2, 2)[1].transpose(1, 2)), torch.rand(1, 4, 6))
    assert parts.footprints["float"].arena.bytes == 96 + 64


def test_who_writes_into_its_input_takes_no_memory() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)
        y[:, 0] = (x @ x.transpose(1, 2))[:, 0, :1]  # the product is needed, though nobody reads what is assigned
        return y.amax(1)

    found = resources(TASK, Product(function), torch.rand(1, 4, 6))
    assert found.macs == 96
    assert [row.operation for row in found.rows][-1] == "amax"
    assert found.footprints["float"].arena.bytes == 96 + 64  # the product first, then y in the place of x


def test_ids_and_raw_inputs_keep_their_size() -> None:
    found = resources(TASK, Attending(), torch.arange(7)[None])
    embedding = found.rows[0]
    assert (embedding.operation, embedding.live) == ("embedding", {"float": 7 * 8 + 7 * 16 * 4, "int8": 7 * 8 + 7 * 16})
    pixels = resources(TASK, Product(lambda x: x.float().sum((1, 2))), torch.zeros(1, 4, 6, dtype=torch.uint8))
    assert pixels.footprints["float"].arena.bytes == 24 + 96
    assert pixels.footprints["int8"].arena.bytes == 24 + 1  # made of the pixels in their place


def test_of_several_outputs_those_count_that_somebody_takes() -> None:
    model = nn.LSTM(5, 7, batch_first=True)
    last = resources(TASK, Product(lambda x: x), torch.rand(1, 9, 5)).footprints["float"].arena.bytes
    assert last == 9 * 5 * 4

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = model

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]  # type: ignore[no-any-return]

    states = 2 * 7 * 4
    assert resources(TASK, Last(), torch.rand(1, 9, 5)).footprints["float"].arena.bytes == 9 * 5 * 4 + states + 9 * 7 * 4


# ------------------------------------------------------------------ weights


def test_zeros_are_left_out_where_their_places_cost_less() -> None:
    model = nn.Linear(64, 32)
    dense = resources(TASK, model, torch.rand(1, 64)).footprints["float"].weights
    assert (dense.values, dense.indices, dense.biases, dense.bytes) == (64 * 32 * 4, 0, 128, dense.dense)
    with torch.no_grad():
        model.weight[:, 8:] = 0
    found = resources(TASK, model, torch.rand(1, 64))
    sparse = found.footprints["float"].weights
    assert (sparse.values, sparse.indices, sparse.biases, sparse.dense) == (8 * 32 * 4, 64 * 32 // 8, 128, dense.dense)
    assert found.nonzero == 8 * 32 + 32
    int8 = found.footprints["int8"].weights
    assert (int8.values, int8.indices, int8.scales, int8.biases) == (8 * 32, 64 * 32 // 8, 5 * 32, 4 * 32)
    with torch.no_grad():
        model.weight[1:] = 0
    few = resources(TASK, model, torch.rand(1, 64)).footprints["int8"].weights
    assert (few.values, few.indices) == (8, 8 + 33)  # a column for each value, and where each row begins
    with torch.no_grad():
        model.weight.fill_(1)
    model.weight.data[0, 0] = 0
    assert resources(TASK, model, torch.rand(1, 64)).footprints["int8"].weights.indices == 0  # one zero does not pay for a bitmap


def test_a_batch_norm_goes_into_the_layer_before_it() -> None:
    folded = resources(TASK, nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)), torch.rand(1, 3, 4, 4))
    assert folded.footprints["int8"].weights.bytes == 24 + 8 * 5 + 8 * 4
    assert folded.footprints["float"].weights.bytes == 4 * (24 + 4 * 8)
    alone = resources(TASK, nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), torch.rand(1, 3, 4, 4))
    assert alone.footprints["int8"].weights.bytes == 3 * 8


def test_tied_weights_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))  # type: ignore[no-any-return]

    found = resources(TASK, Tied(), torch.arange(3)[None])
    assert found.parameters == 120
    assert found.footprints["float"].weights.bytes == 480
    assert found.macs == 3 * 120


# ------------------------------------------------------------------ integer programs


def program() -> Program:
    """A convolution beside a skip, and a linear layer, on raw pixels."""
    whole, generator = np.int32, np.random.default_rng(0)

    def scaled(channels: int) -> dict[str, np.ndarray[Any, Any]]:
        return {
            "bias": np.zeros(channels, whole),
            "multiplier": np.full(channels, 1 << 20, whole),
            "shift": np.full(channels, 28, np.uint8),
        }

    def weight(*shape: int) -> np.ndarray[Any, Any]:
        return generator.integers(1, 100, shape).astype(np.int8)

    window = {"stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1, "low": 0, "high": 127}
    operations = (
        Operation(
            "quantize", "input", ("image",), "pixels", (1, 8, 8), {"shift": 20, "low": -128, "high": 127},
            {"multiplier": np.full(1, 1 << 19, whole), "offset": np.zeros(1, whole)},
        ),
        Operation("conv", "stem", ("pixels",), "stem", (4, 8, 8), window, {"weight": weight(4, 1, 3, 3), **scaled(4)}),
        Operation("conv", "body", ("stem",), "body", (4, 8, 8), window, {"weight": weight(4, 4, 3, 3), **scaled(4)}),
        Operation(
            "add", "add", ("stem", "body"), "sum", (4, 8, 8), {"shift": 20, "low": -128, "high": 127},
            {"multiplier": np.full(2, 1 << 19, whole)},
        ),
        Operation("reshape", "flat", ("sum",), "flat", (256,)),
        Operation("linear", "head", ("flat",), "logits", (10,), {"low": -128, "high": 127}, {"weight": weight(10, 256), **scaled(10)}),
    )  # fmt: skip
    scales = {operation.output: 0.1 for operation in operations}
    return Program((Input("image", "uint8", (1, 8, 8)),), operations, "logits", scales, 0.01)


def test_a_program_costs_its_constants_and_its_arena() -> None:
    found = program_resources(program())
    assert set(found.footprints) == {"int8"}
    assert found.parameters == 36 + 4 + 144 + 4 + 2560 + 10
    assert found.macs == 64 * 4 * 9 + 64 * 4 * 36 + 2560
    footprint = found.footprints["int8"]
    assert (footprint.weights.values, footprint.weights.biases) == (36 + 144 + 2560, 4 * 18)
    assert 0 < footprint.weights.scales < 8 * 18 + 16
    assert footprint.arena.bytes >= 512  # the skip and the other branch; their sum takes the place of one
    assert [row.operation for row in found.rows] == ["quantize", "conv", "conv", "add", "linear"]
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    assert found.memory()["type"] == "int8"


# ------------------------------------------------------------------ the door


class OnlyLoss(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


def test_a_model_that_gives_only_its_loss_is_refused() -> None:
    with pytest.raises(TaskError, match="returns only its loss, so there is nothing to predict with; define predict"):
        resources(TASK, OnlyLoss(), torch.rand(1, 4))


def test_a_bare_model_needs_a_row() -> None:
    with pytest.raises(InputError, match=r"inputs \(=None\) of a model that comes without its schema"):
        resources(TASK, nn.Linear(2, 2))
    with pytest.raises(TaskError, match="must have one row"):
        resources(TASK, nn.Linear(2, 2), torch.rand(3, 2))


def test_the_record_is_plain_json() -> None:
    found = resources(TASK, Residual(), torch.rand(1, 3, 32, 32))
    record = found.to_json()
    assert json.loads(json.dumps(record)) == record
    assert record["kind"] == "estimated"
    assert record["int8"]["activations_bytes"] == 32_768
    memory = found.memory("int8")
    assert record["memory"]["type"] == "float"
    assert len(memory["steps"]) == len(found.rows)
    for position in range(len(memory["steps"])):
        live = [value for value in memory["values"] if value["first"] <= position <= value["last"]]
        assert max(value["offset"] + value["bytes"] for value in live) <= memory["bytes"]
        ends = sorted((value["offset"], value["offset"] + value["bytes"]) for value in live)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert max(
        sum(value["bytes"] for value in memory["values"] if value["first"] <= position <= value["last"]) for position in range(len(found.rows))
    ) == memory["lower_bound"]  # fmt: skip


class Digits(Task):
    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_run_and_its_state_cost_what_their_model_costs() -> None:
    run = anyfit.fit(Digits(), (torch.rand(20, 6), torch.arange(20) % 3), epochs=1)
    plain = resources(run.task, run.model, torch.zeros(1, 6))
    assert resources(run.task, run) == resources(run.task, run.state)  # the row is that of the schema
    assert resources(run.task, run).to_json()["float"] == plain.to_json()["float"]
    assert (plain.parameters, plain.macs) == (56 + 27, 48 + 24)


# ------------------------------------------------------------------ pictures


def picture(path: Path) -> NDArray[Any]:
    assert path.read_bytes().startswith(b"\x89PNG")
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def near(pixels: NDArray[Any], colour: str) -> int:
    """How many pixels have a colour."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(-1) < 8).sum())


def test_memory_is_drawn_to_scale(tmp_path: Path) -> None:
    found = resources(TASK, Residual(), torch.rand(1, 3, 32, 32)).memory("int8")
    draw_memory(found, tmp_path / "memory.png")
    before = picture(tmp_path / "memory.png")
    assert near(before, "#c2571a") > 1000  # the bar of the peak, and the arena's line
    taller = {**found, "values": [{**value, "bytes": value["bytes"] // 8} for value in found["values"]]}
    draw_memory(taller, tmp_path / "less.png")
    filled = [int((picture(tmp_path / name).min(-1) < 250).sum()) for name in ("memory.png", "less.png")]
    assert filled[1] < 0.6 * filled[0]


def test_strange_names_and_many_operations_can_be_drawn(tmp_path: Path) -> None:
    steps = [{"layer": f"层 $x_{index}$", "operation": "conv2d"} for index in range(90)]
    values = [
        {"name": f"v{index}", **step, "offset": 10 * (index % 3), "bytes": 10, "first": index, "last": min(index + 1, 89)}
        for index, step in enumerate(steps)
    ] + [{"name": "s", "layer": "s", "operation": "scratch", "offset": 30, "bytes": 0, "first": 2, "last": 2}]
    draw_memory({"type": "int8", "bytes": 31, "lower_bound": 20, "exact": True, "steps": steps, "values": values}, tmp_path / "many.png")
    assert picture(tmp_path / "many.png").shape[1] < 1700
    draw_memory({"type": "float", "bytes": 0, "lower_bound": 0, "steps": [], "values": []}, tmp_path / "empty.png")
    picture(tmp_path / "empty.png")


def test_the_tradeoff_tells_measured_from_estimated(tmp_path: Path) -> None:
    stages = [
        {"stage": "float", "accuracy": 0.99, "bytes": 176_424, "kind": "estimated"},
        {"stage": "int8", "accuracy": 0.98, "bytes": 6_480, "kind": "estimated"},
        {"stage": "C artifact", "accuracy": 0.98, "bytes": 6_480, "kind": "measured"},  # at the same place
        {"stage": "broken", "accuracy": None, "bytes": 10},
    ]
    draw_tradeoff(stages, tmp_path / "both.png")
    draw_tradeoff([{**stage, "kind": "measured"} for stage in stages], tmp_path / "measured.png")
    hollow, filled = (near(picture(tmp_path / f"{name}.png"), "#2866b1") for name in ("both", "measured"))
    assert 0 < hollow < filled
    draw_tradeoff([{"stage": "float", "mse": 12.5, "bytes": 10}], tmp_path / "one.png", metric="mse")
    draw_tradeoff([], tmp_path / "none.png")
    picture(tmp_path / "one.png")
    picture(tmp_path / "none.png")
