"""Shares of a step, batches within a token budget, evaluation in parts, reading ahead: each sample once, whoever asks and in what order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, RandomSampler

import anyfit
from anyfit import Plan
from anyfit.data import Blocks, Ragged, RowBatches, Share, Stream, blocks, make_batches
from anyfit.engine import make_trainer, train
from anyfit.errors import DataError, InputError
from anyfit.state import Position

CPU = torch.device("cpu")
ROWS = 83


def length_of(row: int) -> int:
    """Of a row of the data sets here; some are empty."""
    return row * 7 % 10


class Samples(Dataset[Any]):
    """Rows as tensors of their lengths, row + 1 in each; it counts what was fetched and may change with the epoch."""

    def __init__(self, rows: int = ROWS) -> None:
        self.rows, self.fetched, self.epoch = rows, list[int](), 0

    def __len__(self) -> int:
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        self.fetched.append(index)
        return index, length_of(index), self.epoch


class Told(Samples):
    """With the lengths of its samples."""

    @property
    def lengths(self) -> list[int]:
        return [length_of(row) for row in range(self.rows)]


class Counted(Samples):
    """In HetSeq's way: asked one by one."""

    def num_tokens(self, index: int) -> int:
        return length_of(index)


def collate(samples: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    rows, lengths, epochs = (torch.tensor(values) for values in zip(*samples, strict=True))
    width = max(1, int(lengths.max()))
    return {"row": rows, "ids": torch.where(torch.arange(width) < lengths[:, None], rows[:, None] + 1, 0), "epoch": epochs}


def ragged(rows: int = ROWS) -> dict[str, Any]:
    return {"ids": Ragged.of([[row + 1] * length_of(row) for row in range(rows)]), "row": torch.arange(rows)}


class Numbers:
    """Rows one after the other, which do not fit."""

    def __init__(self) -> None:
        self.types: dict[str, pa.DataType] = {}

    def batches(self) -> Iterator[pa.RecordBatch]:
        for start in range(0, ROWS, 7):
            yield pa.record_batch({"row": list(range(start, min(ROWS, start + 7)))})

    def identity(self) -> None:
        return None


class Built(Told):
    def __init__(self, table: pa.Table) -> None:
        super().__init__(table.num_rows)
        self.held = table["row"].to_pylist()

    @property
    def lengths(self) -> list[int]:
        return [length_of(row) for row in self.held]

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return self.held[index], length_of(self.held[index]), 0


def built_ragged(table: pa.Table) -> dict[str, Any]:
    rows = table["row"].to_pylist()
    return {"ids": Ragged.of([[row + 1] * length_of(row) for row in rows]), "row": torch.tensor(rows)}


@pytest.fixture(scope="module")
def held() -> Blocks:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", 60)
        found = blocks.hold(Numbers(), "numbers", 10)
    assert isinstance(found, Blocks) and len(found.sizes) > 8
    return found


BUILDS: dict[str, Callable[[pa.Table], Any]] = {
    "blocks of tensors": lambda table: {"row": torch.tensor(table["row"].to_pylist())},
    "blocks of sequences": built_ragged,
    "blocks of samples": Built,
}
MAKES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: {"row": torch.arange(ROWS)},
    "a tuple": lambda: (torch.arange(ROWS), {"twice": torch.arange(ROWS) * 2}),
    "sequences": ragged,
    "samples": Samples,
    "samples of known lengths": Told,
}
WITH_LENGTHS = ("sequences", "samples of known lengths", "blocks of sequences", "blocks of samples")
BUDGETS: dict[str, Callable[[], Any]] = {"sequences": ragged, "samples of known lengths": Told, "samples counted one by one": Counted}
KINDS = [*((kind, None) for kind in (*MAKES, *BUILDS)), *((kind, 30) for kind in BUDGETS)]


def make(kind: str, plan: Plan, held: Blocks, **options: Any) -> Any:
    if kind in BUILDS:
        return make_batches(held, plan, collate, device=CPU, build=BUILDS[kind], **options)
    return make_batches({**MAKES, **BUDGETS}[kind](), plan, collate, device=CPU, **options)


