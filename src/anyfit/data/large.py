"""Batches of rows that are never in memory together: blocks of an Arrow file, and streams.

`build` makes of a table what `Task.build_dataset` makes of it: a dict of tensors (or `Ragged`), or a Dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from anyfit.data.batches import Batches, Indexed, LoaderBatches, Piece, RowBatches, Share, TensorBatches, Uniform, mix_seed, uniform
from anyfit.data.blocks import Blocks
from anyfit.data.ragged import Ragged, RaggedBatches
from anyfit.data.stream import Stream
from anyfit.errors import InputError
from anyfit.schema import Schema
from anyfit.tree import first_tensor

if TYPE_CHECKING:
    from anyfit.state import Position
    from anyfit.values import Plan

__all__ = ["BlockBatches", "StreamBatches", "batches_in_memory", "make_batches"]

GROUP_BLOCKS = 4  # rows are shuffled within so many blocks at a time
Build = Callable[[pa.Table], Any]
Collate = Callable[[Any], Any]


InMemory = TensorBatches | RowBatches | RaggedBatches


def batches_in_memory(rows: Any, plan: Plan, collate: Collate, **options: Any) -> InMemory:
    """Batches of what a table became: flat sequences, tensors or a Dataset."""
    if isinstance(rows, Mapping) and any(isinstance(value, Ragged) for value in rows.values()):
        return RaggedBatches(rows, plan, **options)
    if isinstance(rows, tuple | Mapping):
        return TensorBatches(rows, plan, **options)
    return RowBatches(rows, plan, collate, **options)


class BlockBatches(Indexed):
    """The blocks of an epoch come in a seeded order, a few at a time; rows are shuffled among those. Any step can be sought."""

    def __init__(self, blocks: Blocks, build: Build, plan: Plan, collate: Collate, **options: Any) -> None:
        if plan.max_tokens is not None:
            raise InputError(
                f"max_tokens (={plan.max_tokens}) needs the lengths of all samples, and these rows are never in memory together; leave it out, "
                "or give rows that fit"
            )
        super().__init__(blocks.num_rows, plan.updated(bucket=False), **options)
        self._measured: bool | None = None  # whether groups know the lengths of their rows; None before the first came
        self._blocks, self._build, self._collate, self._plan = blocks, build, collate, plan
        self._loaded: dict[tuple[int, int], InMemory] = {}
        self._listed: tuple[int, list[tuple[list[int], int]]] = (-1, [])

    def _groups(self, epoch: int) -> list[tuple[list[int], int]]:
        """(blocks, rows) of each group of an epoch."""
        if self._listed[0] != epoch:
            self._listed = (epoch, self._listed_groups(epoch))
        return self._listed[1]

    def _listed_groups(self, epoch: int) -> list[tuple[list[int], int]]:
        present = [index for index, size in enumerate(self._blocks.sizes) if size]
        if self._shuffle:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            present = [present[place] for place in torch.randperm(len(present), generator=generator).tolist()]
        groups = [present[start : start + GROUP_BLOCKS] for start in range(0, len(present), GROUP_BLOCKS)]
        return [(group, sum(self._blocks.sizes[index] for index in group)) for group in groups]

    def _group(self, epoch: int, number: int, blocks: list[int]) -> InMemory:
        """The rows of one group, with an order of their own; the last two stay, for a step may stand across them."""
        key = (epoch, number)
        if key not in self._loaded:
            while len(self._loaded) > 1:
                del self._loaded[next(iter(self._loaded))]
            table = pa.concat_tables([self._blocks.block(index) for index in blocks])
            plan = self._plan.updated(seed=mix_seed(self.seed, epoch, number), batch_size=min(self.batch_size, table.num_rows))
            self._loaded[key] = batches_in_memory(self._build(table), plan, self._collate, device=self.device, shuffle=self._shuffle)
            self._measured = self._loaded[key].lengths is not None
        return self._loaded[key]

    def _read(self, position: Position, pieces: list[Piece], share: Share | None) -> list[Any]:
        return [self._batch(position.epoch, start, stop) for start, stop in pieces]

    def _units(self, epoch: int, start: int, stop: int) -> Tensor | None:
        if self._measured is False:  # rows alone need no reading
            return None
        units = [
            None if group.lengths is None else group.lengths[indices].clamp(min=1) for group, indices in self._parts(epoch, start, stop)
        ]
        found = [part for part in units if part is not None]
        return torch.cat(found) if len(found) == len(units) else None

    def _parts(self, epoch: int, start: int, stop: int) -> Iterator[tuple[InMemory, Tensor]]:
        """The groups in which the rows at [start, stop) stand, and their indices there."""
        begin = 0
        for number, (blocks, rows) in enumerate(self._groups(epoch)):
            low, high = max(start, begin), min(stop, begin + rows)
            if low < high:
                group = self._group(epoch, number, blocks)
                yield group, group.order(epoch)[low - begin : high - begin]
            begin += rows

    def _batch(self, epoch: int, start: int, stop: int) -> Any:
        """One batch, joined where its rows stand in two groups."""
        parts = list(self._parts(epoch, start, stop))
        first = parts[0][0]
        if len(parts) == 1 or not isinstance(first, RowBatches):
            paddings = (
                {name: value.padding for name, value in first.columns.items() if isinstance(value, Ragged)}
                if isinstance(first, RaggedBatches)
                else {}
            )
            return _joined([group.batch_of(indices) for group, indices in parts], paddings)
        samples = [sample for group, indices in parts if isinstance(group, RowBatches) for sample in group.samples(indices.tolist())]
        return self._finish(self._collate(samples))

    def part(self, index: int, count: int) -> Iterator[Any]:
        begin = 0  # batches before this block
        for number, size in enumerate(self._blocks.sizes):
            if not size:
                continue
            inside, held = (index - begin) % count, -(-size // self.batch_size)
            if inside < held:
                plan = self._plan.updated(batch_size=min(self.batch_size, size), bucket=False)
                rows = self._build(self._blocks.block(number))
                yield from batches_in_memory(rows, plan, self._collate, device=self.device, shuffle=False).part(inside, count)
            begin += held


def _joined(parts: list[Any], paddings: Mapping[str, int], padding: int = 0) -> Any:
    """Batches one after the other; sequences are padded to the longer with what stands in `paddings` by name."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Mapping):
        return {name: _joined([part[name] for part in parts], paddings, paddings.get(name, 0)) for name in first}
    if isinstance(first, tuple | list):
        return type(first)(_joined(list(items), paddings) for items in zip(*parts, strict=True))
    if isinstance(first, Tensor) and first.dim() == 2 and len({part.shape[1] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=padding) for part in parts]
    return torch.cat(parts)


