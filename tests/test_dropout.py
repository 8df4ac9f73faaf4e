"""Exact dropout: the right rate, independent masks, and the same mask for a sample wherever and beside whatever it is computed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anyfit
from anyfit import Plan
from anyfit.data import Ragged, Share, make_batches
from anyfit.dropout import ExactDropout, dropped
from anyfit.engine import make_trainer, train
from anyfit.errors import TaskError
from anyfit.state import Position

CPU = torch.device("cpu")


def mask(module: nn.Module, shape: Sequence[int]) -> Tensor:
    """Where a layer lets through what it is given."""
    found: Tensor = module(torch.ones(tuple(shape))) != 0
    return found


def exact(p: float, seed: int = 0) -> tuple[nn.Module, ExactDropout]:
    module = nn.Dropout(p)
    return module, ExactDropout(module, seed)


@pytest.mark.parametrize("p", [0.003, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(5000, 81), (100, 50, 81), (3, 4, 50, 675)])
def test_the_rate_is_p(p: float, shape: tuple[int, ...]) -> None:
    """Within four standard deviations: of all, of each sample, of each coordinate."""
    module, drop = exact(p)
    drop.at(3, torch.arange(shape[0]))
    kept = mask(module, shape).reshape(shape[0], -1).double()

    def off(rates: Tensor, number: int) -> float:
        return float((rates - (1 - p)).abs().max() / math.sqrt(p * (1 - p) / number))

    assert off(kept.mean(), kept.numel()) < 4
    if kept.shape[1] > 1000:
        assert off(kept.mean(1), kept.shape[1]) < 4.5
    if kept.shape[0] > 1000:
        assert off(kept.mean(0), kept.shape[0]) < 4.5


def test_masks_have_nothing_to_do_with_each_other() -> None:
    """Of seeds, steps, modules, calls, samples and neighbours in each direction: their products are those of chance."""
    signs = {}
    shape = (64, 33, 48)
    for seed, step in ((0, 0), (1, 0), (0, 1), (0, 2)):
        model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
        drop = ExactDropout(model, seed)
        drop.at(step, torch.arange(64))
        for call in range(2):
            for number, module in enumerate(model):
                signs[seed, step, number, call] = mask(module, shape).double() * 2 - 1
    model = nn.Sequential(nn.Dropout(0.5))
    ExactDropout(model, 0).at(0, torch.arange(64, 128))
    signs[0, 0, 0, 0, "other places"] = mask(model[0], shape).double() * 2 - 1  # type: ignore[index]
    found = list(signs.values())
    correlations = [float((a * b).mean()) for index, a in enumerate(found) for b in found[:index]]
    one = found[0]
    correlations += [float((one * one.roll(by, dimension)).mean()) for dimension in range(3) for by in (1, 2, 3, 16)]
    bound = 4.5 / math.sqrt(one.numel())
    assert max(map(abs, correlations)) < bound, "no more than chance"
    assert abs(sum(correlations)) < 4.5 * math.sqrt(len(correlations)) / math.sqrt(one.numel())


def test_numbers_below_another_p_are_a_part_of_those_below_a_higher_one() -> None:
    low, high = (mask(module, (50, 40)) for module in [exact_at(0.2), exact_at(0.6)])
    assert bool((low | ~high).all()), "it is one number for each coordinate, compared with p"


def exact_at(p: float, seed: int = 0, step: int = 0, places: Sequence[int] = range(50)) -> nn.Module:
    module, drop = exact(p, seed)
    drop.at(step, torch.tensor(list(places), dtype=torch.int64))
    return module


SHAPES = st.lists(st.integers(1, 9), max_size=3)


@given(SHAPES, SHAPES, st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True), st.data())
@settings(max_examples=80)
def test_a_samples_mask_is_its_own(inner: list[int], wider: list[int], seed: int, places: list[int], data: Any) -> None:
    """However the batch is cut and in what order it stands; and more padding, in any dimension, leaves what was there."""
    whole = mask(exact_at(0.4, seed, 5, places), (len(places), *inner))
    order = data.draw(st.permutations(range(len(places))))
    cut = data.draw(st.integers(0, len(places)))
    for chosen in (order[:cut], order[cut:]):
        part = mask(exact_at(0.4, seed, 5, [places[index] for index in chosen]), (len(chosen), *inner))
        assert torch.equal(part, whole[chosen])
    padded = [size + more for size, more in zip(inner, [*wider, 0, 0, 0], strict=False)]
    larger = mask(exact_at(0.4, seed, 5, places), (len(places), *padded))
    assert torch.equal(larger[(slice(None), *(slice(size) for size in inner))], whole)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mask(exact_at(0.3), (50, 7, 13))
    monkeypatch.setattr("anyfit.dropout.CHUNK", 100)
    assert torch.equal(mask(exact_at(0.3), (50, 7, 13)), whole)
    monkeypatch.setattr("anyfit.dropout.CHUNK", 1)
    assert torch.equal(mask(exact_at(0.3), (50, 7, 13)), whole)


class Net(nn.Module):
    """Every kind of layer, one of them twice; a recurrence with two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 6, padding_idx=0)
        self.words, self.channels, self.inner = nn.Dropout(0.2), nn.Dropout1d(0.3), nn.Dropout(0.5, inplace=True)
        self.maps, self.volumes = nn.Dropout2d(0.4), nn.Dropout3d(0.1)
        self.mix, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(self.embed(ids))  # (B, T, E)
        x = self.channels(x.mT).mT
        scores = self.words((x @ x.mT / 3).masked_fill((ids == 0)[:, None, :], -1e9).softmax(-1))  # (B, T, T)
        x = torch.tanh(self.mix(scores @ x))
        x = self.maps(x[:, :, :, None]).squeeze(3)
        x = self.volumes(x[:, :, :, None, None])[..., 0, 0].masked_fill((ids == 0)[..., None], 0.0)
        pooled = self.inner(x.sum(1))
        out: Tensor = self.out(self.inner(torch.tanh(pooled) * 2))
        return out