def rows_of(batch: Any) -> list[int]:
    """The rows of a batch, which is padded to its own longest."""
    if isinstance(batch, tuple):
        return batch[0].tolist()  # type: ignore[no-any-return]
    rows: list[int] = batch["row"].tolist()
    if "ids" in batch:
        width = max(1, *map(length_of, rows))
        assert batch["ids"].tolist() == [[row + 1] * length_of(row) + [0] * (width - length_of(row)) for row in rows]
    return rows


def plain(batch: Any) -> Any:
    """A batch as lists, that can be compared."""
    return anyfit.tree.map_tensors(lambda tensor: tensor.tolist(), batch)


def jittered(batch: Any, uniform: Any) -> Any:
    """Beside a batch a number for each sample that says which place it had."""
    return (*batch, uniform()) if isinstance(batch, tuple) else {**batch, "u": uniform()}


def numbers_of(batch: Any) -> list[float]:
    return (batch[-1] if isinstance(batch, tuple) else batch["u"]).tolist()  # type: ignore[no-any-return]


# Shares


@given(
    st.sampled_from(KINDS),
    st.integers(2, 40),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2),
    st.lists(st.integers(0, 200), max_size=3),
    st.none() | st.integers(1, 6),
)
@settings(max_examples=90)
def test_however_a_step_is_cut_each_sample_is_in_one_share(
    held: Blocks, kind: tuple[str, int | None], size: int, accumulate: int, drop: bool, epoch: int, cuts: list[int], micro: int | None
) -> None:
    name, budget = kind
    plan = Plan(batch_size=size, accumulate=accumulate, drop_last=drop, seed=3, max_tokens=budget)
    whole, cut = (make(name, plan, held, augment=jittered) for _ in range(2))
    seen: list[int] = []
    for offset in range(whole.steps_per_epoch):
        here = Position(7, epoch, offset)
        window = whole.window(here)
        rows, numbers = [row for batch in window for row in rows_of(batch)], [u for batch in window for u in numbers_of(batch)]
        places = [place for batch in whole.places(here) for place in batch.tolist()]
        assert places == list(range(len(seen), len(seen) + len(rows))), "places count from the start of the epoch"
        seen += rows
        if offset not in (0, whole.steps_per_epoch // 2, whole.steps_per_epoch - 1):
            continue
        costs = [max(1, length_of(row)) if name in WITH_LENGTHS or budget else 1 for row in rows]
        begins = [sum(costs[:index]) for index in range(len(rows))]
        assert cut.units(here) == sum(costs)
        assert [plain(batch) for batch in cut.window(here, Share(0, sum(costs)))] == [plain(batch) for batch in window]
        shared: list[int] = []
        for first, last in pairwise([0, *sorted(cuts), 999]):
            share = Share(first, last, micro)
            part, own = cut.window(here, share), cut.places(here, share)
            taken = [index for index, begin in enumerate(begins) if first <= begin < last]
            assert [row for batch in part for row in rows_of(batch)] == [rows[index] for index in taken]
            assert [u for batch in part for u in numbers_of(batch)] == [numbers[index] for index in taken], "augmented by its place"
            assert [place for batch in own for place in batch.tolist()] == [places[index] for index in taken]
            assert [len(place) for place in own] == [len(rows_of(batch)) for batch in part]
            assert all(0 < len(place) <= min(size, micro or size) and place.dtype == torch.int64 for place in own)
            if name not in BUILDS:
                assert all(cut.order(epoch)[place].tolist() == rows_of(batch) for place, batch in zip(own, part, strict=True))
            assert budget is None or all(cost(rows_of(batch)) <= budget for batch in part)
            shared += [places[index] for index in taken]
        assert shared == places
    assert len(set(seen)) == len(seen) and (drop or len(seen) == ROWS)


def test_a_share_holds_what_begins_in_it() -> None:
    """The first unit is the first sample, and the middle of a sample is nobody's beginning."""
    batches = make_batches(ragged(), Plan(batch_size=20), collate, device=CPU)
    rows = rows_of(batches.window(Position())[0])
    place = next(index for index, row in enumerate(rows) if length_of(row) > 2)
    begin = sum(max(1, length_of(row)) for row in rows[:place])
    assert [rows_of(batch) for batch in batches.window(Position(), Share(0, 1))] == [rows[:1]]
    assert [rows_of(batch) for batch in batches.window(Position(), Share(begin, begin + 1))] == [[rows[place]]]
    for empty in (Share(begin + 1, begin + 2), Share(5, 5), Share(9, 3), Share(9999, 99999)):
        assert list(batches.window(Position(), empty)) == [] == batches.places(Position(), empty)


def test_one_process_pays_nothing_for_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a share, tensors and sequences come as views of what was gathered for many steps."""
    for rows in (MAKES["tensors"](), ragged()):
        batches = make_batches(rows, Plan(batch_size=5), collate, device=CPU)
        batches.window(Position())
        for name in ("_pieces", "_units", "_gather", "_finish"):
            monkeypatch.setattr(batches, name, None)
        assert [len(batches.window(Position(0, 0, offset))) for offset in range(10)] == [1] * 10


Call = tuple[str, int, int, Share | None]
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["window", "places", "units", "part"]),
        st.integers(0, 2),
        st.integers(0, 3),
        st.none() | st.builds(Share, st.integers(0, 20), st.integers(0, 60), st.none() | st.integers(1, 4)),
    ),
    min_size=2,
    max_size=12,
)


def answer(batches: Any, call: Call) -> Any:
    verb, epoch, offset, share = call
    here = Position(0, epoch, offset)
    if verb == "units":
        return batches.units(here)
    if verb == "part":
        return [rows_of(batch) for batch in batches.part(epoch, 3)]
    return [plain(item) for item in getattr(batches, verb)(here, share)]


@given(st.sampled_from(KINDS), CALLS)
@settings(max_examples=60)
def test_what_is_asked_before_changes_no_answer(held: Blocks, kind: tuple[str, int | None], calls: list[Call]) -> None:
    plan = Plan(batch_size=11, seed=4, max_tokens=kind[1])
    batches = make(kind[0], plan, held)
    for call in calls:
        assert answer(batches, call) == answer(make(kind[0], plan, held), call)


def test_what_has_no_order_of_its_own_refuses_shares() -> None:
    loader = DataLoader(Samples(9), batch_size=2, sampler=RandomSampler(Samples(9), replacement=True, num_samples=7), collate_fn=collate)
    stream = Stream([{"row": row} for row in range(9)])
    for batches, message in (
        (make_batches(loader, Plan(), collate, device=CPU), "a DataLoader with its own sampler cannot be shared between workers"),
        (make_batches(stream, Plan(batch_size=2), collate, device=CPU, build=BUILDS["blocks of tensors"]), "a stream cannot be shared"),
    ):
        for ask, asked in ((batches.window, (Position(), Share(0, 1))), (batches.units, (Position(),)), (batches.places, (Position(),))):
            with pytest.raises(InputError, match=message):
                ask(*asked)  # type: ignore[operator]
        assert [plain(batch) for part in range(2) for batch in batches.part(part, 2)], "though they can be evaluated in parts"


@pytest.mark.parametrize("lengths", [[1, 2], torch.ones(5, 2), torch.ones(5), ["a"] * 5], ids=["short", "wide", "fractions", "words"])
def test_lengths_that_are_not_one_whole_number_for_each_sample_are_refused(lengths: Any) -> None:
    samples = Samples(5)
    samples.lengths = lengths  # type: ignore[attr-defined]
    batches = make_batches(samples, Plan(batch_size=2), collate, device=CPU)
    for _ in range(2):
        with pytest.raises(DataError, match="of the data set must be 5 whole numbers"):
            batches.units(Position())
    with pytest.raises(DataError, match="of the data set must be 5 whole numbers"):
        make_batches(samples, Plan(batch_size=2, bucket=True), collate, device=CPU)


# Evaluation in parts


@given(st.sampled_from(KINDS), st.integers(1, 100), st.integers(1, 5))
@settings(max_examples=60)
def test_parts_of_an_evaluation_are_the_whole(held: Blocks, kind: tuple[str, int | None], size: int, count: int) -> None:
    batches = make(kind[0], Plan(batch_size=size, max_tokens=kind[1], seed=2), held, shuffle=False)
    whole = [plain(batch) for batch in batches]
    assert [row for batch in batches for row in rows_of(batch)] == list(range(ROWS))
    parts = [[plain(batch) for batch in batches.part(index, count)] for index in range(count)]
    assert [parts[index % count][index // count] for index in range(len(whole))] == whole
    assert sum(map(len, parts)) == len(whole)


def test_a_part_reads_only_its_own(held: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples()
    batches = make_batches(samples, Plan(batch_size=10), collate, device=CPU, shuffle=False)
    assert [rows_of(batch)[0] for batch in batches.part(1, 4)] == [10, 50]
    assert samples.fetched == [*range(10, 20), *range(50, 60)]
    read: list[int] = []
    block = Blocks.block
    monkeypatch.setattr(Blocks, "block", lambda self, index: (read.append(index), block(self, index))[1])
    parts = [make("blocks of tensors", Plan(batch_size=50), held, shuffle=False).part(index, 3) for index in range(3)]
    assert sorted(row for part in parts for batch in part for row in rows_of(batch)) == list(range(ROWS))
    assert sorted(read) == list(range(len(held.sizes))), "each block once, a block being one batch here"


# Reading ahead


def shares_of(batches: Any, ratio: tuple[int, int], micro: int | None = None) -> Callable[[int], Share]:
    """What a balance would say: the part of `ratio` out of 4."""
    return lambda units: Share(ratio[0] * units // 4, ratio[1] * units // 4, micro)


@pytest.mark.parametrize("kind", ["samples", "samples of known lengths", "budget"])
def test_worker_processes_give_what_no_worker_processes_give(held: Blocks, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through shares that change, a step tried again, a jump and an epoch that the data set is told of."""
    budget = 40 if kind == "budget" else None
    name = "samples counted one by one" if budget else kind
    plan = Plan(batch_size=6, accumulate=2, seed=8, max_tokens=budget)
    plainly, ahead = make(name, plan, held, augment=jittered), make(name, plan.updated(workers=2), held, augment=jittered)
    assert isinstance(ahead, RowBatches)
    started = []
    loader = RowBatches._loader
    monkeypatch.setattr(RowBatches, "_loader", lambda self, *given: (started.append(1), loader(self, *given))[1])

    def check(epoch: int, offset: int, share: Share | None) -> None:
        here = Position(0, epoch, offset)
        found = [plain(batch) for batch in ahead.window(here, share)]
        assert found == [plain(batch) for batch in plainly.window(here, share)]
        assert all(batch["epoch"] == [epoch] * len(batch["row"]) for batch in found), "processes know the epoch"

    share = shares_of(ahead, (1, 3), 4)
    for offset in range(ahead.steps_per_epoch):
        check(1, offset, share(ahead.units(Position(0, 1, offset))))
    assert 1 <= len(started) <= 3, "the same part of each step is read ahead, though steps have other units"
    ahead.ahead = shares_of(ahead, (0, 1))
    before = len(started)
    for offset in range(3):
        check(2, offset, ahead.ahead(ahead.units(Position(0, 2, offset))))
        check(2, offset, Share(4, 4))
    assert len(started) == before + 1, "what is told ahead is read ahead, and a share of nothing stops nobody"
    check(2, 1, Share(0, 3)), check(2, 1, None), check(2, 2, None), check(2, 0, Share(1, 9, 2)), check(3, 4, None)
    assert not [row for part in ([*ahead.part(0, 2)], [*ahead.part(1, 2)]) for batch in part for row in rows_of(batch) if row >= ROWS]


# Token budgets


def cost(rows: list[int]) -> int:
    return len(rows) * max(1, *map(length_of, rows))


@given(
    st.sampled_from(sorted(BUDGETS)),
    st.integers(9, 120),
    st.none() | st.integers(2, 100),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 5),
)
@settings(max_examples=40)
def test_batches_stay_within_the_budget_and_waste_none_of_it(
    held: Blocks, kind: str, budget: int, size: int | None, accumulate: int, drop: bool, seed: int
) -> None:
    plan = Plan(max_tokens=budget, batch_size=size, accumulate=accumulate, drop_last=drop, seed=seed)
    batches, most = make(kind, plan, held), size or ROWS
    single = make(kind, plan.updated(accumulate=1, drop_last=False), held)
    cut = [[rows_of(batch) for batch in single.window(Position(0, 0, offset))] for offset in range(single.steps_per_epoch)]
    assert all(len(step) == 1 for step in cut)
    packs = [step[0] for step in cut]
    assert sorted(row for rows in packs for row in rows) == list(range(ROWS))
    assert all(cost(rows) <= budget and len(rows) <= most for rows in packs)
    rest, full = sorted(max(1, length_of(row)) for row in range(ROWS)), []
    while rest:  # as many of the shortest as fit
        number = max(number for number in range(1, min(most, len(rest)) + 1) if number * rest[number - 1] <= budget)
        full.append(rest[:number])
        rest = rest[number:]
    assert sorted(sorted(max(1, length_of(row)) for row in rows) for rows in packs) == sorted(full)
    each = min(accumulate, len(packs))
    assert batches.steps_per_epoch == (len(packs) // each if drop else -(-len(packs) // each))
    assert batches.step_size == -(-ROWS * each // len(packs))
    orders = []
    for epoch in range(2):
        windows = [[rows_of(batch) for batch in batches.window(Position(0, epoch, offset))] for offset in range(batches.steps_per_epoch)]
        assert all(len(window) == each for window in windows[:-1]) and 0 < len(windows[-1]) <= each
        assert all(rows in packs for window in windows for rows in window), "the batches of an epoch are those of each"
        seen = [row for window in windows for rows in window for row in rows]
        assert len(seen) == len(set(seen)) and (drop or len(seen) == ROWS)
        orders.append(seen)
    assert orders[0] != orders[1] or len(packs) < 6, "in another order"


def test_equally_long_samples_meet_others_under_another_seed() -> None:
    def packs(seed: int) -> set[frozenset[int]]:
        batches = make_batches(ragged(), Plan(max_tokens=40, batch_size=None, seed=seed), collate, device=CPU)
        return {
            frozenset(rows_of(batch)) for offset in range(batches.steps_per_epoch or 0) for batch in batches.window(Position(0, 0, offset))
        }

    assert packs(0) == packs(0) and len(packs(0) & packs(1)) < len(packs(0)) / 2


@given(st.integers(9, 100), st.none() | st.integers(1, 100))
@settings(max_examples=30)
def test_an_evaluation_within_a_budget_keeps_the_order_of_rows(held: Blocks, budget: int, size: int | None) -> None:
    for kind in BUDGETS:
        batches = make(kind, Plan(max_tokens=budget, batch_size=size), held, shuffle=False)
        packs = [rows_of(batch) for batch in batches]
        assert [row for rows in packs for row in rows] == list(range(ROWS))
        assert all(cost(rows) <= budget and len(rows) <= (size or ROWS) for rows in packs)
        assert [rows_of(batch) for offset in range(batches.steps_per_epoch) for batch in batches.window(Position(0, 4, offset))] == packs


def test_a_budget_pads_less_than_a_number_of_rows() -> None:
    def padding(plan: Plan) -> float:
        batches = make_batches(ragged(), plan, collate, device=CPU)
        found = [batch["ids"] for offset in range(batches.steps_per_epoch or 0) for batch in batches.window(Position(0, 0, offset))]
        return sum(int((ids == 0).sum()) for ids in found) / sum(ids.numel() for ids in found)

    assert padding(Plan(max_tokens=80)) < 0.2 < 0.4 < padding(Plan(batch_size=8))


def test_what_cannot_keep_a_budget_says_so(held: Blocks) -> None:
    longest = next(row for row in range(ROWS) if length_of(row) == 9)
    for kind in BUDGETS:
        for shuffle in (True, False):
            with pytest.raises(
                InputError, match=re.escape(f"max_tokens (=8) is less than the length 9 of sample {longest} alone; raise it")
            ):
                make(kind, Plan(max_tokens=8), held, shuffle=shuffle)
    for kind in ("tensors", "a tuple", "samples"):
        with pytest.raises(InputError, match=r"max_tokens \(=30\) needs the samples' lengths; give sequences of words, or a data set with"):
            make(kind, Plan(max_tokens=30), held)
    for kind in BUILDS:
        with pytest.raises(InputError, match=r"max_tokens \(=30\) needs the lengths of all samples, and these rows are never in memory"):
            make(kind, Plan(max_tokens=30), held)
    with pytest.raises(InputError, match=r"max_tokens \(=30\) needs the lengths of all samples, which a stream cannot tell"):
        make_batches(Stream([{"row": 1}]), Plan(max_tokens=30), collate, device=CPU, build=BUILDS["blocks of tensors"])
    own = DataLoader(Told(), sampler=RandomSampler(Told(), replacement=True), collate_fn=collate)
    with pytest.raises(InputError, match=r"max_tokens \(=30\) needs the samples' lengths, and batches of a loader with its own sampler"):
        make_batches(own, Plan(max_tokens=30), collate, device=CPU)

    class Ordered(Told):
        def order(self, epoch: int) -> list[int]:
            return list(range(len(self)))

    with pytest.raises(InputError, match=r"max_tokens \(=30\) cuts batches by length, and the data set has an order\(epoch\) of its own"):
        make_batches(Ordered(), Plan(max_tokens=30), collate, device=CPU)
    with pytest.raises(InputError, match=r"max_tokens \(=0\) must be at least 1"):
        Plan(max_tokens=0)


def test_lengths_are_asked_for_one_by_one_only_where_they_are_needed() -> None:
    class Dear(Samples):
        def num_tokens(self, index: int) -> int:
            raise AssertionError("asked")

    class Lazy(Samples):
        @property
        def lengths(self) -> list[int]:
            raise AssertionError("asked")

    assert make_batches(Dear(), Plan(batch_size=4), collate, device=CPU).units(Position()) == 4
    lazy = make_batches(Lazy(), Plan(batch_size=4), collate, device=CPU)
    assert [len(rows_of(batch)) for batch in lazy.window(Position())] == [4] and rows_of(next(iter(lazy))) == [0, 1, 2, 3]
    with pytest.raises(AssertionError, match="asked"):
        lazy.units(Position())
    with pytest.raises(AssertionError, match="asked"):
        make_batches(Dear(), Plan(batch_size=4, bucket=True), collate, device=CPU)


def test_a_fit_within_a_budget_sees_what_a_plain_loop_over_its_batches_sees() -> None:
    """Three steps of SGD on the engine equal three by hand."""

    class Mean(anyfit.Task):
        def build_model(self, schema: Any) -> torch.nn.Module:
            torch.manual_seed(0)
            return torch.nn.Embedding(ROWS + 1, 3, padding_idx=0)

        def build_optimizer(self, model: torch.nn.Module) -> Any:
            return torch.optim.SGD(model.parameters(), lr=0.1)

        def step(self, model: torch.nn.Module, batch: Any) -> anyfit.Step:
            return anyfit.Step(model(batch["ids"]).square().sum((1, 2)).mean(), len(batch["row"]))

    plan = Plan(max_tokens=40, batch_size=None, accumulate=2, dtype="float64", seed=6, used_rows=False)
    task = Mean()
    model = task.build_model(None).double()
    optimizer = task.build_optimizer(model)
    batches = make_batches(ragged(), plan, collate, device=CPU)
    trainer = make_trainer(task, task.build_model(None), plan, 3, CPU)
    assert [event.position.step for event in train(trainer, batches, 3)] == [1, 2, 3]
    for offset in range(3):
        window = batches.window(Position(0, 0, offset))
        count = sum(len(batch["row"]) for batch in window)
        optimizer.zero_grad()
        (sum(task.step(model, batch).loss * len(batch["row"]) for batch in window) / count).backward()
        optimizer.step()
    torch.testing.assert_close(trainer.model.weight, model.weight, rtol=0, atol=1e-12)
