"""Windows of batches: the samples of step k of an epoch, whoever asks, as a pure function of seed, epoch and offset.

B samples of one batch; a window is the batches of one optimizer step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from anyfit.errors import DataError, InputError
from anyfit.schema import Schema
from anyfit.tree import first_tensor, leaves, map_tensors

if TYPE_CHECKING:
    from anyfit.state import Position
    from anyfit.values import Plan

__all__ = ["Batches", "Indexed", "LoaderBatches", "RowBatches", "TensorBatches", "Uniform", "mix_seed", "taken_apart", "uniform"]

CHUNK_BYTES = 8 << 20  # one gather serves many batches, but stays near the cache
CHUNK_STEPS = 64
WORD = (1 << 64) - 1
BUCKET_WINDOWS = 50  # length bucketing sorts within so many windows


class Uniform(Protocol):
    """Uniform numbers in [0, 1) for each sample of a batch: `uniform(*shape)` -> (B, *shape)."""

    def __call__(self, *shape: int) -> Tensor: ...


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(values: Tensor) -> Tensor:
    """splitmix64's finalizer in int64, whose products wrap as uint64's do."""
    values = values + _signed(0x9E3779B97F4A7C15)
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return values ^ ((values >> 31) & ((1 << 33) - 1))


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers."""
    state = 0
    for part in parts:  # the same as `_mix`, without tensors: a simulation asks for each site and round
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
        rows = _mix(positions ^ mix_seed(key, calls))
        calls += 1
        cells = _mix(rows[:, None] + torch.arange(width, device=positions.device) * _signed(0xD1342543DE82EF95))
        return (((cells >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24).reshape(-1, *shape)

    return draw


class Batches(ABC):
    """The rows of one split as windows for training and as batches for evaluation."""

    rows: int | None
    steps_per_epoch: int | None
    schema: Schema | None = None  # what the rows are; metrics ask for it

    @abstractmethod
    def window(self, position: Position, share: slice | None = None) -> Sequence[Any]:
        """The batches of one step; pure in its arguments. `share` is the part of the step's samples that this worker takes."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """All rows once, in the order they stand, for evaluation and prediction."""


class Indexed(Batches):
    """What sources with random access share: order, windows, augmentation, device and type."""

    def __init__(
        self,
        rows: int,
        plan: Plan,
        *,
        device: torch.device,
        shuffle: bool = True,
        augment: Callable[[Any, Uniform], Any] | None = None,
        order: Callable[[int], Sequence[int]] | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        set_epoch: Callable[[int], object] | None = None,
    ) -> None:
        if rows == 0:
            raise DataError("data has no rows; give at least one")
        batch_size = plan.batch_size or rows
        if batch_size > rows and shuffle:
            raise InputError(
                f"batch_size (={batch_size}) is larger than the {rows} rows to train on; pass a smaller one, or None for all rows"
            )
        self.rows, self.batch_size, self.step_size = rows, batch_size, min(rows, batch_size * plan.accumulate)
        self.steps_per_epoch = rows // self.step_size if plan.drop_last else -(-rows // self.step_size)
        self.device, self.dtype, self.seed = device, getattr(torch, plan.dtype), plan.seed
        self._shuffle, self._augment, self._given_order, self._set_epoch = shuffle, augment, order, set_epoch
        self._lengths = torch.as_tensor(lengths) if plan.bucket and lengths is not None else None
        if plan.bucket and lengths is None:
            raise InputError("bucket (=True) needs the samples' lengths; give the data set an attribute `lengths`")
        self._channels_last = plan.channels_last
        self._epoch, self._indices = -1, torch.empty(0, dtype=torch.int64)

    def order(self, epoch: int) -> Tensor:
        """(N,) the indices in the order of one epoch."""
        if epoch != self._epoch:
            if self._set_epoch is not None:
                self._set_epoch(epoch)
            self._indices, self._epoch = self._make_order(epoch), epoch
        return self._indices

    def _make_order(self, epoch: int) -> Tensor:
        if self._given_order is not None:
            assert self.rows is not None
            given = torch.as_tensor(self._given_order(epoch), dtype=torch.int64)
            if given.shape != (self.rows,) or int(given.min()) < 0 or int(given.max()) >= self.rows:
                raise InputError(
                    f"order({epoch}) of the data set must give {self.rows} indices from 0 to {self.rows - 1}; it gave {tuple(given.shape)}"
                )
            return given
        assert self.rows is not None
        if not self._shuffle:
            return torch.arange(self.rows)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        indices = torch.randperm(self.rows, generator=generator)
        return indices if self._lengths is None else self._bucketed(indices, self._lengths, generator)

    def _bucketed(self, indices: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """Sort by length within stretches of many windows, then shuffle the windows; the one short window stays last."""
        stretches = [part[lengths[part].argsort(stable=True)] for part in indices.split(self.step_size * BUCKET_WINDOWS)]  # type: ignore[no-untyped-call]
        windows = list(torch.cat(stretches).split(self.step_size))  # type: ignore[no-untyped-call]
        short = [windows.pop()] if len(windows[-1]) < self.step_size else []
        shuffled = [windows[index] for index in torch.randperm(len(windows), generator=generator).tolist()]
        return torch.cat(shuffled + short)

    def _bounds(self, offset: int, share: slice | None) -> tuple[int, int]:
        """First and last position within the epoch of this worker's part of a step."""
        assert self.rows is not None
        start = offset * self.step_size
        stop = min(self.rows, start + self.step_size)
        if share is None:
            return start, stop
        first, last, _ = share.indices(stop - start)
        return start + first, start + last

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

    def window(self, position: Position, share: slice | None = None) -> Sequence[Any]:
        if share is not None:
            start, stop = self._bounds(position.offset, share)
            return self._augment_all(self._gather(position.epoch, start, stop), position.epoch, start)
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
        batches = self._gather(epoch, first, last)
        per_step = -(-self.step_size // self.batch_size)
        return [batches[index : index + per_step] for index in range(0, len(batches), per_step)]

    def _gather(self, epoch: int, start: int, stop: int) -> list[Any]:
        if stop <= start:
            return []
        return _split(self.batch_of(self.order(epoch)[start:stop]), self.batch_size)

    def batch_of(self, indices: Tensor) -> Any:
        """One batch of some rows, (B,) indices, on the device."""
        return self._finish(map_tensors(lambda tensor: tensor.index_select(0, indices.to(tensor.device)), self._tensors))

    def __iter__(self) -> Iterator[Any]:
        assert self.rows is not None
        for start in range(0, self.rows, self.batch_size):
            yield self._finish(_slice(self._tensors, start, start + self.batch_size))


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


class RowBatches(Indexed):
    """A map-style Dataset: samples by index, batched by `collate`; worker processes only where the plan asks for them."""

    def __init__(self, dataset: Any, plan: Plan, collate: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(
            len(dataset),
            plan,
            order=getattr(dataset, "order", None),
            lengths=getattr(dataset, "lengths", None),
            set_epoch=getattr(dataset, "set_epoch", None),
            **options,
        )
        self._dataset, self._collate, self._workers = dataset, collate, plan.workers
        self._fetch_many = getattr(dataset, "__getitems__", None)
        self._stream: tuple[tuple[int, int], Iterator[Any]] | None = None

    def samples(self, indices: list[int]) -> list[Any]:
        """The samples of some rows."""
        return self._fetch_many(indices) if self._fetch_many is not None else [self._dataset[index] for index in indices]

    def _fetch(self, indices: list[int]) -> Any:
        return self._collate(self.samples(indices))

    def batch_of(self, indices: Tensor) -> Any:
        """One batch of some rows, (B,) indices, on the device."""
        return self._finish(self._fetch(indices.tolist()))

    def _index_batches(self, epoch: int, start: int, stop: int) -> list[list[int]]:
        return [part.tolist() for part in torch.split(self.order(epoch)[start:stop], self.batch_size)] if stop > start else []

    def window(self, position: Position, share: slice | None = None) -> Sequence[Any]:
        start, stop = self._bounds(position.offset, share)
        parts = self._index_batches(position.epoch, start, stop)
        if self._workers and share is None:
            batches = self._prefetched(position, len(parts))
        else:
            batches = [self._fetch(part) for part in parts]
        return [
            self._augmented(self._finish(batch), position.epoch, start + index * self.batch_size) for index, batch in enumerate(batches)
        ]

    def _prefetched(self, position: Position, count: int) -> list[Any]:
        """Worker processes read ahead; the order stays ours, so a seek only starts them anew."""
        here = (position.epoch, position.offset)
        if self._stream is None or self._stream[0] != here:
            assert self.rows is not None
            ahead = self._index_batches(position.epoch, position.offset * self.step_size, self.rows)
            self._stream = (here, iter(self._loader(ahead, position.epoch)))
        batches = [next(self._stream[1]) for _ in range(count)]
        self._stream = ((position.epoch, position.offset + 1), self._stream[1])
        return batches

    def _loader(self, batches: list[list[int]], epoch: int) -> DataLoader[Any]:
        # an own generator: iterating a DataLoader otherwise draws from the global one and a resume would differ
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch, 1))
        return DataLoader(self._dataset, batch_sampler=batches, collate_fn=self._collate, num_workers=self._workers, generator=generator)

    def __iter__(self) -> Iterator[Any]:
        assert self.rows is not None
        parts = [list(range(start, min(self.rows, start + self.batch_size))) for start in range(0, self.rows, self.batch_size)]
        source: Iterable[Any] = self._loader(parts, 0) if self._workers else map(self._fetch, parts)
        for batch in source:
            yield self._finish(batch)


class LoaderBatches(Batches):
    """A loader with a sampler of its own, or a stream: batches come as they come. No seek, no shares, no exact resume."""

    def __init__(
        self, loader: DataLoader[Any], plan: Plan, device: torch.device, augment: Callable[[Any, Uniform], Any] | None = None
    ) -> None:
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

    def window(self, position: Position, share: slice | None = None) -> Sequence[Any]:
        if share is not None:
            raise InputError("a DataLoader with its own sampler cannot be shared between workers; give its data set instead")
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
