"""A model as int8 operations: lowered layers compute what the model computes, integers what the layers compute, within what int8 can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from anyfit.errors import DataError, InputError, StateError, TaskError
from anyfit.program import QuantizedNetwork, describe_row, equalize, lower, magnitudes, ranges_of, row_of, trace
from anyfit.program.network import _fixed
from anyfit.program.operations import requantized

IMAGE = (3, 9, 8)


class Module(nn.Module):
    """A model from a function of itself and its input."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def normal(batch_norm: Any) -> Any:
    """A batch norm that has seen something."""
    generator = torch.Generator().manual_seed(3)
    for tensor, low, high in (
        (batch_norm.running_mean, -1, 1),
        (batch_norm.running_var, 0.3, 3),
        (batch_norm.weight, 0.3, 2),
        (batch_norm.bias, -1, 1),
    ):
        tensor.data.uniform_(low, high, generator=generator)
    return batch_norm


def head(size: int, call: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> Module:
    return Module(lambda self, x: self.head(call(self, x).flatten(1)), head=nn.Linear(size, 4), **modules)


def lowered(model: nn.Module, row: Any) -> QuantizedNetwork:
    return QuantizedNetwork(lower(trace(lambda model, batch: model(batch), model.eval(), row))).eval()


def calibrated(network: QuantizedNetwork, batch: Any) -> QuantizedNetwork:
    with torch.no_grad():
        network.ranges.copy_(ranges_of(magnitudes(network, batch)))
    return network


def images(rows: int = 40, shape: tuple[int, ...] = IMAGE) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(5))


