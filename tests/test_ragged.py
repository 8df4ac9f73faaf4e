"""Sequences of different lengths: padded and packed as plain Python would, each row once in an epoch, whoever asks."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyfit import Plan
from anyfit.data import LENGTHS, Ragged, Share, make_batches, packed, ragged
from anyfit.errors import DataError, InputError
from anyfit.state import Position

CPU = torch.device("cpu")
SEQUENCES = st.lists(st.lists(st.integers(1, 1000), max_size=9), min_size=1, max_size=40)


def plainly(rows: list[list[int]], padding: int) -> list[list[int]]:
    width = max([1, *map(len, rows)])
    return [row + [padding] * (width - len(row)) for row in rows]


@given(SEQUENCES, st.integers(-5, 5), st.data())
def test_padding_is_that_of_plain_python(rows: list[list[int]], padding: int, data: Any) -> None:
    sequences = Ragged.of(rows, padding)
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
    found = sequences.padded(torch.tensor(indices, dtype=torch.int64))
    assert found.tolist() == plainly([rows[index] for index in indices], padding) and found.dtype == torch.int64
    assert len(sequences) == len(rows) and sequences.lengths.tolist() == list(map(len, rows))


@given(SEQUENCES, st.integers(1, 12), st.none() | st.just(0))
def test_packing_keeps_every_token_in_its_order(rows: list[list[int]], length: int, separator: int | None) -> None:
    flat = [value for row in rows for value in (*row, *([] if separator is None else [separator]))]
    found = packed(Ragged.of(rows), length, separator)
    assert found.values.tolist() == flat
    assert [int(size) for size in found.lengths] == [min(length, len(flat) - start) for start in range(0, len(flat), length)]


def test_what_is_no_set_of_sequences_is_refused() -> None:
    values = torch.arange(4)
    for offsets in (torch.tensor([0, 3]), torch.tensor([1, 4]), torch.tensor([[0, 4]]), torch.zeros(0, dtype=torch.int64)):
        with pytest.raises(DataError, match="must run from 0 to the 4 values"):
            Ragged(values, offsets)
    with pytest.raises(DataError, match="offsets must not fall"):
        Ragged(values, torch.tensor([0, 3, 2, 4]))
    with pytest.raises(DataError, match=re.escape("length (=0) of packed rows must be at least 1")):
        packed(Ragged.of([[1]]), 0)
    with pytest.raises(DataError, match="have 2, 3 rows; they must agree"):
        make_batches({"ids": Ragged.of([[1], [2]]), "target": torch.zeros(3)}, Plan(batch_size=1), list, device=CPU)


def columns(rows: list[list[int]]) -> dict[str, Any]:
    """Two sets of sequences of other lengths, and which row it is."""
    return {
        "ids": Ragged.of(rows, -1),
        "reversed": Ragged.of([[*reversed(row), 7, 7][: len(row) % 4 + 1] for row in rows], -2),
        "target": torch.arange(len(rows)),
    }


def check(batch: dict[str, torch.Tensor], rows: list[list[int]]) -> list[int]:
    places: list[int] = batch["target"].tolist()
    assert batch["ids"].tolist() == plainly([rows[place] for place in places], -1), "cut at the longest of the batch"
    assert batch["reversed"].tolist() == plainly([[*reversed(rows[p]), 7, 7][: len(rows[p]) % 4 + 1] for p in places], -2)
    assert batch[LENGTHS].tolist() == [len(rows[place]) for place in places]
    return places


@given(
    SEQUENCES,
    st.integers(1, 15),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
    st.lists(st.integers(0, 40), max_size=3),
    st.sampled_from([8 << 20, 300, 1]),
)
@settings(max_examples=80)
def test_an_epoch_sees_each_row_once_with_shares_windows_and_chunks_of_any_size(
    rows: list[list[int]], batch_size: int, accumulate: int, drop: bool, bucket: bool, epoch: int, cuts: list[int], chunk: int
) -> None:
    plan = Plan(batch_size=min(len(rows), batch_size), accumulate=accumulate, drop_last=drop, bucket=bucket, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "CHUNK_BYTES", chunk)
        batches = make_batches(columns(rows), plan, list, device=CPU)
        sought = make_batches(columns(rows), plan, list, device=CPU)
    assert batches.steps_per_epoch is not None
    seen = []
    for offset in range(batches.steps_per_epoch):
        window = [check(batch, rows) for batch in batches.window(Position(0, epoch, offset))]
        assert len(window) <= accumulate and all(len(batch) == plan.batch_size for batch in window[:-1])
        step = [place for batch in window for place in batch]
        begins = [sum(max(1, len(rows[place])) for place in step[:index]) for index in range(len(step))]
        bounds = [0, *sorted(cuts), 999]
        for first, last in pairwise(bounds):
            share = [check(batch, rows) for batch in sought.window(Position(0, epoch, offset), Share(first, last))]
            taken = [p for p, begin in zip(step, begins, strict=True) if first <= begin < last]
            assert [p for batch in share for p in batch] == taken, "a share is the rows that begin in it"
            assert all(len(batch) == plan.batch_size for batch in share[:-1])
        seen += [place for batch in window for place in batch]
    assert len(seen) == len(set(seen)) and (drop or len(seen) == len(rows))
    last = batches.steps_per_epoch - 1
    direct = [check(batch, rows) for batch in sought.window(Position(0, epoch, last))]
    assert [p for batch in direct for p in batch] == seen[len(seen) - sum(map(len, direct)) :], "a step sought directly is the same"
    assert [place for batch in batches for place in check(batch, rows)] == list(range(len(rows)))


def test_buckets_pad_less() -> None:
    rows = [[1] * ((index * 37) % 50 + 1) for index in range(1000)]

    def padding(bucket: bool) -> int:
        batches = make_batches({"ids": Ragged.of(rows)}, Plan(batch_size=10, bucket=bucket), list, device=CPU)
        return sum(int((b["ids"] == 0).sum()) for offset in range(100) for b in batches.window(Position(0, 0, offset)))

    assert padding(True) < padding(False) / 5


def test_augmentation_does_not_depend_on_shares_and_chunks() -> None:
    rows = [[index] for index in range(100)]
    batches = make_batches(
        {"ids": Ragged.of(rows)},
        Plan(batch_size=8, accumulate=2),
        list,
        device=CPU,
        augment=lambda batch, uniform: {"u": uniform(), **batch},
    )
    whole = torch.cat([batch["u"] for batch in batches.window(Position(0, 0, 2))])
    parts = [batch["u"] for share in (Share(0, 5), Share(5, 16)) for batch in batches.window(Position(0, 0, 2), share)]
    assert torch.equal(whole, torch.cat(parts))


def test_a_batch_larger_than_the_rows_is_refused_and_all_rows_empty_is_not() -> None:
    empty = make_batches({"ids": Ragged.of([[], []])}, Plan(batch_size=2), list, device=CPU)
    assert empty.window(Position())[0]["ids"].tolist() == [[0], [0]]
    with pytest.raises(InputError, match=r"batch_size \(=3\) is larger than the 2 rows"):
        make_batches({"ids": Ragged.of([[], []])}, Plan(batch_size=3), list, device=CPU)
