"""Float models through onnxruntime against torch, and int8 programs against their own interpreter."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import anyfit
from anyfit.errors import DataError, InputError, MissingExtra, RunError, StateError, TaskError
from anyfit.program import QuantizedNetwork, lower, magnitudes, ranges_of, trace
from anyfit.program.operations import Input, Operation, Program
from anyfit.schema import Column, Schema
from anyfit.shrink import onnx as ours
from anyfit.shrink.onnx import check_int8, export_float, export_int8, run_onnx

# ------------------------------------------------------------------ float


class Plain(anyfit.Task):
    """Whatever model it is given."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(256, 3)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image.float() / 255)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 6), nn.Linear(6, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        mask_BT1 = mask.float().unsqueeze(2)
        return self.head((self.table(ids) * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1))


def test_what_is_exported_is_what_predict_gives_for_any_number_of_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Net(), torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    model(images)  # statistics of the batch normalisation that are not those of a new one
    path = export_float(Plain(), model, {"image": images[:1]}, tmp_path / "net.onnx")
    assert model.training
    expected = model.eval()(images).detach().numpy()
    for rows in (1, 2, 5):
        np.testing.assert_allclose(run_onnx(path, {"image": images[:rows].numpy()}), expected[:rows], rtol=0, atol=1e-5)


def test_inputs_have_the_names_of_the_batch_and_the_file_says_what_it_is_of(tmp_path: Path) -> None:
    batch = {"ids": torch.randint(0, 20, (2, 7)), "mask": torch.ones(2, 7, dtype=torch.bool)}
    schema = Schema((Column("ids", "continuous"), Column("target", "categorical", categories=("no", "yes"))), "target")
    path = export_float(Plain(), Words(), batch, tmp_path / "words.onnx", schema=schema)
    session = onnxruntime.InferenceSession(str(path))
    assert [(given.name, given.type) for given in session.get_inputs()] == [("ids", "tensor(int64)"), ("mask", "tensor(bool)")]
    assert [given.name for given in session.get_outputs()] == ["logits"]
    about = session.get_modelmeta().custom_metadata_map
    assert about["anyfit.task"] == "Plain" and about["anyfit.schema"] == schema.hash() and about["anyfit.labels"] == '["no", "yes"]'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        (torch.ones(2, 3), ["input"]),
        ((torch.ones(2, 3), torch.ones(2)), ["input0", "input1"]),
        ({"x": torch.ones(2), "pair": (torch.ones(2), torch.ones(2))}, ["x", "pair_0", "pair_1"]),
    ],
)
def test_entries_are_named_by_where_they_stand(batch: Any, names: list[str]) -> None:
    assert ours._entries(batch) == names


class Doubled(anyfit.Task):
    """What it predicts depends on how often it was asked, so that an export cannot be right."""

    def predict(self, model: nn.Module, batch: Any) -> Any:
        model.calls = getattr(model, "calls", 0) + 1
        return model(batch) * model.calls


