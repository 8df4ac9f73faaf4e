"""What a vector looks like while it travels: sizes, what comes back, and what is left for the next time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

import anyfit
from anyfit import Source, Task
from anyfit.codec import Codec
from anyfit.data import read_splits
from anyfit.errors import InputError, Refused, RunError
from anyfit.guard import Guard
from anyfit.schema import Schema
from anyfit.strategy import FedPCA
from anyfit.update import Order, Update

ALL = ("bf16", "fp16", "int8", "topk:0.05")


def sent(codec: Codec, vector: Tensor, seed: int = 0) -> tuple[Tensor, int]:
    """What arrives, and the bytes that travelled."""
    parts = codec.encode(vector, torch.Generator().manual_seed(seed))
    return codec.decode(parts, vector.numel(), vector.dtype), sum(part.numel() * part.element_size() for part in parts.values())


@pytest.mark.parametrize("size", [1, 2, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("text", [*ALL, "topk", "topk:1.0", "topk:0.0001"])
def test_sizes_are_as_announced_and_shapes_come_back(text: str, size: int) -> None:
    codec = Codec.of(text)
    assert codec is not None
    for dtype in (torch.float32, torch.float64):
        vector = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(size))
        arrives, traveled = sent(codec, vector)
        assert traveled == codec.size(size)
        assert arrives.shape == vector.shape and arrives.dtype == dtype


def test_each_is_lossy_as_it_says() -> None:
    vector = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    error = {text: float((sent(Codec.of(text), vector)[0] - vector).abs().max()) for text in ("bf16", "fp16", "int8")}  # type: ignore[arg-type]
    largest = float(vector.abs().max())
    assert 0 < error["bf16"] <= largest / 256 and 0 < error["fp16"] <= largest / 2048 and 0 < error["int8"] <= largest / 127
    kept = sent(Codec("topk", 0.1), vector)[0]
    assert int((kept != 0).sum()) == 400
    assert float(kept[kept != 0].abs().min()) >= float(vector[kept == 0].abs().max()), "others than the largest were sent"
    assert torch.equal(kept[kept != 0], vector[kept != 0])


def test_int8_rounds_at_random_so_that_the_mean_is_right() -> None:
    vector = torch.randn(3000, generator=torch.Generator().manual_seed(2))
    codec, draws = Codec("int8"), 400
    mean = sum((sent(codec, vector, seed)[0].double() for seed in range(draws)), torch.zeros(3000, dtype=torch.float64)) / draws
    step = float(vector.abs().max()) / 127
    apart = (mean - vector).abs()
    assert float(apart.max()) < 5 * step / 2 / draws**0.5  # rounding to the nearest would leave up to half a step
    assert abs(float((mean - vector).mean())) < 5 * step / 2 / (draws * 3000) ** 0.5


@pytest.mark.parametrize("vector", [torch.zeros(2000), torch.full((10,), 1e-44), torch.tensor([0.0, -3e38, 3e38])], ids=str)
def test_int8_holds_zeros_and_the_smallest_and_largest_numbers(vector: Tensor) -> None:
    arrives, _ = sent(Codec("int8"), vector)
    assert torch.isfinite(arrives).all()
    assert torch.allclose(arrives, vector, rtol=1e-2, atol=1e-40)


def test_what_topk_leaves_out_is_sent_later_so_that_it_converges_where_plain_topk_does_not() -> None:
    """One huge entry that swings between two sites hides the small ones, which plain topk never sends."""
    codec = Codec("topk", 0.2)
    goal = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    apart = {}
    for remembers in (False, True):
        x, left = torch.zeros(5), [torch.zeros(5), torch.zeros(5)]
        for _ in range(1500):
            for site, sign in enumerate((1.0, -1.0)):
                change = 0.01 * (goal - x)
                change[4] = sign * 0.2 - 0.01 * x[4]
                whole = change + left[site] if remembers else change
                arrives, _ = sent(codec, whole)
                left[site] = whole - arrives
                x = x + arrives / 2
        apart[remembers] = float((x[:4] - goal[:4]).abs().mean())
    assert apart[False] == 1.0 and apart[True] < 0.1


@pytest.mark.parametrize(
    "text",
    ["", "zip", "int4", "bf16:2", "int8:0.1", "topk:", "topk:0", "topk:-1", "topk:1.5", "topk:nan", "topk:much", "TOPK:0.1", "fp16,int8"],
)
def test_a_codec_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="compress "):
        Codec.of(text)


def test_no_text_is_no_codec() -> None:
    assert Codec.of(None) is None
    assert Codec.of("topk:0.25") == Codec("topk", 0.25)


# ------------------------------------------------------------------------------------------------ in a federation


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    return read_splits(Source("digits"), None, 0.2, wants_validation=False)


class Softmax(Task):
    lr: float = 0.05

    def build_model(self, schema: Schema) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["image"].float() / 16)


TASK = Softmax()


@pytest.fixture(scope="module")
def runs(digits: dict[str, Any]) -> dict[str | None, Any]:
    train: pa.Table = digits["train"]
    sites = {"a": train.slice(0, 300), "b": train.slice(300, 500), "c": train.slice(800)}
    starts: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            starts.append(event)

    found = {}
    for text in (None, "bf16", "fp16", "int8", "topk:0.2"):
        run = anyfit.federate(TASK, sites, rounds=4, batch_size=16, seed=3, compress=text, test=digits["test"], on_event=listen)
        run.record["announced"] = starts[-1]["bytes_each"]
        found[text] = run
    return found


@pytest.mark.parametrize("text", ["bf16", "fp16", "int8", "topk:0.2"])
def test_compressed_updates_learn_nearly_as_well_and_cost_what_was_announced(runs: dict[str | None, Any], text: str) -> None:
    whole, run = runs[None], runs[text]
    accuracy = whole.splits["test"]["accuracy"]
    assert accuracy > 0.8
    assert run.splits["test"]["accuracy"] > accuracy - (0.1 if text.startswith("topk") else 0.03)
    codec, parameters = Codec.of(text), run.record["exchanged"]
    assert codec is not None and run.record["announced"]["up"] == codec.size(parameters) + 8 < 4 * parameters  # and the loss
    for line in (line for line in run.history if line["event"] == "round"):
        assert line["bytes_up"] == 3 * run.record["announced"]["up"]
        assert line["bytes_down"] == 3 * run.record["announced"]["down"] == 3 * 4 * parameters
    assert not torch.equal(run.state.model["1.weight"], whole.state.model["1.weight"]), "nothing was rounded"


def test_weights_may_go_out_in_half_precision(digits: dict[str, Any], runs: dict[str | None, Any]) -> None:
    run = anyfit.federate(TASK, {"a": digits["train"].slice(0, 400)}, rounds=2, batch_size=32, compress_down="bf16", compress="bf16")
    assert [line["bytes_down"] for line in run.history] == [2 * run.record["exchanged"]] * 2
    assert run.history[1]["loss"] < run.history[0]["loss"]
    with pytest.raises(InputError, match=re.escape("compress_down (='int8') must be bf16 or fp16")):
        anyfit.federate(TASK, {"a": digits["train"]}, rounds=1, compress_down="int8")


class Leaps(anyfit.FedAvg):
    def local(self, turn: Any) -> Any:
        return turn.update(turn.train() + 7e4)


def test_a_change_that_fp16_cannot_hold_is_refused_and_nothing_is_lost(digits: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": 1, "batch_size": 32, "strategy": Leaps()}
    with pytest.raises(RunError, match="site 'a' failed in round 1: the change of weights is too large for fp16"):
        anyfit.federate(TASK, {"a": digits["train"].slice(0, 32)}, compress="fp16", run=tmp_path / "r", **options)
    assert not list((tmp_path / "r/checkpoints").glob("*.safetensors"))
    anyfit.federate(TASK, {"a": digits["train"].slice(0, 32)}, compress="bf16", **options)


def test_a_codec_for_a_strategy_that_sends_no_change_of_weights_is_refused() -> None:
    table = pa.table({"x": [1.0, 2.0, 3.0, 4.0], "y": [2.0, 1.0, 0.0, 5.0]})
    with pytest.raises(InputError, match="is for changes of weights, and FedPCA sends exact sums"):
        anyfit.federate(anyfit.PCA(components=1), {"a": table}, strategy=FedPCA(), rounds=1, compress="int8")
    update = Update.of("weights", {"products": torch.ones(2, 2), "sum": torch.ones(2)}, 4.0)
    shapes = {"weights": {"products": (2, 2), "sum": (2,)}}
    with pytest.raises(Refused, match="compression are for a change of weights, but products, sum would leave"):
        Guard(codec=Codec("int8")).release(Order("train", 1, 1, 0), update, rows=4, shapes=shapes, seed=0, memory={})
