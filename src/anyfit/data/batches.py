"""Windows of batches: the samples of step k of an epoch, whoever asks, as a pure function of seed, epoch and offset.

N samples, B of one batch; a window is the batches of one optimizer step, and a share of it is what one worker takes.
A sample's place is its position in the order of an epoch. A piece is the places [start, stop) of one batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from anyfit.errors import DataError, InputError
from anyfit.schema import Schema
from anyfit.tree import first_tensor, leaves, map_tensors

if TYPE_CHECKING:
    from anyfit.state import Position
    from anyfit.values import Plan

__all__ = [
    "Batches",
    "Indexed",
    "LoaderBatches",
    "RowBatches",
    "Share",
    "TensorBatches",
    "Uniform",
    "mix",
    "mix_seed",
    "signed",
    "taken_apart",
    "uniform",
]

CHUNK_BYTES = 8 << 20  # one gather serves many batches, but stays near the cache
CHUNK_STEPS = 64
WORD = (1 << 64) - 1
BUCKET_WINDOWS = 50  # length bucketing sorts within so many windows
PACKS = 0x7061636B  # what is drawn for batches within a token budget is drawn for nothing else

Piece = tuple[int, int]


class Uniform(Protocol):
    """Uniform numbers in [0, 1) for each sample of a batch: `uniform(*shape)` -> (B, *shape)."""

    def __call__(self, *shape: int) -> Tensor: ...


def signed(value: int) -> int:
    """A 64-bit word as int64 spells it."""
    value &= WORD
    return value - (1 << 64) if value >= 1 << 63 else value


def mix(values: Tensor) -> Tensor:
    """splitmix64's finalizer in int64, whose products wrap as uint64's do."""
    values = values + signed(0x9E3779B97F4A7C15)  # ours from here on: the rest needs no memory of its own
    values ^= (values >> 30).bitwise_and_((1 << 34) - 1)
    values *= signed(0xBF58476D1CE4E5B9)
    values ^= (values >> 27).bitwise_and_((1 << 37) - 1)
    values *= signed(0x94D049BB133111EB)
    values ^= (values >> 31).bitwise_and_((1 << 33) - 1)
    return values


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers."""
    state = 0
    for part in parts:  # the same as `mix`, without tensors: a simulation asks for each site and round
        state = ((state ^ (part & WORD)) + 0x9E3779B97F4A7C15) & WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
        state ^= state >> 31
    return state & (WORD >> 1)