def test_a_graph_that_differs_from_torch_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"differs from torch by .* on 1 random rows; nothing was written"):
        export_float(Doubled(), nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Two(anyfit.Task):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        return {"a": batch, "b": batch}


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="predict of this task cannot be exported"):
        export_float(Plain(), Branching(), torch.ones(2, 3), tmp_path / "x.onnx")
    with pytest.raises(TaskError, match="predict of Two gave a dict; it must give one tensor"):
        export_float(Two(), nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "x.onnx")
    with pytest.raises(InputError, match=r"path \(='.*x.bin'\) must name a file that ends in .onnx"):
        export_float(Plain(), nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_names_the_command_that_installs_it(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package} is not installed; run: pip install 'anyfit\[shrink\]'"):
        export_float(Plain(), nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "x.onnx")


# ------------------------------------------------------------------ int8: single operations


def one(kind: str, shapes: list[tuple[int, ...]], shape: tuple[int, ...], seed: int = 0, **given: Any) -> tuple[Program, dict[str, Any]]:
    """A program of one operation on int8 values that a reversible quantize makes of raw bytes, and rows for it."""
    random = np.random.default_rng(seed)
    inputs = tuple(Input(f"raw{index}", "int8", each) for index, each in enumerate(shapes))
    same = {"multiplier": np.array([1]), "offset": np.array([0])}
    begin = [Operation("quantize", f"q{i}", (f"raw{i}",), f"x{i}", each, {"shift": 0}, same) for i, each in enumerate(shapes)]
    options = {key: value for key, value in given.items() if not isinstance(value, np.ndarray)}
    constants = {key: value for key, value in given.items() if isinstance(value, np.ndarray)}
    operation = Operation(kind, "op", tuple(f"x{index}" for index in range(len(shapes))), "y", shape, options, constants)
    # a reshape at the end: the result of a linear is its int8 values then
    end = Operation("reshape", "end", ("y",), "z", shape)
    scales = {f"x{index}": 0.03 + 0.01 * index for index in range(len(shapes))} | {"y": 0.07, "z": 0.07}
    rows = {each.name: random.integers(-128, 128, (40, *each.shape)).astype(np.int8) for each in inputs}
    return Program(inputs, (*begin, operation, end), "z", scales, 0.07, task="numbers"), rows


def filtered(kind: str, out: int, *into: int, seed: int = 0, power_of_two: bool = False) -> dict[str, np.ndarray]:
    """Weights that keep most results within int8 and saturate some."""
    random = np.random.default_rng(seed)
    size = int(np.prod(into))
    shift = np.full(out, 30) if not power_of_two else np.full(out, round(np.log2(size**0.5 * 80)))
    multiplier = (2.0**30 / (size**0.5 * 80) * random.uniform(0.5, 2, out)).astype(np.int64)
    found = {"weight": random.integers(-127, 128, (out, *into)).astype(np.int8), "bias": random.integers(-2000, 2000, out), "shift": shift}
    return found if power_of_two else {**found, "multiplier": multiplier}


CONV = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
CURVE = np.round(127 * np.tanh(np.arange(-128, 128) / 40)).astype(np.int8)
SCALED = {"multiplier": np.array(1717986919), "shift": np.array(34)}  # x 0.1
ONES = {
    "conv": lambda: one("conv", [(3, 9, 7)], (5, 7, 5), **filtered("conv", 5, 3, 3, 3), **CONV),
    "conv, strided": lambda: one(
        "conv",
        [(4, 9, 9)],
        (6, 5, 4),
        **filtered("conv", 6, 2, 3, 3),
        stride=(2, 2),
        padding=(1, 0, 1, 0),
        dilation=(1, 1),
        groups=2,
        low=0,
    ),
    "conv, depthwise": lambda: one(
        "conv", [(4, 9, 9)], (4, 5, 5), **filtered("conv", 4, 1, 3, 3), **{**CONV, "dilation": (2, 2), "groups": 4}
    ),
    "linear": lambda: one("linear", [(20,)], (6,), **filtered("linear", 6, 20), low=0, high=90),
    "linear, each place": lambda: one("linear", [(5, 20)], (5, 6), **filtered("linear", 6, 20)),
    "add": lambda: one("add", [(3, 4), (3, 4)], (3, 4), multiplier=np.array([700, 1300]), shift=11),
    "add, ReLU": lambda: one("add", [(3, 4), (3, 4)], (3, 4), multiplier=np.array([700, -1300]), shift=10, low=0),
    "concat": lambda: one("concat", [(2, 4), (3, 4)], (5, 4), multiplier=np.array([3, 5]), shift=np.array([2, 3]), axis=0),
    "average": lambda: one(
        "average", [(2, 6, 6)], (2, 3, 3), multiplier=np.array(1), shift=np.array(2), kernel=(2, 2), stride=(2, 2), padding=(0,) * 4
    ),
    "average, padded": lambda: one("average", [(2, 6, 6)], (2, 3, 3), kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1), **SCALED),
    "reduce": lambda: one(
        "reduce", [(4, 5, 5)], (4,), outer=4, size=25, inner=1, how="mean", multiplier=np.array(1374389535), shift=np.array(35)
    ),
    "reduce, in the middle": lambda: one("reduce", [(4, 10, 5)], (4, 5), outer=4, size=10, inner=5, how="mean", **SCALED),
}
EXACT = {
    "concat of one scale": lambda: one("concat", [(2, 4), (3, 4)], (5, 4), multiplier=np.array([1, 8]), shift=np.array([0, 3]), axis=0),
    "maximum": lambda: one("maximum", [(3, 8, 8)], (3, 4, 4), kernel=(2, 2), stride=(2, 2), padding=(0,) * 4, dilation=(1, 1)),
    "maximum, padded": lambda: one("maximum", [(3, 8, 8)], (3, 4, 4), kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1), dilation=(1, 1)),
    "maximum, cut": lambda: one("maximum", [(3, 7, 7)], (3, 4, 4), kernel=(2, 2), stride=(2, 2), padding=(0,) * 4, dilation=(1, 1)),
    "maximum, dilated": lambda: one("maximum", [(3, 8, 8)], (3, 4, 4), kernel=(3, 3), stride=(1, 1), padding=(0,) * 4, dilation=(2, 2)),
    "largest": lambda: one("reduce", [(4, 10, 5)], (4, 5), outer=4, size=10, inner=5, how="max"),
    "clamp": lambda: one("clamp", [(3, 4)], (3, 4), low=-20, high=50),
    "table": lambda: one("table", [(3, 4)], (3, 4), table=CURVE),
    "reshape": lambda: one("reshape", [(3, 4)], (2, 6)),
    "permute": lambda: one("permute", [(2, 3, 4)], (4, 2, 3), order=(2, 0, 1)),
    "slice": lambda: one("slice", [(6, 4)], (2, 4), axis=0, start=1, step=3, count=2),
    "slice, backwards": lambda: one("slice", [(6, 4)], (6, 4), axis=0, start=5, step=-1, count=6),
}