Conv = nn.Conv2d
MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: head(5 * 7 * 6, lambda m, x: m.c(x).relu(), c=Conv(3, 5, 3)),
    "stride, padding, dilation": lambda: head(5 * 5 * 4, lambda m, x: m.c(x).relu(), c=Conv(3, 5, 3, 2, 1)),
    "dilation": lambda: head(5 * 5 * 4, lambda m, x: functional.relu6(m.c(x)), c=Conv(3, 5, 3, dilation=2)),
    "depthwise": lambda: head(6 * 9 * 8, lambda m, x: m.p(m.c(x)).relu(), c=Conv(3, 6, 3, padding=1, groups=3), p=Conv(6, 6, 1)),
    "same, even kernel": lambda: head(4 * 9 * 8, lambda m, x: m.c(x).relu(), c=Conv(3, 4, (4, 2), padding="same")),
    "without bias": lambda: head(4 * 9 * 8, lambda m, x: m.c(x), c=Conv(3, 4, 1, bias=False)),
    "batch norm behind": lambda: head(4 * 7 * 6, lambda m, x: m.b(m.c(x)).relu(), c=Conv(3, 4, 3), b=normal(nn.BatchNorm2d(4))),
    "batch norm before": lambda: head(4 * 9 * 8, lambda m, x: m.c(m.b(x)), c=Conv(3, 4, 3, padding=1), b=normal(nn.BatchNorm2d(3))),
    "batch norm alone": lambda: head(3 * 9 * 8, lambda m, x: m.b(m.c(x).relu()), c=Conv(3, 3, 1), b=normal(nn.BatchNorm2d(3))),
    "residual": lambda: head(3 * 9 * 8, lambda m, x: (m.c(x).relu() + 0.5 * x).relu(), c=Conv(3, 3, 3, padding=1)),
    "difference": lambda: head(3 * 9 * 8, lambda m, x: m.c(x) - m.d(x), c=Conv(3, 3, 1), d=Conv(3, 3, 1)),
    "concat": lambda: head(7 * 9 * 8, lambda m, x: torch.cat((m.c(x).relu(), x * 3), 1), c=Conv(3, 4, 1)),
    "max pool": lambda: head(3 * 4 * 4, lambda m, x: functional.max_pool2d(x, 3, 2, ceil_mode=True)),
    "max pool padded": lambda: head(3 * 5 * 4, lambda m, x: functional.max_pool2d(m.c(x), 3, 2, 1), c=Conv(3, 3, 1)),
    "average pool": lambda: head(3 * 4 * 4, lambda m, x: functional.avg_pool2d(x, 2)),
    "average pool padded": lambda: head(3 * 5 * 4, lambda m, x: functional.avg_pool2d(x, 3, 2, 1)),
    "adaptive": lambda: head(3 * 3 * 2, lambda m, x: functional.adaptive_avg_pool2d(x, (3, 2))),
    "global mean": lambda: head(6, lambda m, x: m.c(x).relu().mean((2, 3)), c=Conv(3, 6, 3)),
    "global max": lambda: head(6, lambda m, x: m.c(x).amax((2, 3)), c=Conv(3, 6, 3)),
    "sum": lambda: head(6 * 7, lambda m, x: m.c(x).relu().sum(-1), c=Conv(3, 6, 3)),
    "pad": lambda: head(4 * 8 * 9, lambda m, x: m.c(functional.pad(x, (2, 1, 0, 1))), c=Conv(3, 4, 3)),
    "permute": lambda: head(9 * 8 * 3, lambda m, x: m.c(x).permute(0, 2, 3, 1), c=Conv(3, 3, 1)),
    "slice": lambda: head(3 * 4 * 4, lambda m, x: m.c(x)[:, :, 1::2, 2:6], c=Conv(3, 3, 1)),
    "chunks": lambda: head(3 * 8 * 2, lambda m, x: torch.cat([part.amax(2) for part in m.c(x).chunk(2, 1)], 1), c=Conv(3, 6, 1)),
    "unbound": lambda: head(3 * 9, lambda m, x: sum(m.c(x).unbind(3)[1:4]), c=Conv(3, 3, 1)),
    "select": lambda: head(3 * 8, lambda m, x: m.c(x)[:, :, -1], c=Conv(3, 3, 1)),
    "perceptron": lambda: Module(
        lambda m, x: m.o(m.b(m.h(x.flatten(1)).relu()).clamp(-1, 1)), h=nn.Linear(216, 20), b=normal(nn.BatchNorm1d(20)), o=nn.Linear(20, 4)
    ),
    "convolution of steps": lambda: head(
        5 * 3 * 2, lambda m, x: functional.max_pool1d(m.c(x.flatten(2)).relu(), 10).flatten(1)[:, :30], c=nn.Conv1d(3, 5, 11, padding=5)
    ),
    "linear on steps": lambda: head(27 * 5, lambda m, x: m.c(x.reshape(-1, 27, 8)), c=nn.Linear(8, 5)),
    "rnn": lambda: head(6, lambda m, x: m.r(x.reshape(-1, 27, 8))[1][-1], r=nn.RNN(8, 6, batch_first=True)),
    "rnn of two layers": lambda: head(27 * 6, lambda m, x: m.r(x.reshape(-1, 27, 8))[0], r=nn.RNN(8, 6, 2, batch_first=True)),
    "rnn with relu": lambda: head(
        4, lambda m, x: m.r(x.reshape(-1, 27, 8) * 0.3)[0][:, -1], r=nn.RNN(8, 4, nonlinearity="relu", batch_first=True)
    ),
}
for function in (
    torch.sigmoid,
    torch.tanh,
    functional.gelu,
    functional.silu,
    functional.hardswish,
    functional.elu,
    functional.leaky_relu,
    functional.softplus,
    torch.abs,
):
    MODELS[f"function {function.__name__}"] = lambda function=function: head(4 * 7 * 6, lambda m, x: function(m.c(x)), c=Conv(3, 4, 3))


def standardized() -> nn.Module:
    model = head(4 * 7 * 6, lambda m, x: m.c((x - m.mean) * m.scale), c=Conv(3, 4, 3))
    model.register_buffer("mean", torch.tensor([0.5, -1.0, 0.0])[:, None, None])
    model.register_buffer("scale", torch.tensor([2.0, 0.5, 1.0])[:, None, None])
    return model


MODELS["standardized"] = standardized