def uniform(seed: int, epoch: int, positions: Tensor) -> Uniform:
    """Counter-based numbers: those of a sample depend on seed, epoch and its position in the epoch, not on its batch or its worker."""
    key = mix_seed(seed, epoch, 0x756E69)
    calls = 0

    def draw(*shape: int) -> Tensor:
        nonlocal calls
        width = math.prod(shape)
        rows = mix(positions ^ mix_seed(key, calls))
        calls += 1
        cells = mix(rows[:, None] + torch.arange(width, device=positions.device) * signed(0xD1342543DE82EF95))
        return (((cells >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24).reshape(-1, *shape)

    return draw


class Share(NamedTuple):
    """A worker's part of a step: the samples that begin in [first, last) of its units, at most `micro` rows of them at once.

    Whatever the cuts are, each sample is in exactly one of the shares that they make.
    """

    first: int
    last: int
    micro: int | None = None


class Batches(ABC):
    """The rows of one split as windows for training and as batches for evaluation."""

    rows: int | None
    steps_per_epoch: int | None
    schema: Schema | None = None  # what the rows are; metrics ask for it
    unshared = "these batches cannot be shared between workers; give rows in memory, a Dataset or a file"

    @abstractmethod
    def window(self, position: Position, share: Share | None = None) -> Sequence[Any]:
        """The batches of one step; pure in its arguments. `share` is the part of the step's samples that this worker takes."""

    def units(self, position: Position) -> int:
        """How many units of work a step has: the lengths of its samples (each at least 1) where they are known, else their number."""
        raise InputError(self.unshared)

    def places(self, position: Position, share: Share | None = None) -> list[Tensor]:
        """The places of the samples of each batch of a window, (B,) int64; pure in its arguments."""
        raise InputError(
            f"the places of samples are not known before they are read, and exact_dropout and shares need them: {self.unshared}"
        )

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """All rows once, in the order they stand, for evaluation and prediction."""

    def part(self, index: int, count: int) -> Iterator[Any]:
        """Each `count`-th batch of all rows from `index` on; without reading the others where any row can be read."""
        return islice(iter(self), index, None, count)


class Indexed(Batches):
    """What sources with random access share: order, windows, shares, token budgets, augmentation, device and type."""

    ahead: Callable[[int], Share | None] | None = None  # the share of a coming step by its units, for those who read ahead

    def __init__(
        self,
        rows: int,
        plan: Plan,
        *,
        device: torch.device,
        shuffle: bool = True,
        augment: Callable[[Any, Uniform], Any] | None = None,
        order: Callable[[int], Sequence[int]] | None = None,
        lengths: Callable[[], Any] | None = None,
        set_epoch: Callable[[int], object] | None = None,
    ) -> None:
        if rows == 0:
            raise DataError("data has no rows; give at least one")
        batch_size = plan.batch_size or rows
        if batch_size > rows and shuffle and plan.max_tokens is None:
            raise InputError(
                f"batch_size (={batch_size}) is larger than the {rows} rows to train on; pass a smaller one, or None for all rows"
            )
        self.rows, self.batch_size = rows, batch_size  # under a token budget the most rows of a batch
        self.device, self.dtype, self.seed = device, getattr(torch, plan.dtype), plan.seed
        self._shuffle, self._augment, self._given_order, self._set_epoch = shuffle, augment, order, set_epoch
        self._ask_lengths = lengths  # which may be dear: not before they are needed
        self._lengths: Tensor | None = None
        self._bucket, self._max_tokens, self._channels_last = plan.bucket, plan.max_tokens, plan.channels_last
        self._epoch, self._indices = -1, torch.empty(0, dtype=torch.int64)
        if plan.bucket and self.lengths is None:
            raise InputError("bucket (=True) needs the samples' lengths; give the data set an attribute `lengths`")
        self._packs: list[Tensor] | None = None  # the batches of a token budget
        self._ends: list[int] = []  # and where each ends in the order of the epoch
        if plan.max_tokens is not None:
            self._packs = self._packed(plan.max_tokens)
        # of what a step is made: rows, or batches that stay whole
        parts, self._per_step = (rows, batch_size * plan.accumulate) if self._packs is None else (len(self._packs), plan.accumulate)
        self._per_step = min(parts, self._per_step)
        self.steps_per_epoch = parts // self._per_step if plan.drop_last else -(-parts // self._per_step)
        self.step_size = -(-rows * self._per_step // parts)  # rows; under a token budget on average

    @property
    def lengths(self) -> Tensor | None:
        """(N,) the samples' lengths; None where they are not known."""
        if self._ask_lengths is not None:
            given = self._ask_lengths()
            self._lengths = None if given is None else _checked(given, self.rows)
            self._ask_lengths = None
        return self._lengths

    def _packed(self, max_tokens: int) -> list[Tensor]:
        """Batches within a token budget, cut once: from the order by length, or from that of the rows where nothing is shuffled."""
        assert self.rows is not None
        if self.lengths is None:
            raise InputError(
                f"max_tokens (={max_tokens}) needs the samples' lengths; give sequences of words, or a data set with an attribute `lengths` "
                "or a method `num_tokens(index)`"
            )
        if self._given_order is not None:
            raise InputError(
                f"max_tokens (={max_tokens}) cuts batches by length, and the data set has an order(epoch) of its own; leave one of them out"
            )
        longest = int(self.lengths.max())
        if longest > max_tokens:
            raise InputError(
                f"max_tokens (={max_tokens}) is less than the length {longest} of sample {int(self.lengths.argmax())} alone; raise it, or cut "
                "or leave out what is longer"
            )
        order = torch.arange(self.rows)
        if self._shuffle:
            order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(mix_seed(self.seed, PACKS)))
            order = order[self.lengths[order].argsort(stable=True)]
        return list(order.split(_pack_sizes(self.lengths[order], self.batch_size, max_tokens)))  # type: ignore[no-untyped-call]

    def order(self, epoch: int) -> Tensor:
        """(N,) the indices in the order of one epoch."""
        if epoch != self._epoch:
            if self._set_epoch is not None:
                self._set_epoch(epoch)
            self._indices, self._epoch = self._make_order(epoch), epoch
        return self._indices

    def _make_order(self, epoch: int) -> Tensor:
        assert self.rows is not None
        if self._packs is not None:
            return self._order_of_packs(epoch, self._packs)
        if self._given_order is not None:
            given = torch.as_tensor(self._given_order(epoch), dtype=torch.int64)
            if given.shape != (self.rows,) or int(given.min()) < 0 or int(given.max()) >= self.rows:
                raise InputError(
                    f"order({epoch}) of the data set must give {self.rows} indices from 0 to {self.rows - 1}; it gave {tuple(given.shape)}"
                )
            return given
        if not self._shuffle:
            return torch.arange(self.rows)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        indices = torch.randperm(self.rows, generator=generator)
        return self._bucketed(indices, self.lengths, generator) if self._bucket and self.lengths is not None else indices

    def _order_of_packs(self, epoch: int, packs: list[Tensor]) -> Tensor:
        if self._shuffle:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            packs = [packs[place] for place in torch.randperm(len(packs), generator=generator).tolist()]
        self._ends = list(accumulate(map(len, packs)))
        return torch.cat(packs)

    def _bucketed(self, indices: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """Sort by length within stretches of many windows, then shuffle the windows; the one short window stays last."""
        stretches = [part[lengths[part].argsort(stable=True)] for part in indices.split(self.step_size * BUCKET_WINDOWS)]  # type: ignore[no-untyped-call]
        windows = list(torch.cat(stretches).split(self.step_size))  # type: ignore[no-untyped-call]
        short = [windows.pop()] if len(windows[-1]) < self.step_size else []
        shuffled = [windows[index] for index in torch.randperm(len(windows), generator=generator).tolist()]
        return torch.cat(shuffled + short)

    def _step(self, position: Position) -> list[Piece]:
        """The parts of a step that no batch may reach across: its batches where a token budget cut them, else all of it."""
        assert self.rows is not None
        if self._packs is None:
            start = position.offset * self.step_size
            return [(start, min(self.rows, start + self.step_size))]
        self.order(position.epoch)
        first = position.offset * self._per_step
        ends = self._ends[first : first + self._per_step]
        starts = [0, *self._ends][first : first + self._per_step]
        return list(zip(starts, ends, strict=False))  # after the last batch nothing begins

    def _units(self, epoch: int, start: int, stop: int) -> Tensor | None:
        """(stop - start,) the units of the samples at these places; None where each is one."""
        return None if self.lengths is None else self.lengths[self.order(epoch)[start:stop]].clamp(min=1)

    def units(self, position: Position) -> int:
        step = self._step(position)
        if not step or step[-1][1] <= step[0][0]:
            return 0
        units = self._units(position.epoch, step[0][0], step[-1][1])
        return step[-1][1] - step[0][0] if units is None else int(units.sum())

    def _pieces(self, position: Position, share: Share | None) -> list[Piece]:
        """The places of each batch of this worker's part of a step."""
        step, size = self._step(position), self.batch_size
        if not step:
            return []
        first, last = step[0][0], step[-1][1]
        if share is not None:
            first, last = self._taken(position.epoch, first, last, share)
            size = min(size, share.micro or size)
        return [(start, min(start + size, last, high)) for low, high in step for start in range(max(first, low), min(last, high), size)]

    def _taken(self, epoch: int, start: int, stop: int, share: Share) -> Piece:
        """The places of a share of the step at [start, stop)."""
        units = self._units(epoch, start, stop) if start < stop else None
        if units is None:
            first, last = (min(max(0, edge), stop - start) for edge in share[:2])
        else:
            begins = units.cumsum(0) - units
            first, last = torch.searchsorted(begins, torch.tensor(share[:2])).tolist()
        return start + first, start + last

    def places(self, position: Position, share: Share | None = None) -> list[Tensor]:
        return [torch.arange(start, stop, device=self.device) for start, stop in self._pieces(position, share)]

    def window(self, position: Position, share: Share | None = None) -> Sequence[Any]:
        pieces = self._pieces(position, share)
        batches = self._read(position, pieces, share)
        return [self._augmented(batch, position.epoch, start) for (start, _), batch in zip(pieces, batches, strict=True)]

    @abstractmethod
    def _read(self, position: Position, pieces: list[Piece], share: Share | None) -> list[Any]:
        """The batches of some pieces of one step, which stand one after the other."""

    def _in_order(self) -> list[Piece]:
        """The batches of all rows as they stand."""
        assert self.rows is not None
        if self._max_tokens is None:
            return [(start, min(self.rows, start + self.batch_size)) for start in range(0, self.rows, self.batch_size)]
        assert self.lengths is not None
        ends = list(accumulate(_pack_sizes(self.lengths, self.batch_size, self._max_tokens)))
        return list(pairwise([0, *ends]))

    def __iter__(self) -> Iterator[Any]:
        return self.part(0, 1)

    def _finish(self, batch: Any) -> Any:
        """To the device, floats to the plan's type, images to channels last where asked."""

        def convert(tensor: Tensor) -> Tensor:
            if tensor.device != self.device:
                tensor = tensor.to(self.device, non_blocking=True)
            if tensor.is_floating_point() and tensor.dtype != self.dtype:
                tensor = tensor.to(self.dtype)
            if self._channels_last and tensor.dim() == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            return tensor

        return map_tensors(convert, batch)

    def _augmented(self, batch: Any, epoch: int, start: int) -> Any:
        if self._augment is None:
            return batch
        size = first_tensor(batch).shape[0]
        positions = torch.arange(start, start + size, device=self.device)
        return self._augment(batch, uniform(self.seed, epoch, positions))


def _checked(lengths: Any, rows: int | None) -> Tensor:
    """(N,) int64."""
    try:
        found = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"lengths (a {type(lengths).__name__}) of the data set must be {rows} whole numbers: {error}") from error
    if found.shape != (rows,) or found.is_floating_point() or found.is_complex():
        raise DataError(f"lengths of the data set must be {rows} whole numbers; they are {tuple(found.shape)} of {found.dtype}")
    return found.to("cpu", torch.int64)


def _pack_sizes(lengths: Tensor, most: int, max_tokens: int) -> list[int]:
    """How many rows each batch takes of rows in their order: as many as fit, rows x longest being what a batch costs."""
    sizes, rows, longest = [], 0, 0
    for length in lengths.clamp(min=1).tolist():  # an empty row is padded to one
        wider = max(longest, length)
        if rows and (rows == most or (rows + 1) * wider > max_tokens):
            sizes.append(rows)
            rows, wider = 0, length
        rows, longest = rows + 1, wider
    return [*sizes, rows]


class TensorBatches(Indexed):
    """Tensors in memory: one gather for many batches, then views; no worker processes."""

    def __init__(self, tensors: Any, plan: Plan, **options: Any) -> None:
        super().__init__(int(first_tensor(tensors).shape[0]), plan, **options)
        floats = {leaf.dtype for leaf in leaves(tensors) if leaf.is_floating_point()}
        if floats - {self.dtype}:  # once here rather than in each batch
            tensors = map_tensors(lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor, tensors)
        self._tensors = tensors
        row_bytes = sum(leaf[0].numel() * leaf.element_size() for leaf in leaves(tensors))
        self._chunk_steps = max(1, min(CHUNK_STEPS, CHUNK_BYTES // max(1, row_bytes * self.step_size)))
        self._chunk: tuple[int, int] = (-1, -1)
        self._views: list[list[Any]] = []

    def window(self, position: Position, share: Share | None = None) -> Sequence[Any]:
        if share is not None:
            return super().window(position, share)
        chunk = (position.epoch, position.offset // self._chunk_steps)
        if chunk != self._chunk:
            self._chunk, self._views = chunk, self._load(*chunk)
        window = self._views[position.offset % self._chunk_steps]
        return window if self._augment is None else self._augment_all(window, position.epoch, position.offset * self.step_size)

    def _augment_all(self, window: list[Any], epoch: int, start: int) -> list[Any]:
        """Window by window and never ahead: what draws from a global generator is then resumed exactly."""
        return [self._augmented(batch, epoch, start + index * self.batch_size) for index, batch in enumerate(window)]

    def _load(self, epoch: int, chunk: int) -> list[list[Any]]:
        """The windows of many steps from one gather."""
        assert self.rows is not None
        first = chunk * self._chunk_steps * self.step_size
        last = min(self.rows, first + self._chunk_steps * self.step_size)
        batches = self._gather(epoch, first, last, self.batch_size)
        per_step = -(-self.step_size // self.batch_size)
        return [batches[index : index + per_step] for index in range(0, len(batches), per_step)]

    def _gather(self, epoch: int, start: int, stop: int, size: int) -> list[Any]:
        return _split(self.batch_of(self.order(epoch)[start:stop]), size) if start < stop else []

    def _read(self, position: Position, pieces: list[Piece], share: Share | None) -> list[Any]:
        return self._gather(position.epoch, pieces[0][0], pieces[-1][1], pieces[0][1] - pieces[0][0]) if pieces else []

    def batch_of(self, indices: Tensor) -> Any:
        """One batch of some rows, (B,) indices, on the device."""
        return self._finish(map_tensors(lambda tensor: tensor.index_select(0, indices.to(tensor.device)), self._tensors))

    def part(self, index: int, count: int) -> Iterator[Any]:
        for start, stop in self._in_order()[index::count]:
            yield self._finish(_slice(self._tensors, start, stop))


def _split(gathered: Any, size: int) -> list[Any]:
    """Views of `size` rows. The common containers go without a walk per batch."""
    if type(gathered) is dict and all(isinstance(value, Tensor) for value in gathered.values()):
        names = tuple(gathered)
        return [dict(zip(names, parts, strict=True)) for parts in zip(*(value.split(size) for value in gathered.values()), strict=True)]
    if type(gathered) is tuple and all(isinstance(value, Tensor) for value in gathered):
        return list(zip(*(value.split(size) for value in gathered), strict=True))
    count = -(-int(first_tensor(gathered).shape[0]) // size)
    return [_slice(gathered, index * size, (index + 1) * size) for index in range(count)]


def _slice(tree: Any, start: int, stop: int) -> Any:
    return map_tensors(lambda tensor: tensor[start:stop], tree)


class _Ahead(NamedTuple):
    """What worker processes read ahead, and what they were told to read: (offset, pieces) of each step that has any."""

    epoch: int
    told: deque[tuple[int, list[Piece]]]
    batches: Iterator[Any]


class RowBatches(Indexed):
    """A map-style Dataset: samples by index, batched by `collate`; worker processes only where the plan asks for them."""

    def __init__(self, dataset: Any, plan: Plan, collate: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(
            len(dataset),
            plan,
            order=getattr(dataset, "order", None),
            lengths=lambda: _lengths_of(dataset, plan.bucket or plan.max_tokens is not None),
            set_epoch=getattr(dataset, "set_epoch", None),
            **options,
        )
        self._dataset, self._collate, self._workers = dataset, collate, plan.workers
        self._fetch_many = getattr(dataset, "__getitems__", None)
        self._stream: _Ahead | None = None

    def samples(self, indices: list[int]) -> list[Any]:
        """The samples of some rows."""
        return self._fetch_many(indices) if self._fetch_many is not None else [self._dataset[index] for index in indices]

    def _fetch(self, indices: list[int]) -> Any:
        return self._collate(self.samples(indices))

    def batch_of(self, indices: Tensor) -> Any:
        """One batch of some rows, (B,) indices, on the device."""
        return self._finish(self._fetch(indices.tolist()))

    def _read(self, position: Position, pieces: list[Piece], share: Share | None) -> list[Any]:
        if self._workers:
            return [self._finish(batch) for batch in self._prefetched(position, pieces, share)]
        order = self.order(position.epoch)
        return [self.batch_of(order[start:stop]) for start, stop in pieces]

    def _prefetched(self, position: Position, pieces: list[Piece], share: Share | None) -> list[Any]:
        """Worker processes read ahead; what is read stays ours to say, so a seek or another share only starts them anew."""
        if not pieces:
            return []
        stream, expected = self._stream, (position.offset, pieces)
        if stream is None or stream.epoch != position.epoch or not stream.told or stream.told[0] != expected:
            told: deque[tuple[int, list[Piece]]] = deque()
            self._stream = None  # the old processes go before new ones come
            self.order(position.epoch)  # which tells the data set of the epoch, before processes hold copies of it
            self._stream = stream = _Ahead(position.epoch, told, iter(self._loader(self._told(position, share, told), position.epoch)))
        batches = [next(stream.batches) for _ in pieces]
        stream.told.popleft()
        return batches

    def _told(self, position: Position, share: Share | None, told: deque[tuple[int, list[Piece]]]) -> Iterator[list[int]]:
        """The rows of each batch from here to the end of the epoch, noted in `told` as far as they were asked for."""
        for offset in range(position.offset, max(self.steps_per_epoch or 0, position.offset + 1)):
            there = position._replace(offset=offset)
            pieces = self._pieces(there, self._share_of(there, position, share))
            if pieces:
                told.append((offset, pieces))
            for start, stop in pieces:
                yield self.order(position.epoch)[start:stop].tolist()

    def _share_of(self, there: Position, here: Position, share: Share | None) -> Share | None:
        """The share of a coming step: as `ahead` tells, else the same part of its units as here."""
        if share is None or there == here:
            return share
        units, total = self.units(there), self.units(here)
        if self.ahead is not None:
            return self.ahead(units)
        return Share(share.first * units // total, share.last * units // total, share.micro)

    def _loader(self, batches: Iterable[list[int]], epoch: int) -> DataLoader[Any]:
        # an own generator: iterating a DataLoader otherwise draws from the global one and a resume would differ
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch, 1))
        return DataLoader(
            self._dataset,
            batch_sampler=batches,  # iterated once, in this process
            collate_fn=self._collate,
            num_workers=self._workers,
            generator=generator,
        )

    def part(self, index: int, count: int) -> Iterator[Any]:
        parts = [list(range(start, stop)) for start, stop in self._in_order()[index::count]]
        source: Iterable[Any] = self._loader(parts, 0) if self._workers else map(self._fetch, parts)
        for batch in source:
            yield self._finish(batch)


def _lengths_of(dataset: Any, needed: bool) -> Any:
    """The lengths that a Dataset tells of; one by one only where they are needed."""
    lengths, one_by_one = getattr(dataset, "lengths", None), getattr(dataset, "num_tokens", None)
    if lengths is not None or one_by_one is None or not needed:
        return lengths
    return [int(one_by_one(index)) for index in range(len(dataset))]


class LoaderBatches(Batches):
    """A loader with a sampler of its own, or a stream: batches come as they come. No seek, no shares, no exact resume."""

    unshared = "a DataLoader with its own sampler cannot be shared between workers; give its data set instead"

    def __init__(
        self, loader: DataLoader[Any], plan: Plan, device: torch.device, augment: Callable[[Any, Uniform], Any] | None = None
    ) -> None:
        if plan.max_tokens is not None:
            raise InputError(
                f"max_tokens (={plan.max_tokens}) needs the samples' lengths, and batches of a loader with its own sampler, or of a data set "
                "without index, come as they come; give a data set with an attribute `lengths`"
            )
        self._augment, self._seed, self._seen = augment, plan.seed, 0
        self.rows = None if isinstance(loader.dataset, IterableDataset) else len(loader.dataset)  # type: ignore[arg-type]
        try:
            self.steps_per_epoch = -(-len(loader) // plan.accumulate)
        except TypeError:
            self.steps_per_epoch = None
        self._loader, self._accumulate, self.device, self.dtype = loader, plan.accumulate, device, getattr(torch, plan.dtype)
        self._next = (0, 0)
        self._stream: Iterator[Any] = iter(())

    def _finish(self, batch: Any) -> Any:
        return map_tensors(
            lambda tensor: tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype, non_blocking=True), batch
        )

    def window(self, position: Position, share: Share | None = None) -> Sequence[Any]:
        if share is not None:
            raise InputError(self.unshared)
        if position.offset == 0:
            self._stream, self._seen = iter(self._loader), 0
        elif self._next != (position.epoch, position.offset):
            raise InputError(
                f"a DataLoader with its own sampler cannot seek to step {position.offset} of an epoch; give its data set instead, "
                "or resume from a checkpoint at the end of an epoch"
            )
        self._next = (position.epoch, position.offset + 1)
        batches: list[Any] = []
        for batch in self._stream:
            batches.append(self._augmented(self._finish(batch), position.epoch))
            if len(batches) == self._accumulate:
                break
        return batches

    def _augmented(self, batch: Any, epoch: int) -> Any:
        """A sample's position is that in which it came."""
        if self._augment is None:
            return batch
        start, self._seen = self._seen, self._seen + first_tensor(batch).shape[0]
        return self._augment(batch, uniform(self._seed, epoch, torch.arange(start, self._seen, device=self.device)))

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield self._finish(batch)


def taken_apart(loader: DataLoader[Any]) -> tuple[Any, dict[str, Any], Callable[[Any], Any], bool] | None:
    """A user's DataLoader as data set, plan fields, collate and whether it shuffles; None where its sampler is its own."""
    batches = loader.batch_sampler  # the loader's own sampler says nothing where a batch sampler was given
    sampler = getattr(batches, "sampler", None)
    plain = type(sampler) in (RandomSampler, SequentialSampler) and type(batches) is BatchSampler
    replaced = getattr(sampler, "replacement", False) or getattr(sampler, "_num_samples", None) is not None
    if not plain or replaced or isinstance(loader.dataset, IterableDataset):
        return None
    assert isinstance(batches, BatchSampler)
    fields = {"batch_size": batches.batch_size, "drop_last": batches.drop_last, "workers": loader.num_workers}
    return loader.dataset, fields, loader.collate_fn, type(sampler) is RandomSampler