@pytest.mark.parametrize("name", ONES)
def test_an_operation_that_rounds_differs_by_one_step_at_most(name: str, tmp_path: Path) -> None:
    program, raw = ONES[name]()
    path = export_int8(program, tmp_path / "one.onnx")
    given = program.run(raw).logits
    found = np.rint(run_onnx(path, raw).reshape(given.shape) / 0.07).astype(int)
    assert np.abs(found - given).max() <= 1
    assert (found == given).mean() > 0.8, "halves alone may differ"
    assert np.ptp(given.astype(int)) > 60, "the rows reach much of the range"
    assert check_int8(program, path, raw).steps <= 1.001


@pytest.mark.parametrize("name", EXACT)
def test_an_operation_that_does_not_round_is_exact(name: str, tmp_path: Path) -> None:
    program, raw = EXACT[name]()
    path = export_int8(program, tmp_path / "one.onnx")
    given = program.run(raw).logits
    assert np.array_equal(np.rint(run_onnx(path, raw).reshape(given.shape) / 0.07), given)
    assert len(np.unique(given)) > 20


def quantizing(dtype: Any, shape: tuple[int, ...], made: tuple[int, ...], options: dict[str, Any], **constants: Any) -> Program:
    first = Operation("quantize", "q", ("raw",), "x", made, options, {name: np.asarray(value) for name, value in constants.items()})
    return Program((Input("raw", dtype, shape),), (first,), "x", {"x": 0.5}, 0.5, task="numbers")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("odd", [0, 12345])