@pytest.mark.parametrize("name", MODELS)
def test_integers_compute_what_the_model_computes(name: str) -> None:
    torch.manual_seed(1)
    model, batch = MODELS[name]().eval(), images()
    network = lowered(model, batch[:1])
    with torch.no_grad():
        expected = model(batch)
        floats = network.float_values(batch)[network.plan.result].reshape(expected.shape)
    assert torch.allclose(floats, expected, rtol=1e-4, atol=1e-5)
    given = calibrated(network, batch)(batch)
    noise = float((given - expected).square().mean().sqrt() / expected.std())
    assert noise < 0.06, noise  # of int8, once or a few times
    program = network.program()
    result = program.run({"input": batch.numpy()})
    assert program.accumulates
    assert np.allclose(result.accumulators.astype(np.float64) * program.result_scale, given.detach().numpy(), atol=1e-6)
    assert np.array_equal(result.answers, given.argmax(1).numpy())


@pytest.mark.parametrize("name", ["residual", "batch norm behind", "depthwise", "rnn", "concat"])
def test_training_follows_the_integers_and_reaches_every_weight(name: str) -> None:
    torch.manual_seed(1)
    batch = images()
    network = calibrated(lowered(MODELS[name](), batch[:1]), batch)
    exact = network(batch)
    network.train()
    near = network(batch)
    assert float((near - exact).detach().square().mean().sqrt() / exact.std()) < 0.02
    near.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert (key == "ranges") == (parameter.grad is None), key
        assert parameter.grad is None or bool(parameter.grad.any()), key


def test_words_and_codes_are_looked_up() -> None:
    torch.manual_seed(1)
    model = Module(
        lambda m, x: m.head(torch.cat((m.a(x[:, 0]), m.b(x[:, 2])), 1).relu()),
        a=nn.Embedding(7, 3),
        b=nn.Embedding(4, 2),
        head=nn.Linear(5, 3),
    )
    batch = torch.randint(0, 4, (50, 3))
    network = calibrated(lowered(model, batch[:1]), batch)
    assert [layer.options["source"] for layer in network.plan.layers if layer.kind == "embedding"] == [[0], [2]]
    with torch.no_grad():
        expected = model.eval()(batch)
    assert float((network(batch) - expected).abs().max()) < 0.03
    outside = network.program().run({"input": np.array([[-1, 0, 99]], np.int32)})
    inside = network.program().run({"input": np.array([[0, 0, 0]], np.int32)})
    assert np.array_equal(outside.accumulators, inside.accumulators)  # what is in no table is its first row