class StreamBatches(Batches):
    """Windows of a stream in the order of its shuffle buffer; a seek reads again from the epoch's start."""

    unshared = "a stream cannot be shared between workers by rows; give each its own part of the source"

    def __init__(
        self,
        stream: Stream,
        build: Build,
        plan: Plan,
        collate: Collate,
        *,
        device: torch.device,
        columns: pa.Schema,
        shuffle: bool = True,
        augment: Callable[[Any, Uniform], Any] | None = None,
    ) -> None:
        if plan.batch_size is None:
            raise InputError("batch_size (=None) means all rows, which a stream has no number of; give one")
        if plan.max_tokens is not None:
            raise InputError(f"max_tokens (={plan.max_tokens}) needs the lengths of all samples, which a stream cannot tell; leave it out")
        self.rows, self.steps_per_epoch = None, None
        self.batch_size, self.step_size = plan.batch_size, plan.batch_size * plan.accumulate
        self.device = device
        self._stream, self._build, self._collate, self._plan, self._columns = stream, build, collate, plan, columns
        self._shuffle, self._augment = shuffle, augment
        self._next = (-1, -1)
        self._source: Iterator[dict[str, Any]] = iter(())

    def window(self, position: Position, share: Share | None = None) -> Sequence[Any]:
        if share is not None:
            raise InputError(self.unshared)
        here = (position.epoch, position.offset)
        if here != self._next:
            self._source = self._stream.shuffled(mix_seed(self._plan.seed, position.epoch)) if self._shuffle else iter(self._stream)
            for _ in islice(self._source, position.offset * self.step_size):
                pass
        self._next = (position.epoch, position.offset + 1)
        rows = list(islice(self._source, self.step_size))
        if not rows or (len(rows) < self.step_size and self._plan.drop_last and position.offset):
            return []
        batches = list(self._batches(rows))
        if self._augment is None:
            return batches
        result, start = [], position.offset * self.step_size
        for batch in batches:
            size = first_tensor(batch).shape[0]
            places = torch.arange(start, start + size, device=self.device)
            result.append(self._augment(batch, uniform(self._plan.seed, position.epoch, places)))
            start += size
        return result

    def _batches(self, rows: list[dict[str, Any]]) -> Iterator[Any]:
        built = self._build(self._stream.table(rows, self._columns))
        plan = self._plan.updated(batch_size=min(self.batch_size, len(rows)), accumulate=1, bucket=False, workers=0)
        yield from batches_in_memory(built, plan, self._collate, device=self.device, shuffle=False)

    def __iter__(self) -> Iterator[Any]:
        source = iter(self._stream)
        while rows := list(islice(source, self.batch_size)):
            yield from self._batches(rows)


def make_batches(
    rows: Any,
    plan: Plan,
    collate: Collate,
    *,
    device: torch.device,
    shuffle: bool = True,
    augment: Callable[[Any, Uniform], Any] | None = None,
    schema: Schema | None = None,
    build: Build | None = None,
    columns: pa.Schema | None = None,
) -> Batches:
    """Batches of whatever a source gave: a table, blocks or a stream that `build` takes; tensors, a Dataset, a DataLoader.

    `columns` are the Arrow types of a stream's rows; None takes those of its first.
    """
    batches: Batches
    if isinstance(rows, TensorDataset):
        rows = rows.tensors
    options: dict[str, Any] = {"device": device, "shuffle": shuffle, "augment": augment}
    if isinstance(rows, pa.Table):
        assert build is not None
        rows = build(rows)
    if isinstance(rows, Blocks):
        assert build is not None
        batches = BlockBatches(rows, build, plan, collate, **options)
    elif isinstance(rows, Stream):
        assert build is not None
        batches = StreamBatches(rows, build, plan, collate, columns=rows.first().schema if columns is None else columns, **options)
    elif isinstance(rows, DataLoader):
        batches = LoaderBatches(rows, plan, device, augment)
    elif isinstance(rows, IterableDataset):
        batches = LoaderBatches(DataLoader(rows, batch_size=plan.batch_size, collate_fn=collate), plan, device, augment)
    else:
        batches = batches_in_memory(rows, plan, collate, **options)
    batches.schema = schema
    return batches