def test_whole_numbers_are_quantized_to_the_last_bit(dtype: Any, channels: int, odd: int, tmp_path: Path) -> None:
    random, info = np.random.default_rng(1), np.iinfo(dtype)
    multiplier = random.integers(280, 350, channels) * 2 ** (46 - info.bits) + odd
    offset = -(multiplier * ((info.max + info.min) // 2)) + random.integers(-10, 10, channels) * 2**46
    program = quantizing(dtype, (3, 5, 4), (3, 5, 4), {"shift": 46, "low": -100, "high": 120}, multiplier=multiplier, offset=offset)
    raw = {"raw": random.integers(info.min, info.max, (60, 3, 5, 4), dtype=dtype, endpoint=True)}
    path = export_int8(program, tmp_path / "q.onnx")
    given = program.run(raw).logits.reshape(60, 3, 5, 4)
    assert np.array_equal(run_onnx(path, raw) / 0.5, given)
    assert {-100, 120} <= set(np.unique(given)) and len(np.unique(given)) > 100


def test_bytes_that_floats_would_round_wrongly_are_looked_up(tmp_path: Path) -> None:
    # one below each whole number by a part that float32 cannot hold
    program = quantizing("uint8", (4,), (4,), {"shift": 40}, multiplier=[2**39], offset=[-(2**39) - 1 - 2**46])
    raw = {"raw": np.arange(256, dtype=np.uint8).reshape(64, 4)}
    path = export_int8(program, tmp_path / "q.onnx")
    assert "Gather" in {node.op_type for node in onnx.load(str(path)).graph.node}
    assert np.array_equal(run_onnx(path, raw) / 0.5, program.run(raw).logits)


def test_numbers_are_quantized_to_the_last_bit_and_what_is_missing_is_zero(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    x = random.normal(0, 40, (500, 3)).astype(np.float32)
    x[random.random(x.shape) < 0.1] = np.nan
    x[0], x[1] = [np.inf, -np.inf, 1e30], [0.5, 1.5, -2.5]
    plain = quantizing("float32", (3,), (3,), {}, gain=[1, 0.7, 3.3], shift_by=[0, 4.5, -20])
    flags = {"source": (2, 0, 0), "flag": (False, False, True), "low": -127}
    columns = quantizing("float32", (3,), (3,), flags, gain=[1, 0.7, 100], shift_by=[0, 4.5, -20])
    for program in (plain, columns):
        path = export_int8(program, tmp_path / "q.onnx")
        given = program.run({"raw": x}).logits
        assert np.array_equal(run_onnx(path, {"raw": x}) / 0.5, given)
        assert (given[np.isnan(x)] == 0).any()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_ids_that_no_row_of_the_table_has_take_the_first(dtype: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    table = random.integers(-128, 128, (9, 4)).astype(np.int8)
    first = Operation("embedding", "words", ("raw",), "x", (5, 4), {}, {"table": table})
    program = Program((Input("raw", dtype, (5,)),), (first,), "x", {"x": 0.5}, 0.5, task="numbers")
    raw = random.integers(0, 12, (50, 5)).astype(dtype)
    path = export_int8(program, tmp_path / "ids.onnx")
    given = program.run({"raw": raw}).logits.reshape(50, 5, 4)
    assert np.array_equal(run_onnx(path, {"raw": raw}) / 0.5, given)
    assert (given[raw > 8] == table[0]).all() and len(given[raw > 8])


# ------------------------------------------------------------------ int8: networks


def network(power_of_two: bool = False) -> tuple[Program, dict[str, Any]]:
    """Images: convolution, ReLU, pooling, a residual sum, mean, classes."""
    random = np.random.default_rng(5)
    padded = {**CONV, "padding": (1, 1, 1, 1)}
    operations = (
        Operation(
            "quantize", "q", ("image",), "x", (1, 12, 12), {"shift": 1, "low": 0}, {"multiplier": np.array([1]), "offset": np.array([0])}
        ),
        Operation(
            "conv", "one", ("x",), "a", (8, 12, 12), {**padded, "low": 0}, filtered("conv", 8, 1, 3, 3, seed=1, power_of_two=power_of_two)
        ),
        Operation("maximum", "pool", ("a",), "b", (8, 6, 6), {"kernel": (2, 2), "stride": (2, 2), "padding": (0,) * 4, "dilation": (1, 1)}),
        Operation("conv", "two", ("b",), "c", (8, 6, 6), padded, filtered("conv", 8, 8, 3, 3, seed=2, power_of_two=power_of_two)),
        Operation("add", "sum", ("b", "c"), "d", (8, 6, 6), {"shift": 8, "low": 0}, {"multiplier": np.array([100, 180])}),
        Operation(
            "reduce",
            "mean",
            ("d",),
            "e",
            (8,),
            {"outer": 8, "size": 36, "inner": 1, "how": "mean"},
            {"multiplier": np.array(60), "shift": np.array(10)},
        ),
        Operation("linear", "head", ("e",), "f", (4,), {}, filtered("linear", 4, 8, seed=3, power_of_two=power_of_two)),
    )
    scales = {"x": 0.02, "a": 0.05, "b": 0.05, "c": 0.04, "d": 0.06, "e": 0.03, "f": 0.1}
    coarse = random.integers(0, 200, (300, 1, 3, 3)).repeat(4, 2).repeat(4, 3)  # of noise alone all rows would be of one class
    raw = {"image": (coarse + random.integers(0, 56, (300, 1, 12, 12))).astype(np.uint8)}
    program = Program(
        (Input("image", "uint8", (1, 12, 12)),), operations, "f", scales, 0.0004, ("a", "b", "c", "d"), power_of_two=power_of_two
    )
    sums = program.run(raw).accumulators
    assert sums is not None
    centred = {**operations[-1].constants, "bias": operations[-1].constants["bias"] - sums.mean(0).astype(np.int64)}
    return dataclasses.replace(program, operations=(*operations[:-1], dataclasses.replace(operations[-1], constants=centred))), raw


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_network_agrees_with_its_program(power_of_two: bool, tmp_path: Path) -> None:
    program, raw = network(power_of_two)
    path = export_int8(program, tmp_path / "net.onnx")
    found = check_int8(program, path, raw)
    assert found.rows == 300 and found.agreeing > 0.97 and 0 < found.steps < 4
    assert len(np.unique(program.run(raw).answers)) > 1
    exact, logits = program.run(raw).accumulators, run_onnx(path, raw)
    assert exact is not None and np.corrcoef(logits.reshape(-1), exact.reshape(-1) * program.result_scale)[0, 1] > 0.999
    assert np.array_equal(run_onnx(path, {"image": raw["image"][:1]}), logits[:1])


def test_the_check_sees_another_network(tmp_path: Path) -> None:
    program, raw = network()
    path = export_int8(program, tmp_path / "net.onnx")
    head = program.operations[-1]
    turned = dataclasses.replace(head, constants={**head.constants, "weight": np.roll(head.constants["weight"], 1, 0)})
    found = check_int8(dataclasses.replace(program, operations=(*program.operations[:-1], turned)), path, raw)
    assert found.agreeing < 0.6 and found.steps > 5


def test_onnxruntime_computes_the_layers_in_integers(tmp_path: Path) -> None:
    program, _ = network()
    path, optimized = export_int8(program, tmp_path / "net.onnx"), tmp_path / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 3
    onnxruntime.InferenceSession(str(path), options)
    kinds = [node.op_type for node in onnx.load(str(optimized)).graph.node]
    assert kinds.count("QLinearConv") == 2 and {"QGemm", "QLinearAdd", "NhwcMaxPool"} <= set(kinds)
    assert not {"Conv", "Gemm", "AveragePool", "QuantizeLinear", "DequantizeLinear"} & set(kinds)


def test_what_has_no_int8_form_and_what_does_not_fit_is_told(tmp_path: Path) -> None:
    program, raw = network()
    odd = dataclasses.replace(program.operations[2], kind="rnn", name="encoder")
    with pytest.raises(InputError, match=r"operation 'encoder' \(kind='rnn'\) has no int8 counterpart in ONNX"):
        export_int8(dataclasses.replace(program, operations=(*program.operations[:2], odd)), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    path = export_int8(program, tmp_path / "net.onnx")
    with pytest.raises(DataError, match=r"raw has no 'image'; .*net.onnx needs image"):
        run_onnx(path, {"picture": raw["image"]})
    with pytest.raises(DataError, match=r"raw does not fit .*net.onnx"):
        run_onnx(path, {"image": raw["image"][:, :, :5]})
    with pytest.raises(DataError, match="raw has no rows"):
        check_int8(program, path, {"image": raw["image"][:0]})
    with pytest.raises(StateError, match="does not exist"):
        run_onnx(tmp_path / "none.onnx", raw)
    path.write_bytes(b"no protobuf")
    with pytest.raises(StateError, match="is no ONNX model that onnxruntime can run"):
        run_onnx(path, raw)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.mix, self.head = nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 8, 1), nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.one(image)))
        x = torch.cat((x + torch.relu(self.norm(self.two(x))), torch.tanh(x)), 1)
        return self.head(nn.functional.avg_pool2d(nn.functional.hardswish(self.mix(x)), 2).flatten(1))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_model_that_was_lowered_and_quantized_computes_the_same(power_of_two: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randn(100, 2, 8, 8)
    network = QuantizedNetwork(lower(trace(lambda net, batch: net(batch), model, images[:1])), power_of_two=power_of_two).eval()
    with torch.no_grad():
        network.ranges.copy_(ranges_of(magnitudes(network, images)))
        expected = network(images).numpy()
    program = network.program(tuple("abcde"))
    assert {operation.kind for operation in program.operations} >= {"conv", "maximum", "add", "concat", "table", "average", "linear"}
    path = export_int8(program, tmp_path / "net.onnx")
    found = check_int8(program, path, {"input": images.numpy()})
    # halves are common where every multiplier is 1
    assert found.agreeing > 0.97 and found.steps < (2.0 if power_of_two else 0.2)
    np.testing.assert_allclose(
        run_onnx(path, {"input": images.numpy()}), expected, rtol=0, atol=found.steps * program.scales[program.result] * 1.01 + 1e-6
    )