def test_bytes_of_pixels_are_inputs() -> None:
    torch.manual_seed(1)
    model = head(4 * 7 * 6, lambda m, x: m.c((x - 30.0) / 60.0).relu(), c=Conv(3, 4, 3))
    batch = torch.randint(0, 256, (40, *IMAGE), dtype=torch.uint8)
    network = calibrated(lowered(model, batch[:1]), batch)
    first = network.program().operations[0]
    assert network.program().inputs[0].dtype == "uint8" and first.kind == "quantize" and first.constants["multiplier"].dtype == np.int32
    with torch.no_grad():
        assert float((network(batch) - model.eval()(batch)).abs().max()) < 0.05


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "group_norm": (lambda: head(216, lambda m, x: m.n(x), n=nn.GroupNorm(1, 3)), r"group_norm \(layer 'n'\).*BatchNorm2d"),
    "lstm": (
        lambda: head(6, lambda m, x: m.r(x.reshape(-1, 27, 8))[0][:, -1], r=nn.LSTM(8, 6, batch_first=True)),
        r"lstm \(layer 'r'\).*nn.RNN",
    ),
    "softmax": (lambda: Module(lambda m, x: m.h(x.flatten(1)).softmax(1), h=nn.Linear(216, 3)), "softmax.*logits"),
    "product": (lambda: head(216, lambda m, x: x * x), "mul.*two activations"),
    "bidirectional": (
        lambda: head(12, lambda m, x: m.r(x.reshape(-1, 27, 8))[0][:, -1], r=nn.RNN(8, 6, batch_first=True, bidirectional=True)),
        "bidirectional",
    ),
    "batch moved": (lambda: head(216, lambda m, x: x.permute(1, 0, 2, 3).permute(1, 0, 2, 3)), "batch dimension"),
    "uneven pooling": (lambda: head(12, lambda m, x: functional.adaptive_avg_pool2d(x, 2)), "windows have different sizes"),
    "attention": (
        lambda: head(216, lambda m, x: m.a(*[x.reshape(-1, 27, 8)] * 3)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)),
        "no int8 form",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_int8_form_is_refused_by_name(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(TaskError, match=words):
        lowered(make(), images(1))


def test_a_model_that_branches_on_values_cannot_be_traced() -> None:
    model = Module(lambda m, x: m.h(x.flatten(1)) if x.sum() > 0 else x.flatten(1), h=nn.Linear(216, 3))
    with pytest.raises(TaskError, match=r"cannot be traced.*without branches on values"):
        lowered(model, images(1))
    with pytest.raises(TaskError, match="one row"):
        lowered(model, images(2))


def test_shapes_that_follow_values_are_refused() -> None:
    model = head(1, lambda m, x: x[x > 0].sum().reshape(1, 1))
    with pytest.raises(TaskError, match=r"follows the values of a row .*dynamic"):
        lowered(model, images(1))


def test_ranges_add_up_over_any_parts() -> None:
    torch.manual_seed(1)
    batch = images(60)
    network = lowered(MODELS["residual"](), batch[:1])
    whole = magnitudes(network, batch)
    assert torch.equal(whole, magnitudes(network, batch[:17]) + magnitudes(network, batch[17:]))
    seen = network.float_values(batch)
    for name, place in network.places.items():
        channels = seen[name].detach().reshape(60, place.stop - place.start, -1).abs().amax((0, 2)).double()
        found = ranges_of(whole)[place]
        assert bool((found >= channels).all()) and bool((found <= channels * 2 ** (1 / 16) + 1e-9).all())


def test_channels_of_unlike_ranges_are_evened_out() -> None:
    torch.manual_seed(1)
    model = head(8 * 49, lambda m, x: m.b(m.a(x).relu()).relu(), a=Conv(3, 8, 1), b=Conv(8, 8, 3, padding=0))
    model.head = nn.Linear(8 * 7 * 6, 4)
    with torch.no_grad():
        model.a.weight.mul_(torch.logspace(-2, 1, 8)[:, None, None, None])
        model.b.weight.div_(torch.logspace(-2, 1, 8)[None, :, None, None])
        model.a.bias.zero_()
    batch = images()
    with torch.no_grad():
        expected = model.eval()(batch)
    network = calibrated(lowered(model, batch[:1]), batch)
    before = float((network(batch) - expected).square().mean().sqrt())
    assert equalize(network) == 2
    floats = network.float_values(batch)[network.plan.result]
    assert torch.allclose(floats, expected, rtol=1e-3, atol=1e-4)
    assert bool((network.ranges >= 0).all())
    after = float((network(batch) - expected).square().mean().sqrt())
    assert after < before / 4, (before, after)


def test_powers_of_two_need_no_multiplier() -> None:
    torch.manual_seed(1)
    model, batch = MODELS["batch norm behind"]().eval(), images()
    plan = lower(trace(lambda model, batch: model(batch), model, batch[:1]))
    network = calibrated(QuantizedNetwork(plan, power_of_two=True).eval(), batch)
    program = network.program()
    assert not [o for o in program.operations if o.kind in ("conv", "linear", "rnn") and "multiplier" in o.constants]
    with torch.no_grad():
        expected = model(batch)
    assert float((network(batch) - expected).square().mean().sqrt() / expected.std()) < 0.04


def test_a_bias_far_larger_than_its_weights_still_fits() -> None:
    torch.manual_seed(1)
    model = head(4 * 9 * 8, lambda m, x: m.c(x).relu(), c=Conv(3, 4, 1))
    with torch.no_grad():
        model.c.weight.mul_(1e-9)
        model.c.bias.fill_(1e4)
        model.c.weight[0].zero_()
    batch = images()
    network = calibrated(lowered(model, batch[:1]), batch)
    constants = network.program().operations[1].constants
    assert int(np.abs(constants["bias"].astype(np.int64)).max()) <= 2**29
    with torch.no_grad():
        assert torch.allclose(network(batch), model.eval()(batch), rtol=0.02)


def test_a_network_without_ranges_says_what_to_do() -> None:
    network = lowered(MODELS["conv"](), images(1))
    with pytest.raises(StateError, match=r"not calibrated.*quantize"):
        network(images(2))
    with pytest.raises(StateError, match="not calibrated"):
        network.program()


def test_raw_rows_of_another_kind_are_refused() -> None:
    batch = images()
    program = calibrated(lowered(MODELS["conv"](), batch[:1]), batch).program()
    with pytest.raises(InputError, match="'input' is float64"):
        program.run({"input": batch.double().numpy()})
    with pytest.raises(InputError, match="no 'input'"):
        program.run({"image": batch.numpy()})


@pytest.mark.parametrize(
    "batch", [torch.zeros(1, 3), {"a": torch.zeros(1, 2, dtype=torch.uint8), "b": torch.zeros(1)}, (torch.zeros(1, 4),)]
)
def test_a_row_is_made_again_from_its_description(batch: Any) -> None:
    again = row_of(describe_row(batch))
    assert type(again) is type(batch)
    assert describe_row(again) == describe_row(batch)


def test_requantizing_rounds_half_up() -> None:
    sums = torch.tensor([-5, -3, -1, 1, 3, 5, 2**31 - 1, -(2**31)])
    one = torch.tensor(1)
    assert requantized(sums, one, one, -128, 127).tolist() == [-2, -1, 0, 1, 2, 3, 127, -128]
    for ratio in (1e-9, 0.3, 0.9999999999, 1.0, 17.5):
        multiplier, shift = _fixed(ratio)
        assert 0 < multiplier < 2**31 and 0 <= shift <= 62
        assert multiplier / 2**shift == pytest.approx(ratio, rel=1e-8)


# ------------------------------------------------- what was wrong once


def compared(model: nn.Module, batch: Any, noise: float = 0.06, equal: bool = False) -> QuantizedNetwork:
    """Layers compute what the model computes, and int8 nearly so."""
    network = lowered(model, batch[:1] if isinstance(batch, Tensor) else {name: part[:1] for name, part in batch.items()})
    with torch.no_grad():
        expected = model.eval()(batch)
        calibrated(network, batch)
        if equal:
            equalize(network)
        floats = network.float_values(batch)[network.plan.result].reshape(expected.shape)
        assert torch.allclose(floats, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        given = network(batch)
    assert float((given - expected).square().mean().sqrt() / expected.std().clamp(min=1e-9)) < noise
    return network


def test_a_bound_on_the_result_holds_in_integers() -> None:
    torch.manual_seed(1)
    batch = torch.randn(60, 4)
    for bound in (nn.ReLU(), nn.Hardtanh(-0.1, 0.1)):
        model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1), bound)
        network = compared(model, batch, 0.1)
        assert not network.program().accumulates
        with torch.no_grad():
            assert float(network(batch).min()) >= float(model(batch).min()) - 0.01