def words(rows: int = 37) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (rows,), generator=generator).tolist()
    ids = [torch.randint(1, 40, (length,), generator=generator).tolist() for length in lengths]
    return {"ids": Ragged.of(ids), "target": torch.randint(3, (rows,), generator=generator)}


@pytest.mark.parametrize("budget", [None, 60])
def test_gradients_of_a_step_do_not_depend_on_how_it_is_cut(budget: int | None) -> None:
    """In float64, with sequences that are padded differently in each part, which dropout of attention would notice."""
    torch.manual_seed(0)
    model = Net().double().train()
    drop = ExactDropout(model, 9)
    plan = Plan(batch_size=16, accumulate=2, dtype="float64", max_tokens=budget)
    batches = make_batches(words(), plan, list, device=CPU)

    def gradients(position: Position, shares: Sequence[Share | None]) -> list[Tensor]:
        model.zero_grad()
        count = 0
        for share in shares:
            for batch, places in zip(batches.window(position, share), batches.places(position, share), strict=True):
                drop.at(position.step, places)
                nn.functional.cross_entropy(model(batch["ids"]), batch["target"], reduction="sum").backward()
                count += len(places)
        return [parameter.grad / count for parameter in model.parameters() if parameter.grad is not None]

    here = Position(4, 0, 1)
    units = batches.units(here)
    whole = gradients(here, [None])
    cuts = sorted({0, 1, units // 3, units // 2, units - 2, units})
    for parts in (
        [Share(first, last) for first, last in pairwise(cuts)],
        [Share(0, units, 1)],
        [Share(units // 2, units, 3), Share(0, units // 2)],
    ):
        for found, expected in zip(gradients(here, parts), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    again, other = gradients(here, [None]), gradients(Position(5, 0, 1), [None])
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True)), "a step tried again is the same"
    assert not any(torch.allclose(a, b) for a, b in zip(other, whole, strict=True)), "another step is another"
    drop.leave()
    torch.manual_seed(1)
    outside = gradients(here, [None])
    assert not any(torch.allclose(a, b) for a, b in zip(outside, whole, strict=True))


class Rows(anyfit.Task):
    """A net with dropout on tensors."""

    def build_model(self, schema: Any) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Tanh(), nn.Linear(40, 30), nn.Dropout(0.3), nn.Linear(30, 1))

    def build_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(self, model: nn.Module, batch: Any) -> anyfit.Step:
        return anyfit.Step((model(batch[0]).squeeze(1) - batch[1]).square().mean(), len(batch[1]))


def trained(size: int, accumulate: int, exact_dropout: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(70, 5, generator=generator), torch.randn(70, generator=generator)
    plan = Plan(batch_size=size, accumulate=accumulate, dtype="float64", exact_dropout=exact_dropout, seed=2)
    task = Rows()
    trainer = make_trainer(task, task.build_model(None), plan, 7, CPU)
    for _ in train(trainer, make_batches(data, plan, list, device=CPU), 7):
        pass
    return [parameter.detach() for parameter in trainer.model.parameters()]


def test_a_fit_with_dropout_is_the_same_however_its_batches_are_cut() -> None:
    """Seven steps of 24 rows through the end of an epoch, in pieces of 24, 12 and 6."""
    whole = trained(24, 1, True)
    for size, accumulate in ((12, 2), (6, 4)):
        for found, expected in zip(trained(size, accumulate, True), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(trained(12, 2, False)[0], trained(24, 1, False)[0], atol=1e-3), "which dropout otherwise is not"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_stays_is_scaled_and_so_is_its_gradient(dtype: torch.dtype, inplace: bool) -> None:
    module = nn.Dropout(0.3, inplace=inplace)
    ExactDropout(module, 1).at(0, torch.arange(8))
    x = torch.randn(8, 31, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    given = x * 1
    out = module(given)
    kept = mask(exact_at(0.3, 1, 0, range(8)), (8, 31))
    assert out.dtype == dtype and torch.equal(out, torch.where(kept, x * (1 / 0.7), 0))
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.where(kept, torch.ones((), dtype=dtype) * (1 / 0.7), 0))
    assert (given is out) == inplace and torch.equal(given, out if inplace else x)


def test_nothing_and_everything_may_drop_out() -> None:
    x = torch.randn(50, 6)
    assert torch.equal(exact_at(0.0)(x), x)
    assert torch.equal(exact_at(1.0)(x), torch.zeros(50, 6))
    assert torch.equal(exact_at(1 - 1e-12)(x), torch.zeros(50, 6))
    nothing = exact_at(0.5, places=[])(torch.zeros(0, 4))
    assert nothing.shape == (0, 4) and exact_at(0.5)(torch.zeros(50, 0)).shape == (50, 0)


def test_evaluation_lets_everything_through() -> None:
    model = Net().eval()
    ids = torch.randint(1, 40, (5, 7))
    expected = model(ids)
    drop = ExactDropout(model, 0)
    assert torch.equal(model(ids), expected)
    drop.at(0, torch.arange(3))  # of a training batch that has another size
    assert torch.equal(model(ids), expected)


def test_channels_drop_out_whole() -> None:
    for module, shape in ((nn.Dropout1d(0.5), (6, 40, 5)), (nn.Dropout2d(0.5), (6, 40, 5, 4)), (nn.Dropout3d(0.5), (6, 40, 2, 3, 4))):
        ExactDropout(module, 0).at(0, torch.arange(6))
        kept = mask(module, shape).reshape(6, 40, -1)
        assert bool((kept.all(2) | ~kept.any(2)).all()) and 60 < int(kept.any(2).sum()) < 180
        rows = [tuple(row) for row in kept.any(2).tolist()]
        assert len(set(rows)) == 6, "other channels for each sample"


def test_a_model_is_as_it_was_after_leaving() -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spelled, names = repr(model), [type(module) for module in model.modules()]
    drop = ExactDropout(model, 0)
    assert repr(model) == spelled and list(model.state_dict()) == list(before)
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), names, strict=True))
    model.load_state_dict(before)
    second = ExactDropout(model, 1)
    drop.leave()
    assert [type(module) for module in model.modules()] != names, "what another has taken over is left to it"
    second.leave(), second.leave()
    assert [type(module) for module in model.modules()] == names and all("_exact_dropout" not in vars(module) for module in model.modules())


def test_a_copy_of_a_model_draws_what_the_model_draws() -> None:
    model = Net()
    drop = ExactDropout(model, 0)
    drop.at(0, torch.arange(4))
    twin, ids = copy.deepcopy(model), torch.randint(1, 40, (4, 6))
    first = model(ids)
    drop.at(0, torch.arange(4))
    assert torch.equal(twin(ids), first)


def test_between_batches_layers_draw_as_torch_does() -> None:
    module, x = nn.Dropout(0.5), torch.ones(7, 9)
    torch.manual_seed(2)
    expected = module(x)
    drop = ExactDropout(module, 0)
    torch.manual_seed(2)
    assert torch.equal(module(x), expected)
    drop.at(0, torch.arange(7))
    inside = module(x)
    assert not torch.equal(inside, expected)
    drop.done()
    torch.manual_seed(2)
    assert torch.equal(module(x), expected)


def test_what_drops_out_by_other_means_is_named() -> None:
    class WordDropout(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.p = p

    class Thinning(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            return input * torch.rand(())

    class Own(Thinning):
        draws_by_place = True

    class DropoutBlock(nn.Module):
        """Holds layers, and drops nothing itself."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Dropout(0.5)

    class UnknownDropout(nn.Module):
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.Dropout(0.5),
            "alpha": nn.AlphaDropout(0.1),
            "feature": nn.FeatureAlphaDropout(0.1),
            "zero": nn.AlphaDropout(0.0),
            "lstm": nn.LSTM(2, 2, num_layers=2, dropout=0.1),
            "gru": nn.GRU(2, 2, num_layers=2),
            "single": nn.GRU(2, 2),
            "attention": nn.MultiheadAttention(4, 2, dropout=0.1),
            "careful": nn.MultiheadAttention(4, 2),
            "layer": nn.TransformerEncoderLayer(4, 2, dropout=0.2),
            "words": WordDropout(0.1),
            "silent": WordDropout(0.0),
            "thinning": Thinning(0.1),
            "own": Own(0.1),
            "block": DropoutBlock(),
            "unknown": UnknownDropout(),
        }
    )
    model["single"].dropout = 0.5  # between layers, of which there is one
    assert ExactDropout(model, 0).others == ["alpha", "feature", "lstm", "attention", "layer.self_attn", "words", "thinning", "unknown"]
    assert ExactDropout(nn.AlphaDropout(0.1), 0).others == ["AlphaDropout"]
    assert ExactDropout(Net(), 0).others == []
    assert ExactDropout(model, 0).names == ["plain", "layer.dropout", "layer.dropout1", "layer.dropout2", "own", "block.inner"]
    assert ExactDropout(nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.1)), 0).names == ["1"]


def test_a_layer_of_ones_own_can_be_exact() -> None:
    class Thinning(nn.Module):
        draws_by_place = True

        def forward(self, ids: Tensor) -> Tensor:
            return ids.masked_fill(dropped(self, 0.25, ids.shape, ids.device), 0)

    model = nn.Sequential(nn.Dropout(0.5), Thinning())
    ids = torch.ones(40, 30)
    drop = ExactDropout(model, 0)
    drop.at(0, torch.arange(40))
    first, second = model[1](ids), model[1](ids)
    assert 200 < int((first == 0).sum()) < 400 and not torch.equal(first, second)
    drop.at(0, torch.arange(30, 40))
    assert torch.equal(model[1](ids[30:]), first[30:])
    drop.leave()
    torch.manual_seed(4)
    outside = model[1](ids)
    torch.manual_seed(4)
    assert torch.equal(outside, ids.masked_fill(torch.rand(40, 30) < 0.25, 0)), "and draws as ever where nothing is exact"


def test_draws_that_no_module_tells_of_are_noticed() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    drop = ExactDropout(model, 0)
    drop.at(0, torch.arange(5))
    model(torch.ones(5, 3))
    assert not drop.drew()
    nn.functional.dropout(torch.ones(5, 3), 0.5)
    assert drop.drew()
    drop.at(1, torch.arange(5))
    assert not drop.drew()


def test_a_layer_that_gets_no_batch_is_named() -> None:
    model = nn.ModuleDict({"flat": nn.Dropout(0.5), "line": nn.Dropout1d(0.5), "map": nn.Dropout2d(0.5), "room": nn.Dropout3d(0.5)})
    ExactDropout(model, 0).at(0, torch.arange(6))
    message = "module flat (Dropout) got (12, 3), and the batch has 6 samples: exact dropout needs the samples in the first dimension"
    with pytest.raises(TaskError, match=re.escape(message)):
        model["flat"](torch.ones(12, 3))
    with pytest.raises(TaskError, match=re.escape("module flat (Dropout) got (), and the batch has 6 samples")):
        model["flat"](torch.ones(()))
    for name, shape in (("line", (6, 3)), ("map", (6,)), ("room", (6, 3, 2, 2))):
        kind = type(model[name]).__name__
        with pytest.raises(TaskError, match=re.escape(f"module {name} ({kind}) got {shape}, which is one sample without a batch")):
            model[name](torch.ones(shape))


def test_a_layer_that_runs_again_in_the_backward_pass_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    drop = ExactDropout(model, 0)
    drop.at(0, torch.arange(4))
    out = checkpoint(model, torch.ones(4, 3, requires_grad=True), use_reentrant=False)
    drop.in_backward = True
    with pytest.raises(TaskError, match=r"module 1 \(Dropout\) runs again in the backward pass \(activation checkpointing\)"):
        out.sum().backward()
    drop.in_backward = False
    model(torch.ones(4, 3)).sum().backward()


def test_autocast_and_a_layer_under_two_names() -> None:
    """A layer that stands twice in a model is one, and each of its calls draws anew."""
    layer = nn.Dropout(0.5)
    model = nn.Sequential(layer, nn.Linear(4, 4, bias=False), layer)
    nn.init.eye_(model[1].weight)  # type: ignore[arg-type]
    drop = ExactDropout(model, 0)
    drop.at(0, torch.arange(50))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.ones(50, 4))
    assert out.dtype == torch.bfloat16 and set(out.unique().tolist()) == {0.0, 4.0}
    assert 0.15 < float((out != 0).float().mean()) < 0.35, "through both, one in four"


def test_masks_stay_what_they_are() -> None:
    """Runs can be repeated with a later version: these numbers are part of what a seed means."""
    kept = mask(exact_at(0.5, seed=7, step=3, places=[0, 1, 1000]), (3, 2, 5)).int().reshape(3, -1)
    assert ["".join(map(str, row)) for row in kept.tolist()] == ["1001010110", "1111011001", "0001110000"]