def test_equalizing_keeps_layers_on_rows() -> None:
    torch.manual_seed(1)
    compared(head(4 * 9 * 5, lambda m, x: m.b(m.a(x).relu()), a=Conv(3, 4, 1), b=nn.Linear(8, 5)), images(), equal=True)
    compared(head(3 * 9 * 5, lambda m, x: m.b(m.a(x).relu()).relu(), a=nn.Linear(8, 3), b=nn.Linear(3, 5)), images(), equal=True)


def test_sums_never_leave_an_accumulator() -> None:
    torch.manual_seed(1)
    model = nn.Linear(150_528, 2)
    with torch.no_grad():
        model.weight.uniform_(0.99, 1.0)
    batch = torch.rand(3, 150_528) * 0.01 + 0.99
    network = lowered(model, batch[:1])
    calibrated(network, batch)
    constants = network.program().operations[-1].constants
    largest = np.abs(constants["weight"].astype(np.int64)).sum(1) * 128 + np.abs(constants["bias"].astype(np.int64))
    assert int(largest.max()) < 2**31
    result = network.program().run({"input": batch.numpy()})
    assert np.allclose(result.accumulators * network.program().result_scale, network(batch).numpy())
    with torch.no_grad():
        assert torch.allclose(network(batch), model(batch), rtol=0.02)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_values_of_any_size_have_ranges(scale: float) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias.mul_(scale)
        model[2].bias.mul_(scale)
    compared(model, torch.randn(50, 4) * scale)


def test_a_layer_that_is_dead_on_the_rows_is_a_layer_still() -> None:
    torch.manual_seed(1)
    model = head(3 * 9 * 8, lambda m, x: m.a(x).relu() + m.b(x).relu() + x, a=Conv(3, 3, 1), b=Conv(3, 3, 1))
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight.zero_()
            layer.bias.fill_(-1)
    compared(model, images())


def test_names_of_layers_never_meet() -> None:
    torch.manual_seed(1)
    conv = nn.Sequential(nn.Identity(), Conv(3, 3, 1))
    model = head(
        3 * 9 * 8,
        lambda m, x: m.fc_2(m.conv_1(m.conv(x)).relu() + m.keys(m.conv(x))),
        conv=conv,
        conv_1=Conv(3, 3, 1),
        keys=Conv(3, 3, 1),
        fc_2=Conv(3, 3, 1),
    )
    compared(model, images())


def twice(m: Any, x: Tensor) -> Tensor:
    y = m.c(x).relu() * 2
    return y + y  # type: ignore[no-any-return]


def beside(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    return m.d(functional.pad(y, (1, 1, 1, 1))) + y  # type: ignore[no-any-return]


def test_folding_in_branches() -> None:
    torch.manual_seed(1)
    compared(head(3 * 9 * 8, twice, c=Conv(3, 3, 1)), images())
    compared(head(3 * 9 * 8, beside, c=Conv(3, 3, 1), d=Conv(3, 3, 3)), images())
    with pytest.raises(TaskError, match=r"pad .*fold into convolutions only"):
        lowered(head(3 * 11 * 10, lambda m, x: functional.pad(m.c(x), (1, 1, 1, 1)), c=Conv(3, 3, 1)), images(1))
    for sizes in ((-1, 0, 0, 0), (0, 0, 0, 0, 0, 1)):
        channels, width = 3 + (len(sizes) > 4), 8 + sizes[0]
        model = head(3 * 9 * width, lambda m, x, sizes=sizes: m.d(functional.pad(m.c(x), sizes)), c=Conv(3, 3, 1), d=Conv(channels, 3, 1))
        with pytest.raises(TaskError, match="only zeros around images"):
            lowered(model, images(1))
    bounded = head(
        27 * 4, lambda m, x: m.r(x.reshape(-1, 27, 8) * 0.3)[0].clamp(0, 0.2), r=nn.RNN(8, 4, nonlinearity="relu", batch_first=True)
    )
    compared(bounded, images(), 0.12)


def test_entries_have_any_name() -> None:
    torch.manual_seed(1)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return (self.a(batch["my input-a"]) + self.b(batch["1"])).relu()

    network = compared(Named(), {"my input-a": torch.randn(40, 3), "1": torch.randn(40, 2)})
    assert [given.name for given in network.program().inputs] == ["my input-a", "1"]
    for batch in ({"input": torch.zeros(1, 3)}, {"input0": torch.zeros(1, 3)}):
        assert isinstance(row_of(describe_row(batch)), dict)


def test_rows_that_are_not_finite_are_refused() -> None:
    network = lowered(MODELS["conv"](), images(1))
    with pytest.raises(DataError, match="not finite"):
        magnitudes(network, images() * float("nan"))


def test_a_trace_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TaskError, match="cannot be traced"):
        lowered(Module(lambda m, x: m.h(x.flatten(1)) if x.sum() > 0 else x.flatten(1), h=nn.Linear(216, 3)), images(1))
    assert capfd.readouterr().err == ""
